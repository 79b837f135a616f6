"""Evaluation of an encoder on a suite: retrieval by trec_eval's measures, similarity by SciPy, per-item scores kept."""

"""Checkpoints -> one model: weights per tensor, row or element, merged tile by tile, searched on a dev suite."""

"""The metric that stands for a task in tables and comparisons."""

HEADLINE = {
    "retrieval": "ndcg_at_10",
    "similarity": "spearman",
    "pair_classification": "max_ap",
    "classification": "accuracy",
    "clustering": "v_measure",
    "reranking": "map",
}

"""Clustering: whether k-means, told the number of labels, finds the labels.

As mteb does: all texts are embedded; ten times 16,384 of them are drawn with replacement and clustered.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import adjusted_mutual_info_score, v_measure_score

from codiemb.distributed import rank
from codiemb.errors import DataError
from codiemb.evaluation.labelled import Labelled, load
from codiemb.evaluation.scores import Encoder, Evaluation, Scores, embed_all, texts_of
from codiemb.suites.suite import DataSet

METRICS = ("v_measure", "ami")
EXPERIMENTS = 10
DRAWN = 16384
BATCH = 512
SEED = 42


def evaluate(encoder: Encoder, source: DataSet, data: Labelled, bf16: bool = False) -> Scores | None:
    """Every text; the items are the experiments, because a single text has no score. None but on the first rank."""
    texts = texts_of(encoder, data.texts, "similarity", data.instructions)
    embeddings = embed_all(encoder, source.name, texts, bf16, normalize=False).cpu().numpy()
    if rank() > 0:
        return None
    by_experiment = score(embeddings, np.array(data.labels))
    metrics = {metric: float(np.mean(values)) for metric, values in by_experiment.items()}
    items: dict[str, list[Any]] = {"experiment": list(range(EXPERIMENTS)), **by_experiment}
    facts = {"left_out": data.left_out, "experiments": EXPERIMENTS, "labels": len(set(data.labels))}
    return Scores(metrics, len(data.texts), items, facts)


def score(embeddings: Float[np.ndarray, "text dim"], labels: np.ndarray) -> dict[str, list[float]]:
    """V-measure and adjusted mutual information of clusters and labels, by experiment."""
    draws = random.Random(SEED)
    clusters = MiniBatchKMeans(len(set(labels)), batch_size=BATCH, init="k-means++", n_init=1, random_state=SEED)
    found: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for _ in range(EXPERIMENTS):
        places = draws.choices(range(len(labels)), k=DRAWN)
        assigned = clusters.fit_predict(embeddings[places])
        found["v_measure"].append(float(v_measure_score(labels[places], assigned)))
        found["ami"].append(float(adjusted_mutual_info_score(labels[places], assigned)))
    return found


def load_texts(source: DataSet) -> Labelled:
    """
    Raises:
        DataError: as `labelled.load`, or more labels than texts are drawn.
    """
    data = load(source)
    if (labels := len(set(data.labels))) > DRAWN:
        raise DataError(
            f"source {source.name!r}, {source.path}", got=f"{labels} labels", expected=f"at most {DRAWN}",
            fix="name the column of the labels",
        )  # fmt: skip
    return data


CLUSTERING = Evaluation(load_texts, evaluate)

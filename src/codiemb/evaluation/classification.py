"""Classification: logistic regression on a few embedded texts of each label, tried on the others.

As mteb does: ten experiments, each fitted on `samples_per_label` training texts of every label. The order they are
drawn from is shuffled anew for each experiment.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score

from codiemb.distributed import rank
from codiemb.errors import DataError
from codiemb.evaluation.labelled import Labelled, training_source
from codiemb.evaluation.labelled import load as load_labelled
from codiemb.evaluation.scores import Encoder, Evaluation, Scores, embed_all, texts_of
from codiemb.suites.suite import DataSet

METRICS = ("accuracy", "f1")
EXPERIMENTS = 10
SEED = 42


@dataclass(frozen=True)
class Classes:
    """Texts that a classifier is fitted on, and texts that it is tried on."""

    train: Labelled
    test: Labelled

    def digest(self) -> str:
        return f"{self.train.digest()} {self.test.digest()}"


def load(source: DataSet) -> Classes:
    """
    Raises:
        DataError: as the readers; or a label of the test texts that no training text has.
    """
    if source.train_path is None and Path(source.path).is_file():
        raise DataError(
            f"source {source.name!r}, train_path",
            got="none",
            expected="the file with the training texts",
            fix="set train_path, or give a folder as `path`, which holds a file for each split",
        )
    data = Classes(load_labelled(training_source(source)), load_labelled(source))
    if unknown := sorted(set(data.test.labels) - set(data.train.labels)):
        raise DataError(
            f"source {source.name!r}, {source.path}",
            got=f"the label {unknown[0]!r}" + (f" and {len(unknown) - 1} more" if unknown[1:] else ""),
            expected="labels that the training texts have too",
        )
    return data


def evaluate(encoder: Encoder, source: DataSet, data: Classes, bf16: bool = False) -> Scores | None:
    """Every test text, by each of the experiments' classifiers; None but on the first rank."""
    experiments = draw(data.train.labels, source.samples_per_label)
    used = sorted({place for places in experiments for place in places})
    texts = texts_of(encoder, data.train.texts, "similarity", data.train.instructions)
    texts = [
        *(texts[place] for place in used),
        *texts_of(encoder, data.test.texts, "similarity", data.test.instructions),
    ]
    embeddings = embed_all(encoder, source.name, texts, bf16, normalize=False).cpu().numpy()
    if rank() > 0:
        return None
    row = {place: number for number, place in enumerate(used)}
    guesses = [
        classify(
            embeddings[[row[place] for place in places]],
            [data.train.labels[place] for place in places],
            embeddings[len(used) :],
        )
        for places in experiments
    ]
    truth = np.array(data.test.labels)
    items = {
        "text": data.test.texts,
        "label": data.test.labels,
        "accuracy": (np.stack(guesses) == truth).mean(axis=0).tolist(),
        "guess": [Counter(by_text).most_common(1)[0][0] for by_text in np.stack(guesses, axis=1).tolist()],
    }
    facts = {
        "left_out": data.test.left_out,
        "experiments": EXPERIMENTS,
        "samples_per_label": source.samples_per_label,
        "train_texts": len(data.train.texts),
    }
    return Scores(score(guesses, truth), len(truth), items, facts)


def draw(labels: list[str], samples_per_label: int) -> list[list[int]]:
    """For each experiment the places of the texts to fit on: at most so many of each label."""
    order = list(range(len(labels)))
    experiments = []
    for _ in range(EXPERIMENTS):
        np.random.RandomState(SEED).shuffle(order)  # the same shuffle, of what the one before left
        taken: Counter[str] = Counter()
        places = []
        for place in order:
            if taken[labels[place]] < samples_per_label:
                taken[labels[place]] += 1
                places.append(place)
        experiments.append(places)
    return experiments


def classify(
    train: Float[np.ndarray, "text dim"], labels: list[str], test: Float[np.ndarray, "text dim"]
) -> np.ndarray:
    """A label for each test text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # mteb, too, stops after 100 iterations
        return LogisticRegression(max_iter=100, random_state=SEED).fit(train, labels).predict(test)


def score(guesses: list[np.ndarray], truth: np.ndarray) -> dict[str, float]:
    """Means over the experiments: accuracy, and F1 averaged over the labels."""
    return {
        "accuracy": float(np.mean([accuracy_score(truth, guess) for guess in guesses])),
        "f1": float(np.mean([f1_score(truth, guess, average="macro") for guess in guesses])),
    }


CLASSIFICATION = Evaluation(load, evaluate)

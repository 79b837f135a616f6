"""mteb's own evaluators beside ours, and its tasks inside a suite. Skipped where mteb is not installed."""

import json
import random as standard

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from codiemb.errors import ConfigError, EvaluationError
from codiemb.evaluation import classification, clustering, pair_classification, retrieval, similarity
from codiemb.evaluation.evaluate import evaluate
from codiemb.evaluation.scores import Scores
from codiemb.suites.suite import load_suite

mteb = pytest.importorskip("mteb", reason="mteb is not installed (the extra mteb)")
datasets = pytest.importorskip("datasets")

from mteb.abstasks import (  # noqa: E402
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.clustering import _evaluate_clustering_bootstrapped  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

random = np.random.default_rng(0)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def text(most):
    return " ".join(random.choice(list(LETTERS), random.integers(1, most + 1)))


LABELS = [f"label {n % 3}" for n in range(45)]
FIRST, SECOND = [text(5) for _ in range(40)], [text(5) for _ in range(40)]
GAINS = {f"q{n}": {f"d{(3 * n + k) % 60}": k for k in range(4)} for n in range(15)}
QUERIES = {key: text(4) for key in GAINS}
DOCUMENTS = {f"d{n}": (text(2) if n % 2 else "", text(8)) for n in range(60)}
LABELLED = [f"{text(4)} {LETTERS[n % 3] * 2}" for n in range(45)]
ROWS = {
    "sts": [
        {"sentence1": a, "sentence2": b, "score": n % 6} for n, (a, b) in enumerate(zip(FIRST, SECOND, strict=True))
    ],
    "pairs": [
        {"sentence1": a, "sentence2": b, "labels": n % 2} for n, (a, b) in enumerate(zip(FIRST, SECOND, strict=True))
    ],
    "classes": [{"text": t, "label": label} for t, label in zip(LABELLED, LABELS, strict=True)],
    "clusters": [{"sentences": t, "labels": label} for t, label in zip(LABELLED, LABELS, strict=True)],
}
ENTRIES = [
    {"name": "search", "task": "retrieval", "path": "search", "split": "test"},
    {
        "name": "sts",
        "task": "similarity",
        "path": "sts.jsonl",
        "columns": {"query": "sentence1", "positive": "sentence2", "score": "score"},
        "score_range": [0, 5],
    },
    {
        "name": "pairs",
        "task": "pair_classification",
        "path": "pairs.jsonl",
        "columns": {"query": "sentence1", "positive": "sentence2", "score": "labels"},
    },
    {
        "name": "classes",
        "task": "classification",
        "path": "classes.jsonl",
        "train_path": "classes.jsonl",
        "columns": {"query": "text", "label": "label"},
    },
    {
        "name": "clusters",
        "task": "clustering",
        "path": "clusters.jsonl",
        "columns": {"query": "sentences", "label": "labels"},
    },
]


def metadata(name, kind, score):
    return TaskMetadata(
        name=name,
        type=kind,
        main_score=score,
        description="made here",
        dataset={"path": f"nobody/{name}", "revision": "1"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        modalities=["text"],
        category="t2t",
    )


class Ours:
    """Loads a task from the rows above."""

    def load_data(self, *_, **__):
        rows = datasets.Dataset.from_list(ROWS[self.rows])
        self.dataset = datasets.DatasetDict({"test": rows, "train": rows})
        self.data_loaded = True


class OurSTS(Ours, AbsTaskSTS):
    metadata, rows = metadata("OurSTS", "STS", "cosine_spearman"), "sts"


class OurPairs(Ours, AbsTaskPairClassification):
    metadata, rows = metadata("OurPairs", "PairClassification", "max_ap"), "pairs"


class OurClasses(Ours, AbsTaskClassification):
    metadata, rows = metadata("OurClasses", "Classification", "accuracy"), "classes"


class OurClusters(Ours, AbsTaskClustering):
    metadata, rows = metadata("OurClusters", "Clustering", "v_measure"), "clusters"
    max_fraction_of_documents_to_embed = None


class OurSearch(AbsTaskRetrieval):
    metadata = metadata("OurSearch", "Retrieval", "ndcg_at_10")
    lists = None

    def load_data(self, *_, **__):
        queries = [{"id": key, "text": value} for key, value in QUERIES.items()]
        corpus = [{"id": key, "title": title, "text": body} for key, (title, body) in DOCUMENTS.items()]
        part = {
            "queries": datasets.Dataset.from_list(queries),
            "corpus": datasets.Dataset.from_list(corpus),
            "relevant_docs": {key: dict(gains) for key, gains in GAINS.items()},
            "top_ranked": self.lists,
        }
        self.dataset = {"default": {"test": part}}
        self.data_loaded = True


class OurReranking(OurSearch):
    metadata = metadata("OurReranking", "Reranking", "map_at_1000")
    lists = {key: list(gains) for key, gains in GAINS.items()}  # noqa: RUF012


asked = []  # whether the hub could be asked for data that are not here


class Absent(OurSTS):
    metadata = metadata("Absent", "STS", "cosine_spearman")

    def load_data(self, *_, **__):
        asked.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("Couldn't reach the hub\nand more")


TASKS = (OurSearch, OurSTS, OurPairs, OurClasses, OurClusters)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    from mteb.get_tasks import _TASKS_REGISTRY

    for task in (*TASKS, OurReranking, Absent):
        monkeypatch.setitem(_TASKS_REGISTRY, task.metadata.name, task)


@pytest.fixture
def suites(tmp_path):
    """The same data twice: as our files, and as tasks of mteb."""
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "search" / "qrels").mkdir(parents=True)
    for name, rows in (
        ("corpus", [{"_id": key, "title": title, "text": body} for key, (title, body) in DOCUMENTS.items()]),
        ("queries", [{"_id": key, "text": value} for key, value in QUERIES.items()]),
    ):
        (tmp_path / "search" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"{query}\t{document}\t{gain}\n" for query, gains in GAINS.items() for document, gain in gains.items()]
    (tmp_path / "search" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(ENTRIES))
    theirs = [{"mteb": task.metadata.name, "name": entry["name"]} for task, entry in zip(TASKS, ENTRIES, strict=True)]
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(theirs))
    return tmp_path / "ours.yaml", tmp_path / "theirs.yaml"


def test_our_evaluations_equal_those_of_mteb(tiny_encoder, suites, tmp_path):
    """One model, the same rows: every metric that both have, and the scores by query and pair."""
    tiny_encoder.prompts = {"query": "q: ", "document": "d ", "similarity": "s? "}  # a wrong role would show
    ours, theirs = (evaluate(tiny_encoder, suite, tmp_path / suite.stem) for suite in suites)
    for name, metrics in theirs.items():
        shared = {metric: ours[name][metric] for metric in metrics}
        assert metrics == pytest.approx(shared, abs=6e-6), name  # mteb rounds some to five places
        assert len(set(metrics.values())) > 1 or name == "clusters"
    for name, column in (("search", "ndcg_at_10"), ("sts", "cosine"), ("pairs", "cosine")):
        one, two = (pq.read_table(tmp_path / side / f"{name}.items.parquet") for side in ("ours", "theirs"))
        assert two[column].to_pylist() == pytest.approx(one[column].to_pylist(), abs=1e-5)
        assert two.column_names == one.column_names
    search = pq.read_table(tmp_path / "theirs" / "search.items.parquet").to_pylist()
    assert all(hit["text"] == " ".join(filter(None, DOCUMENTS[hit["id"]])) for hit in search[0]["retrieved"])
    written = json.loads((tmp_path / "theirs" / "classes.json").read_text())
    assert (written["task"], written["mteb"]["path"], written["n"]) == ("classification", "nobody/OurClasses", 45)


def test_the_seeds_of_a_training_are_its_own(tiny_encoder, suites):
    """mteb sets those of the whole process whenever it makes a task; dropout would repeat after each evaluation."""
    standard.seed(7), np.random.seed(7), torch.manual_seed(7)
    before = standard.random(), np.random.rand(), torch.rand(1)
    standard.seed(7), np.random.seed(7), torch.manual_seed(7)
    evaluate(tiny_encoder, suites[1])
    assert (standard.random(), np.random.rand(), torch.rand(1)) == before


def test_reranking_equals_mteb(tiny_encoder, tmp_path):
    rows = []
    for query, gains in GAINS.items():
        sides = {True: [], False: []}
        for document, gain in gains.items():
            sides[gain > 0].append((" ".join(filter(None, DOCUMENTS[document])), gain))
        positives, scores = zip(*sides[True], strict=True)
        rows.append({"query": QUERIES[query], "positives": positives, "positive_scores": scores})
        rows[-1]["negatives"] = [body for body, _ in sides[False]]
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = [{"name": "ours", "task": "reranking", "path": "lists.jsonl"}, {"mteb": "OurReranking", "name": "theirs"}]
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    found = evaluate(tiny_encoder, tmp_path / "suite.yaml")
    assert found["theirs"] == pytest.approx(found["ours"], abs=6e-6)
    assert 0 < found["ours"]["map"] < 1


def test_metrics_equal_those_of_mteb_on_random_data_with_ties():
    labels = random.integers(0, 2, 300)
    likeness = {name: (random.normal(size=300) + 0.5 * labels).round(1) for name in ("cosine", "manhattan", "dot")}
    distances = {f"{name}_scores": values.tolist() for name, values in likeness.items()}
    given = distances | {"similarity_scores": distances["cosine_scores"]}
    given["manhattan_distances"] = (-likeness["manhattan"]).tolist()
    given["euclidean_distances"] = given["manhattan_distances"]
    expected = OurPairs()._compute_metrics(given, labels.tolist())
    for metric, value in pair_classification.score(likeness, labels).items():
        assert value == pytest.approx(expected[metric], abs=1e-9), metric

    embeddings = random.normal(size=(200, 4)).astype(np.float32).round(1)
    names = np.array([f"l{n % 5}" for n in range(200)])
    theirs, _ = _evaluate_clustering_bootstrapped(
        embeddings,
        [[name] for name in names],
        n_clusters=clustering.EXPERIMENTS,
        cluster_size=clustering.DRAWN,
        kmean_batch_size=clustering.BATCH,
        max_depth=None,
        rng_state=standard.Random(clustering.SEED),
        seed=clustering.SEED,
    )
    assert clustering.score(embeddings, names)["v_measure"] == pytest.approx(theirs["v_measure"]["Level 0"], abs=1e-9)

    task, rows = OurClasses(), datasets.Dataset.from_dict({"text": names, "label": names})
    order, experiments = None, []
    for number in range(classification.EXPERIMENTS):
        _, order, places = task._undersample_data(rows, number, order)
        experiments.append(places)
    assert classification.draw(list(names), 8) == experiments
    guesses = [random.permutation(names) for _ in range(3)]
    scores = [task._calculate_scores(names, guess) for guess in guesses]
    for metric, value in classification.score(guesses, names).items():
        assert value == pytest.approx(np.mean([one[metric] for one in scores]), abs=1e-9), metric

    cosines, graded = random.normal(size=200).round(1), random.integers(0, 5, 200).astype(float)
    expected = OurSTS()._calculate_scores(
        {
            "cosine_scores": cosines,
            "manhattan_distances": cosines,
            "euclidean_distances": cosines,
            "similarity_scores": cosines,
        },
        graded,
    )
    for metric, value in similarity.score(cosines, graded).items():
        assert value == pytest.approx(expected[metric], abs=1e-9), metric

    from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores

    run = {q: {d: float(random.integers(0, 9)) / 8 for d in DOCUMENTS} for q in GAINS}
    ours = retrieval.score(run, GAINS)
    theirs = calculate_retrieval_scores(run, GAINS, [10, 100, 1000])
    for metric, value in (
        ("ndcg_at_10", theirs.ndcg["NDCG@10"]),
        ("map", theirs.map["MAP@1000"]),
        ("recall_at_100", theirs.recall["Recall@100"]),
        ("mrr_at_10", theirs.mrr["MRR@10"]),
    ):
        assert np.mean([values[metric] for values in ours.values()]) == pytest.approx(value, abs=1e-5), metric


def test_missing_data_are_named_all_at_once_before_anything_is_encoded(tiny_encoder, tmp_path, monkeypatch):
    (tmp_path / "suite.yaml").write_text("- {mteb: OurSTS}\n- {mteb: Absent}\n- {mteb: Absent, name: again}\n")
    monkeypatch.setattr("codiemb.evaluation.mteb_run.run", lambda *_: Scores({}, 0, {}))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    asked.clear()
    with pytest.raises(EvaluationError) as error:
        evaluate(tiny_encoder, tmp_path / "suite.yaml")
    assert "data of Absent (nobody/Absent), Absent (nobody/Absent): got nothing" in str(error.value)
    assert "Couldn't reach the hub)" in str(error.value)
    assert asked == [False, True], "one wait for the hub, not one a data set"
    assert datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{mteb: STSBenchmrk}", "mteb: STSBenchmrk: got an unknown task, .*did you mean 'STSBenchmark'"),
        ("{mteb: STS17, subsets: [en-xx]}", "subsets: got 'en-xx', expected one of ko-ko"),
        ("{mteb: SummEval}", "a task of type Summarization, expected one of type Retrieval"),
        ("{mteb: STS12, task: similarity}", "entry 0: task: got an unknown key"),
        ("{name: a, task: similarity, path: a.jsonl, subsets: [b]}", "subsets: got a list, expected none"),
    ],
)
def test_entries_that_are_refused(tmp_path, entry, words):
    (tmp_path / "suite.yaml").write_text(f"- {entry}\n")
    with pytest.raises(ConfigError, match=words):
        load_suite(tmp_path / "suite.yaml")


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("cmteb-ir-sts", {"retrieval": 8, "similarity": 7}),
        ("mteb-eng-ir-sts", {"retrieval": 10, "similarity": 9}),
        ("nano-beir", {"retrieval": 13}),
    ],
)
def test_ready_suites_go_by_their_names(name, tasks):
    suite = load_suite(name)
    assert {task: sum(source.task == task for source in suite) for task in tasks} == tasks
    assert len(suite) == sum(tasks.values())

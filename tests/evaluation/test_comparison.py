"""Evaluations side by side: what must not be paired is refused, what is said is what the items say."""

import json
import os
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from codiemb import cli
from codiemb.errors import EvaluationError
from codiemb.evaluation import similarity
from codiemb.evaluation.comparison import compare
from codiemb.evaluation.scored import models_of, read_evaluation
from codiemb.evaluation.tables import comparison_text


def write_search(folder, values, name="search", **facts):
    """As codiemb evaluate writes it."""
    items = {"query_id": [f"q{place}" for place in range(len(values))], "ndcg_at_10": values}
    write(folder, name, "retrieval", {"ndcg_at_10": float(np.mean(values))}, items, {"documents": 90, **facts})


def write_pairs(folder, cosines, labels, name="pairs"):
    items = {"pair": list(range(len(labels))), "cosine": cosines, "label": labels}
    write(folder, name, "similarity", similarity.score(np.array(cosines), np.array(labels)), items, {})


def write(folder, name, task, metrics, items, facts):
    folder.mkdir(parents=True, exist_ok=True)
    content = {"dataset": name, "task": task, "split": "test", "metrics": metrics, "n": len(next(iter(items.values())))}
    content |= {"items": f"{name}.items.parquet", **facts}
    (folder / f"{name}.json").write_text(json.dumps(content))
    pq.write_table(pa.table(items), folder / content["items"])


@pytest.fixture
def scores(tmp_path):
    """Evaluations of three models on a search, two searches more and pairs; `good` is better, `same` is as the base."""
    random = np.random.default_rng(0)
    hard, truth = random.uniform(0.2, 0.6, size=80), random.normal(size=120)
    labels = np.clip(np.round(truth + 2), 0, 4).tolist()
    for name, better in (("base", 0.0), ("good", 0.2), ("same", 0.0)):
        for data_set in ("search", "second", "third"):
            values = hard + better + random.normal(0, 0.1, size=80)
            write_search(tmp_path / name, values.tolist(), data_set)
        write_pairs(tmp_path / name, (truth + random.normal(0, 1 - 3 * better, size=120)).tolist(), labels)
    return tmp_path


def folders(root, *names):
    return {name: [root / name] for name in names}


def row_of(found, name, model=0):
    return next(row for row in found["comparisons"][model]["data_sets"] if row["name"] == name)


def mean_of(found, task, model=0):
    return next(row for row in found["comparisons"][model]["means"] if row["task"] == task)


def test_a_better_model_is_called_better_and_an_equal_one_is_not(scores):
    found = compare(folders(scores, "base", "good", "same"))
    assert found["reference"] == "base"
    assert [one["model"] for one in found["comparisons"]] == ["good", "same"]
    assert [row["name"] for row in found["comparisons"][0]["data_sets"]] == ["pairs", "search", "second", "third"]
    for one, verdict in zip(found["comparisons"], ("better", "no difference shown"), strict=True):
        assert {row["verdict"] for row in one["data_sets"]} == {verdict}
        assert [row["task"] for row in one["means"]] == ["similarity", "retrieval", "all"]
    row = row_of(found, "search")
    read = [read_evaluation(scores / name)["search"].values["ndcg_at_10"] for name in ("base", "good")]
    assert (row["n"], row["metric"]) == (80, "ndcg_at_10")
    assert row["difference"] == pytest.approx(read[1].mean() - read[0].mean())
    assert row["difference"] == pytest.approx(row["model"] - row["reference"])
    expected = stats.ttest_rel(read[1], read[0]).confidence_interval(0.95)
    assert row["interval"] == pytest.approx(tuple(expected), abs=0.005)
    assert row["effect_size"] == pytest.approx((read[1] - read[0]).mean() / (read[1] - read[0]).std(ddof=1))


def test_reversed_the_same_model_is_worse(scores):
    """Whoever takes the wrong one for the reference must not read of a gain."""
    found = compare(folders(scores, "good", "base"))
    assert {row["verdict"] for row in found["comparisons"][0]["data_sets"]} == {"worse"}


def test_p_is_corrected_for_data_sets_and_models(scores):
    """Means are a family of their own, and a mean of a single data set is no further test."""
    found = compare(folders(scores, "base", "good", "same"), resamples=499)
    rows = [row for one in found["comparisons"] for row in one["data_sets"]]
    smallest = min(row["p"] for row in rows)
    assert min(row["p_holm"] for row in rows) == pytest.approx(8 * smallest)
    means = [mean_of(found, task, model) for model in (0, 1) for task in ("retrieval", "all")]
    assert min(mean["p_holm"] for mean in means) == pytest.approx(4 * min(mean["p"] for mean in means))
    assert mean_of(found, "similarity") == {**row_of(found, "pairs"), "name": "mean"}


def test_means_are_of_data_sets(scores):
    found = compare(folders(scores, "base", "good"))
    rows = found["comparisons"][0]["data_sets"]
    assert mean_of(found, "all")["difference"] == pytest.approx(np.mean([row["difference"] for row in rows]))
    retrieval = mean_of(found, "retrieval")
    assert retrieval["difference"] == pytest.approx(np.mean([row["difference"] for row in rows[1:]]))
    widths = [row["interval"][1] - row["interval"][0] for row in rows[1:]]
    width = retrieval["interval"][1] - retrieval["interval"][0]
    assert width == pytest.approx(np.sqrt(np.sum(np.square(widths))) / 3, rel=0.05), "independent data sets"


def test_results_do_not_depend_on_what_else_is_compared(scores):
    alone = compare({"base": [scores / "base"], "good": [scores / "good"]})
    (scores / "base" / "second.json").unlink()
    fewer = compare({"base": [scores / "base"], "good": [scores / "good"]})
    assert row_of(alone, "pairs") == {**row_of(fewer, "pairs"), "p_holm": row_of(alone, "pairs")["p_holm"]}
    assert fewer["settings"]["left_out"] == ["second"]
    assert "Left out" in comparison_text(fewer)


def test_scores_that_are_not_of_items_are_left_out_and_named(scores):
    """Of clustering the items are experiments; in mteb a score may be a mean over subsets."""
    for place, name in enumerate(("base", "good")):
        right = [float(item % 3 <= place) for item in range(30)]
        items = {"text": ["equal"] * 30, "label": ["a"] * 30, "accuracy": right}
        write(scores / name, "intents", "classification", {"accuracy": float(np.mean(right))}, items, {})
        write(scores / name, "groups", "clustering", {"v_measure": 0.5}, {"experiment": [0, 1]}, {"n": 90})
        write(scores / name, "languages", "retrieval", {"ndcg_at_10": 0.9}, {"ndcg_at_10": [0.5, 0.6]}, {"mteb": {}})
        write_search(scores / name, [0.5 + place / 4], "one query")
    found = compare(folders(scores, "base", "good"), resamples=999)
    assert found["settings"]["left_out"] == ["groups", "languages", "one query"]
    row = row_of(found, "intents")
    assert (row["metric"], row["n"], row["verdict"]) == ("accuracy", 30, "better")
    assert row["difference"] == pytest.approx(1 / 3)


def test_items_are_paired_by_id_not_by_place(scores):
    table = pq.read_table(scores / "good" / "search.items.parquet")
    before = row_of(compare(folders(scores, "base", "good")), "search")
    pq.write_table(table.take(list(range(79, -1, -1))), scores / "good" / "search.items.parquet")
    assert row_of(compare(folders(scores, "base", "good")), "search") == before


def test_seeds_widen_the_interval(scores):
    """Three trainings that differ much: what is shown by queries alone is not shown any more."""
    random = np.random.default_rng(1)
    base = read_evaluation(scores / "base")["search"].values["ndcg_at_10"]
    for seed, shift in enumerate((-0.1, 0.02, 0.3)):
        write_search(scores / f"seed-{seed}", (base + shift + random.normal(0, 0.01, size=80)).tolist())
    shutil.rmtree(scores / "good")
    seeds = models_of([str(scores / "base"), str(scores / "seed-*")])
    assert [folder.name for folder in seeds["seed-*"]] == ["seed-0", "seed-1", "seed-2"]
    row = row_of(compare(seeds), "search")
    assert row["verdict"] == "no difference shown"
    assert row["difference"] == pytest.approx(0.22 / 3, abs=0.01)
    assert (row["reference_spread"], row["model_spread"]) == (None, pytest.approx(0.205, abs=0.01))
    assert row_of(compare(folders(scores, "base", "seed-2")), "search")["verdict"] == "better"
    assert "±" in comparison_text(compare(seeds))


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_items(file, **columns):
    table = pq.read_table(file)
    for name, change in columns.items():
        values = change(table[name].to_pylist())
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, file)


def spoil_text(folder):
    """A byte that is no UTF-8 in an id, where nothing but the text itself tells it."""
    file = folder / "search.items.parquet"
    pq.write_table(pq.read_table(file), file, compression="none", use_dictionary=False, write_statistics=False)
    content = file.read_bytes()
    assert content.count(b"q55") == 1
    file.write_bytes(content.replace(b"q55", b"q\xff5"))


DAMAGE = {
    "another split": (lambda f: edit(f / "search.json", split="dev"), "split"),
    "another corpus": (lambda f: edit(f / "search.json", documents=91), "documents"),
    "another version": (lambda f: [edit(f.parent / m / "search.json", data_hash=m) for m in ("base", f.name)], "hash"),
    "other ids": (lambda f: edit_items(f / "search.items.parquet", query_id=lambda ids: ["x", *ids[1:]]), "'q0'"),
    "an id twice": (lambda f: edit_items(f / "search.items.parquet", query_id=lambda ids: [ids[1], *ids[1:]]), "79"),
    "other n": (lambda f: edit(f / "search.json", n=79), "80 items"),
    "no number": (lambda f: edit_items(f / "search.items.parquet", ndcg_at_10=lambda v: [float("nan"), *v[1:]]), "nan"),
    "words": (lambda f: edit_items(f / "search.items.parquet", ndcg_at_10=lambda v: ["best"] * len(v)), "best"),
    "other labels": (lambda f: edit_items(f / "pairs.items.parquet", label=lambda v: [9.0, *v[1:]]), "pairs"),
    "items of another model": (lambda f: shutil.copy(f.parent / "good" / "search.items.parquet", f), "ndcg_at_10"),
    "no items file": (lambda f: (f / "search.items.parquet").unlink(), "nothing there"),
    "damaged items": (lambda f: (f / "search.items.parquet").write_bytes(b"PAR1 gone"), "search.items.parquet"),
    "a byte of a text": (spoil_text, "search.items.parquet"),
    "two files of a data set": (lambda f: shutil.copy(f / "search.json", f / "search.old.json"), "search again"),
    "damaged JSON": (lambda f: (f / "search.json").write_text('{"dataset": "sea'), "search.json"),
    "a metric of another form": (lambda f: edit(f / "search.json", metrics={"ndcg_at_10": "0.5"}), "0.5 as in"),
    "a metric that is no number": (
        lambda f: edit(f / "search.json", metrics={"ndcg_at_10": float("nan")}),
        "nan as in",
    ),
    "a task of another form": (lambda f: edit(f / "search.json", task=["retrieval"]), "task"),
    "a name of another form": (lambda f: edit(f / "search.json", dataset=["search"]), "dataset"),
    "metrics of another form": (lambda f: edit(f / "search.json", metrics=[0.5]), "metrics"),
    "JSON of something else": (lambda f: (f / "search.json").write_text('{"metrics": {}}'), "'dataset'"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_does_not_match_is_refused(scores, case, capsys):
    """Items that are not the same give a number that looks like any other."""
    damage, words = DAMAGE[case]
    damage(scores / "same")
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", str(scores / "base"), str(scores / "same")])
    shown = capsys.readouterr().err
    assert stop.value.code == 2
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert words in shown
    assert str(scores / "same") in shown


def test_texts_of_another_version_are_refused(scores):
    for name, text in (("base", "before"), ("same", "after")):
        file = scores / name / "pairs.items.parquet"
        table = pq.read_table(file)
        pq.write_table(table.append_column("text1", pa.array(["a"] * 7 + [text] + ["a"] * 112)), file)
    with pytest.raises(EvaluationError, match="text1 of pair 7: got 'after', expected 'before'"):
        compare(folders(scores, "base", "same"))
    compare(folders(scores, "base", "good"))  # written before texts were: nothing to compare


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["base"], "one evaluation"),
        (["base", "base"], "twice"),
        (["base", "./base/"], "twice"),
        (["base", "good", "--json", "empty"], "a folder"),
        (["base", "good", "--json", "base/search.json/c.json"], "a file at"),
        (["base", "none"], "no such folder"),
        (["base", "none-*"], "no folder"),
        (["base", "run"], "run/eval/model"),
        (["base", "empty"], "codiemb evaluate"),
        (["base", "other"], "no data set that all of them have"),
    ],
)
def test_wrong_folders_are_one_line(scores, monkeypatch, capsys, arguments, words):
    (scores / "run" / "eval" / "model").mkdir(parents=True)
    (scores / "empty").mkdir()
    write_search(scores / "other", [0.1, 0.2], "elsewhere")
    monkeypatch.chdir(scores)
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", *arguments])
    shown = capsys.readouterr().err
    assert stop.value.code == 2
    assert shown.count("\n") == 1
    assert words in shown


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["runs/a/eval/base", "runs/a/eval/model"], ["base", "model"]),
        (["runs/a/eval/model", "runs/b/eval/model"], ["a", "b"]),
        (["scores/base", "runs/a/eval/model/"], ["scores/base", "runs/a/eval/model"]),
        (["runs/a/eval", "runs/b/eval", "runs/eval"], ["a/eval", "b/eval", "eval"]),
    ],
)
def test_models_are_called_by_what_tells_them_apart(arguments, names):
    assert list(models_of(arguments)) == names


def test_the_command_prints_and_writes(scores, capsys):
    file = scores / "comparison.json"
    cli.main(["compare", str(scores / "base"), str(scores / "good"), str(scores / "same"), "--json", str(file)])
    shown = capsys.readouterr().out
    assert "good against base, 4 data sets: better on 4." in shown
    assert "same against base, 4 data sets: no difference shown on any." in shown
    expected = json.loads(json.dumps(compare(folders(scores, "base", "good", "same"))))
    assert json.loads(file.read_text()) == expected
    assert list(json.loads(file.read_text())) == ["reference", "comparisons", "settings"]
    cli.main(["compare", str(scores / "base"), str(scores / "good"), "--json", str(scores / "base" / "c.json")])
    cli.main(["compare", str(scores / "base"), str(scores / "good")])  # a comparison beside the results is none of them


def test_a_path_that_looks_like_an_address(scores, monkeypatch, capsys):
    monkeypatch.chdir(scores)
    (scores / "run:1").mkdir()
    for name in ("base", "good"):
        shutil.move(scores / name, scores / "run:1" / name)
    cli.main(["compare", "run:1/base", "run:1/good"])
    assert "better on 4" in capsys.readouterr().out


def test_a_device_is_not_replaced(scores, capsys):
    """Written beside and renamed, a file would take the place of /dev/null."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", str(scores / "base"), str(scores / "good"), "--json", os.devnull])
    assert stop.value.code == 2
    assert "a file to write" in capsys.readouterr().err


def rows_shown(text, mark):
    return [line for line in text.splitlines() if line.count(mark) > 5]


def test_tables_hold_the_same_in_every_form(scores):
    write_search(scores / "base", [0.5, 0.25, 0.0], "a_b|c")
    write_search(scores / "good", [0.5, 0.25, 0.3], "a_b|c")
    found = compare(folders(scores, "base", "good"))
    table, markdown, latex = (comparison_text(found, form) for form in ("table", "markdown", "latex"))
    lines = table.splitlines()
    assert lines[0].split()[:7] == ["data", "set", "metric", "n", "base", "good", "difference"]
    assert lines[2].startswith("a_b|c ")
    assert "25.00" in lines[2]
    assert lines[2].endswith("no difference shown")
    told = [
        [re.findall(r"\d+\.\d+", line) for line in rows_shown(*form)] for form in ((markdown, " | "), (latex, " & "))
    ]
    assert told[0] == told[1]
    assert all(len(numbers) >= 4 for numbers in told[0][1:])
    assert r"| a_b\|c | ndcg_at_10 | 3 | 25.00 | 35.00 | +10.00 |" in markdown
    assert r"a\_b|c & ndcg\_at\_10 & 3 & 25.00 & 35.00 & $+10.00$ &" in latex
    assert latex.startswith("\\begin{tabular}{llrrrrrrrrl}\n\\toprule\n")
    rows = 1 + 5 + 2  # header, data sets, mean retrieval and mean of all: that of the pairs repeats their row
    assert len(rows_shown(markdown, " | ")) == rows
    assert len(rows_shown(latex, " & ")) == rows
    assert all(line.startswith("%") or "&" in line or line.startswith("\\") for line in latex.splitlines() if line)

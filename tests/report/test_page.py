"""The page of a run: what is there is shown, what is not is left out, and damage ends with one line."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import codiemb
from codiemb import cli
from codiemb.errors import CheckpointError, EvaluationError
from codiemb.figures.charts import LEFT, RIGHT
from codiemb.report.page import SECTIONS, write_report
from tests.report import runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return runs.whole_run(tmp_path_factory.mktemp("runs") / "joint")


def shown(folder):
    """The page as text, and as a tree: all of it is well-formed XML, or this raises."""
    text = write_report(folder).read_text(encoding="utf-8")
    doctype, _, rest = text.partition("\n")
    assert doctype == "<!DOCTYPE html>"
    return text, ElementTree.fromstring(rest)


def words(tree):
    return " ".join(" ".join(tree.itertext()).split())


def rows_of(tree, label):
    (region,) = (found for found in tree.iter("div") if found.get("aria-label") == label)
    return [["".join(cell.itertext()) for cell in row] for row in region.iter("tr")]


def sections(tree):
    return [found.get("id") for found in tree.iter("section")]


def test_a_whole_run_shows_every_section(whole):
    _, tree = shown(whole)
    assert sections(tree) == [*SECTIONS]
    links = [link.get("href") for link in tree.iter("a")]
    assert links == [f"#{anchor}" for anchor in SECTIONS]


# What each section is made of: without these files it is left out, and the others stay.
MADE_OF = {
    "results": ["eval/base", "eval/model"],
    "during": ["eval/step-20"],
    "loss": ["metrics.jsonl"],
    "schedule": ["metrics.jsonl"],
    "cost": ["metrics.jsonl"],
    "data": ["plan.json"],
    "geometry": ["geometry.json"],
    "conflict": ["conflict.jsonl"],
    "fusion": ["fused", "pareto.json"],
    "examples": ["eval/model"],
    "settings": ["config.yaml", "environment.json"],
}


@pytest.mark.parametrize("section", MADE_OF)
def test_a_section_without_its_files_is_left_out(whole, tmp_path, section):
    """A page with an empty section would say that nothing was found, where nothing was looked for."""
    run = shutil.copytree(whole, tmp_path / "joint")
    for name in MADE_OF[section]:
        (run / name).rename(tmp_path / name.replace("/", "-"))
    _, tree = shown(run)
    gone = {anchor for anchor, files in MADE_OF.items() if set(files) <= set(MADE_OF[section])}
    if section == "results":
        gone |= {"examples"}
    assert sections(tree) == [anchor for anchor in SECTIONS if anchor not in gone]


def test_a_run_of_one_file_is_enough(tmp_path):
    runs.write_steps(tmp_path, [runs.step_line(1)])
    _, tree = shown(tmp_path)
    assert sections(tree) == ["loss", "schedule", "cost"]


def test_the_table_by_data_set(whole):
    """All figures of comparison.json, in points; the difference of manuals is within its interval."""
    _, tree = shown(whole)
    rows = {row[0]: row[1:] for row in rows_of(tree, "Results by data set")}
    told = "+6.29 points, interval [+4.29, +8.29]"
    assert rows["faq-test"] == [
        "nDCG@10", "68.00", "74.29", "+6.29", told, "[+4.29, +8.29]", "▲better", "0.001", "10", "retrieval",
    ]  # fmt: skip
    assert rows["manuals"][6] == "≈no difference shown"
    assert rows["manuals"][3] == "−0.15"
    assert rows["mean retrieval"][1:4] == ["54.52", "57.59", "+3.07"]  # (68.00 + 41.05) / 2 and (74.29 + 40.90) / 2
    assert rows["mean of all"][1:4] == ["54.86", "60.80", "+5.94"]  # each data set counts the same
    assert rows["mean of all"][6] == "▲better"


def test_without_tests_there_is_no_interval_and_it_says_so(whole, tmp_path):
    """A difference that nobody tested must not look like one that was."""
    run = shutil.copytree(whole, tmp_path / "joint")
    (run / "comparison.json").unlink()
    _, tree = shown(run)
    rows = rows_of(tree, "Results by data set")
    assert rows[0] == ["data set", "metric", "before", "after", "difference", "", "mark", "n", "task"]
    assert {row[6] for row in rows[1:]} == {"–not tested"}
    assert "The differences are not tested" in words(tree)
    assert "interval" not in words(next(found for found in tree.iter("div") if found.get("class") == "tiles"))


def test_a_comparison_with_something_else_marks_nothing(whole, tmp_path):
    """Of another reference than the base, its verdicts are not about before and after."""
    run = shutil.copytree(whole, tmp_path / "joint")
    content = json.loads((run / "comparison.json").read_text())
    content["reference"] = "delta"
    for found in content["comparisons"]:
        found["data_sets"] = []
    (run / "comparison.json").write_text(json.dumps(content))
    _, tree = shown(run)
    assert {row[6] for row in rows_of(tree, "Results by data set")[1:]} == {"–not tested"}


def test_the_mean_of_other_data_sets_is_not_marked(whole, tmp_path):
    """A comparison that left a data set out has tested another mean than the one that is shown."""
    run = shutil.copytree(whole, tmp_path / "joint")
    content = json.loads((run / "comparison.json").read_text())
    for line in content["comparisons"][0]["means"]:
        line["reference"] += 0.01 * (line["task"] == "retrieval")
    (run / "comparison.json").write_text(json.dumps(content))
    _, tree = shown(run)
    marks = {row[0]: row[7] for row in rows_of(tree, "Results by data set")[1:] if row[0].startswith("mean")}
    assert marks == {"mean retrieval": "–not tested", "mean similarity": "▲better", "mean of all": "▲better"}


def test_a_comparison_of_other_scores_is_refused(whole, tmp_path):
    """A comparison that is older than the scores would put its marks beside numbers it has never seen."""
    run = shutil.copytree(whole, tmp_path / "joint")
    path = run / "eval" / "model" / "sts.json"
    path.write_text(path.read_text().replace(str(runs.AFTER["sts"]), "0.5"))
    with pytest.raises(
        EvaluationError, match=r"comparison.json, sts: got spearman 0.672100 of model, expected 0.500000"
    ):
        write_report(run)


def test_a_score_that_was_rounded_is_the_same(whole, tmp_path):
    """mteb keeps five places of a score, and the items, which are compared, all of them."""
    run = shutil.copytree(whole, tmp_path / "joint")
    marked = write_report(run).read_text().count('class="verdict better"')
    path = run / "eval" / "model" / "sts.json"
    path.write_text(path.read_text().replace(str(runs.AFTER["sts"]), str(runs.AFTER["sts"] + 5e-6)))
    assert write_report(run).read_text().count('class="verdict better"') == marked > 2


def test_what_was_scored_once_only_is_told(whole, tmp_path):
    """A data set that is missing on one side must not leave the table unnoticed."""
    run = shutil.copytree(whole, tmp_path / "joint")
    (run / "eval" / "model" / "sts.json").unlink()
    (run / "comparison.json").unlink()
    _, tree = shown(run)
    assert "Scored on one side only, and left out: sts." in words(tree)
    assert "sts" not in [row[0] for row in rows_of(tree, "Results by data set")]


def test_one_evaluation_is_shown_alone(tmp_path):
    runs.write_evaluation(tmp_path, "base", runs.BEFORE)
    _, tree = shown(tmp_path)
    assert sections(tree) == ["results"]
    assert ["sts", "similarity", "Spearman", "10", "55.53"] in rows_of(tree, "Results by data set")


def test_the_schedule_shows_each_source_at_its_steps(tmp_path):
    """Two steps of faq, then one of pairs, then one of both."""
    lines = [
        runs.step_line(1), runs.step_line(2), runs.step_line(3, "pairs", "similarity"),
        runs.step_line(4, "faq+pairs", "retrieval+similarity"),
    ]  # fmt: skip
    runs.write_steps(tmp_path, lines)
    _, tree = shown(tmp_path)
    strip = next(found for found in tree.iter("div") if found.get("class") == "strip")
    rows = [row for row in strip if row.get("class") == "row"]
    cells = {row[0][0].text: [path.get("d") for path in row[1]] for row in rows}
    assert cells == {"faq": ["M0 0H2V10H0ZM3 0H4V10H3Z"], "pairs": ["M2 0H4V10H2Z"]}
    assert "75.0 % of steps" in words(strip)


def test_lengths_of_a_sample_say_so(whole, tmp_path):
    """Else a histogram of a few thousand texts passes for one of all rows."""
    run = shutil.copytree(whole, tmp_path / "joint")
    content = json.loads((run / "plan.json").read_text())
    content["sources"]["faq"]["tokens"]["query"]["sampled_texts"] = 2000
    del content["sources"]["faq"]["tokens"]["document"]["sampled_texts"]
    (run / "plan.json").write_text(json.dumps(content))
    _, tree = shown(run)
    captions = [words(found) for found in tree.iter("figcaption")]
    said = "half up to 9 tokens, longest 130; 1.2 % are cut at 64"
    assert f"faq: lengths, query of 2,000 sampled texts, {said}" in captions
    assert f"faq: lengths, document {said}" in captions


def test_fused_models_stand_beside_the_trained_one(whole):
    """The fused scores are 0.4 points above the trained ones everywhere; weights are means over two tensors."""
    _, tree = shown(whole)
    rows = {row[0]: row[1:] for row in rows_of(tree, "Fused models")}
    assert rows["base"] == ["54.52", "55.53", "54.86", "–", "–", ""]
    assert rows["fused: delta"] == ["57.99", "67.61", "61.20", "+6.34", "[+4.34, +8.34]", "▲better"]
    recipes = rows_of(tree, "Recipes of the fusions")
    parents = "checkpoint-20, checkpoint-40"
    assert recipes[1] == ["delta", "delta", parents, "0.450, 0.550 (mean over 2 tensors)", "1", "7.25"]


def test_a_fused_mean_of_other_data_sets_is_not_marked(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "joint")
    content = json.loads((run / "comparison.json").read_text())
    content["comparisons"][1]["means"][-1]["model"] += 0.01
    (run / "comparison.json").write_text(json.dumps(content))
    _, tree = shown(run)
    rows = {row[0]: row[1:] for row in rows_of(tree, "Fused models")}
    assert rows["fused: delta"][3:] == ["+6.34", "–", "–not tested"]
    assert rows["trained model"][-1] == "▲better"


def test_histograms_of_lengths_show_the_cut_and_the_open_end(whole):
    """Nine stretches of 8 tokens end at 72, the longest text has 130; texts are cut at 64."""
    _, tree = shown(whole)
    rows = rows_of(tree, "Data of faq: lengths, query")
    assert rows[-1] == ["64 and more", "10"]
    figure = next(one for one in tree.iter("figure") if one[0][0].text == "faq: lengths, query")
    (mark,) = (line for line in figure.iter("line") if line.get("class") == "mark")
    assert float(mark.get("x1")) == pytest.approx(LEFT + (RIGHT - LEFT) * 64 / 72, abs=0.1)


def test_means_of_models_are_over_the_data_sets_that_all_have(whole, tmp_path):
    """A fused model that was not scored on the hardest data set would beat all others in the mean."""
    run = shutil.copytree(whole, tmp_path / "joint")
    (run / "eval" / "delta" / "manuals.json").unlink()
    content = json.loads((run / "comparison.json").read_text())
    content["comparisons"] = content["comparisons"][:1]
    (run / "comparison.json").write_text(json.dumps(content))
    _, tree = shown(run)
    rows = {row[0]: row[1:] for row in rows_of(tree, "Fused models")}
    assert rows["base"][:4] == ["68.00", "55.53", "61.77", "–"]  # of faq-test and sts
    assert rows["trained model"] == ["74.29", "67.21", "70.75", "+8.98", "–", "–not tested"]
    assert rows["fused: delta"] == ["74.69", "67.61", "71.15", "+9.38", "–", "–not tested"]
    assert "Not scored on every model, and left out: manuals." in words(tree)


def test_means_by_step_are_over_the_data_sets_of_every_step(whole, tmp_path):
    """A line must not rise because a data set came later."""
    run = shutil.copytree(whole, tmp_path / "joint")
    (run / "eval" / "step-20" / "manuals.json").unlink()
    _, tree = shown(run)
    assert [row[1] for row in rows_of(tree, "Data of retrieval")] == ["retrieval", "68", "71", "74.29"]
    assert "Not scored at every step, and left out: manuals." in words(tree)


@pytest.mark.parametrize("name", ["384", "step-²", "step-x", "step-"])
def test_other_evaluations_are_no_steps(whole, tmp_path, name):
    """One at 384 tokens is no step 384, and a digit that is no decimal one ended in a traceback."""
    run = shutil.copytree(whole, tmp_path / "joint")
    shutil.copytree(run / "eval" / "base", run / "eval" / name)
    _, tree = shown(run)
    assert [row[0] for row in rows_of(tree, "Data of retrieval")] == ["step", "0", "20", "40"]


def test_a_comparison_of_another_metric_marks_nothing(whole, tmp_path):
    """Its interval and verdict are not those of the difference that is shown."""
    run = shutil.copytree(whole, tmp_path / "joint")
    content = json.loads((run / "comparison.json").read_text())
    other = runs.difference("faq-test", 0.9, 0.6, "worse", "retrieval", metric="accuracy")
    content["comparisons"][0]["data_sets"][0] = other
    (run / "comparison.json").write_text(json.dumps(content))
    _, tree = shown(run)
    rows = {row[0]: row[1:] for row in rows_of(tree, "Results by data set")}
    assert rows["faq-test"][:4] == ["nDCG@10", "68.00", "74.29", "+6.29"]
    assert rows["faq-test"][5:7] == ["–", "–not tested"]


def test_a_model_that_was_analysed_twice_has_two_columns(whole, tmp_path):
    """The same name twice is no reason to have no report, nor to put a figure under another model."""
    run = shutil.copytree(whole, tmp_path / "joint")
    content = json.loads((run / "geometry.json").read_text())
    content["models"].append(content["models"][0])
    (run / "geometry.json").write_text(json.dumps(content))
    _, tree = shown(run)
    rows = rows_of(tree, "Geometry of the pooled sentences")
    assert rows[0] == ["", "base", "model", "base"]
    assert rows[1] == ["anisotropy", "0.3", "0.21", "0.3"]


def test_examples_are_the_extremes(whole):
    """Query n goes from n/10 up by 0.2 below 5, and down by 0.1 from 5 on; worst is what is lowest afterwards."""
    _, tree = shown(whole)
    block = next(
        found for found in tree.iter("div") if found.get("class") == "examples" and found[0][0].text == "faq-test"
    )
    assert words(block[0]) == "faq-test 5 better, 5 worse, 0 as before"
    groups = {group[0].text: [words(one) for one in group.iter("p")] for group in block.iter("details")}
    assert [text.split(" nDCG")[0] for text in groups["Most improved"]] == ["what is 0", "what is 1", "what is 2"]
    assert groups["Most improved"][0] == "what is 0 nDCG@10 0.00 → 20.00"
    assert {text[-13:] for text in groups["Most worsened"]} == {"50.00 → 40.00", "60.00 → 50.00", "70.00 → 60.00"}
    assert next(text[-13:] for text in groups["Worst after training"]) == " 0.00 → 20.00"
    before, after = (["relevant" in words(line) for line in side.iter("li")] for side in [*block.iter("ol")][:2])
    assert (before.index(True), after.index(True)) == (3, 0)


def test_scores_without_texts_make_no_examples(tmp_path):
    """Evaluations of earlier versions keep no texts."""
    for model in ("base", "model"):
        runs.write_evaluation(tmp_path, model, {"sts": 0.5})
        pq.write_table(
            pa.table({"pair": [0], "cosine": [0.1], "label": [0.2]}), tmp_path / "eval" / model / "sts.items.parquet"
        )
    _, tree = shown(tmp_path)
    assert sections(tree) == ["results"]


def test_numbers_that_are_none_are_left_out_and_told(tmp_path):
    """A loss that became NaN must not move the axis, nor be passed over in silence."""
    lines = [runs.step_line(n) for n in range(1, 6)]
    lines[2]["loss"] = float("nan")
    lines[3]["loss/info_nce"] = float("inf")
    runs.write_steps(tmp_path, lines)
    text, tree = shown(tmp_path)
    assert "In 1 step the loss is no number" in words(tree)
    assert not re.search(r'="[^"]*\b(nan|inf)\b', text)


@pytest.mark.parametrize("unfinished", ['{"step": 3, "sou', ""])
def test_a_last_line_that_was_cut_is_told(tmp_path, unfinished):
    """A killed run may leave half a line; its report is wanted all the more."""
    runs.write_steps(tmp_path, [runs.step_line(1), runs.step_line(2)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(unfinished)
    _, tree = shown(tmp_path)
    assert "2 steps on 1 source" in words(tree)
    assert ("never finished" in words(tree)) == bool(unfinished)


DAMAGE = {
    "plan.json": ("{", "expected JSON"),
    "environment.json": ("[]", "got list, expected dict"),
    "metrics.jsonl": ('{"step": 1}\n', "metrics.jsonl, line 1, source: got nothing"),
    "comparison.json": ('{"reference": "base"}', "comparisons: got nothing"),
    "plan.json ": ('{"sources": {}, "schedule": "x", "steps": "many"}', "plan.json, steps_per_epoch: got nothing"),
    "geometry.json": ('{"models": 3}', "geometry.json, models: got 3"),
    "conflict.jsonl": ("x\n{}\n", "conflict.jsonl, line 1"),
    "config.yaml": (b"\xff", "expected text in UTF-8"),
    "eval/model/sts.json": ("null", "got NoneType"),
    "eval/base/sts.json": ('{"dataset": "sts", "task": "similarity", "n": 3, "metrics": {"spearman": NaN}}', "got nan"),
    "eval/model/sts.items.parquet": ("PAR1", "expected Parquet"),
    "fused/delta/fusion.json": ('{"parents": []}', "method: got nothing"),
    "pareto.json": ('{"tasks": [], "points": [], "front": [0], "knee": 0}', "a place that is no point"),
    "geometry.json ": ("[" * 100_000, "expected JSON"),
    "metrics.jsonl ": (f"{{{'[' * 100_000}\n{{}}\n", "metrics.jsonl, line 1"),
    "conflict.jsonl ": ("[" * 100_000 + "\n{}\n", "conflict.jsonl, line 1"),
    "metrics.jsonl  ": (json.dumps(runs.step_line(1, seconds=math.inf)), "metrics.jsonl, line 1, seconds: got inf"),
    "metrics.jsonl   ": (json.dumps(runs.step_line(1, seconds=math.nan)), "metrics.jsonl, line 1, seconds: got nan"),
    "metrics.jsonl    ": (json.dumps({**runs.step_line(1), "step": 10**400}), "metrics.jsonl, line 1, step"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_one_line_and_the_old_page_stays(whole, tmp_path, capsys, name):
    run = shutil.copytree(whole, tmp_path / "joint")
    content, said = DAMAGE[name]
    name = name.strip()
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (run / "report.html").write_text("the old page")
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(run)])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert Path(name).name in error
    assert (run / "report.html").read_text() == "the old page"
    assert not list(run.glob("*.partial"))


@pytest.mark.parametrize(
    ("data_set", "column", "values", "said"),
    [
        ("faq-test", "ndcg_at_10", [None, *[0.5] * 9], "got null or nan, expected finite numbers"),
        ("faq-test", "ndcg_at_10", [math.nan, *[0.5] * 9], "got null or nan, expected finite numbers"),
        ("faq-test", "ndcg_at_10", ["a"] * 10, "got string, expected numbers"),
        ("faq-test", "retrieved", ["a"] * 10, "got string, expected lists of results"),
        ("faq-test", "retrieved", [["a"]] * 10, "expected lists of results"),
        ("faq-test", "retrieved", [[{"text": "a", "score": "high"}]] * 10, "expected lists of results"),
        ("faq-test", "query_id", [["a"]] * 10, "expected texts"),
        ("sts", "cosine", ["a"] * 10, "got string, expected numbers"),
        ("sts", "label", [None, *[0.5] * 9], "got null or nan, expected finite numbers"),
    ],
)
def test_items_of_another_kind_are_refused(whole, tmp_path, data_set, column, values, said):
    """A file that was made or changed by hand ends in a line that names the column, not in a traceback."""
    run = shutil.copytree(whole, tmp_path / "joint")
    for model in ("base", "model"):
        path = run / "eval" / model / f"{data_set}.items.parquet"
        items = pq.read_table(path)
        pq.write_table(items.set_column(items.column_names.index(column), column, pa.array(values)), path)
    with pytest.raises(EvaluationError, match=rf"{data_set}.items.parquet, column {column}: .*{said}"):
        write_report(run)


def test_results_that_are_null_are_passed_over(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "joint")
    path = run / "eval" / "model" / "faq-test.items.parquet"
    items = pq.read_table(path)
    lists = [None, [None, {"text": "found", "score": None, "gain": None}], *items["retrieved"].to_pylist()[2:]]
    pq.write_table(items.set_column(items.column_names.index("retrieved"), "retrieved", pa.array(lists)), path)
    _, tree = shown(run)
    assert "found" in words(tree)


def test_a_link_to_nothing_is_damage(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "joint")
    (run / "eval" / "base" / "z.json").symlink_to(tmp_path / "nothing")
    with pytest.raises(EvaluationError, match=r"z\.json: got .*No such file"):
        write_report(run)


@pytest.mark.parametrize("value", [1e308, -1e308, 5e-324, 10**400])
def test_what_no_axis_can_hold_is_left_out(whole, tmp_path, value):
    """A loss that ran away is when the report is wanted most."""
    run = shutil.copytree(whole, tmp_path / "joint")
    losses = {"loss": min(value, 1e308), "loss/info_nce": value, "learning_rate": min(value, 1e308)}
    runs.write_steps(run, [runs.step_line(1), runs.step_line(2, **losses), runs.step_line(3, loss=-1.0)])
    content = json.loads((run / "geometry.json").read_text())
    content["models"][0]["layers"][0]["condition_number"] = value
    (run / "geometry.json").write_text(json.dumps(content))
    text, tree = shown(run)
    assert "In 1 step the loss is no number" in words(tree)
    assert not re.search(r'="[^"]*\b(nan|inf)\b', text)


def test_a_full_disk_is_one_line_and_the_old_page_stays(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    runs.write_steps(tmp_path, [runs.step_line(1)])
    (tmp_path / "report.html").write_text("the old page")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device, expected room to write, free some disk"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "the old page"


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_a_run_is_refused(tmp_path, there):
    folder = tmp_path / "empty"
    if there:
        folder.mkdir()
    with pytest.raises(CheckpointError, match=r"run folder .*empty: got no .*, expected the output_dir of a training"):
        write_report(folder)


def test_the_command_says_where_the_page_is(tmp_path, capsys):
    runs.write_steps(tmp_path, [runs.step_line(1)])
    cli.main(["report", str(tmp_path)])
    assert capsys.readouterr().out == f"report {tmp_path / 'report.html'}\n"


def test_a_page_is_the_same_twice(whole):
    """Nothing of the hour or the machine goes into it, so that two reports can be compared."""
    assert shown(whole)[0] == shown(whole)[0]


@pytest.mark.parametrize("count", [3000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_a_long_run_makes_a_small_page(tmp_path, count):
    """Steps of twelve sources: medians and bands, not every step."""
    sources = {f"source-{n}": "retrieval" if n % 3 else "similarity" for n in range(12)}
    names = [*sources.items()]
    runs.write_steps(tmp_path, [runs.step_line(n, *names[n * 7 % 12]) for n in range(1, count + 1)])
    runs.write_plan(tmp_path, sources)
    started = time.perf_counter()
    path = write_report(tmp_path)
    assert time.perf_counter() - started < 15
    assert path.stat().st_size < 700_000


def test_the_report_imports_no_torch():
    """It reads files: it must answer at once, where there is no GPU and no model."""
    ask = "import codiemb.report.page, sys; assert not {'torch', 'transformers', 'scipy'} & {*sys.modules}"
    subprocess.run(
        [sys.executable, "-c", ask],
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(codiemb.__file__).parent.parent)},
    )

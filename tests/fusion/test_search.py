"""Choosing among fusions: with scores that are made up, so that the right choice is known."""

import json
import shutil
from xml.etree import ElementTree

import pytest
from safetensors.torch import load_file, save_file

from codiemb.errors import ConfigError
from codiemb.figures.front import front, knee
from codiemb.fusion.search import Search, best, pareto

NAME = "encoder.layer.0.output.dense.bias"
FILE = "model.safetensors"


@pytest.fixture
def checkpoints(tiny_model_folder, tmp_path):
    """Three, whose bias is 0, 1 and 5 everywhere."""
    folders = []
    for number, value in enumerate((0.0, 1.0, 5.0)):
        folder = shutil.copytree(tiny_model_folder, tmp_path / f"checkpoint-{number}")
        weights = load_file(folder / FILE)
        save_file(weights | {NAME: weights[NAME] * 0 + value}, folder / FILE, {"format": "pt"})
        folders.append(folder)
    return folders


def bias(folder):
    return load_file(folder / FILE)[NAME].mean().item()


def near(target):
    """One task: the nearer the bias to a number, the better."""
    return lambda folder: {"retrieval": 1 - abs(bias(folder) - target) / 10}


def trials(out):
    return [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]


def test_greedy_soup_keeps_what_raises_the_score(checkpoints, tiny_model_folder, tmp_path):
    """For 0.4: best alone 0, with 1 it is 0.5 (better), with 5 it would be 2 (worse)."""
    search = Search(checkpoints, tiny_model_folder, tmp_path / "out", near(0.4))
    told = best(search, "greedy", {})
    assert bias(tmp_path / "out" / "best") == pytest.approx(0.5)
    assert [len(trial["checkpoints"]) for trial in trials(tmp_path / "out")] == [1, 1, 1, 2, 3]
    facts = json.loads((tmp_path / "out" / "best" / "fusion.json").read_text())
    assert len(facts["trials"]) == 5
    assert facts["scores"] == {"retrieval": pytest.approx(0.99)}
    assert "(chosen)" in told
    assert not (tmp_path / "out" / "trial").exists()


def test_one_checkpoint_may_be_best(checkpoints, tiny_model_folder, tmp_path):
    best(Search(checkpoints, tiny_model_folder, tmp_path / "out", near(5)), None, {"method": "uniform"})
    assert bias(tmp_path / "out" / "best") == 5
    assert len(trials(tmp_path / "out")) == 4


def test_grid_takes_the_best_of_its_trials(checkpoints, tiny_model_folder, tmp_path):
    search = Search(checkpoints, tiny_model_folder, tmp_path / "out", near(2.9))
    best(search, "grid", {})
    highest = max(trials(tmp_path / "out"), key=lambda trial: trial["score"])
    assert bias(tmp_path / "out" / "best") == pytest.approx(2.9 - 10 * (1 - highest["score"]), abs=1e-4) or bias(
        tmp_path / "out" / "best"
    ) == pytest.approx(2.9 + 10 * (1 - highest["score"]), abs=1e-4)
    assert len(trials(tmp_path / "out")) == 12


def test_front_and_knee_worked_out_by_hand():
    """(2, 2) is beaten by (3, 3); of the rest (3, 3) stands farthest above the line from (0, 4) to (4, 0)."""
    points = [(4, 0), (2, 2), (0, 4), (3, 3), (0, 3)]
    assert front(points) == [2, 3, 0]
    assert knee([points[place] for place in front(points)]) == 1
    assert front([(1, 1), (1, 1)]) == [0, 1]
    assert knee([(1, 1)]) == 0


def test_pareto_walks_between_two_experts(checkpoints, tiny_model_folder, tmp_path):
    """One task wants 0, the other 5; both lose little at first, so the middle stands out."""

    def score(folder):
        value = bias(folder)
        return {"retrieval": 1 - (value / 5) ** 3, "similarity": 1 - (1 - value / 5) ** 3}

    out = tmp_path / "out"
    told = pareto(
        Search([checkpoints[0], checkpoints[2], checkpoints[1]], tiny_model_folder, out, score),
        ["retrieval", "similarity"],
    )
    content = json.loads((out / "pareto.json").read_text())
    assert len(content["points"]) == 12
    assert content["points"][content["knee"]]["settings"]["weights"] == pytest.approx([0.5, 0.5])
    assert bias(out / "best") == pytest.approx(2.5)
    drawn = [dot.get("class") for dot in ElementTree.parse(out / "pareto.svg").iterfind(".//{*}circle")]
    assert len(drawn) == 12
    assert drawn.index("dot knee") == content["knee"]
    assert drawn.count("dot onfront") == len(content["front"]) - 1
    assert "knee" in told


def test_pareto_needs_two_tasks(checkpoints, tiny_model_folder, tmp_path):
    with pytest.raises(ConfigError, match="--suite: got data sets of retrieval alone"):
        pareto(Search(checkpoints[:2], tiny_model_folder, tmp_path / "out", near(1)), ["retrieval"])
    assert not (tmp_path / "out").exists()


def test_what_holds_files_is_refused(checkpoints, tiny_model_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ConfigError, match="a folder with files"):
        Search(checkpoints, tiny_model_folder, tmp_path / "out", near(1))


def test_weights_by_layer_find_what_one_weight_for_all_cannot(checkpoints, tiny_model_folder, tmp_path):
    """The bias should be that of the last checkpoint, the word embeddings those of the first."""
    words = "embeddings.word_embeddings.weight"
    for number, folder in enumerate(checkpoints):
        weights = load_file(folder / FILE)
        save_file(weights | {words: weights[words] * 0 + number}, folder / FILE, {"format": "pt"})

    def score(folder):
        weights = load_file(folder / FILE)
        return {"retrieval": 1 - abs(weights[NAME].mean().item() - 5) / 10 - abs(weights[words].mean().item()) / 10}

    told = best(Search(checkpoints, tiny_model_folder, tmp_path / "out", score), "layers", {}, trials=40)
    tried = trials(tmp_path / "out")
    assert len(tried) >= 43
    assert max(trial["score"] for trial in tried) > max(trial["score"] for trial in tried[:3]) + 0.02
    facts = json.loads((tmp_path / "out" / "best" / "fusion.json").read_text())
    for layer, weights in facts["weights"].items():
        assert sum(weights) == pytest.approx(1), layer
    assert facts["weights"]["layer 0"][2] > facts["weights"]["embeddings"][2]
    assert "by layer" in told


def test_what_is_kept_is_what_was_scored(checkpoints, tiny_model_folder, tmp_path):
    """A checkpoint alone is scored in the base's number type too: 1.001 is 1 in bfloat16."""
    base = shutil.copytree(tiny_model_folder, tmp_path / "base")
    save_file({name: weight.bfloat16() for name, weight in load_file(base / FILE).items()}, base / FILE)
    weights = load_file(checkpoints[1] / FILE)
    save_file(weights | {NAME: weights[NAME] * 0 + 1.001}, checkpoints[1] / FILE)
    best(Search(checkpoints[:2], base, tmp_path / "out", near(1.001)), None, {})
    alone = trials(tmp_path / "out")[1]
    assert (alone["settings"], alone["scores"]["retrieval"]) == ({}, pytest.approx(1 - 0.001 / 10))
    facts = json.loads((tmp_path / "out" / "best" / "fusion.json").read_text())
    assert (bias(tmp_path / "out" / "best"), facts["scores"]) == (1, alone["scores"])


def test_the_fusion_without_options_is_no_checkpoint_alone(checkpoints, tiny_model_folder, tmp_path):
    told = best(Search(checkpoints[:2], tiny_model_folder, tmp_path / "out", near(1)), None, {})
    assert [trial["settings"] for trial in trials(tmp_path / "out")] == [{}, {}, {"method": "delta"}]
    assert "checkpoint-0, " in told
    assert ": method delta" in told


@pytest.mark.parametrize("way", ["greedy", "layers", "grid"])
def test_settings_that_a_search_would_not_use_are_refused(checkpoints, tiny_model_folder, tmp_path, way):
    with pytest.raises(ConfigError, match=f"--search {way}: got granularity"):
        best(Search(checkpoints, tiny_model_folder, tmp_path / "out", near(1)), way, {"granularity": "row"})
    assert not (tmp_path / "out").exists()

"""How far checkpoints moved, worked out by hand."""

import json
import shutil
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

from codiemb.fusion.inspect import inspect, moves
from codiemb.fusion.weights import layer_of

NAME = "encoder.layer.1.output.dense.bias"


@pytest.fixture
def two(tiny_model_folder, tmp_path):
    """Only one bias moves: by (3, 4, 0, ...) and by (-3, 4, 0, ...)."""
    folders = []
    for number, sign in enumerate((1, -1)):
        folder = shutil.copytree(tiny_model_folder, tmp_path / f"checkpoint-{number}")
        weights = load_file(folder / "model.safetensors")
        weights[NAME] = weights[NAME].clone()
        weights[NAME][:2] += torch.tensor([3.0 * sign, 4.0])
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        folders.append(folder)
    return folders


def test_moves(two, tiny_model_folder):
    """Both moved by 5; cosine (16 - 9) / 25; the sum is (0, 8), and nothing goes against a sum of 0."""
    layers, tensors = moves(two, tiny_model_folder)
    facts = next(found.facts() for found in tensors if found.name == NAME)
    assert facts["moved"] == pytest.approx([5, 5], rel=1e-5)
    assert facts["cosines"][0][1] == pytest.approx(7 / 25, rel=1e-4)
    assert facts["sign_conflicts"] == 0
    by_layer = {found.name: found.facts() for found in layers}
    assert by_layer["layer 1"]["moved"] == pytest.approx([5, 5], rel=1e-5)
    assert by_layer["layer 0"]["moved"] == [0, 0]


def test_conflicts(two, tiny_model_folder, tmp_path):
    """Three moves of the first number, +3, -3 and +3: of 9 in all 3 go against the sum; of the second 12 agree."""
    third = shutil.copytree(two[0], tmp_path / "checkpoint-2")
    _, tensors = moves([*two, third], tiny_model_folder)
    facts = next(found.facts() for found in tensors if found.name == NAME)
    assert facts["sign_conflicts"] == pytest.approx(3 / 21, rel=1e-4)


def test_table_and_files(two, tiny_model_folder, tmp_path):
    table = inspect(two, tiny_model_folder, tmp_path / "out")
    assert "| layer 1 |" in table
    layers = json.loads((tmp_path / "out" / "moves.json").read_text())["layers"]
    drawing = ElementTree.parse(tmp_path / "out" / "moves.svg")
    named = [text.text for text in drawing.iterfind(".//{*}text[@class='named']")]
    assert named == [layer["name"] for layer in layers]
    assert len(named) == 5


def test_layers_by_name():
    names = {"encoder.layer.3.x.weight": "layer 3", "layers.11.y": "layer 11", "embeddings.word.weight": "embeddings"}
    assert {name: layer_of(name) for name in names} == names

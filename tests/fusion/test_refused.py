"""Folders that would merge into something wrong, or end in a traceback: each is told in one line, nothing is left."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from codiemb import fuse
from codiemb.errors import CheckpointError, ConfigError
from codiemb.fusion.inspect import inspect
from codiemb.fusion.numbers import narrowed, widened
from codiemb.fusion.weights import weights_of

FILE = "model.safetensors"


def folder(place, weights, **files):
    """A folder of transformers with these weights."""
    place.mkdir(parents=True)
    save_file(weights, place / FILE, {"format": "pt"})
    (place / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for name, content in files.items():
        (place / name).write_text(content)
    return place


def three(tmp_path, base, one, other):
    return [folder(tmp_path / name, weights) for name, weights in (("base", base), ("one", one), ("other", other))]


def refused(tmp_path, checkpoints, base, *words, error=CheckpointError, **settings):
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(error) as caught:
        fuse(checkpoints, base, tmp_path / "deep" / "er" / "out", **settings)
    for word in words:
        assert word in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_bfloat16_is_rounded_as_torch_does():
    values = np.concatenate([np.random.default_rng(0).normal(size=1000), [0.0, -0.0, 1e38, 1.0039062, 1.01171875]])
    values = values.astype(np.float32)
    expected = torch.from_numpy(values).bfloat16()
    rows = narrowed(values, "BF16")
    assert np.array_equal(rows, expected.view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(widened(rows, "BF16", np.dtype("f4")), expected.float().numpy())


@pytest.mark.parametrize("base_type", [torch.int32, torch.int64])
def test_whole_numbers_are_those_of_the_checkpoints(tmp_path, base_type):
    """A base of another width would shift every byte behind them."""
    places = torch.arange(4)
    base, one, other = three(
        tmp_path,
        {"places": places.to(base_type)[:3], "w": torch.zeros(2)},
        {"places": places, "w": torch.ones(2)},
        {"places": places, "w": torch.ones(2) * 3},
    )
    merged = load_file(fuse([one, other], base, tmp_path / "out", method="uniform").path / FILE)
    assert torch.equal(merged["places"], places)
    assert torch.equal(merged["w"], torch.ones(2) * 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scale": math.nan}, "scale: got nan"),
        ({"scale": math.inf}, "scale: got inf"),
        ({"weighting": "softmax", "temperature": math.inf}, "temperature: got inf"),
        ({"method": "weighted", "weights": [math.inf, 1]}, "weights: got [inf, 1]"),
        ({"method": "weighted", "weights": [1e308, 1e308]}, "weights: got [1e+308, 1e+308]"),
        ({"method": "weighted", "weights": [math.nan, 1]}, "weights: got [nan, 1]"),
    ],
)
def test_settings_that_are_no_numbers(tmp_path, settings, words):
    folders = three(tmp_path, *({"a.w": torch.rand(2)} for _ in range(3)))
    refused(tmp_path, folders[1:], folders[0], words, error=ConfigError, **settings)


def test_an_empty_output_whose_folder_cannot_be_written(tmp_path, monkeypatch):
    folders = three(tmp_path, *({"a.w": torch.rand(2)} for _ in range(3)))
    out = tmp_path / "mount" / "out"
    out.mkdir(parents=True)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != out.parent and allowed(path, mode))
    with pytest.raises(ConfigError, match="no right to write in"):
        fuse(folders[1:], folders[0], out)
    monkeypatch.undo()
    monkeypatch.setattr(type(out), "is_mount", lambda path: path == out)
    with pytest.raises(ConfigError, match="a mount point"):
        fuse(folders[1:], folders[0], out)


@pytest.mark.parametrize("temperature", [1e-30, 1e-50, 1e-300])
def test_a_softmax_of_almost_no_temperature_takes_the_farthest(temperature):
    norms = np.array([[0.25, 1.0], [0.5, 0.5]], np.float32)
    assert weights_of(norms, "softmax", temperature).tolist() == [[0, 1], [1, 0]]


def test_norms_whose_sum_their_type_cannot_hold(tmp_path):
    norms = np.full((4, 2), 3e38, np.float32)
    assert weights_of(norms, "proportional").tolist() == [[0.25, 0.25]] * 4


def test_numbers_where_the_base_has_whole_ones(tmp_path):
    base, one, other = three(tmp_path, {"a.w": torch.zeros(2).long()}, {"a.w": torch.rand(2)}, {"a.w": torch.rand(2)})
    refused(tmp_path, [one, other], base, "a.w", "F32")


@pytest.mark.parametrize("file", ["model.safetensors.index.json", "modules.json"])
def test_a_place_outside_of_the_folder(tmp_path, file):
    """It would be written over."""
    outside = {"weight_map": {"w": "../shared.safetensors"}} if file != "modules.json" else [{"path": "../one"}]
    folders = three(tmp_path, *({"w": torch.rand(2)} for _ in range(3)))
    save_file({"w": torch.ones(2)}, tmp_path / "shared.safetensors")
    for place in folders:
        (place / FILE).unlink()
        (place / file).write_text(json.dumps(outside))
    base, *checkpoints = folders
    refused(tmp_path, checkpoints, base, file, "..")
    assert torch.equal(load_file(tmp_path / "shared.safetensors")["w"], torch.ones(2))


def test_a_sum_beyond_the_number_type_of_the_base(tmp_path):
    half = torch.full((2,), 6e4, dtype=torch.float16)
    base, one, other = three(tmp_path, {"w": half * 0}, {"w": half}, {"w": half})
    refused(tmp_path, [one, other], base, "w", "beyond F16", method="uniform", scale=1.3)


def test_large_numbers_are_not_too_large(tmp_path):
    """Their squares do not fit into float32."""
    large = torch.full((2,), 1e20, dtype=torch.bfloat16)
    base, one, other = three(tmp_path, {"w": large * 0}, {"w": large}, {"w": large})
    fused = fuse([one, other], base, tmp_path / "out", method="uniform")
    assert torch.equal(load_file(fused.path / FILE)["w"], large)
    assert fused.facts["delta_length"] == pytest.approx(2**0.5 * large[0].item())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    "settings",
    [
        {"weighting": "inverse"},
        {"weighting": "inverse", "granularity": "model"},
        {"method": "weighted", "weights": [1, 0]},
    ],
    ids=str,
)
def test_what_is_not_finite_does_not_drop_out_in_silence(tmp_path, settings, value):
    base, one, other = three(tmp_path, {"w": torch.zeros(2)}, {"w": torch.ones(2)}, {"w": torch.tensor([1.0, value])})
    refused(tmp_path, [one, other], base, str(other), "nan or inf", **settings)
    with pytest.raises(CheckpointError, match="nan or inf"):
        inspect([one, other], base, tmp_path / "out")


def test_a_pooler_that_the_base_has_nothing_of_is_averaged(tmp_path):
    """As checkpoints of RoBERTa have, which was saved as a language model."""
    w = {"encoder.layer.0.w": torch.zeros(2)}
    base, one, other = three(
        tmp_path, w, w | {"pooler.dense.bias": torch.ones(2)}, w | {"pooler.dense.bias": torch.ones(2) * 3}
    )
    fused = fuse([one, other], base, tmp_path / "out", granularity="model")
    assert torch.equal(load_file(fused.path / FILE)["pooler.dense.bias"], torch.ones(2) * 2)
    assert fused.facts["delta_length"] == 0


def test_layers_that_the_base_has_nothing_of(tmp_path):
    w = {"embeddings.w": torch.zeros(2)}
    layers = w | {"transformer.layer.0.w": torch.ones(2)}
    base, one, other = three(tmp_path, w, layers, {name: weight + 1 for name, weight in layers.items()})
    refused(tmp_path, [one, other], base, "transformer.layer.0.w", "no such tensor")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"method": "ties", "scale": 0.1}, "scale"),
        ({"method": "uniform", "granularity": "row"}, "granularity"),
        ({"method": "uniform", "parameters": {"t": 1.0}}, "parameters"),
        ({"temperature": 2.0}, "softmax"),
        ({"method": "slerp", "by_run": True}, "by_run"),
    ],
    ids=str,
)
def test_settings_that_the_method_does_not_look_at(tmp_path, settings, word):
    base, one, other = three(tmp_path, *({"w": torch.rand(2)} for _ in range(3)))
    refused(tmp_path, [one, other], base, word, error=ConfigError, **settings)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("modules.json", {}),
        ("modules.json", []),
        ("modules.json", [{"idx": 0}]),
        ("model.safetensors.index.json", {"weight_map": []}),
        ("model.safetensors.index.json", {"weight_map": {"w": 3}}),
        ("model.safetensors.index.json", []),
        ("adapter_config.json", []),
        ("adapter_config.json", {"peft_type": "LORA", "r": 0, "lora_alpha": 1}),
        ("adapter_config.json", {"peft_type": "LORA", "r": 2}),
    ],
    ids=str,
)
def test_damaged_settings(tmp_path, file, content):
    base, one, other = three(tmp_path, *({"w": torch.rand(2, 2)} for _ in range(3)))
    if file.startswith("adapter"):
        matrices = {f"base_model.model.w.lora_{side}.weight": torch.rand(2, 2) for side in "AB"}
        save_file(matrices, other / "adapter_model.safetensors")
    if file != "modules.json":
        (other / FILE).unlink()
    (other / file).write_text(json.dumps(content))
    refused(tmp_path, [one, other], base, str(other))


def test_a_refused_folder_leaves_no_file_open(tmp_path):
    base, one, other = three(tmp_path, *({"w": torch.rand(2)} for _ in range(3)))
    (other / FILE).write_bytes(b"short")
    opened = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        refused(tmp_path, [one, other], base, str(other))
    assert len(os.listdir("/proc/self/fd")) == opened


def test_vocabularies_that_differ(tmp_path):
    """They are no JSON, but the tokenizer all the same."""
    base, one, other = three(tmp_path, *({"w": torch.rand(2)} for _ in range(3)))
    for number, place in enumerate((one, other)):
        (place / "vocab.txt").write_text(f"a\nb{number}\n")
    refused(tmp_path, [one, other], base, "vocab.txt", "--force")


def test_a_link_to_nowhere(tmp_path):
    base, one, other = three(tmp_path, *({"w": torch.rand(2)} for _ in range(3)))
    (one / "tokenizer.json").symlink_to(tmp_path / "none.json")
    refused(tmp_path, [one, other], base, "tokenizer.json", "link")


def test_modules_within_a_module_are_merged_too(tmp_path):
    """A router has one for queries and one for documents."""
    modules = json.dumps([{"path": ""}, {"path": "1_Router"}])
    folders = []
    for value, name in enumerate(("base", "one", "other")):
        place = folder(tmp_path / name, {"w": torch.ones(2) * value}, **{"modules.json": modules})
        folder(place / "1_Router" / "query_0_Dense", {"linear.weight": torch.ones(2, 2) * value})
        folders.append(place)
    base, *checkpoints = folders
    out = fuse(checkpoints, base, tmp_path / "out", method="uniform").path
    merged = load_file(out / "1_Router" / "query_0_Dense" / FILE)["linear.weight"]
    assert torch.equal(merged, torch.ones(2, 2) * 1.5)
    assert (out / "1_Router" / "query_0_Dense" / "config.json").exists()


def test_a_minus_zero_stays_one(tmp_path):
    """The bits of a checkpoint with the whole weight, where `torch.equal` sees no difference."""
    base, one, other = three(
        tmp_path, {"w": torch.ones(2)}, {"w": torch.tensor([-0.0, 1.0])}, {"w": torch.tensor([0.5, 1.0])}
    )
    out = fuse([one, other], base, tmp_path / "out", method="weighted", weights=[1, 0]).path
    assert torch.signbit(load_file(out / FILE)["w"]).tolist() == [True, False]


def test_the_output_inside_a_checkpoint_is_no_part_of_it(tmp_path):
    base, one, other = three(tmp_path, *({"w": torch.rand(2)} for _ in range(3)))
    fuse([one, other], base, one / "fused", method="uniform")
    again = fuse([one, other], base, tmp_path / "out", method="uniform").path
    assert not (again / "fused").exists()
    shutil.rmtree(one / "fused")

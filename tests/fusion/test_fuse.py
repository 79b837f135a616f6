"""Fusion against its formula in float64, its identities to the last bit, and folders that must be refused."""

import json
import shutil
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense

from codiemb import fuse
from codiemb.config import Granularity, Norm, Weighting
from codiemb.errors import CheckpointError, ConfigError
from codiemb.fusion import merge
from codiemb.fusion.weights import layer_of
from tests.conftest import needs_peft

GRANULARITIES, NORMS, WEIGHTINGS = (get_args(kind) for kind in (Granularity, Norm, Weighting))
FILE = "model.safetensors"


def checkpoint(base, folder, seed, size=0.1, dtype=None):
    """The base moved at random, by other lengths in each tensor, row and element."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)

    def moved(weight):
        noise = torch.randn(weight.shape, generator=generator) * torch.rand(weight.shape[:1], generator=generator).view(
            -1, *[1] * (weight.dim() - 1)
        )
        return (weight + size * noise * torch.rand((), generator=generator)).to(dtype or weight.dtype)

    save_file({name: moved(weight) for name, weight in load_file(base / FILE).items()}, folder / FILE, {"format": "pt"})
    return folder


@pytest.fixture
def base(tiny_model_folder):
    return tiny_model_folder


@pytest.fixture
def three(base, tmp_path):
    """Of two runs; small tiles, so that every tensor is merged in several."""
    return [
        checkpoint(base, tmp_path / run / name, seed)
        for seed, (run, name) in enumerate([("a", "checkpoint-1"), ("a", "checkpoint-2"), ("b", "checkpoint-1")])
    ]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(merge, "TILE", 100)


def arrays(folder):
    return {name: weight.double().numpy() for name, weight in load_file(folder / FILE).items()}


def by_formula(base, checkpoints, granularity, norm, weighting, temperature, groups):
    """METHOD: w_k = g(||delta_k||) / sum g, in groups and then across them; NumPy, float64, all in memory."""
    theta_0, thetas = arrays(base), [arrays(folder) for folder in checkpoints]
    deltas = {name: np.stack([theta[name] - start for theta in thetas]) for name, start in theta_0.items()}
    sizes = {"l1": lambda x: np.abs(x), "l2": np.square, "mean_square": np.square}[norm]

    def finish(total, count):
        return np.sqrt(total) if norm == "l2" else total / count if norm == "mean_square" else total

    def norms(mixes):
        """Of every tensor's deltas [model, ...], to be broadcast over them."""
        if granularity == "model":
            total = sum(sizes(delta).reshape(len(delta), -1).sum(axis=1) for delta in mixes.values())
            whole = finish(total, sum(delta[0].size for delta in mixes.values()))
            return {name: whole.reshape(-1, *[1] * (delta.ndim - 1)) for name, delta in mixes.items()}
        found = {}
        for name, delta in mixes.items():
            axes = tuple(range(1, delta.ndim))
            if granularity == "row" and delta.ndim > 2:
                axes = axes[1:]
            if granularity == "element":
                found[name] = finish(sizes(delta), 1)
            else:
                count = np.prod([delta.shape[axis] for axis in axes])
                found[name] = finish(sizes(delta).sum(axis=axes, keepdims=True), count)
        return found

    def weights(norm):
        if weighting == "inverse":  # opposite moves cancel to 0, or to a rounding of it: the limit
            norm = np.maximum(norm, 1e-12)
        g = {"proportional": lambda x: x, "inverse": lambda x: 1 / x, "softmax": lambda x: np.exp(x / temperature)}
        return g[weighting](norm) / g[weighting](norm).sum(axis=0)

    first = norms(deltas)
    means = {
        name: np.stack([(weights(first[name][group]) * delta[group]).sum(axis=0) for group in groups])
        for name, delta in deltas.items()
    }
    across = norms(means)
    return {name: theta_0[name] + (weights(across[name]) * mean).sum(axis=0) for name, mean in means.items()}


@pytest.mark.parametrize("by_run", [False, True])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_delta_is_the_formula(base, three, tmp_path, granularity, norm, weighting, by_run):
    temperature = 0.5
    out = fuse(
        three,
        base,
        tmp_path / "out",
        granularity=granularity,
        norm=norm,
        weighting=weighting,
        by_run=by_run,
        **({"temperature": temperature} if weighting == "softmax" else {}),
    ).path
    groups = [[0, 1], [2]] if by_run else [[0, 1, 2]]
    expected = by_formula(base, three, granularity, norm, weighting, temperature, groups)
    found = arrays(out)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name], weight, rtol=0, atol=1e-6, err_msg=name)


def test_the_ways_to_weigh_differ(base, three, tmp_path):
    """Otherwise the test above could compare uniform averages."""
    found = [
        arrays(
            fuse(
                three, base, tmp_path / f"{granularity}-{weighting}", granularity=granularity, weighting=weighting
            ).path
        )
        for granularity in GRANULARITIES
        for weighting in WEIGHTINGS
    ]
    name = "encoder.layer.0.output.dense.weight"
    assert len({weights[name].round(6).tobytes() for weights in found}) == len(found)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_weight_of_one_returns_the_parent_to_the_last_bit(base, three, tmp_path, place):
    weights = [float(number == place) for number in range(3)]
    out = fuse(three, base, tmp_path / "out", method="weighted", weights=weights).path
    assert (out / FILE).read_bytes()[8:] == (three[place] / FILE).read_bytes()[8:] or all(
        torch.equal(weight, load_file(three[place] / FILE)[name]) for name, weight in load_file(out / FILE).items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "settings", [{"method": "uniform"}, *({"granularity": granularity} for granularity in GRANULARITIES)], ids=str
)
def test_equal_checkpoints_return_themselves(base, tmp_path, settings, dtype):
    halves = checkpoint(base, tmp_path / "base", 9, 0, dtype)
    one = checkpoint(halves, tmp_path / "one", 1, 0.1, dtype)
    copies = [shutil.copytree(one, tmp_path / f"copy-{number}") for number in range(2)]
    out = fuse([one, *copies], halves, tmp_path / "out", **settings).path
    expected = load_file(one / FILE)
    for name, weight in load_file(out / FILE).items():
        assert weight.dtype == dtype
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_only_the_checkpoint_that_moved_counts(base, tmp_path, granularity):
    still = [shutil.copytree(base, tmp_path / f"still-{number}") for number in range(2)]
    moved = checkpoint(base, tmp_path / "moved", 4)
    out = fuse([still[0], moved, still[1]], base, tmp_path / "out", granularity=granularity).path
    expected = load_file(moved / FILE)
    for name, weight in load_file(out / FILE).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("settings", [{"granularity": "element"}, {"by_run": True}, {"method": "uniform"}], ids=str)
def test_the_order_of_checkpoints_does_not_matter(base, three, tmp_path, settings):
    one = fuse(three, base, tmp_path / "one", **settings).path
    other = fuse(three[::-1], base, tmp_path / "other", **settings).path
    assert (one / FILE).read_bytes() == (other / FILE).read_bytes()


def test_scale_goes_from_the_base_through_the_mean(base, three, tmp_path):
    start, mean = arrays(base), arrays(fuse(three, base, tmp_path / "1", method="uniform").path)
    for scale in (0.0, 0.5, 1.5):
        fused = fuse(three, base, tmp_path / str(scale), method="uniform", scale=scale)
        for name, weight in arrays(fused.path).items():
            np.testing.assert_allclose(weight, start[name] + scale * (mean[name] - start[name]), atol=1e-6)
        length = np.sqrt(sum(np.square(weight - start[name]).sum() for name, weight in arrays(fused.path).items()))
        assert fused.facts["delta_length"] == pytest.approx(length, rel=1e-5)


def test_the_folder_is_a_model_with_a_record(base, three, tmp_path):
    fused = fuse(three, base, tmp_path / "out")
    assert SentenceTransformer(str(fused.path), device="cpu").encode(["a b"]).shape == (1, 16)
    facts = json.loads((fused.path / "fusion.json").read_text())
    assert facts["method"] == "delta"
    assert [parent["path"] for parent in facts["parents"]] == [str(folder) for folder in three]
    for weights in facts["weights"].values():
        assert sum(weights) == pytest.approx(1, abs=1e-12)
    assert not list(tmp_path.glob(".writing*"))


def test_shards_come_out_as_shards(base, three, tmp_path):
    whole = fuse(three, base, tmp_path / "whole").path
    for folder in three:
        SentenceTransformer(str(folder), device="cpu")[0].model.save_pretrained(folder / "shards", max_shard_size="3KB")
        (folder / FILE).unlink()
        for file in (folder / "shards").glob("model*"):
            file.rename(folder / file.name)
        shutil.rmtree(folder / "shards")
    out = fuse(three, base, tmp_path / "out").path
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    one, other = (SentenceTransformer(str(folder), device="cpu").state_dict() for folder in (whole, out))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@needs_peft
def test_a_new_head_beside_adapters_is_averaged(base, tmp_path):
    """The base has no head; the files of the result are the base's and the head's."""
    from peft import LoraConfig

    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        encoder = SentenceTransformer(str(base), device="cpu")
        encoder.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False))
        encoder.append(Dense(16, 8, activation_function=None))
        folders.append(tmp_path / f"checkpoint-{seed}")
        encoder.save(str(folders[-1]), create_model_card=False)
    out = fuse(folders, base, tmp_path / "out").path
    assert SentenceTransformer(str(out), device="cpu").encode(["a"]).shape == (1, 8)
    heads = [load_file(folder / "2_Dense" / FILE)["linear.weight"] for folder in (*folders, out)]
    torch.testing.assert_close(heads[2], (heads[0] + heads[1]) / 2)


def test_a_base_whose_names_have_a_prefix(base, three, tmp_path):
    """As on the hub, saved from a model with a head, with TensorFlow's names for the weights of layer norms."""
    prefixed = shutil.copytree(base, tmp_path / "prefixed")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    weights = {}
    for name, weight in load_file(base / FILE).items():
        new = next((ending for ending in old if name.endswith(ending)), "")
        weights[f"bert.{name.removesuffix(new)}{old.get(new, '')}"] = weight
    assert any(name.endswith("gamma") for name in weights)
    save_file(weights | {"cls.bias": torch.zeros(3)}, prefixed / FILE, {"format": "pt"})
    one, other = (arrays(fuse(three, start, tmp_path / start.name / "out").path) for start in (base, prefixed))
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", ["slerp", "task_arithmetic", "ties", "dare", "dare_ties", "sce", "model_stock"])
def test_methods_of_mergekit_are_those_of_mergekit(base, three, tmp_path, method):
    """Between the base and beyond the checkpoints, another model than the average, and the same twice."""
    pytest.importorskip("mergekit")
    checkpoints = three[:2] if method == "slerp" else three
    found = [load_file(fuse(checkpoints, base, tmp_path / str(n), method=method).path / FILE) for n in range(2)]
    average = load_file(fuse(checkpoints, base, tmp_path / "average", method="uniform").path / FILE)
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())
    name = "encoder.layer.1.output.dense.weight"
    assert not torch.equal(found[0][name], average[name])
    if method == "task_arithmetic":  # theta_0 + sum_k delta_k
        start, thetas = load_file(base / FILE)[name], [load_file(folder / FILE)[name] for folder in checkpoints]
        torch.testing.assert_close(found[0][name], start + sum(theta - start for theta in thetas))


@needs_peft
def test_lora_adapters_are_added_to_the_base_on_the_way(base, tmp_path):
    from peft import LoraConfig

    from codiemb.encoder.adapters import merge_adapters

    merged, adapters = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        encoder = SentenceTransformer(str(base), device="cpu")
        encoder.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False))
        adapters.append(tmp_path / f"adapters-{seed}")
        encoder.save(str(adapters[-1]), create_model_card=False)
        merge_adapters(encoder)
        merged.append(tmp_path / f"merged-{seed}")
        encoder.save(str(merged[-1]), create_model_card=False)
    whole = arrays(fuse(merged, base, tmp_path / "whole", by_run=False).path)
    out = fuse(adapters, base, tmp_path / "out").path
    assert not list(out.glob("adapter*"))
    for name, weight in arrays(out).items():
        np.testing.assert_allclose(weight, whole[name], atol=1e-5, err_msg=name)
    assert SentenceTransformer(str(out), device="cpu").encode(["a"]).shape == (1, 16)


# ---- bad input ----


def refused(error, three, base, tmp_path, *words, **settings):
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(error) as raised:
        fuse(three, base, settings.pop("out", tmp_path / "out"), **settings)
    for word in words:
        assert word in str(raised.value)
    assert sorted(path for path in tmp_path.rglob("*")) == before, "nothing may be left"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "detla"}, ["method", "'detla'", "delta"]),
        ({"granularity": "layer"}, ["granularity", "'layer'"]),
        ({"weights": [1, 2, 3]}, ["weights"]),
        ({"method": "weighted"}, ["weights", "none"]),
        ({"method": "weighted", "weights": [1, 2]}, ["weights", "3 numbers"]),
        ({"method": "weighted", "weights": [1, -1, 0]}, ["weights", "sum above 0"]),
        ({"method": "weighted", "weights": {"layer 0": [1, 2, 3]}}, ["weights", "embeddings, layer 0, layer 1"]),
        ({"method": "weighted", "weights": {"layer 0": [1, 2]}}, ["weights", "3 numbers"]),
        ({"weighting": "softmax", "temperature": 0}, ["temperature"]),
    ],
    ids=str,
)
def test_settings(base, three, tmp_path, settings, words):
    refused(ConfigError, three, base, tmp_path, *words, **settings)


def test_weights_by_layer(base, three, tmp_path):
    """Each layer is the mean by its own weights, whatever the order of the checkpoints."""
    layers = {
        "embeddings": [1, 0, 0],
        "layer 0": [1, 1, 2],
        "layer 1": [0, 3, 1],
        "layer 2": [1, 1, 1],
        "pooler": [0, 1, 0],
    }
    first, *others = load_file(three[0] / FILE), load_file(three[1] / FILE), load_file(three[2] / FILE)
    given = {layer: layers[layer] for layer in layers if any(layer_of(name) == layer for name in first)}
    out = fuse(three, base, tmp_path / "out", method="weighted", weights=given).path
    turned = {layer: weights[::-1] for layer, weights in given.items()}
    again = fuse(three[::-1], base, tmp_path / "again", method="weighted", weights=turned).path
    assert (out / FILE).read_bytes() == (again / FILE).read_bytes()
    for name, merged in load_file(out / FILE).items():
        weights = given[layer_of(name)]
        expected = sum(w * model[name].double() for w, model in zip(weights, [first, *others], strict=True)) / sum(
            weights
        )
        torch.testing.assert_close(merged.double(), expected, rtol=0, atol=1e-7)


def test_one_checkpoint_only(base, three, tmp_path):
    refused(ConfigError, three[:1], base, tmp_path, "at least two")


def test_the_same_twice(base, three, tmp_path):
    refused(ConfigError, [three[0], three[0]], base, tmp_path, "twice")


def test_no_base(three, tmp_path):
    refused(CheckpointError, three, tmp_path / "none", tmp_path, "none", "no such folder")


def change(folder, act):
    weights = load_file(folder / FILE)
    act(weights)
    save_file(weights, folder / FILE, {"format": "pt"})


NAME = "encoder.layer.1.output.dense.weight"


@pytest.mark.parametrize("where", ["base", "checkpoint"])
@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda weights: weights.pop(NAME), [NAME, "no such tensor", "[16, 32]"]),
        (lambda weights: weights.update({NAME: torch.zeros(16, 31)}), [NAME, "[16, 31]", "[16, 32]"]),
        (lambda weights: weights[NAME].view(-1).__setitem__(3, float("nan")), [NAME, "nan"]),
        (lambda weights: weights[NAME].view(-1).__setitem__(3, float("inf")), [NAME, "inf"]),
    ],
    ids=["missing", "misshapen", "nan", "inf"],
)
def test_tensors(base, three, tmp_path, where, act, words):
    copy = shutil.copytree(base, tmp_path / "base")
    change(copy if where == "base" else three[1], act)
    refused(CheckpointError, three, copy, tmp_path, str(copy if where == "base" else three[1]), *words)


def test_a_truncated_file(base, three, tmp_path):
    content = (three[2] / FILE).read_bytes()
    (three[2] / FILE).write_bytes(content[:-10])
    refused(CheckpointError, three, base, tmp_path, str(three[2] / FILE), "whole safetensors")


def test_pickled_weights(base, three, tmp_path):
    (three[2] / FILE).rename(three[2] / "pytorch_model.bin")
    refused(CheckpointError, three, base, tmp_path, "pytorch_model.bin", "pickled", "convert")


def test_an_output_folder_with_files(base, three, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    refused(ConfigError, three, base, tmp_path, "out", "files")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("1_Pooling/config.json", "pooling_mode", "cls"),
        ("config_sentence_transformers.json", "prompts", {"query": "q: "}),
        ("tokenizer.json", "normalizer", None),
    ],
)
def test_folders_that_read_texts_otherwise(base, three, tmp_path, file, key, value):
    content = json.loads((three[1] / file).read_text())
    (three[1] / file).write_text(json.dumps(content | {key: value}))
    refused(CheckpointError, three, base, tmp_path, file, key, "--force")
    facts = fuse(three, base, tmp_path / "out", force=True).facts
    assert file in facts["forced"][0]


def test_a_full_disk(base, three, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "_write", full)
    refused(CheckpointError, three, base, tmp_path, "room")

"""Whole runs that train adapters or a head only: what changes, what is saved, and that they resume."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from codiemb import load_config, train
from codiemb.training.metrics import MetricsLog
from tests.conftest import HIDDEN, needs_peft
from tests.small_run import assert_equal_weights, small_run

TEXTS = ["a b", "c d e", "t"]
LORA = "model.lora={r: 2, alpha: 4, dropout: 0.1}"
HEAD = ["model.freeze_backbone=true", "model.head.dim=16", "losses.similarity.mid_nce=0"]
PARTS = {
    "lora": pytest.param([LORA], marks=needs_peft),
    "lora and head": pytest.param([LORA, "model.head.dim=8"], marks=needs_peft),
    "frozen": HEAD,
}
each_part = pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())


@pytest.fixture
def config_file(tmp_path, tiny_model_folder):
    """Retrieval and pairs on the tiny model, with dropout: 7 steps."""
    return small_run(
        tmp_path,
        tiny_model_folder,
        model={"dropout": {"hidden": 0.1}},
        train={"save_steps": 3, "learning_rate": 1e-2},
    )


def scores(run, model):
    return {file.name: json.loads(file.read_text())["metrics"] for file in (run / "eval" / model).glob("*.json")}


@needs_peft
def test_the_model_of_a_lora_run_is_merged(config_file, tmp_path, tiny_model_folder):
    """Its files and shapes are those of the base, its embeddings those of the last checkpoint, which has adapters."""
    train(load_config(config_file, [LORA]))
    run = tmp_path / "run"
    assert not list((run / "model").glob("adapter*"))
    base, merged = (load_file(folder / "model.safetensors") for folder in (tiny_model_folder, run / "model"))
    assert {name: weight.shape for name, weight in merged.items()} == {n: weight.shape for n, weight in base.items()}
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name for name in base if name.endswith(("query.weight", "value.weight"))}
    assert (run / "checkpoint-7" / "adapter_model.safetensors").is_file()
    assert not (run / "checkpoint-7" / "model.safetensors").exists()
    adapted, whole = (SentenceTransformer(str(run / name), device="cpu") for name in ("checkpoint-7", "model"))
    assert whole.encode(TEXTS) == pytest.approx(adapted.encode(TEXTS), abs=1e-5)
    assert abs(whole.encode(TEXTS) - SentenceTransformer(str(tiny_model_folder)).encode(TEXTS)).max() > 1e-2


def test_a_frozen_backbone_stays_as_it_is(config_file, tmp_path, tiny_model_folder):
    train(load_config(config_file, HEAD))
    base, trained = (load_file(folder / "model.safetensors") for folder in (tiny_model_folder, tmp_path / "run/model"))
    assert base.keys() == trained.keys()
    assert all(torch.equal(base[name], trained[name]) for name in base)
    head = load_file(tmp_path / "run/model/2_Dense/model.safetensors")
    assert (head["linear.weight"] - torch.eye(HIDDEN)).abs().max() > 1e-2
    assert SentenceTransformer(str(tmp_path / "run/model")).encode(TEXTS).shape == (3, HIDDEN)


@pytest.mark.slow
@each_part
def test_the_base_is_scored_untouched(config_file, tmp_path, part):
    train(load_config(config_file, ["train.max_steps=1", f"output_dir={tmp_path / 'whole'}"]))
    train(load_config(config_file, [*part, "train.max_steps=1"]))
    assert scores(tmp_path / "run", "base") == scores(tmp_path / "whole", "base")
    assert len(scores(tmp_path / "run", "base")) == 2


@pytest.mark.slow
@each_part
def test_an_interrupted_run_resumes_to_the_same_weights(config_file, tmp_path, monkeypatch, part):
    """To the last bit, with dropout in the model and in the adapters."""
    train(load_config(config_file, [*part, f"output_dir={tmp_path / 'whole'}"]))
    original = MetricsLog.on_step_begin

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(MetricsLog, "on_step_begin", stop)
    with pytest.raises(KeyboardInterrupt):
        train(load_config(config_file, part))
    monkeypatch.undo()
    train(load_config(config_file, part), resume=True)
    assert_equal_weights(tmp_path / "whole" / "model", tmp_path / "run" / "model", rtol=0, atol=0)
    assert_equal_weights(tmp_path / "whole" / "checkpoint-7", tmp_path / "run" / "checkpoint-7", rtol=0, atol=0)


@pytest.mark.slow
@each_part
def test_a_run_goes_on_after_its_base_has_moved(config_file, tmp_path, tiny_model_folder, part):
    """The checkpoint of adapters names the place its base had; the base is the one that the config names now."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(tiny_model_folder, first)
    steps = [*part, "train.max_steps=7"]
    train(load_config(config_file, [*steps, f"model.base={first}", f"output_dir={tmp_path / 'whole'}"]))
    shutil.copytree(tmp_path / "whole", tmp_path / "run", ignore=shutil.ignore_patterns("model", "checkpoint-[67]"))
    first.rename(second)
    train(load_config(config_file, [*steps, f"model.base={second}"]), resume=True)
    assert_equal_weights(tmp_path / "whole" / "model", tmp_path / "run" / "model", rtol=0, atol=0)

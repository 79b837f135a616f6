"""The task-conflict meter: its cosines are those of the definition, and training does not notice it."""

import json
import math
import shutil

import pytest
import torch

from codiemb import load_config, train
from codiemb.batching.loader import StepReader
from codiemb.errors import ConfigError
from codiemb.training import conflict
from codiemb.training.conflict import compared, fixed_batches, gradient_of, group_of
from codiemb.training.joint import JointModel
from codiemb.training.run import prepare
from tests.small_run import assert_equal_weights, small_run


def test_the_cosine_of_two_gradients_by_hand():
    """Layer 0: (3, 4) and (4, -3) are orthogonal. Layer 1: (1, 0) and (-2, 0) are opposed. The rest: 0 for the first
    task, so no cosine. The embeddings: 0 for both, left out. All: dot -2, lengths sqrt(26) and sqrt(30)."""
    encoder = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Linear(2, 1))
    groups = {"0.weight": "layer 0", "0.bias": "embeddings", "1.weight": "layer 1", "1.bias": "rest"}
    assert [name for name, _ in encoder.named_parameters()] == list(groups)
    one = [torch.tensor(values) for values in ([[3.0, 4.0]], [0.0], [[1.0, 0.0]], [0.0])]
    other = [torch.tensor(values) for values in ([[4.0, -3.0]], [0.0], [[-2.0, 0.0]], [1.0])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conflict, "group_of", groups.__getitem__)
        found = compared(encoder, one, other)
    assert list(found["cosine"]) == ["all", "layer 0", "layer 1", "rest"]
    assert found["cosine"] == {
        "all": pytest.approx(-2 / math.sqrt(26 * 30)),
        "layer 0": 0,
        "layer 1": -1,
        "rest": None,
    }
    assert found["gradient_norm"] == {"retrieval": pytest.approx(26**0.5), "similarity": pytest.approx(30**0.5)}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("0.model.embeddings.word_embeddings.weight", "embeddings"),
        ("0.model.embeddings.LayerNorm.bias", "embeddings"),
        ("0.model.encoder.layer.11.attention.self.query.weight", "layer 11"),
        ("0.model.layers.3.mlp.experts.5.up_proj.weight", "layer 3"),
        ("0.model.base_model.model.layers.2.q_proj.lora_A.default.weight", "layer 2"),
        ("0.model.embed_tokens.weight", "embeddings"),
        ("0.model.wte.weight", "embeddings"),
        ("0.model.norm.weight", "rest"),
        ("0.model.pooler.dense.weight", "rest"),
        ("2.linear.weight", "rest"),
    ],
)
def test_weights_are_grouped_as_architectures_name_them(name, group):
    """Else a layer would be counted under another, or under none."""
    assert group_of(name) == group


@pytest.fixture
def config_file(tmp_path, tiny_model_folder):
    return small_run(
        tmp_path,
        tiny_model_folder,
        model={"dropout": {"hidden": 0.1, "attention": 0.1}},
        losses={"balance": "magnitude"},
        train={"max_steps": 7, "save_steps": 4, "learning_rate": 1e-3},
        evaluation={"suite": None},
    )


@pytest.fixture
def prepared(config_file):
    """A model as it is trained, and the reader of its steps."""
    ready = prepare(load_config(config_file), device="cpu")
    joint = JointModel(ready.encoder, ready.config.losses).train()
    return joint, StepReader(ready.plan, ready.records, ready.encoder, 0, 1)


def test_the_gradient_is_that_of_a_backward_pass_and_nothing_else_changes(prepared):
    """Of the mean of two batches; running means of the loss parts, random state, mode and the gradients that wait are
    what they were."""
    joint, reader = prepared
    inputs = [listed[0] for listed in fixed_batches(reader).values()]
    for parameter in joint.parameters():
        parameter.grad = torch.ones_like(parameter)
    joint.balance.means = {"retrieval/info_nce": torch.tensor([5.0, 0.5])}
    random = torch.get_rng_state()
    found = gradient_of(joint, inputs)
    assert torch.equal(torch.get_rng_state(), random)
    assert joint.training
    assert joint.encoder[0].model.training
    assert all(bool((parameter.grad == 1).all()) for parameter in joint.parameters())
    assert joint.balance.means.keys() == {"retrieval/info_nce"}
    assert joint.balance.means["retrieval/info_nce"].tolist() == [5, 0.5]
    joint.eval().zero_grad()
    for batch in inputs:
        (0.5 * joint(batch["batches"], batch["micro_batches"])["loss"]).backward()
    trained = [parameter for parameter in joint.encoder.parameters() if parameter.requires_grad]
    assert sum(bool(gradient.abs().max() > 1e-3) for gradient in found) > 30, "zeros would be compared"
    for gradient, parameter in zip(found, trained, strict=True):
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("means", [{}, {"retrieval/info_nce": torch.tensor([3.0, 0.5])}])
def test_the_order_of_the_batches_does_not_matter(prepared, means):
    """With running means each batch would move the divisor of the next, so that the norm at step 0 would say how many
    batches were drawn."""
    joint, reader = prepared
    inputs = fixed_batches(reader)["retrieval"]
    joint.balance.means = dict(means)
    forwards, backwards = gradient_of(joint, inputs), gradient_of(joint, inputs[::-1])
    alone = [gradient_of(joint, [batch]) for batch in inputs]
    assert any(not torch.allclose(alone[0][place], alone[1][place]) for place in range(len(forwards))), "one batch"
    for one, other, *each in zip(forwards, backwards, *alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one, torch.stack(each).mean(dim=0), rtol=1e-4, atol=1e-6)


def test_the_batches_are_four_of_each_task_and_not_those_of_training(prepared):
    """Retrieval has four batches an epoch and similarity three; a third source would have its part of the four."""
    _, reader = prepared
    found = fixed_batches(reader)
    sources = {task: [batch["batches"][0]["source"] for batch in listed] for task, listed in found.items()}
    assert sources == {"retrieval": ["search"] * 4, "similarity": ["pairs"] * 3}
    trained = [reader[step] for step in reader.plan.steps(0)]
    labels = [batch["target"].tolist() for step in trained for batch in step["batches"] if batch["task"] != "retrieval"]
    assert [batch["batches"][0]["target"].tolist() for batch in found["similarity"]] != labels


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["losses.emphasis=1"], "similarity not trained"),
        (["losses.retrieval.weight=0"], "retrieval not trained"),
        (["data.1.task=pair_classification"], "similarity not trained, expected both retrieval and similarity"),
        (["train.fsdp=true"], "no rank holds a whole gradient"),
    ],
)
def test_where_there_are_no_two_gradients_it_is_refused(config_file, overrides, words):
    load_config(config_file, overrides)
    with pytest.raises(ConfigError, match=f"train.conflict_every: got 5 .*{words}"):
        load_config(config_file, [*overrides, "train.conflict_every=5"])


def lines_of(run):
    return [json.loads(line) for line in (run / "conflict.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_weights_are_the_same_to_the_last_bit_and_a_resumed_run_repeats_no_line(config_file, tmp_path):
    """With dropout and running means of the parts, which the meter must not touch."""

    def run(name, *overrides, **how):
        return train(load_config(config_file, [f"output_dir={tmp_path / name}", *overrides]), **how).model

    without = run("without")
    measured = run("measured", "train.conflict_every=2")
    assert_equal_weights(without, measured, rtol=0, atol=0)
    assert not (tmp_path / "without" / "conflict.jsonl").exists()
    lines = lines_of(tmp_path / "measured")
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert list(lines[0]["cosine"]) == ["all", "embeddings", "layer 0", "layer 1", "layer 2"]
    assert lines[0]["cosine"] != lines[1]["cosine"], "the weights of the moment"
    for line in lines:
        assert all(-1 <= cosine <= 1 for cosine in line["cosine"].values())
        assert min(line["gradient_norm"].values()) > 0
    # As if killed after step 6: the last checkpoint is that of step 4, the line of step 6 is written.
    for name in ("model", "checkpoint-7"):
        shutil.rmtree(tmp_path / "measured" / name)
    again = run("measured", "train.conflict_every=3", resume=True)
    assert_equal_weights(without, again, rtol=0, atol=0)
    resumed = lines_of(tmp_path / "measured")
    assert [line["step"] for line in resumed] == [0, 2, 4, 6]
    assert resumed[:3] == lines[:3]
    assert resumed[3] == lines[3], "the gradients of the resumed run at step 6"

"""A step whose activations are made twice gives what one does that keeps them, dropout and all."""

import pytest
import torch

from codiemb.config import Losses
from codiemb.encoder.engine import embed
from codiemb.encoder.memory import Footprint, Memory
from codiemb.encoder.tokens import Text, shape, tokenize
from codiemb.training import joint
from codiemb.training.joint import JointModel
from tests.distributed.test_two_processes import MEMORIES, STEPS, loss_and_gradients, write_data

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tiny_model_folder, tmp_path_factory):
    """By memory the loss and gradients of every step of `STEPS`, with dropout."""
    data = tmp_path_factory.mktemp("data")
    write_data(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODIEMB_CACHE", str(tmp_path_factory.mktemp("cache")))
        return {
            memory: loss_and_gradients(tiny_model_folder, data, 0, 1, memory, dropout=0.2) for memory in MEMORIES
        } | {"no dropout": loss_and_gradients(tiny_model_folder, data, 0, 1)}


@pytest.mark.parametrize("memory", [memory for memory in MEMORIES if memory != "direct"])
@pytest.mark.parametrize("name", STEPS)
def test_cached_gradients_equal_direct_ones_to_the_last_bit(found, name, memory):
    direct, cached, without = found["direct"][name], found[memory][name], found["no dropout"][name]
    assert cached["loss"] == direct["loss"] != without["loss"]
    largest = [gradient.abs().max().item() for gradient in direct["gradients"].values()]
    assert sum(value > 1e-3 for value in largest) > 30, "zeros would be compared"
    for key, gradient in direct["gradients"].items():
        assert torch.equal(cached["gradients"][key], gradient), key


@pytest.mark.parametrize("memory", MEMORIES)
def test_the_next_step_draws_the_same_random_numbers(found, memory):
    """Else a run would depend on which step was cached."""
    assert [step["random"] for step in found[memory].values()] == [step["random"] for step in found["direct"].values()]


def test_most_steps_have_several_micro_batches(found):
    """Without this "the last one direct" would be all of them."""
    assert sum(step["micro_batches"] > 2 for step in found["cached"].values()) >= len(STEPS) - 1


@pytest.mark.parametrize("name", ["ragged queries", "same slot", "symmetric", "prefixes"])
def test_many_scores_are_held_in_tiles(found, tiny_model_folder, tmp_path, name, monkeypatch):
    """Same gradients; with at most 7 scores of 5 queries and up to 20 documents there are several tiles."""
    monkeypatch.setattr(joint, "_MOST_SCORES", 7)
    write_data(tmp_path)
    widths = []
    inner = joint.SHAPES["lists"]

    def seen(batch, settings, dim=None):
        widths.append(settings["chunk_size"])
        return inner(batch, settings, dim)

    monkeypatch.setitem(joint.SHAPES, "lists", seen)
    tiled = loss_and_gradients(tiny_model_folder, tmp_path, 0, 1, dropout=0.2)[name]
    assert 1 in widths, "tiled"
    assert 3 in widths, "where the setting says so, it holds"
    assert tiled["loss"] == pytest.approx(found["direct"][name]["loss"], rel=1e-5)
    torch.testing.assert_close(tiled["gradients"], found["direct"][name]["gradients"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("room", "recomputed"), [(3, 1), (2, 2), (0, 4)])
def test_micro_batches_run_again_for_other_ranks_count_as_memory(tiny_encoder, monkeypatch, room, recomputed):
    """Two texts of one token in a micro-batch each, where another rank has four: room for `room` keeps as many."""
    tokens = tokenize(tiny_encoder, [Text("a", "", None), Text("b", "", None)], 1)
    micro_batches = tokens.micro_batches
    one = Footprint(1, 0).of(*shape(micro_batches[0]))
    seen = []

    def embedded(encoder, micro_batches, place, middle, recomputed):
        seen.append((len(micro_batches), recomputed))
        return embed(encoder, micro_batches, place, middle, recomputed)

    elsewhere = iter([4, 0])  # micro-batches, and how many of them run again
    monkeypatch.setattr(joint, "most", lambda count: max(count, next(elsewhere)))
    monkeypatch.setattr(joint, "embed", embedded)
    model = JointModel(tiny_encoder, Losses(), Memory(room * one, Footprint(1, 0), 1), sharded=True)
    batch = {"task": "similarity", "rows": 1, "place": tokens.place, "target": torch.ones(1)}
    ids = torch.arange(1)
    model([{**batch, "left_ids": ids, "right_ids": ids}], micro_batches)
    assert seen == [(4, recomputed)]

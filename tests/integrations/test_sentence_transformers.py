"""The door for sentence-transformers scripts: losses equal the pure functions, batches keep devices together."""

import itertools
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, skip_first_batches
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import DefaultBatchSampler, NoDuplicatesBatchSampler
from torch.nn.functional import normalize
from torch.utils.data import ConcatDataset

from codiemb import losses
from codiemb.encoder.engine import embed
from codiemb.encoder.tokens import Text, tokenize
from codiemb.integrations import same_dataset
from codiemb.integrations.sentence_transformers import (
    CoDiEmbSimilarity,
    InfoNCE,
    PairLoss,
    SameDatasetBatchSampler,
    text_ids,
)

QUERIES = ["who sat", "what falls", "who sat", "dogs"]  # the first one twice, with another positive each time
POSITIVES = ["the cat", "rain falls", "a cat sat", "dogs bark loud at dawn"]
NEGATIVES = ["dogs bark loud at dawn", "the cat", "dogs", "what falls"]  # positives and queries of other rows
LEFT = ["the cat sat", "dogs bark", "birds sing", "rain"]
RIGHT = ["a cat sat", "rain falls at dawn", "birds", "the cat sat"]
SCORES = torch.tensor([1.0, 0.2, 0.6, 1.0])


def columns(encoder, *texts):
    return [encoder.preprocess(list(column)) for column in texts]


def unit(encoder, texts):
    return normalize(encoder(encoder.preprocess(list(texts)))["sentence_embedding"], dim=-1)


def gradients(encoder, loss):
    encoder.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    assert sum(bool(gradient.abs().max() > 1e-5) for gradient in found.values()) > 20, "zeros would be compared"
    return found


def naive_info_nce(encoder, columns, positives, masked, same_slot=False, temperature=0.5):
    """Query by query and positive by positive; the relevant texts of a query are left out by comparing strings."""
    queries = columns[0]
    embedded = [unit(encoder, column) for column in columns]
    terms = []
    for i, query in enumerate(queries):
        relevant = {query}
        for j, other in enumerate(queries):
            if other == query:
                relevant |= {columns[1 + slot][j] for slot in range(positives)}
        own = {columns[1 + slot][i] for slot in range(positives)}
        row = []
        for p in range(1, positives + 1):
            score = lambda column, j: embedded[0][i] @ embedded[column][j] / temperature  # noqa: B023, E731
            others = [
                score(column, j)
                for column, j in itertools.product(range(1, len(columns)), range(len(queries)))
                if columns[column][j] not in (relevant if masked else own)
                and not (same_slot and column <= positives and column != p)
            ]
            row.append(torch.logsumexp(torch.stack([score(p, i), *others]), dim=0) - score(p, i))
        terms.append(torch.stack(row).mean())
    return torch.stack(terms).mean()


@pytest.mark.parametrize(
    ("texts", "positives", "candidates"),
    [
        ([QUERIES, POSITIVES], 1, "all"),
        ([QUERIES, POSITIVES, NEGATIVES], 1, "all"),
        ([QUERIES, POSITIVES, RIGHT, NEGATIVES], 2, "all"),
        ([QUERIES, POSITIVES, RIGHT, NEGATIVES], 2, "same_slot"),
    ],
)
def test_info_nce_equals_a_double_loop_over_the_texts(tiny_encoder, texts, positives, candidates):
    loss = InfoNCE(tiny_encoder, temperature=0.5, positives=positives, candidates=candidates)
    found = loss(columns(tiny_encoder, *texts))
    expected = naive_info_nce(tiny_encoder, texts, positives, True, candidates == "same_slot")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(tiny_encoder, found), gradients(tiny_encoder, expected), rtol=1e-4, atol=1e-5)


def test_the_masks_of_the_test_above_count(tiny_encoder):
    texts = [QUERIES, POSITIVES, NEGATIVES]
    masked, plain = (naive_info_nce(tiny_encoder, texts, 1, kind) for kind in (True, False))
    assert plain > masked + 0.05


def test_info_nce_in_chunks_is_the_same(tiny_encoder):
    features = columns(tiny_encoder, QUERIES, POSITIVES, NEGATIVES)
    whole, chunked = (InfoNCE(tiny_encoder, chunk_size=size)(features) for size in (None, 3))
    torch.testing.assert_close(whole, chunked)


def test_equal_texts_have_equal_ids_whatever_the_padding():
    tokens = torch.tensor([[2, 7, 8, 3, 0, 0], [0, 0, 2, 7, 8, 3], [2, 8, 7, 3, 0, 0], [2, 7, 8, 3, 3, 0]])
    mask = torch.tensor([[1] * 4 + [0] * 2, [0] * 2 + [1] * 4, [1] * 4 + [0] * 2, [1] * 5 + [0]])
    ids = text_ids({"input_ids": tokens, "attention_mask": mask}).tolist()
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3, "another order or another length is another text"
    narrow = text_ids({"input_ids": tokens[:1, :4], "attention_mask": mask[:1, :4]}).tolist()
    assert narrow == ids[:1]


def test_different_texts_have_different_ids():
    """All 30^3 texts of three tokens, and their prefixes."""
    tokens = torch.cartesian_prod(*[torch.arange(30)] * 3)
    lengths = torch.tensor([3, 2, 1])
    found = set()
    for length in lengths:
        mask = (torch.arange(3) < length).long().expand_as(tokens)
        found |= set(text_ids({"input_ids": tokens, "attention_mask": mask}).tolist())
    assert len(found) == 30**3 + 30**2 + 30


@pytest.mark.parametrize(
    ("function", "given"), [(losses.pearson, {}), (losses.rank_kl, {"temperature": 0.1}), (losses.pro, {})]
)
def test_pair_loss_equals_its_function(tiny_encoder, function, given):
    loss = PairLoss(tiny_encoder, function, **given)
    found = loss(columns(tiny_encoder, LEFT, RIGHT), SCORES)
    expected = function((unit(tiny_encoder, LEFT) * unit(tiny_encoder, RIGHT)).sum(dim=-1), SCORES, **given)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(tiny_encoder, found), gradients(tiny_encoder, expected), rtol=1e-4, atol=1e-5)
    assert loss.get_config_dict() == {"loss": function.__name__, **given}


@pytest.mark.parametrize("mid_nce", [0, 1])
def test_similarity_equals_the_weighted_sum(tiny_encoder, mid_nce):
    loss = CoDiEmbSimilarity(tiny_encoder, mid_nce=mid_nce, mid_nce_temperature=0.5)
    found = loss(columns(tiny_encoder, LEFT, RIGHT), SCORES)
    tokens = tokenize(tiny_encoder, [Text(text, "", None) for text in LEFT + RIGHT])
    final, middle = (normalize(e, dim=-1) for e in embed(tiny_encoder, tokens.micro_batches, tokens.place, True))
    cosine = (final[:4] * final[4:]).sum(dim=-1)
    texts = list(dict.fromkeys(LEFT + RIGHT))
    ids = torch.tensor([texts.index(text) for text in LEFT + RIGHT])
    parts = [
        2 * losses.pearson(cosine, SCORES),
        5 * losses.rank_kl(cosine, SCORES),
        0.5 * losses.pro(cosine, SCORES),
        mid_nce * losses.mid_nce(middle[:4], middle[4:], SCORES, left_ids=ids[:4], right_ids=ids[4:], temperature=0.5),
    ]
    assert mid_nce == 0 or parts[3] > 0.1
    torch.testing.assert_close(found, sum(parts))
    torch.testing.assert_close(
        gradients(tiny_encoder, found), gradients(tiny_encoder, sum(parts)), rtol=1e-3, atol=1e-5
    )
    assert not tiny_encoder[0].config.output_hidden_states, "left as it was found"


BAD_COLUMNS = {
    "query alone": (lambda model: InfoNCE(model), [QUERIES], None, "1 text column(s) without labels, expected a query"),
    "one positive of two": (lambda model: InfoNCE(model, positives=2), [QUERIES, POSITIVES], None, "2 positive(s)"),
    "labels for InfoNCE": (lambda model: InfoNCE(model), [LEFT, RIGHT], SCORES, "and labels, expected a query"),
    "pairs without labels": (
        lambda model: CoDiEmbSimilarity(model),
        [LEFT, RIGHT],
        None,
        "without labels, expected two",
    ),
    "three sides": (lambda model: PairLoss(model, losses.pro), [LEFT, RIGHT, LEFT], SCORES, "3 text column(s)"),
    "scores up to 5": (lambda model: CoDiEmbSimilarity(model), [LEFT, RIGHT], 5 * SCORES, "divide the column"),
    "no score": (lambda model: PairLoss(model, losses.pearson), [LEFT, RIGHT], SCORES * torch.nan, "of 0 to 1"),
    "two scores": (lambda model: PairLoss(model, losses.pearson), [LEFT, RIGHT], SCORES.expand(2, 4).T, "one number"),
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
def test_wrong_columns_are_one_clear_error(tiny_encoder, case):
    make, texts, labels, words = BAD_COLUMNS[case]
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        make(tiny_encoder)(columns(tiny_encoder, *texts), labels)
    assert "\n" not in str(error.value)


def test_features_without_padded_tokens_are_refused():
    with pytest.raises(ValueError, match="unpad_inputs = False"):
        text_ids({"input_ids": torch.zeros(1, 9), "cu_seq_lens_q": torch.tensor([0, 4, 9])})


@pytest.mark.parametrize("wrong", [{"pearsn": 1}, {"pearson": 0, "rank_kl": 0, "pro": 0, "mid_nce": 0}])
def test_wrong_settings_are_refused_at_once(tiny_encoder, wrong):
    with pytest.raises(ValueError, match=r"pearsn|all weights are 0"):
        CoDiEmbSimilarity(tiny_encoder, **wrong)


def sampler_of(lengths, world, **given):
    """As the trainer builds it, with sentence-transformers' drop_last under torchrun."""
    names = [f"set{number}" for number in range(len(lengths))]
    data = [[{"dataset_name": name, "n": n} for n in range(rows)] for name, rows in zip(names, lengths, strict=True)]
    samplers = [DefaultBatchSampler(range(rows), batch_size=2, drop_last=world > 1) for rows in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(same_dataset, "_processes", lambda: world)
        return SameDatasetBatchSampler(ConcatDataset(data), samplers, seed=5, **given)


def on_devices(sampler, world):
    """The batches of each device, dealt by accelerate as in training."""
    shards = [BatchSamplerShard(sampler, world, device, even_batches=False) for device in range(world)]
    dealt = [list(shard) for shard in shards]
    assert {len(batches) for batches in dealt} == {len(shard) for shard in shards} == {len(sampler) / world}
    return dealt


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), min_size=1, max_size=4),
    st.integers(1, 5),
    st.sampled_from(["proportional", "round_robin", "temperature", "weights"]),
)
def test_devices_agree_and_every_row_is_used(sets, world, schedule):
    lengths, extra = zip(*sets, strict=True)
    sizes = {f"set{number}": world + more for number, more in enumerate(extra)}
    weights = {name: number + 1.0 for number, name in enumerate(sizes)}
    sampler = sampler_of(lengths, world, batch_sizes=sizes, schedule=schedule, weights=weights)
    ends = list(itertools.accumulate(lengths))
    for epoch in range(2):
        sampler.set_epoch(epoch)
        seen, batches, repeated = Counter(), Counter(), defaultdict(int)
        for step in zip(*on_devices(sampler, world), strict=True):
            assert all(step), "a device without rows"
            rows = [row for batch in step for row in batch]
            (number,) = {next(n for n, end in enumerate(ends) if row < end) for row in rows}
            name = f"set{number}"
            assert len(rows) <= max(sizes[name], world)
            assert max(map(len, step)) - min(map(len, step)) <= 1
            repeated[name] += len(rows) - len(set(rows))
            batches[name] += 1
            seen.update(set(rows))
        if epoch == 0 or schedule == "proportional":  # a stream of several passes goes on from epoch to epoch
            assert set(seen) == set(range(sum(lengths)))
        assert batches == {name: counts["batches"] for name, counts in sampler.counts.items()}
        if schedule == "proportional":
            assert set(seen.values()) == {1}
            assert repeated == {name: counts["repeated"] for name, counts in sampler.counts.items()}


def test_the_number_of_devices_does_not_change_the_steps():
    one, four = (
        [sorted(itertools.chain(*step)) for step in zip(*on_devices(sampler, world), strict=True)]
        for world, sampler in (
            (world, sampler_of([21, 14], world, batch_sizes={"set0": 8, "set1": 5})) for world in (1, 4)
        )
    )
    assert one == four


def test_epochs_differ_and_seeds_count():
    sampler = sampler_of([20, 9], 2)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first


@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_epoch_is_the_rest_of_that_epoch(world):
    """As transformers does it: skip the steps done, then set the epoch."""
    sampler = sampler_of([20, 9], world)
    dealt = sampler if world == 1 else BatchSamplerShard(sampler, world, 1, even_batches=False)
    loader = DataLoaderShard(sampler.dataset, batch_sampler=dealt, collate_fn=lambda rows: [row["n"] for row in rows])
    loader.set_epoch(1)
    whole = list(loader)
    loader.set_epoch(0)
    assert list(loader) != whole
    resumed = skip_first_batches(loader, 3)
    resumed.set_epoch(1)
    assert list(resumed) == whole[3:]


def test_processes_that_the_trainer_does_not_join_are_refused(monkeypatch):
    """transformers does so, with a warning only, where torchrun meets no GPU and no `use_cpu`."""
    monkeypatch.setattr(same_dataset, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="set use_cpu=True"):
        SameDatasetBatchSampler(ConcatDataset([[{}]]), [DefaultBatchSampler(range(1), batch_size=2, drop_last=True)])


def test_what_is_dropped_and_repeated_is_counted():
    """10 rows in batches of 8 on 4 devices leave 2, so 2 are repeated; 9 rows would leave 1, which gets a companion."""
    given = {"batch_sizes": {"set0": 8, "set1": 8}}
    assert [c["repeated"] for c in sampler_of([10, 9], 4, **given).counts.values()] == [2, 2]
    dropped = sampler_of([10, 9], 4, drop_last=True, **given)
    assert [(c["dropped"], c["repeated"]) for c in dropped.counts.values()] == [(2, 0), (1, 0)]
    assert len(dropped) == 2 * 4


def test_without_batch_sizes_it_is_the_size_per_device_times_devices():
    assert [c["batch size"] for c in sampler_of([10, 9], 3).counts.values()] == [6, 6]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch_sizes": {"st0": 4}}, "got the data set 'st0', expected one of set0, set1"),
        ({"batch_sizes": {"set1": 1}}, "expected at least one row for each of 2 device(s)"),
        ({"schedule": "paired"}, "got 'paired', expected one of proportional"),
        ({"schedule": "weights", "weights": {"set0": 1}}, "got none for 'set1'"),
        ({"lengths": [3, 0]}, "no rows in data set number 1"),
    ],
)
def test_wrong_sampler_settings_are_refused(given, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        sampler_of(given.pop("lengths", [10, 9]), 2, **given)


def test_another_batch_sampler_is_refused():
    rows = Dataset.from_dict({"query": ["a", "b"], "dataset_name": ["set0"] * 2})
    with pytest.raises(ValueError, match="batch_sampler: got one of its own"):
        SameDatasetBatchSampler(ConcatDataset([rows]), [NoDuplicatesBatchSampler(rows, 2, False)])


def test_a_training_run_lowers_both_losses(tiny_encoder, tmp_path):
    search = Dataset.from_dict({"query": QUERIES, "positive": POSITIVES, "negative": NEGATIVES})
    pairs = Dataset.from_dict({"sentence1": LEFT, "sentence2": RIGHT, "score": SCORES.tolist()})
    loss = {"search": InfoNCE(tiny_encoder, temperature=0.2), "pairs": CoDiEmbSimilarity(tiny_encoder)}

    def values():
        with torch.no_grad():
            features = [columns(tiny_encoder, QUERIES, POSITIVES, NEGATIVES), columns(tiny_encoder, LEFT, RIGHT)]
            return loss["search"](features[0]).item(), loss["pairs"](features[1], SCORES).item()

    before = values()
    trainer = SentenceTransformerTrainer(
        model=tiny_encoder,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=10,
            learning_rate=1e-3,
            multi_dataset_batch_sampler=partial(SameDatasetBatchSampler, batch_sizes={"search": 3, "pairs": 4}),
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
        train_dataset={"search": search, "pairs": pairs},
        loss=loss,
    )
    trainer.train()
    assert trainer.state.global_step == 10 * (2 + 1)
    after = values()
    assert after[0] < before[0] - 0.1
    assert after[1] < before[1] - 0.1


@pytest.mark.slow
def test_the_script_of_the_docs_runs(tiny_model_folder, tiny_encoder, tmp_path):
    page = Path(__file__).parents[2] / "docs" / "integrations.md"
    (script,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert "sentence-transformers/all-MiniLM-L6-v2" in script
    script = script.replace("sentence-transformers/all-MiniLM-L6-v2", str(tiny_model_folder))
    (tmp_path / "mine.py").write_text(script, encoding="utf-8")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, env=environment, timeout=120, check=True)
    model = SentenceTransformer(str(tmp_path / "runs" / "mine" / "model"), device="cpu")
    assert model.encode(["it runs"]).shape == (1, 16)
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), tiny_encoder.parameters(), strict=True)]
    assert sum(changed) > 30

"""Models are analysed as if every text went through alone, and compared layer by layer."""

import json
import os
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import Qwen2Config, Qwen2Model

from codiemb import analyze
from codiemb.encoder.model import open_model
from codiemb.errors import DataError, EvaluationError
from codiemb.evaluation import analysis
from codiemb.evaluation.analysis import TOKEN_MEASURES, States, measured, states_of, table
from codiemb.evaluation.figure import figure
from codiemb.evaluation.geometry import sentence_measures, token_measures
from codiemb.evaluation.texts import Entry, Texts, read_texts
from tests.evaluation.test_geometry import naive_spectral, units

WORDS = ["ab", "codi emb", "a", "sentence of some length", "graded pairs", "q", "zyx wvu", "m n o p q r s t"]
TEXTS = [f"{word} {letter}" for word in WORDS for letter in "abc"]


@pytest.fixture
def decoder_folder(tiny_encoder, tmp_path):
    """A random Qwen2 of 2 layers that pools the last token."""
    tiny_encoder.tokenizer.save_pretrained(tmp_path / "parts")
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(vocab_size=80, intermediate_size=16, initializer_range=0.3, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen2Model(config).save_pretrained(tmp_path / "parts")
    modules = [Transformer(str(tmp_path / "parts")), Pooling(12, "lasttoken")]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "decoder"), create_model_card=False)
    return tmp_path / "decoder"


def one_at_a_time(encoder, text, prompt):
    """All hidden states [layer, token, dim] of a text as the model itself gives them, and the final embedding."""
    with torch.no_grad():
        tokens = encoder.tokenizer(prompt + text, return_tensors="pt")
        hidden = encoder[0].model(**tokens, output_hidden_states=True).hidden_states
    return torch.cat(hidden), encoder.encode(text, prompt=prompt or None, convert_to_tensor=True)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("threads", [1, 2])
def test_states_are_those_of_one_text_at_a_time(kind, threads, tiny_model_folder, decoder_folder, monkeypatch):
    """With a prompt for queries, in pieces of 7 texts; on two threads micro-batches run side by side."""
    monkeypatch.setattr(analysis, "_TEXTS_AT_ONCE", 7)
    encoder = open_model(str(tiny_model_folder if kind == "encoder" else decoder_folder), dtype=torch.float32)
    encoder.prompts = {"query": "w: ", "document": ""}
    entries = [Entry(text, "query" if number % 2 else "document") for number, text in enumerate(TEXTS)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        states = states_of(encoder, Texts(entries, None), "tiny")
    finally:
        torch.set_num_threads(before)
    assert len(states.layers) == (4 if kind == "encoder" else 3)
    for place, entry in enumerate(entries):
        hidden, final = one_at_a_time(encoder, entry.text, encoder.prompts[entry.role])
        torch.testing.assert_close(states.pooled[place], final, rtol=0, atol=1e-5)
        for number, layer in enumerate(hidden):
            pooled = layer.mean(dim=0) if kind == "encoder" else layer[-1]
            torch.testing.assert_close(states.layers[number][place], pooled, rtol=0, atol=1e-5)
            own = token_measures(layer[None], torch.ones(1, len(layer), dtype=torch.bool))
            expected = torch.stack([own[name][0] for name in TOKEN_MEASURES])
            torch.testing.assert_close(states.tokens[place, number], expected, rtol=1e-3, atol=1e-5)
    assert float(torch.pdist(states.pooled).min()) > 1e-3, "the texts must differ for their order to be tested"


def test_means_over_texts_by_hand(tiny_encoder):
    """One text has a single token, so its cosine does not count; conditions 2 and 8 have the geometric mean 4."""
    tokens = torch.tensor([[[0.5, 2, 1.5, 0.4, 2]], [[torch.nan, 1, 1, 0, 8]]], dtype=torch.float64)
    vectors = torch.tensor([[1.0, 0], [1, 1]])
    found = measured(analysis.States([vectors], vectors, tokens), Texts([], None))
    of_tokens = {name: value for name, value in found["layers"][0].items() if name.startswith("token_")}
    assert of_tokens == {
        "token_cosine": 0.5,
        "token_rank": 1.5,
        "token_effective_rank": 1.25,
        "token_svd_entropy": pytest.approx(0.2),
        "token_condition_number": pytest.approx(4),
    }
    assert found["pooled"] == sentence_measures(vectors)
    tokens[0, 0, 0] = torch.nan
    found = measured(analysis.States([vectors], vectors, tokens), Texts([], None))
    assert found["layers"][0]["token_cosine"] is None


@pytest.fixture
def texts_file(tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return tmp_path / "texts.txt"


def shallower(folder, out):
    """The same model without its last layer."""
    encoder = SentenceTransformer(str(folder), device="cpu")
    encoder[0].model.encoder.layer = encoder[0].model.encoder.layer[:2]
    encoder[0].model.config.num_hidden_layers = 2
    encoder.save(str(out), create_model_card=False)
    return out


def test_geometry_json_holds_every_model_against_the_first(tiny_model_folder, texts_file, tmp_path):
    """The shallower model has the reference's layers, so CKA is 1 where they are set against each other: its layers 0,
    1 and 2 with 0, 2 (half of three, rounded) and 3."""
    models = [tiny_model_folder, shallower(tiny_model_folder, tmp_path / "two"), tiny_model_folder]
    returned = analyze(models, texts_file, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "geometry.json").read_text())
    assert content == returned
    assert content["texts"] == 24
    assert [model["model"] for model in content["models"]] == [str(model) for model in models]
    first, two, again = content["models"]
    assert again == first
    assert [layer["layer"] for layer in first["layers"]] == [0, 1, 2, 3]
    for layer, same in zip(two["layers"], first["layers"], strict=False):
        assert layer == pytest.approx(same, rel=1e-3, abs=1e-4)
    assert two["pooled"] != first["pooled"]
    keys = {"rank", "effective_rank", "svd_entropy", "condition_number", "cosine", "uniformity", "iso_score", "hubness"}
    assert first["pooled"].keys() == keys
    assert first["layers"][0].keys() == {"layer", *keys, *(f"token_{name}" for name in TOKEN_MEASURES)}
    likenesses = content["cka"]["models"]
    assert content["cka"]["reference"] == str(tiny_model_folder)
    assert [[layer["reference_layer"] for layer in model["layers"]] for model in likenesses] == [
        [0, 2, 3],
        [0, 1, 2, 3],
    ]
    of_two, of_itself = ([layer["cka"] for layer in model["layers"]] for model in likenesses)
    assert of_itself == pytest.approx([1, 1, 1, 1])
    assert of_two[0] == pytest.approx(1)
    assert max(of_two[1:]) < 0.999
    vectors = torch.from_numpy(SentenceTransformer(str(tiny_model_folder), device="cpu").encode(TEXTS))
    for name, expected in naive_spectral(vectors).items():
        assert first["pooled"][name] == pytest.approx(expected, rel=1e-3), name
    unit = units(vectors)
    off_diagonal = (unit @ unit.T)[~np.eye(24, dtype=bool)]
    assert first["pooled"]["cosine"] == pytest.approx(off_diagonal.mean(), abs=1e-6)
    drawing = ElementTree.parse(tmp_path / "out" / "geometry.svg").getroot()
    lines = drawing.findall(".//{*}polyline")
    assert len(lines) == 13 * 3 + 2, "5 measures of tokens and 8 of texts of three models, CKA of two with the first"
    assert [len(line.get("points").split()) for line in lines[:3]] == [4, 3, 4]
    rings = [circle for circle in drawing.iterfind(".//{*}circle") if circle.get("class").startswith("line ")]
    assert len(rings) == 8 * 3 + 2
    shown = table(content)
    assert shown.count("pooled") == 3
    assert shown.count("cka") == 2
    assert len(shown.splitlines()) == 2 * (1 + 1 + 5 + 1 + 6) + (1 + 1 + 4 + 1 + 5) + 2


@pytest.mark.parametrize("vectors", [torch.randn(4, 1), torch.zeros(4, 3)])
def test_what_vectors_have_no_measure_of_is_null(vectors):
    """One dimension has no IsoScore, and zeros have no spectrum: JSON has no nan."""
    states = States([vectors, vectors], vectors, torch.ones(4, 2, len(TOKEN_MEASURES)))
    found = measured(states, Texts([Entry(word) for word in "abcd"], None))
    assert None in found["pooled"].values()
    assert found["layers"][1]["iso_score"] == found["pooled"]["iso_score"]
    content = {"models": [{"model": "a", **found}], "cka": {"reference": "a", "models": []}}
    json.dumps(content, allow_nan=False)
    assert "nan" not in figure(content)
    assert "-" in table(content).split()


def test_a_name_that_no_file_can_hold_is_written_cleaned(tiny_model_folder, texts_file, tmp_path, monkeypatch):
    """A path that is not UTF-8, or that holds what XML has no place for, is met when all the work is done."""
    monkeypatch.setattr(analysis, "locate", lambda name: str(tiny_model_folder))
    analyze([os.fsdecode(b"mod\xe9le\x01")], texts_file, tmp_path)
    content = json.loads((tmp_path / "geometry.json").read_text(encoding="utf-8"))
    assert content["models"][0]["model"] == content["cka"]["reference"] == "mod\ufffdle\ufffd"
    assert "mod\ufffdle\ufffd" in "".join(ElementTree.parse(tmp_path / "geometry.svg").getroot().itertext())


def test_texts_are_lines_or_objects_or_records_and_equal_ones_count_once(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo \none\n")
    assert read_texts(tmp_path / "a.txt") == ([Entry("one"), Entry("two")], None)
    rows = [{"text": "one"}, {"_id": "7", "title": "The", "text": "two"}, {"text": " "}, {"text": "one"}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_texts(tmp_path / "b.jsonl") == ([Entry("one"), Entry("The two")], None)
    rows = [
        {"query": "q", "positives": ["p", "s"], "negatives": ["n"], "instruction": "find"},
        {"query": "q", "positives": ["p"]},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries, pairs = read_texts(tmp_path / "c.jsonl")
    assert entries == [Entry("q", "query", "find"), Entry("p"), Entry("s"), Entry("n"), Entry("q", "query")]
    assert pairs.tolist() == [[0, 1], [0, 2], [4, 1]]


def test_pairs_of_a_low_score_do_not_belong_together(tmp_path):
    """Of 5 the scores from 4 on; where all are 0, none."""
    rows = [{"query": f"q{n}", "positives": [f"p{n}"], "positive_scores": [n]} for n in (5, 3, 4, 0)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_texts(tmp_path / "a.jsonl").pairs.tolist() == [[0, 1], [4, 5]]
    (tmp_path / "b.jsonl").write_text(json.dumps(rows[3]) + "\n")
    assert read_texts(tmp_path / "b.jsonl").pairs is None


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "one\ntwo\n", r"a.csv: got a name that ends in '.csv', expected a line each \(.txt\)"),
        ("a.txt", "one\none\n", r"a.txt: got 1 text\(s\), expected at least two"),
        ("a.txt", "", r"got 0 text\(s\)"),
        ("a.jsonl", '{"text": "one"}\n{"text": 2}\n', r"a.jsonl, line 2, text: got .* expected a text"),
        ("a.jsonl", '{"sentence": "one"}\n', r"a.jsonl, line 1, query: got no query"),
        ("a.jsonl", "one\n", r"a.jsonl, line 1: got invalid JSON"),
    ],
)
def test_a_file_without_texts_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        read_texts(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.txt: got no such file"):
        read_texts(tmp_path / "none.txt")


def test_a_model_whose_layers_cannot_be_pooled_is_refused(tiny_encoder, texts_file):
    """The states of a model without pooling cannot be made one vector a text."""
    tokens = SentenceTransformer(modules=[tiny_encoder[0]], device="cpu")
    with pytest.raises(EvaluationError, match=r"model bare: got Transformer, expected a Transformer and a Pooling"):
        states_of(tokens, read_texts(texts_file), "bare")

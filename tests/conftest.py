"""A tiny random encoder, built here: the network is not a fixture."""

import os
import string

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries are imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does: threads that wait sleep

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

HIDDEN = 16


@pytest.fixture(autouse=True)
def cache_of_the_tests(monkeypatch, tmp_path_factory):
    """Records are cached beside the tests' other files, never in the user's home."""
    monkeypatch.setenv("CODIEMB_CACHE", str(tmp_path_factory.getbasetemp() / "codiemb-cache"))


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory):
    """A SentenceTransformer: BERT of 3 layers and width 16, mean pooling, one token a letter, no dropout.

    The weights are drawn wide, so that different texts get different embeddings.
    """
    parts, folder = tmp_path_factory.mktemp("tiny-parts"), tmp_path_factory.mktemp("tiny")
    tokenizer = _letter_tokenizer()
    tokenizer.save_pretrained(parts)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(parts)
    model = SentenceTransformer(modules=[Transformer(str(parts)), Pooling(HIDDEN, "mean")], device="cpu")
    model.save(str(folder), create_model_card=False)
    return folder


@pytest.fixture
def tiny_encoder(tiny_model_folder):
    """A fresh copy of the tiny model, in evaluation mode."""
    return SentenceTransformer(str(tiny_model_folder), device="cpu").eval()


def _letter_tokenizer():
    pieces = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase), *string.digits, *":.,?"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {piece: number for number, piece in enumerate(special + pieces)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )


def peft_missing() -> str:
    """Why adapters cannot be tested here, or nothing."""
    from codiemb.encoder.adapters import require_peft
    from codiemb.errors import ConfigError

    try:
        require_peft()
    except ConfigError as error:
        return str(error)
    return ""


needs_peft = pytest.mark.skipif(bool(peft_missing()), reason=peft_missing())

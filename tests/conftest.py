"""A tiny random BERT as a SentenceTransformer, made here: no test needs a download."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ":", "query", *(f"word{number}" for number in range(30))]


def make_model_folder(folder, layers=3, hidden=16):
    """Writes a SentenceTransformer folder (mean pooling) of a random BERT over `WORDS`."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    plain = folder.parent / f"{folder.name}-transformers"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names).save_pretrained(plain)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(plain)
    transformer = Transformer(str(plain))
    SentenceTransformer(modules=[transformer, Pooling(hidden, "mean")], device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny_encoder(tiny_model_folder):
    return SentenceTransformer(str(tiny_model_folder), device="cpu")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Records are cached in a folder of the test run, not in the user's."""
    os.environ["CODIEMB_CACHE"] = str(tmp_path_factory.mktemp("cache"))

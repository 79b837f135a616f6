"""The checks on a model folder refuse no sound model: other architectures, other heads, other dtypes."""

import shutil

import pytest
import torch

from codiemb.encoder.model import open_model
from codiemb.errors import CheckpointError

SIZES = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
T5_SIZES = {"vocab_size": 40, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
FORMS = {
    "BERT for masked words": ("BertForMaskedLM", SIZES),
    "BERT for classes": ("BertForSequenceClassification", SIZES),
    "XLM-R without pooler": ("XLMRobertaForMaskedLM", SIZES | {"pad_token_id": 0}),
    "MPNet": ("MPNetModel", SIZES),
    "ModernBERT": ("ModernBertModel", SIZES | {"pad_token_id": 0}),
    "T5": ("T5EncoderModel", T5_SIZES),
    "Qwen2": ("Qwen2Model", SIZES | {"num_key_value_heads": 1}),
    "Qwen3 with a tied head": ("Qwen3ForCausalLM", SIZES | {"num_key_value_heads": 1, "head_dim": 4}),
}


@pytest.fixture
def saved(tmp_path, model_folder):
    """Saves a random model of a class beside the tiny tokenizer."""

    def saved(name: str, sizes: dict, dtype: torch.dtype = torch.float32):
        import transformers

        kind = getattr(transformers, name)
        model = kind(kind.config_class(**sizes)).to(dtype)
        model.save_pretrained(tmp_path)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(model_folder / file, tmp_path)
        return tmp_path

    return saved


@pytest.mark.parametrize("form", FORMS)
def test_other_architectures_and_heads(saved, form):
    encoder = open_model(str(saved(*FORMS[form])))
    assert encoder.encode(["the cat"]).shape == (1, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(saved, dtype):
    encoder = open_model(str(saved("BertModel", SIZES, dtype)))
    assert encoder.encode(["the cat"]).shape == (1, 8)


def test_a_model_that_lacks_layers_is_refused_in_other_architectures_too(saved):
    from transformers import Qwen2Config

    folder = saved("Qwen2Model", SIZES | {"num_key_value_heads": 1})
    config = Qwen2Config.from_pretrained(folder)
    config.num_hidden_layers, config.layer_types = 3, ["full_attention"] * 3
    config.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"no weights for layers\.2"):
        open_model(str(folder))

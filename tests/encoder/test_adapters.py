"""What is trained when not all of the encoder is, and that the rest stays as it was."""

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize

from codiemb.config import ModelSection
from codiemb.encoder.adapters import adapt, has_adapters, merge_adapters, without_head
from codiemb.encoder.engine import embed
from codiemb.encoder.model import load_encoder, save_encoder
from codiemb.encoder.tokens import tokenize
from codiemb.errors import ConfigError
from tests.conftest import HIDDEN, needs_peft
from tests.encoder.test_engine import texts_of_all_roles

TEXTS = ["abc", "a longer text", "codi emb"]


def section(base="a", **settings):
    return ModelSection(base=str(base), **settings)


def trained(encoder):
    return {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}


def filled(encoder):
    """Adapters that change the embeddings, as after training; new ones change nothing."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    return encoder


def test_without_settings_everything_is_trained_and_nothing_is_added(tiny_encoder):
    names = list(dict(tiny_encoder.named_parameters()))
    adapt(tiny_encoder, section())
    assert list(dict(tiny_encoder.named_parameters())) == names
    assert trained(tiny_encoder) == set(names)


# ---- LoRA ----


@needs_peft
@pytest.mark.parametrize(
    ("target_modules", "modules"),
    [
        (None, {"query", "value"}),
        (["key", "value"], {"key", "value"}),
        ("all-linear", {"query", "key", "value", "dense"}),
    ],
)
def test_only_adapters_are_trained(tiny_encoder, target_modules, modules):
    before = tiny_encoder.encode(TEXTS)
    adapt(tiny_encoder, section(lora={"r": 2, "target_modules": target_modules}))
    names = trained(tiny_encoder)
    assert all("lora_" in name for name in names)
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names} == modules
    assert (tiny_encoder.encode(TEXTS) == before).all(), "new adapters change the base"


@needs_peft
def test_rank_and_alpha_scale_the_adapters(tiny_encoder, tiny_model_folder):
    """W + (alpha / r) B A, worked out by hand: with r 2 and alpha 8, four times the product."""
    base = tiny_encoder[0].model.encoder.layer[1].attention.self.value.weight.detach().clone()
    adapt(tiny_encoder, section(lora={"r": 2, "alpha": 8}))
    filled(tiny_encoder)
    value = tiny_encoder[0].model.encoder.layer[1].attention.self.value
    a, b = value.lora_A["default"].weight.detach(), value.lora_B["default"].weight.detach()
    assert a.shape == (2, HIDDEN)
    merge_adapters(tiny_encoder)
    merged = tiny_encoder[0].model.encoder.layer[1].attention.self.value.weight
    torch.testing.assert_close(merged, base + 4 * b @ a, rtol=0, atol=1e-5)


@needs_peft
def test_merged_weights_give_the_embeddings_of_the_adapters(tiny_encoder, tiny_model_folder, tmp_path):
    torch.manual_seed(0)  # some draws of the adapters are wide enough for roundings above the tolerance
    names = list(tiny_encoder.state_dict())
    before = tiny_encoder.encode(TEXTS)
    adapt(tiny_encoder, section(lora={"r": 2, "target_modules": "all-linear"}))
    adapted = filled(tiny_encoder).encode(TEXTS)
    assert abs(adapted - before).max() > 0.1, "the adapters do nothing, so nothing is compared"
    merge_adapters(tiny_encoder)
    assert not has_adapters(tiny_encoder)
    assert list(tiny_encoder.state_dict()) == names
    assert tiny_encoder.encode(TEXTS) == pytest.approx(adapted, abs=1e-4)
    save_encoder(tiny_encoder, tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    assert SentenceTransformer(str(tmp_path)).encode(TEXTS) == pytest.approx(adapted, abs=1e-4)


@needs_peft
def test_a_saved_model_with_adapters_loads_from_any_working_directory(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_model_folder.parent)
    encoder = filled(load_encoder(section(f"./{tiny_model_folder.name}", lora={"r": 2}), "cpu"))
    save_encoder(encoder, tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    monkeypatch.chdir(tmp_path)
    loaded = SentenceTransformer("saved", device="cpu")
    assert loaded.encode(TEXTS) == pytest.approx(encoder.eval().encode(TEXTS), abs=1e-5)


@needs_peft
def test_a_base_of_adapters_is_merged_and_all_of_it_trained(tiny_model_folder, tmp_path):
    adapted = filled(load_encoder(section(tiny_model_folder, lora={"r": 2}), "cpu"))
    save_encoder(adapted, tmp_path)
    encoder = load_encoder(section(tmp_path), "cpu")
    assert not has_adapters(encoder)
    assert trained(encoder) == set(dict(SentenceTransformer(str(tiny_model_folder)).named_parameters()))
    assert encoder.eval().encode(TEXTS) == pytest.approx(adapted.eval().encode(TEXTS), abs=1e-5)
    save_encoder(encoder, tmp_path / "merged")
    again = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert again.encode(TEXTS) == pytest.approx(adapted.encode(TEXTS), abs=1e-5), "saved under names that are not read"
    with pytest.raises(ConfigError, match="got a folder of adapters, expected a model with weights of its own"):
        load_encoder(section(tmp_path, lora={"r": 2}), "cpu")


@needs_peft
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_dropout_of_a_base_of_adapters_is_set(tiny_model_folder, tmp_path, dropout):
    save_encoder(load_encoder(section(tiny_model_folder, lora={"r": 2}), "cpu"), tmp_path)
    encoder = load_encoder(section(tmp_path, dropout={"hidden": dropout, "attention": dropout}), "cpu")
    found = {module.p for module in encoder.modules() if isinstance(module, torch.nn.Dropout)}
    assert found == {dropout}


# ---- head and frozen backbone ----


def test_a_square_head_starts_as_the_base(tiny_encoder):
    before = tiny_encoder.encode(TEXTS)
    adapt(tiny_encoder, section(head={"dim": HIDDEN}))
    assert len(tiny_encoder) == 3
    assert (tiny_encoder.encode(TEXTS) == before).all()


def test_a_smaller_head_starts_with_the_first_dimensions(tiny_encoder):
    before = tiny_encoder.encode(TEXTS)
    adapt(tiny_encoder, section(head={"dim": 5}))
    assert (tiny_encoder.encode(TEXTS) == before[:, :5]).all()
    assert tiny_encoder.get_embedding_dimension() == 5
    with without_head(tiny_encoder, section(head={"dim": 5})):
        assert (tiny_encoder.encode(TEXTS) == before).all()
    assert tiny_encoder.encode(TEXTS).shape == (3, 5)


def test_a_head_stands_before_a_last_normalize(tiny_encoder, tmp_path):
    tiny_encoder.append(Normalize())
    before = tiny_encoder.encode(TEXTS)
    adapt(tiny_encoder, section(head={"dim": HIDDEN}, freeze_backbone=True))
    assert tiny_encoder.encode(TEXTS) == pytest.approx(before, abs=1e-6)
    with torch.no_grad():
        tiny_encoder[2].linear.weight[0] = 3
    save_encoder(tiny_encoder, tmp_path)
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert [type(module).__name__ for module in loaded] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert loaded.encode(TEXTS) == pytest.approx(tiny_encoder.encode(TEXTS), abs=1e-6)
    assert (loaded.encode(TEXTS) ** 2).sum(axis=1) == pytest.approx(1, abs=1e-5)


def test_a_head_larger_than_the_base_is_refused(tiny_encoder):
    with pytest.raises(ConfigError, match=r"model.head.dim: got 17, expected at most 16"):
        adapt(tiny_encoder, section(head={"dim": 17}))


def test_no_graph_goes_through_a_frozen_backbone(tiny_encoder):
    adapt(tiny_encoder, section(head={"dim": HIDDEN}, freeze_backbone=True))
    assert trained(tiny_encoder) == {"2.linear.weight", "2.linear.bias"}
    seen = []
    tiny_encoder[1].register_forward_hook(lambda module, inputs, output: seen.append(output["sentence_embedding"]))
    tokens = tokenize(tiny_encoder, texts_of_all_roles(tiny_encoder))
    final = embed(tiny_encoder.train(), tokens.micro_batches, tokens.place).final
    assert seen
    assert not any(pooled.requires_grad for pooled in seen)
    final.square().sum().backward()
    assert tiny_encoder[2].linear.weight.grad.abs().min() > 0

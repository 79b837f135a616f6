"""On a GPU the encoder is the ordinary one, and gives what it gives on the processor."""

import pytest
import torch

from codiemb.encoder import cpu
from codiemb.encoder.engine import Text, encode
from codiemb.encoder.model import open_model, save_encoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def test_embeddings_are_those_of_the_processor(tiny_encoder, tmp_path):
    """Attention and dropout made for processors must not run on a GPU; embeddings agree to 1e-3."""
    save_encoder(tiny_encoder, tmp_path / "model")
    texts = [Text("ab " * count, "", 12) for count in range(1, 9)]
    on_processor, on_gpu = (open_model(str(tmp_path / "model"), device=device) for device in ("cpu", "cuda"))
    assert on_gpu[0].config._attn_implementation != cpu.ATTENTION
    assert not [module for module in on_gpu.modules() if isinstance(module, cpu.Dropout)]
    found, expected = encode(on_gpu, texts).cpu(), encode(on_processor, texts)
    assert torch.pdist(expected).min() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)

"""FSDP2 and DeepSpeed ZeRO, through the Trainer's own settings; here is what they need to know of our model.

Both take the mean of the gradients over ranks, as DDP does, so the loss is multiplied by the number of ranks all the
same. Unlike DDP they exchange weights inside the forward pass, so all ranks must run as many micro-batches
(`JointModel` sees to it), and no rank holds a whole encoder: checkpoints are written through a new one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import TrainingArguments

from codiemb.config import Config
from codiemb.distributed import world_size
from codiemb.encoder.model import load_encoder
from codiemb.errors import ConfigError
from codiemb.training.checkpoint import Checkpoint


def require_devices(config: Config) -> None:
    """Refuses FSDP on processors, where accelerate would train without it and say nothing, and one process.

    Raises:
        ConfigError: it names the setting.
    """
    setting = "train.fsdp" if config.train.fsdp else "train.deepspeed"
    if config.train.fsdp and not torch.cuda.is_available():
        raise ConfigError(setting, got="true on processors", expected="GPUs", fix="leave it out to train with DDP")
    if (config.train.fsdp or config.train.deepspeed) and world_size() == 1:
        raise ConfigError(
            setting, got="one process", expected="one per GPU", fix="start with torchrun --nproc-per-node gpu"
        )


def require_same_shards(config: Config, checkpoint: Checkpoint) -> None:
    """Refuses to go on with DeepSpeed on another number of processes, whose files it cannot share out anew.

    Raises:
        ConfigError: with both numbers.
    """
    if config.train.deepspeed and checkpoint.world_size != world_size():
        raise ConfigError(
            "--resume, train.deepspeed",
            got=f"{world_size()} processes",
            expected=f"{checkpoint.world_size}, which wrote {checkpoint.path}",
            fix="start as many, or a new run",
        )


def complete_zero(arguments: TrainingArguments) -> None:
    """Clips under DeepSpeed as without it where its settings do not say; refuses ZeRO-3 that could not write a whole
    model.

    Raises:
        ConfigError: with the setting that lacks.
    """
    zero = getattr(arguments, "hf_deepspeed_config", None)
    if zero is None:
        return
    zero.config.setdefault("gradient_clipping", arguments.max_grad_norm)
    name = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if zero.is_zero3() and not zero.get_value(name):
        raise ConfigError(
            f"train.deepspeed, {name}", got="false", expected="true, because a checkpoint is a whole model"
        )


def unused_parameters(encoder: SentenceTransformer) -> list[torch.nn.Parameter]:
    """Those of a transformer's pooler, which get no gradient; FSDP resumes only where every trained one got some."""
    return [parameter for name, parameter in encoder.named_parameters() if ".pooler." in name]


@contextlib.contextmanager
def loading_whole(arguments: TrainingArguments) -> Iterator[None]:
    """Inside, models are loaded whole; under ZeRO-3 transformers would share them out, and all ranks had to load."""
    zero = getattr(arguments, "hf_deepspeed_config", None)
    if zero is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(zero)


def whole_encoder(config: Config, arguments: TrainingArguments, state: dict[str, Tensor]) -> SentenceTransformer:
    """The encoder with the gathered weights of the model that is trained, on the processor."""
    with torch.random.fork_rng(), loading_whole(arguments):
        encoder = load_encoder(config.model, "cpu")
    prefix = "encoder."
    weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    encoder.load_state_dict(weights)
    return encoder

"""`transformers.Trainer` with the plan as its data, and SentenceTransformer folders as its checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

from codiemb.batching.loader import StepLoader, StepReader
from codiemb.batching.plan import Plan
from codiemb.config import Config
from codiemb.data.store import Records
from codiemb.distributed import agree, barrier, rank, world_size
from codiemb.encoder.model import bf16_pays, idle_parameters, open_model, save_encoder
from codiemb.errors import CheckpointError, ConfigError
from codiemb.training.joint import JointModel
from codiemb.training.metrics import MetricsLog

BALANCE_FILE = "balance.json"
_SET_HERE = {"bf16", "warmup_ratio", "gradient_accumulation_steps", "gradient_checkpointing", "rank_check_steps"}


class JointTrainer(Trainer):
    """Trains one encoder on the steps of a plan.

    Args:
        encoder: the model, trained in place.
        config: the resolved configuration.
        plan: the global batches.
        records: the data by source name.
        callbacks: further callbacks of the Trainer.
    """

    def __init__(
        self,
        encoder: SentenceTransformer,
        config: Config,
        plan: Plan,
        records: dict[str, Records],
        callbacks: list[TrainerCallback],
    ) -> None:
        arguments = training_arguments(config, encoder.device)
        self.step_reader = StepReader(plan, records, encoder, rank(), world_size())
        self.step_log = MetricsLog(Path(config.output_dir) / "metrics.jsonl")
        if config.train.gradient_checkpointing:
            encoder.gradient_checkpointing_enable()
        for parameter in idle_parameters(encoder):
            parameter.requires_grad_(False)
        self.joint = JointModel(encoder, config.losses)
        super().__init__(model=self.joint, args=arguments, callbacks=[self.step_log, *callbacks])
        self.remove_callback(PrinterCallback)  # the log has its own bar
        self.encoder = encoder
        self.rank_check_steps = config.train.rank_check_steps

    def get_train_dataloader(self) -> StepLoader:
        return StepLoader(self.step_reader.plan, self.step_reader, self.args.dataloader_num_workers)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step % self.rank_check_steps == 0:
            held: dict[str, str | int] = {"source": "+".join(batch["source"] for batch in inputs["batches"])}
            agree({"step": self.state.global_step + 1, **held}, f"at step {self.state.global_step + 1}")
        outputs = model(**inputs)
        self.step_log.observe(inputs["batches"], outputs["objectives"])
        return outputs["loss"]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_encoder(self.encoder, folder)
        if self.joint.balance is not None:
            means = {name: mean.tolist() for name, mean in self.joint.balance.means.items()}
            (folder / BALANCE_FILE).write_text(json.dumps(means, indent=2) + "\n", encoding="utf-8")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Written under a temporary name, then renamed: a folder named checkpoint-<step> is always complete."""
        run = Path(str(self.args.output_dir))
        writing = run / ".writing"
        name = f"checkpoint-{self.state.global_step}"
        self.step_log.write()
        self.args.output_dir = str(writing)
        try:
            super()._save_checkpoint(model, trial)
        except OSError as error:
            raise CheckpointError(
                f"{run / name}", got=error, expected="a checkpoint written", fix="free some disk"
            ) from error
        finally:
            self.args.output_dir = str(run)
            barrier()
        if self.args.should_save:
            shutil.rmtree(run / name, ignore_errors=True)
            os.replace(writing / name, run / name)
            shutil.rmtree(writing)
            rotate_checkpoints(str(run), save_total_limit=self.args.save_total_limit, use_mtime=False)
        barrier()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.encoder.load_state_dict(open_model(resume_from_checkpoint, device="cpu", dtype=torch.float32).state_dict())
        if self.joint.balance is not None:
            self.joint.balance.means = read_balance(Path(resume_from_checkpoint))


def training_arguments(config: Config, device: torch.device) -> TrainingArguments:
    """The `train` section as Hugging Face's arguments.

    Raises:
        ConfigError: a value that the Trainer refuses.
    """
    settings = config.train.model_dump(exclude=_SET_HERE)
    bf16 = bf16_pays(device) if config.train.bf16 == "auto" else config.train.bf16
    try:
        arguments = TrainingArguments(
            output_dir=config.output_dir,
            seed=config.seed,
            bf16=bf16,
            use_cpu=device.type == "cpu",
            warmup_steps=config.train.warmup_ratio,
            remove_unused_columns=False,
            disable_tqdm=True,
            logging_nan_inf_filter=False,
            eval_strategy="no",
            ddp_find_unused_parameters=True,
            **settings,
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(
            "train", got=str(error).splitlines()[0], expected="values that transformers accepts"
        ) from None
    trackers = get_available_reporting_integrations()
    if missing := [name for name in arguments.report_to or () if name not in trackers]:
        raise ConfigError(
            "train.report_to",
            got=f"{missing[0]!r}, which is not installed or not known to transformers",
            expected=f"none or one of {', '.join(trackers)}" if trackers else "none",
            fix="install it or change train.report_to",
        )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for torchrun, not for DataParallel
    return arguments


def newest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint with the most steps."""
    checkpoints = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return max(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def read_balance(checkpoint: Path) -> dict[str, Tensor]:
    """The running sizes of the loss parts that a checkpoint holds, as `RunningScale` keeps them.

    Raises:
        CheckpointError: no such file, or no sizes in it.
    """
    file = checkpoint / BALANCE_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        means = {name: torch.tensor([float(count), float(mean)]) for name, (count, mean) in content.items()}
        if not all(bool((mean.isfinite() & (mean >= 0)).all()) for mean in means.values()):
            raise ValueError("a size that is negative or not finite")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"file {file}",
            got="nothing there" if isinstance(error, FileNotFoundError) else error,
            expected="the size of each loss part, because losses.balance is on",
            fix="resume from an earlier checkpoint (remove this one), or start a new run",
        ) from None
    return means


def checkpoint_bytes(encoder: SentenceTransformer) -> int:
    """Disk a resumable checkpoint takes: the weights, and two moments of each trained one."""
    weights = sum(p.numel() * p.element_size() for p in encoder.parameters())
    moments = sum(2 * p.numel() * p.element_size() for p in encoder.parameters() if p.requires_grad)
    return weights + moments

"""`transformers.Trainer` with the plan as its data, and SentenceTransformer folders as its checkpoints."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback

from codiemb.batching.ahead import Ahead
from codiemb.batching.loader import StepLoader, StepReader, signals_wait
from codiemb.batching.plan import Plan
from codiemb.config import Config
from codiemb.data.store import Records
from codiemb.distributed import agree, barrier, keep_losses_in_float32, rank, world_size
from codiemb.encoder.adapters import has_adapters, load_adapters
from codiemb.encoder.gpu import packs
from codiemb.encoder.memory import plan_memory
from codiemb.encoder.model import attention_dropout, bf16_pays, idle_parameters, open_model, save_encoder
from codiemb.errors import CheckpointError, ConfigError
from codiemb.training import checkpoint
from codiemb.training.checkpoint import Checkpoint
from codiemb.training.conflict import ConflictMeter
from codiemb.training.ema import Ema
from codiemb.training.facts import environment_of
from codiemb.training.joint import JointModel
from codiemb.training.metrics import MetricsLog
from codiemb.training.sharding import complete_zero, unused_parameters, whole_encoder

BALANCE_FILE = "balance.json"
# Optimizers that switch between two sets of weights, step inside the backward pass, or want the names of layers.
_WANT_MORE = ("schedule_free", "lomo", "adalomo", "galore", "apollo")
_SET_HERE = {
    "bf16",
    "warmup_ratio",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "rank_check_steps",
    "memory_budget",
    "conflict_every",
}


class JointTrainer(Trainer):
    """Trains one encoder on the steps of a plan.

    Args:
        encoder: the model, trained in place.
        config: the resolved configuration.
        plan: the global batches.
        records: the data by source name.
        facts: what the run is, for the manifest of its checkpoints.
        callbacks: further callbacks of the Trainer.
        before: the checkpoint that it goes on from.
    """

    def __init__(
        self,
        encoder: SentenceTransformer,
        config: Config,
        plan: Plan,
        records: dict[str, Records],
        facts: dict[str, str],
        callbacks: list[TrainerCallback],
        before: Checkpoint | None = None,
    ) -> None:
        arguments = training_arguments(config, encoder.device)
        self.step_log = MetricsLog(Path(config.output_dir) / "metrics.jsonl")
        if config.train.gradient_checkpointing:
            encoder.gradient_checkpointing_enable()
        self.sharded = bool(config.train.fsdp or config.train.deepspeed)
        encoder.sharded = self.sharded  # type: ignore[assignment]  # for threads.at_once, before memory is planned
        for parameter in idle_parameters(encoder) + (unused_parameters(encoder) if self.sharded else []):
            parameter.requires_grad_(False)
        shards = world_size() if self.sharded else 1
        at_most = before.micro_batch_tokens(encoder.device.type) if before else None
        memory = plan_memory(encoder, config.train.memory_budget, arguments.bf16, shards, at_most)
        packed = packs(encoder, arguments.bf16, attention_dropout(encoder))
        self.step_reader = StepReader(plan, records, encoder, rank(), world_size(), memory.micro_batch_tokens, packed)
        self.joint = JointModel(encoder, config.losses, memory, self.sharded, self.step_log.clock.mark)
        averages = config.fusion is not None and "ema" in config.fusion.methods and rank() == 0
        self.ema = Ema(encoder, config.fusion.ema_decay) if config.fusion and averages else None
        ours = [_SettingsOfNow(), self.step_log, *([self.ema] if self.ema else [])]
        super().__init__(model=self.joint, args=arguments, callbacks=[*ours, *callbacks])
        if self.is_fsdp_enabled:
            keep_losses_in_float32(self.accelerator.state.fsdp_plugin)
        self.remove_callback(PrinterCallback)  # the log has its own bar
        if config.train.conflict_every:
            self.add_callback(ConflictMeter(self, config))
        self.encoder = encoder
        self.facts = facts
        self.environment = environment_of(arguments, memory.micro_batch_tokens, packed)
        self.saved_step = before.step if before else None
        self.config = config
        self.rank_check_steps = config.train.rank_check_steps
        self.ahead: Ahead | None = None
        self.workers_start = contextlib.ExitStack()  # holds back signals until loader workers have begun

    def get_train_dataloader(self) -> StepLoader:
        return StepLoader(self.step_reader.plan, self.step_reader, self.args.dataloader_num_workers)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """From its last checkpoint a run has no step to go; the Trainer would do one more."""
        if self.state.global_step < self.state.max_steps:
            with contextlib.ExitStack() as self.workers_start:
                if self.args.dataloader_num_workers:
                    self.workers_start.enter_context(signals_wait())
                super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        """The next step's tokens, made in a thread while the last steps ran."""
        if (
            not self.args.dataloader_num_workers
        ):  # workers are ahead by themselves, and keep one iterator for all epochs
            if self.ahead is None or self.ahead.items is not epoch_iterator:
                self.ahead = Ahead(epoch_iterator)
            epoch_iterator = self.ahead
        samples = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.workers_start.close()
        self.step_log.clock.mark("data")
        return samples

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.step_log.clock.mark("backward")
        return loss

    def _prepare_input(self, data: Any) -> Any:
        """Onto the device; under DeepSpeed and bf16 the Trainer would round labels too."""
        return (
            data.to(self.args.device, non_blocking=True) if isinstance(data, Tensor) else super()._prepare_input(data)
        )

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step % self.rank_check_steps == 0:
            held: dict[str, str | int] = {"source": "+".join(batch["source"] for batch in inputs["batches"])}
            agree({"step": self.state.global_step + 1, **held}, f"at step {self.state.global_step + 1}")
        outputs = model(inputs["batches"], inputs["micro_batches"])
        self.step_log.observe(inputs, outputs["objectives"])
        return outputs["loss"]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        whole = self.encoder if state_dict is None else whole_encoder(self.config, self.args, state_dict)
        save_encoder(whole, folder)
        if self.joint.balance is not None:
            means = {name: mean.tolist() for name, mean in self.joint.balance.means.items()}
            (folder / BALANCE_FILE).write_text(json.dumps(means, indent=2) + "\n", encoding="utf-8")
        if self.ema is not None:
            self.ema.save(folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Written under a temporary name, sealed, then renamed: see `codiemb.training.checkpoint`."""
        run, step = Path(str(self.args.output_dir)), self.state.global_step
        if step == self.saved_step:  # for a signal, and again for the end of the epoch
            return
        written = run / checkpoint.WRITING / f"checkpoint-{step}"
        self.step_log.write()
        self.args.output_dir = str(written.parent)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(run)
        barrier()
        if self.args.should_save:
            _require_every_rank(written, run)
            what = {"facts": self.facts, "environment": self.environment, "scheduled": self._scheduled()}
            checkpoint.seal(written, step=step, world_size=world_size(), **what)
            checkpoint.replace(written, run / written.name)
            checkpoint.keep_newest(run, self.args.save_total_limit, run / written.name)
        barrier()
        self.saved_step = step

    def _scheduled(self) -> bool:
        """Whether a checkpoint of this step is due, and not only written for a signal."""
        strategy, step = self.config.train.save_strategy, self.state.global_step
        every = len(self.step_reader.plan) if strategy == "epoch" else self.state.save_steps
        return strategy != "no" and (step == self.state.max_steps or step % every == 0)

    def save_now(self) -> None:
        """A checkpoint between two steps, unless this step has one."""
        self._save_checkpoint(self.model, None)
        self.callback_handler.on_save(self.args, self.state, self.control)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif has_adapters(self.encoder):
            load_adapters(self.encoder, Path(resume_from_checkpoint))
        else:
            whole = open_model(resume_from_checkpoint, device="cpu", dtype=torch.float32)
            self.encoder.load_state_dict(whole.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.joint.balance is not None:
            content = json.loads((Path(checkpoint) / BALANCE_FILE).read_text(encoding="utf-8"))
            self.joint.balance.means = {name: torch.tensor(mean) for name, mean in content.items()}
        if checkpoint is not None and self.ema is not None:
            self.ema.load(Path(checkpoint))


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
    complete_zero(arguments)
    _require_optimizer(arguments, config.train.optim, config.train.lr_scheduler_type)
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


def _require_optimizer(arguments: TrainingArguments, optim: str, schedule: str) -> None:
    """Refuses an optimizer or a schedule that the Trainer would fail to make when data and model are ready, or that
    wants more of it than steps.

    Raises:
        ConfigError: it names the setting.
    """
    key, expected = "train.optim", "one that is installed and needs its steps alone, as adamw_torch_fused"
    weight = torch.nn.Parameter(torch.zeros(1, device=arguments.device))
    try:
        if optim.startswith(_WANT_MORE):
            raise ValueError("which wants more of a trainer")
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = kind([weight], **settings)
        key, expected = "train.lr_scheduler_type", "one without settings of its own, as linear or cosine"
        get_scheduler(schedule, optimizer, num_warmup_steps=1, num_training_steps=2)
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        got = f"{optim if key == 'train.optim' else schedule} ({str(error).splitlines()[0]})"
        raise ConfigError(key, got=got, expected=expected) from None


class _SettingsOfNow(TrainerCallback):
    """How often to save and to log is what the config says, not what the checkpoint that is resumed from says."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)


def _require_every_rank(written: Path, run: Path) -> None:
    """Refuses a checkpoint without the random state of a rank, from which it could not go on exactly.

    Raises:
        CheckpointError: it names the first such rank.
    """
    ranks = range(world_size()) if world_size() > 1 else ()
    if absent := [number for number in ranks if not (written / f"rng_state_{number}.pth").is_file()]:
        raise CheckpointError(
            f"output_dir {run}",
            got=f"nothing that rank {absent[0]} wrote",
            expected="one disk that all machines share",
            fix="change output_dir",
        )


def checkpoint_bytes(encoder: SentenceTransformer, averaged: bool = False) -> int:
    """Disk a resumable checkpoint takes: the weights (adapters: they alone), and two moments of each trained one; with
    their mean if it is kept."""
    trained = model_bytes(encoder, trained_only=True)
    return (3 if averaged else 2) * trained + (trained if has_adapters(encoder) else model_bytes(encoder))


def model_bytes(encoder: SentenceTransformer, trained_only: bool = False) -> int:
    """Disk the weights take."""
    return sum(p.numel() * p.element_size() for p in encoder.parameters() if p.requires_grad or not trained_only)

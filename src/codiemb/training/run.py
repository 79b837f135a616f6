"""The whole run, from a configuration to a run folder with a trained and evaluated model.

`prepare` reads, checks and plans, and writes nothing. `train` also refuses what depends on devices and disk, then makes
the run folder and fills it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import TrainerCallback, set_seed

from codiemb.batching.plan import Plan
from codiemb.batching.plan_report import PlanReport, plan_report
from codiemb.config import ROLES, Config, Role, Source, dump_config
from codiemb.data.store import Records, load_records
from codiemb.distributed import agree, barrier, on_first, rank, start, world_size
from codiemb.encoder.adapters import merge_adapters, without_head
from codiemb.encoder.allocator import keep_memory
from codiemb.encoder.location import folder_of
from codiemb.encoder.model import load_encoder, max_length, open_model, prompt, save_encoder
from codiemb.errors import ConfigError, DataError
from codiemb.evaluation.suite import Results, evaluate_suite, require_readable
from codiemb.files import told_of_full_disk
from codiemb.fusion.settings import require_base
from codiemb.report.facts import Comparison
from codiemb.suites.suite import load_suite
from codiemb.tasks import TASKS
from codiemb.training import run_folder
from codiemb.training.card import write_card
from codiemb.training.checkpoint import WRITING, clean, keep_newest, keep_scheduled, replace
from codiemb.training.ema import require_same_mean
from codiemb.training.facts import facts_of, require_same_run
from codiemb.training.merging import averaged_encoder, merge_run
from codiemb.training.results import TrainResult, compare_run, report_run
from codiemb.training.sharding import loading_whole, require_devices, require_same_shards
from codiemb.training.stop import StopOnSignal
from codiemb.training.trainer import JointTrainer, checkpoint_bytes, model_bytes, training_arguments
from codiemb.versions import versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A run that can start: everything is read and checked."""

    config: Config
    encoder: SentenceTransformer
    records: dict[str, Records]
    plan: Plan
    suite: Sequence[Source]
    dev: Sequence[Source]
    digests: dict[str, str]  # of the data sets of suite and dev
    bf16: bool
    report: PlanReport


def prepare(config: Config, device: str | None = None) -> Prepared:
    """Reads data and model (onto `device`, else the fastest there is), and plans the run; writes nothing into it.

    Raises:
        CodiembError: whatever is wrong with the configuration, the data or the model.
    """
    records = {source.name: load_records(source) for source in config.data}
    for name, source in records.items():
        if TASKS[source.source.task].shape == "pairs" and len(source) < 2:
            raise DataError(f"source {name!r}", got="one pair", expected="at least two, to be put in order")
    suite = load_suite(config.evaluation.suite, config.data_root) if config.evaluation.suite else []
    dev = load_suite(config.fusion.suite, config.data_root) if config.fusion and config.fusion.suite else []
    digests = {
        f"data set {name!r} of {section}": digest
        for section, sources in (("evaluation", suite), ("fusion", dev))
        for name, digest in require_readable(sources).items()
    }
    set_seed(config.seed)
    encoder = load_encoder(config.model, device)
    _require_fitting(config, encoder)
    if config.fusion:
        require_base(folder_of(config.model.base), config.fusion.methods)
    bf16 = training_arguments(config, encoder.device).bf16  # refuses what transformers would refuse later
    lengths = {name: len(source) for name, source in records.items()}
    plan = Plan(lengths, {name: source.source.task for name, source in records.items()}, config.batching, config.seed)

    def count_tokens(texts: Sequence[str], role: Role) -> np.ndarray:
        encoded = encoder.tokenizer([prompt(encoder, role) + text for text in texts], truncation=False, verbose=False)
        return np.array([len(ids) for ids in encoded["input_ids"]])

    kept = {role: max_length(encoder, role) for role in ROLES}
    report = plan_report(config, records, plan, count_tokens, kept, suite)
    return Prepared(config, encoder, records, plan, suite, dev, digests, bf16, report)


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> TrainResult:
    """Trains as configured and evaluates before and after; the files of the run are in `config.output_dir`.

    Args:
        config: from `load_config`.
        resume: go on from the newest complete checkpoint in `output_dir`; from the beginning if the run was stopped
            before its first.
        overwrite: remove an earlier run in `output_dir` first.

    Raises:
        CodiembError: a mistake in the input, and nothing has been written; or no room is left on the disk.
        Stopped: SIGTERM or SIGINT; while training, after a checkpoint.
    """
    keep_memory()
    run = Path(config.output_dir)
    start(config.train.ddp_timeout)
    with StopOnSignal(run) as stop, contextlib.ExitStack() as stack, told_of_full_disk(run):
        seen = on_first(lambda: run_folder.content(run))
        checkpoint, passed_over = on_first(lambda: run_folder.find_checkpoint(run, resume, overwrite))
        stop.newest = checkpoint.path if checkpoint else None
        require_devices(config)
        prepared = prepare(config)
        encoder, suite = prepared.encoder, prepared.suite
        facts = facts_of(config, prepared.records, encoder)
        if checkpoint is not None:
            require_same_run(checkpoint, facts, str(run / "config.yaml"))
            if config.fusion and "ema" in config.fusion.methods:
                require_same_mean(checkpoint.path, config.fusion.ema_decay)
            require_same_shards(config, checkpoint)
        needed = model_bytes(encoder)
        if config.train.save_strategy != "no":
            needed += checkpoint_bytes(encoder, averaged=config.fusion is not None and "ema" in config.fusion.methods)
        run_folder.require_disk(run, needed, overwrite)
        agree({**facts, **_only_compared(prepared)}, "before the first step")
        trainer = JointTrainer(encoder, config, prepared.plan, prepared.records, facts, [stop], checkpoint)
        if config.evaluation.every_steps and suite:
            trainer.add_callback(_EvaluateDuring(trainer, stop, suite, config.evaluation.every_steps))

        logger.info(prepared.report.text())
        logger.info(_settings_text(prepared, trainer))
        on_first(lambda: run_folder.hold(run, stack, seen))
        if rank() == 0:
            run_folder.begin(run, overwrite, checkpoint is None, _files(prepared, trainer))
        barrier()

        with without_head(encoder, config.model):
            base = _evaluate(encoder, suite, run / "eval" / "base", "before training")
        if resume:
            logger.info("\n".join([*passed_over, run_folder.resuming_text(run, checkpoint, trainer.environment)]))
        # Each rank drops other things; the Trainer has seeded all alike, and a checkpoint brings the state of each.
        torch.manual_seed(config.seed + rank())
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        finally:
            trainer.step_log.close()
        if trainer.step_log.sums["steps"]:
            logger.info(trainer.step_log.summary())
        stop.raise_if_asked()
        if trainer.state.global_step != trainer.state.max_steps:
            raise RuntimeError(
                f"trained {trainer.state.global_step} of {trainer.state.max_steps} steps, and no more came"
            )
        return _finish(config, trainer, prepared, base, stop)


def _finish(
    config: Config, trainer: JointTrainer, prepared: Prepared, base: Results, stop: StopOnSignal
) -> TrainResult:
    """The trained model, its scores, merges of checkpoints, and what is told of all that."""
    run, suite = Path(config.output_dir), prepared.suite
    encoder = _trained_encoder(trainer, run / WRITING)
    averaged = averaged_encoder(encoder, trainer.ema)
    merge_adapters(encoder)
    if rank() == 0:
        save_encoder(encoder, run / WRITING / "model")
    trained = _evaluate(encoder, suite, run / "eval" / "model", "after training")
    comparison = on_first(lambda: compare_run(run, ["base", "model"])) if suite else None
    if rank() == 0:
        _write_card(run / WRITING / "model", config, prepared, base, trained, comparison)
        replace(run / WRITING / "model", run / "model")
        if trainer.saved_step is not None:
            keep_newest(run, config.train.save_total_limit, run / f"checkpoint-{trainer.saved_step}")
    barrier()
    stop.model = run / "model"
    fused = merge_run(config, trainer.args, encoder, averaged, suite, prepared.dev) if config.fusion else {}
    if fused and suite:
        comparison = on_first(lambda: compare_run(run, ["base", "model", *fused]))
    if rank() == 0:
        if fused and comparison:
            _write_card(run / "model", config, prepared, base, trained, comparison)
        keep_scheduled(run)
        clean(run)
        report_run(run)
        (run / run_folder.FINISHED).touch()
    return TrainResult(run / "model", base, trained, suite, fused, comparison)


def _only_compared(prepared: Prepared) -> dict[str, str]:
    """What all ranks must hold alike, though a run may go on with something else."""
    found = {f"version of {name}": version for name, version in versions().items()}
    return {
        **prepared.digests,
        **found,
        "device": prepared.encoder.device.type,
        "precision": "bf16" if prepared.bf16 else "float32",
    }


def _write_card(
    folder: Path, config: Config, prepared: Prepared, base: Results, trained: Results, found: dict[str, Any] | None
) -> None:
    tested = Comparison.model_validate(found) if found else None
    write_card(folder, config, prepared.report, base, trained, prepared.suite, tested)


def _trained_encoder(trainer: JointTrainer, folder: Path) -> SentenceTransformer:
    """The encoder that was trained, whole on every rank; shards are put together in `folder`."""
    if not trainer.sharded:
        return trainer.encoder
    trainer.save_model(str(folder / "whole"))
    barrier()
    with loading_whole(trainer.args):
        encoder = open_model(str(folder / "whole"), device=str(trainer.args.device), dtype=torch.float32)
    barrier()
    if rank() == 0:
        shutil.rmtree(folder / "whole")
    return encoder


def _require_fitting(config: Config, encoder: SentenceTransformer) -> None:
    """Refuses losses that this model cannot have."""
    for task in sorted({source.task for source in config.data if TASKS[source.task].shape == "pairs"}):
        weight = getattr(config.losses, task).mid_nce
        if weight and not any(isinstance(module, Pooling) for module in encoder):
            raise ConfigError(
                f"losses.{task}.mid_nce",
                got=f"{weight:g} and a model without a Pooling module",
                expected="0, because there is no pooling to apply to the middle layer",
            )
    dim = encoder.get_embedding_dimension()
    if config.losses.matryoshka and dim is not None and max(config.losses.matryoshka.dims) > dim:
        raise ConfigError(
            "losses.matryoshka.dims",
            got=max(config.losses.matryoshka.dims),
            expected=f"at most {dim}, the dimensions of {config.model.base}",
        )


def _files(prepared: Prepared, trainer: JointTrainer) -> dict[str, str]:
    """What tells what a run is."""
    return {
        "config.yaml": dump_config(prepared.config),
        "plan.json": json.dumps(prepared.report.content, indent=2, ensure_ascii=False) + "\n",
        "environment.json": json.dumps({**trainer.environment, "seed": prepared.config.seed}, indent=2) + "\n",
    }


def _settings_text(prepared: Prepared, trainer: JointTrainer) -> str:
    config = getattr(prepared.encoder[0], "config", None)
    dropout = {name: value for name, value in vars(config).items() if "drop" in name} if config is not None else {}
    parameters = sum(p.numel() for p in prepared.encoder.parameters())
    trained = sum(p.numel() for p in prepared.encoder.parameters() if p.requires_grad)
    return (
        f"\nmodel {prepared.config.model.base}, {parameters:,} parameters, {trained:,} of them trained\n"
        f"{trainer.args.device}, {'bf16' if trainer.args.bf16 else 'float32'}, {world_size()} process(es)\n"
        f"dropout {', '.join(f'{name} {value}' for name, value in dropout.items()) or 'none'}\n"
    )


def _evaluate(encoder: SentenceTransformer, suite: Sequence[Source], out: Path, when: str, **settings: Any) -> Results:
    if suite:
        logger.info(f"evaluation {when}")
    return evaluate_suite(encoder, suite, out, **settings)


class _EvaluateDuring(TrainerCallback):
    """Evaluates the suite every so many steps, into eval/step-<n>.

    Before the next step begins: a checkpoint of the step is written by then, whatever happens during the evaluation. A
    signal ends both after the data set in hand, with a checkpoint; a run that goes on evaluates the rest.
    """

    def __init__(self, trainer: JointTrainer, stop: StopOnSignal, suite: Sequence[Source], every: int) -> None:
        self.trainer, self.stop, self.suite, self.every = trainer, stop, suite, every

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and state.global_step % self.every == 0:
            step = f"step-{state.global_step}"
            out = Path(args.output_dir) / "eval" / step
            _evaluate(self.trainer.encoder, self.suite, out, f"at {step}", until=self.stop.asked_of_any)
            if self.stop.asked_of_any():
                self.trainer.save_now()
                self.stop.raise_if_asked()
            self.trainer.step_log.restart_clock()

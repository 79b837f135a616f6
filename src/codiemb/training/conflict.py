"""The task-conflict meter: whether retrieval and similarity pull the weights the same way, every so many steps.

At the start, and after every `train.conflict_every` steps, the gradient of each task's loss is taken at the weights of
the moment, and the cosine of the two is written, for all weights and by layer, to conflict.jsonl. Above 0 a step for
one task is a step for the other too, below 0 they undo each other (Yu et al., 2020, "Gradient surgery for multi-task
learning", call that a conflict), near 0 they go their own ways.

The batches are the same every time: the first few of each task in the plan that another seed would give. So they are
rows that training sees too; nothing is held back, because that would be another run. They are a few because gradients
of single batches have much noise, which makes any two of them look orthogonal. Dropout is off, so nothing is drawn, and
what training goes on with is as it was: the weights of a run are the same with and without the meter.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import TrainerCallback

from codiemb.batching.loader import StepReader
from codiemb.batching.plan import Plan, Step
from codiemb.config import Config
from codiemb.distributed import summed, world_size
from codiemb.files import write_whole
from codiemb.training.joint import JointModel
from codiemb.training.metrics import written_until

if TYPE_CHECKING:
    from codiemb.training.trainer import JointTrainer

TASKS_COMPARED = ("retrieval", "similarity")
BATCHES = 4  # of each task
Gradient = list[Tensor]


class ConflictMeter(TrainerCallback):
    """Writes conflict.jsonl: a line for the start, and one after every so many steps.

    Every rank calls in. When a run resumes, lines after its checkpoint are taken out first.
    """

    def __init__(self, trainer: JointTrainer, config: Config) -> None:
        self.trainer = trainer
        self.every = config.train.conflict_every
        self.path = Path(config.output_dir) / "conflict.jsonl"
        self.lines: list[str] = []
        self.inputs: dict[str, list[Any]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.inputs = fixed_batches(self.trainer.step_reader)
        self.lines = written_until(self.path, state.global_step) if state.global_step else []
        if state.global_step:
            self._write(state)
        else:
            self._measure(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._measure(state)

    def _measure(self, state: Any) -> None:
        joint = self.trainer.joint
        one, other = (
            gradient_of(joint, (self.trainer._prepare_inputs(batch) for batch in self.inputs[task]))
            for task in TASKS_COMPARED
        )
        self.lines.append(json.dumps({"step": state.global_step, **compared(joint.encoder, one, other)}))
        self._write(state)

    def _write(self, state: Any) -> None:
        if state.is_world_process_zero:
            write_whole(self.path, "".join(line + "\n" for line in self.lines))
        self.trainer.step_log.restart_clock()  # this is no step's time


def fixed_batches(reader: StepReader) -> dict[str, list[Any]]:
    """By task the first `BATCHES` batches in the plan of another seed, tokenised; all if an epoch has fewer."""
    plan = reader.plan
    other = Plan(plan.lengths, plan.tasks, plan.settings, plan.seed + 1, plan.batch_sizes)
    drawn = StepReader(
        other, reader.records, reader.encoder, reader.rank, reader.world, reader.micro_batch_tokens, reader.packed
    )
    batches = [batch for step in other.steps(0) for batch in step.batches]
    by_task = {task: [batch for batch in batches if plan.tasks[batch.source] == task] for task in TASKS_COMPARED}
    return {task: [drawn[Step((batch,))] for batch in found[:BATCHES]] for task, found in by_task.items()}


def gradient_of(joint: JointModel, batches: Iterable[Any]) -> Gradient:
    """The gradient of the mean of the batches' losses, over all ranks, by trained weight; the module is left as it was.

    Args:
        joint: the model that is trained, without the wrapper of DDP.
        batches: at least one, as a `StepReader` gives them, on the device of the model.
    """
    weights = _trained(joint.encoder).values()
    total, counted = [torch.zeros_like(weight) for weight in weights], 0
    means = dict(joint.balance.means) if joint.balance else {}
    with _left_as_it_was(joint):
        for batch in batches:
            if joint.balance:  # each batch is divided as the next step would be, whichever come before it here
                joint.balance.means = dict(means)
            loss = joint(batch["batches"], batch["micro_batches"])["loss"]
            found = torch.autograd.grad(loss, list(weights), allow_unused=True)
            for whole, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    whole.add_(gradient)
            counted += 1
    # The loss is multiplied by the number of ranks, to undo the mean that DDP takes.
    return [summed(gradient).div_(counted * world_size()) for gradient in total]


def compared(encoder: SentenceTransformer, one: Gradient, other: Gradient) -> dict[str, Any]:
    """The cosine of two gradients by group of weights (None where one of them is 0, left out where both are), and the
    norm of each."""
    products: dict[str, Float[Tensor, "3"]] = {}
    for name, a, b in zip(_trained(encoder), one, other, strict=True):
        product = torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]).double()
        for group in ("all", group_of(name)):
            products[group] = products.get(group, 0) + product
    cosine = {}
    for group in sorted(products, key=_in_order):
        dot, *squares = products[group].tolist()
        if any(squares):
            length = math.sqrt(math.prod(squares))
            cosine[group] = dot / length if length else None
    norms = products["all"][1:].sqrt().tolist()
    return {"cosine": cosine, "gradient_norm": dict(zip(TASKS_COMPARED, norms, strict=True))}


def group_of(name: str) -> str:
    """The group of a weight, by its name in the encoder: "layer 3", "embeddings" or "rest" (heads, last norms)."""
    module, _, inside = name.partition(".")
    if module != "0":
        return "rest"
    if layer := re.search(r"\.(\d+)\.", inside):
        return f"layer {layer[1]}"
    return "embeddings" if re.search(r"embed|\bwte\b|\bwpe\b", inside) else "rest"


def _in_order(group: str) -> tuple[int, int]:
    kind, _, number = group.partition(" ")
    return ("all", "embeddings", "layer", "rest").index(kind), int(number or 0)


def _trained(encoder: SentenceTransformer) -> dict[str, Tensor]:
    return {name: weight for name, weight in encoder.named_parameters() if weight.requires_grad}


@contextlib.contextmanager
def _left_as_it_was(joint: JointModel) -> Iterator[None]:
    """Inside, no dropout and no activations kept, so that two more gradients have room; after it all is as before."""
    training, memory = joint.training, joint.memory
    means = dict(joint.balance.means) if joint.balance else {}
    joint.eval()
    joint.memory = memory and replace(memory, activations=-1)
    try:
        yield
    finally:
        joint.train(training)
        joint.memory = memory
        if joint.balance:
            joint.balance.means = means

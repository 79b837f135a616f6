"""The other side of `train.py`, in a process of its own: `SentenceTransformerTrainer` on the rows of a task file.

    python benchmarks/their_training.py train|work TASK.json

`train` writes the seconds of each step. `work` makes a random model where one is asked for, and writes how many real
tokens and FLOPs a step has, beside the FLOP/s of a large matrix product here.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from flops import forward_flops, matmul_flops
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Transformer
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    CoSENTLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, BertConfig, BertModel, TrainerCallback

from codiemb.encoder.location import locate

BUNDLED = "bundled:all-MiniLM-L6-v2"
SIZES = {"large": (24, 1024, 16), "tiny": (2, 64, 2)}  # layers, width, heads


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Trains as their documentation shows; the rows come in the order of the file."""
    dropout = {} if task["attention_dropout"] is None else {"attention_probs_dropout_prob": task["attention_dropout"]}
    model = SentenceTransformer(
        model_path(task), config_kwargs=dropout, model_kwargs={"attn_implementation": task["attention"]}
    )
    model.max_seq_length = task["max_length"]
    clock = Clock()
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=f"{task['folder']}/theirs",
            per_device_train_batch_size=task["rows"],
            max_steps=task["steps"],
            learning_rate=2e-5,
            warmup_steps=0.1,
            optim="adamw_torch_fused",
            bf16=task["dtype"] == "bf16",
            use_cpu=not torch.cuda.is_available(),  # else bf16 is refused
            batch_sampler=in_order,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([columns(row) for row in rows(task)]),
        loss=loss(model, task),
        callbacks=[clock],
    )
    trainer.train()
    return {"seconds": clock.seconds}


class Clock(TrainerCallback):
    """Seconds from the end of a step to the end of the next, so data counts too."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.mark = 0.0

    def on_train_begin(self, *arguments: Any, **more: Any) -> None:
        self.mark = time.perf_counter()

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.mark)
        self.mark = now


def in_order(dataset: Dataset, **settings: Any) -> DefaultBatchSampler:
    return DefaultBatchSampler(SequentialSampler(dataset), **settings)


def loss(model: SentenceTransformer, task: dict[str, Any]) -> torch.nn.Module:
    """InfoNCE at temperature 0.02 (their scale 50) for retrieval, CoSENT for pairs."""
    if task["task"] == "similarity":
        return CoSENTLoss(model)
    if task["cached"]:
        return CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_size=32)
    return MultipleNegativesRankingLoss(model, scale=50.0)


def rows(task: dict[str, Any]) -> list[dict[str, Any]]:
    with Path(task["folder"], "planned.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def columns(row: dict[str, Any]) -> dict[str, Any]:
    """A row as their losses take it."""
    texts = {"query": row["query"], "positive": row["positives"][0]}
    texts |= {f"negative_{place}": text for place, text in enumerate(row.get("negatives", ()))}
    return texts | ({"score": row["positive_scores"][0]} if "positive_scores" in row else {})


def model_path(task: dict[str, Any]) -> str:
    return locate(BUNDLED) if task["model"] == "bundled" else f"{task['folder']}/model"


def work(task: dict[str, Any]) -> dict[str, Any]:
    """Real tokens and FLOPs of a step that counts (each text as often as it stands there), and the machine's peak."""
    if task["model"] != "bundled":
        make_model(task)
    tokenizer = AutoTokenizer.from_pretrained(model_path(task))
    config = BertConfig.from_pretrained(model_path(task))
    counted = rows(task)[task["warm_up"] * task["rows"] :]
    texts = [text for row in counted for name, text in columns(row).items() if name != "score"]
    encoded = tokenizer(texts, truncation=True, max_length=task["max_length"])["input_ids"]
    steps = task["steps"] - task["warm_up"]
    dtype = torch.bfloat16 if task["dtype"] == "bf16" else torch.float32
    return {
        "tokens_per_step": sum(map(len, encoded)) / steps,
        "flops_per_step": 3 * sum(forward_flops(config, len(ids)) for ids in encoded) / steps,
        "matmul_gflops": round(matmul_flops(dtype) / 1e9, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    }


def make_model(task: dict[str, Any]) -> None:
    """A random BERT with the bundled model's vocabulary, as a SentenceTransformer folder."""
    layers, width, heads = SIZES[task["model"]]
    tokenizer = AutoTokenizer.from_pretrained(locate(BUNDLED))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    torch.manual_seed(0)
    plain = f"{task['folder']}/bert"
    tokenizer.save_pretrained(plain)
    BertModel(config).save_pretrained(plain)
    SentenceTransformer(modules=[Transformer(plain), Pooling(width, "mean")]).save(f"{task['folder']}/model")


if __name__ == "__main__":
    content = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    answer = {"train": train, "work": work}[sys.argv[1]](content)
    Path(content["result"]).write_text(json.dumps(answer), encoding="utf-8")

"""A `SentenceTransformerTrainer` script with both tasks: two processes finish, and give the model that one gives.

This file is also the script: `torchrun ... test_sentence_transformers_door.py MODEL OUT`. With the losses and samplers
of sentence-transformers alone it stands still at the first step; `benchmarks/door.py` shows that.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from codiemb.integrations.sentence_transformers import CoDiEmbSimilarity, InfoNCE, SameDatasetBatchSampler

LIMIT = 120  # seconds; one of the runs takes about 15
WORDS = ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st", "uv", "wx"]
SEARCH = {  # 11 rows in batches of 4: 4, 4, 3; queries 0 and 6 are one text, as are some documents
    "query": [WORDS[n % 6] for n in range(11)],
    "positive": [f"{WORDS[n]} {WORDS[n + 1]}" for n in range(11)],
    "negative": [f"{WORDS[(n + 3) % 11]} {WORDS[(n + 3) % 11 + 1]}" for n in range(11)],
}
PAIRS = {  # 9 rows in batches of 4: 4, 3, 2
    "sentence1": [WORDS[n] for n in range(9)],
    "sentence2": [f"{WORDS[n]} {WORDS[(5 * n) % 12]}" for n in range(9)],
    "score": [n % 5 / 4 for n in range(9)],
}


class Trainer(SentenceTransformerTrainer):
    """Remembers the data set and the rows of each step."""

    steps: list

    def compute_loss(self, model, inputs, *arguments, **more):
        self.steps.append((inputs["dataset_name"], len(next(v for k, v in inputs.items() if k.endswith("_ids")))))
        return super().compute_loss(model, inputs, *arguments, **more)


def train(model_folder, out):
    model = SentenceTransformer(str(model_folder), device="cpu")  # its dropout is 0
    trainer = Trainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(out),
            num_train_epochs=2,
            optim="sgd",
            learning_rate=0.01,
            max_grad_norm=0,
            multi_dataset_batch_sampler=partial(SameDatasetBatchSampler, batch_sizes={"search": 4, "pairs": 4}),
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset={"search": Dataset.from_dict(SEARCH), "pairs": Dataset.from_dict(PAIRS)},
        loss={
            "search": InfoNCE(model, temperature=0.5),
            "pairs": CoDiEmbSimilarity(model, temperature=0.5, mid_nce_temperature=0.5),
        },
    )
    Trainer.steps = []
    trainer.train()
    (out / f"steps-{trainer.args.process_index}.json").write_text(json.dumps(trainer.steps))
    if trainer.args.process_index == 0:
        (out / "losses.json").write_text(
            json.dumps([log["loss"] for log in trainer.state.log_history if "loss" in log])
        )
        model.save(str(out / "model"), create_model_card=False)
    # The group is left to the end of the process: torch 2.13 can stand still in DDP's destructor once it is destroyed.


def run(command, out):
    """On time-out by SIGTERM, upon which torchrun ends its processes too."""
    with (out / "said.txt").open("w") as said:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([sys.executable, *command], stdout=said, stderr=said, env=environment)
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            code = f"none after {LIMIT} s"
    assert code == 0, (out / "said.txt").read_text()[-4000:]


@pytest.fixture(scope="module")
def runs(tiny_model_folder, tmp_path_factory):
    """The folders that one process and two leave."""
    folders = {}
    for processes in (1, 2):
        out = folders[processes] = tmp_path_factory.mktemp(f"processes{processes}")
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
        run([*torchrun, __file__, str(tiny_model_folder), str(out)], out)
    return folders


@pytest.mark.slow
def test_two_processes_give_the_model_of_one(runs, tiny_model_folder):
    """After 12 steps of SGD, to 1e-5."""
    start, one, two = (
        load_file(folder / "model.safetensors") for folder in (tiny_model_folder, runs[1] / "model", runs[2] / "model")
    )
    assert sum((one[name] - start[name]).abs().max() > 1e-3 for name in start) > 30, (
        "untrained models would be compared"
    )
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_two_processes_report_the_losses_of_one(runs):
    one, two = (json.loads((runs[processes] / "losses.json").read_text()) for processes in (1, 2))
    assert len(one) == 2 * (3 + 3)
    assert two == pytest.approx(one, abs=2e-4)


@pytest.mark.slow
def test_both_processes_are_in_one_data_set_with_rows_of_their_own(runs):
    one = [tuple(step) for step in json.loads((runs[1] / "steps-0.json").read_text())]
    ranks = [json.loads((runs[2] / f"steps-{rank}.json").read_text()) for rank in range(2)]
    assert [name for name, _ in ranks[0]] == [name for name, _ in ranks[1]]
    assert [(name, rows + ranks[1][step][1]) for step, (name, rows) in enumerate(ranks[0])] == one
    assert {rows for name, rows in one if name == "search"} == {4, 3}
    assert {rows for name, rows in one if name == "pairs"} == {4, 3, 2}


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]))

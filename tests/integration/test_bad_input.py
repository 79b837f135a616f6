"""Whatever the user gets wrong ends as one line on stderr, exit 2, no traceback, and nothing left behind."""

import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from codiemb import cli
from codiemb.evaluation.similarity import SIMILARITY
from codiemb.evaluation.suite import EVALUATIONS
from codiemb.training import checkpoint
from tests.conftest import needs_peft
from tests.integration.conftest import PAIRS, QUERIES

LONG = "x" * 300_000


def test_the_workplace_itself_is_sound(workplace):
    """Guards the tests below: what they break is what is refused."""
    workplace.run("check")
    workplace.run("train")
    assert (workplace.folder / "run" / "model" / "model.safetensors").is_file()


# ---- configuration ----

CONFIGS = {
    "empty file": ("", ["config.yaml", "nothing", "a mapping"]),
    "only a comment": ("# later\n", ["config.yaml", "nothing", "a mapping"]),
    "list": ("- model\n", ["a list", "a mapping"]),
    "a word": ("hello\n", ["a str", "a mapping"]),
    "YAML syntax": ("model:\n  base: a\ndata: [1, 2\ntrain: {}\n", ["line 4", "valid YAML"]),
    "a tab": ("model:\n\tbase: a\n", ["line 2", "valid YAML"]),
    "binary": (b"\x00\x01\x02\xff\xfe", ["config.yaml", "expected"]),
    "not UTF-8": ("output_dir: caf\xe9".encode("latin-1"), ["config.yaml", "UTF-8"]),
    "unhashable key": ("{[a]: 1}: 2\n", ["config.yaml", "line 1"]),
    "unknown tag": ("a: !!python/object:os.system {}\n", ["line 1"]),
    "recursive alias": ("&a [*a]\n", ["a list", "a mapping"]),
    "a key twice": ("seed: 1\nseed: 2\n", ["seed", "line 2"]),
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("verb", ["check", "train"])
def test_config_file(workplace, case, verb):
    content, words = CONFIGS[case]
    workplace.write("config.yaml", content)
    workplace.refused(*words, verb=verb)


SETTINGS = {
    "unknown key": (
        {"train.lerning_rate": 1e-4},
        ["train.lerning_rate", "unknown key", "did you mean 'learning_rate'?"],
    ),
    "unknown section": ({"modle": {}}, ["modle", "did you mean 'model'?"]),
    "unknown key of a source": ({"data.0.taks": "retrieval"}, ["data.0.taks", "did you mean 'task'?"]),
    "unknown column": ({"data.0.columns": {"qeury": "a"}}, ["data.0.columns.qeury", "'query'"]),
    "wrong type": ({"train.max_steps": "many"}, ["train.max_steps", "'many'", "integer"]),
    "section is a word": ({"train": "fast"}, ["train", "'fast'"]),
    "source is a word": ({"data.0": "queries.jsonl"}, ["data.0", "'queries.jsonl'"]),
    "data is a mapping": ({"data": {"name": "a"}}, ["data", "list"]),
    "data is empty": ({"data": []}, ["data", "at least 1"]),
    "union": ({"train.bf16": "maybe"}, ["train.bf16: got 'maybe', expected 'auto' or a valid boolean\n"]),
    "two faults": (
        {"train.max_steps": "many", "model.dropout.hidden": 3},
        ["train.max_steps", "model.dropout.hidden", "; "],
    ),
    "fault and unknown key": ({"train.lr": 1, "seed": -1}, ["train.lr", "seed: got -1", "; "]),
    "fault and batch of one": (
        {"train.lr": 1, "batching.similarity.batch_size": 1},
        ["train.lr", "batching.similarity.batch_size", "rank loss"],
    ),
    "batch of one": ({"batching.similarity.batch_size": 1}, ["batching.similarity.batch_size: got 1", "at least 2"]),
    "same name twice": ({"data.1.name": "queries"}, ["'queries' twice"]),
    "upside-down range": ({"data.1.score_range": [5, 0]}, ["data.1.score_range: got [5, 0], expected [lowest"]),
    "range of NaN": ({"data.1.score_range": [0, float("nan")]}, ["data.1.score_range"]),
    "accumulation": ({"train.gradient_accumulation_steps": 4}, ["gradient_accumulation_steps: got 4", "expected 1"]),
    "no weight at all": (
        {"losses.similarity": {"pearson": 0, "rank_kl": 0, "pro": 0, "mid_nce": 0}},
        ["losses.similarity", "all weights are 0"],
    ),
    "emphasis that trains nothing": (
        {"losses.emphasis": 1, "data": [{"name": "pairs", "task": "similarity", "path": "pairs.jsonl"}]},
        ["losses.emphasis: got 1", "trains some source"],
    ),
    "option of another type": (
        {"losses.retrieval": {"type": "triplet", "hardness": 3}},
        ["losses.retrieval: hardness: got 3", "the type is triplet"],
    ),
    "margin out of range": ({"losses.retrieval.false_negative_margin": 5}, ["false_negative_margin: got 5"]),
    "prefix longer than the embedding": (
        {"losses.matryoshka": {"dims": [8, 9]}},
        ["losses.matryoshka.dims: got 9", "at most 8"],
    ),
    "weights of other prefixes": (
        {"losses.matryoshka": {"dims": [8, 4], "weights": [1]}},
        ["losses.matryoshka", "one weight for each of the 2 dims"],
    ),
    "sharded on processors": ({"train.fsdp": True}, ["train.fsdp: got true on processors", "GPUs"]),
    "sharded twice": ({"train.fsdp": True, "train.deepspeed": "zero.json"}, ["fsdp: got true with deepspeed"]),
    "how to shard, but not that": ({"train.fsdp_config": {"version": 2}}, ["fsdp_config", "fsdp: true"]),
    "the older FSDP": (
        {"train.fsdp": True, "train.fsdp_config": {"fsdp_version": 1}},
        ["train.fsdp_config: got {'fsdp_version': 1}", "expected fsdp_version: 2"],
    ),
    "checkpoints in shards": (
        {"train.fsdp": True, "train.fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
        ["expected state_dict_type: FULL_STATE_DICT"],
    ),
    "evaluation of shards": (
        {"train.fsdp": True, "evaluation": {"every_steps": 2, "suite": "suite.yaml"}},
        ["evaluation.every_steps: got 2 with a sharded model"],
    ),
    "deepspeed on one process, or not installed": ({"train.deepspeed": {"zero_optimization": {}}}, ["deepspeed"]),
    "rank of nothing": ({"model.lora": {"r": 0}}, ["model.lora.r: got 0"]),
    "modules as a word": ({"model.lora": {"target_modules": "all"}}, ["target_modules: got 'all'", "'all-linear'"]),
    "no module": ({"model.lora": {"target_modules": []}}, ["target_modules: got []", "at least 1"]),
    "nothing left to train, and more": (
        {"model.freeze_backbone": True, "train.gradient_checkpointing": True},
        [
            "model.freeze_backbone: got true without model.head",
            "train.gradient_checkpointing: got true with model.freeze_backbone",
            "losses.similarity.mid_nce: got 1 with model.freeze_backbone, expected 0",
        ],
    ),
    "frozen and adapted": (
        {"model.freeze_backbone": True, "model.lora": {}},
        ["model.freeze_backbone: got true with model.lora"],
    ),
    "head larger than the base": ({"model.head": {"dim": 9}}, ["model.head.dim: got 9", "at most 8"]),
    "prefix longer than the head": (
        {"model.head": {"dim": 4}, "losses.matryoshka": {"dims": [8, 4]}},
        ["losses.matryoshka.dims: got 8", "at most 4", "model.head.dim"],
    ),
    "unknown loss": ({"losses.similarity.cosnet": 1}, ["losses.similarity.cosnet", "did you mean 'cosent'?"]),
    "unknown task": ({"data.0.task": "retreival"}, ["data.0.task: got 'retreival'", "'retrieval'"]),
    "name with a slash": ({"data.0.name": "../x"}, ["data.0.name: got '../x'"]),
    "no base": ({"model": {}}, ["model.base: got nothing"]),
    "unknown schedule": ({"batching.schedule": "randm"}, ["batching.schedule: got 'randm'", "'proportional'"]),
    "weight missing": ({"batching.schedule": "weights"}, ["batching.weights", "'queries'"]),
    "stage unknown": (
        {"batching.schedule": "staged", "batching.stages": [["retrieval"], ["similarty"]]},
        ["batching.stages", "did you mean 'similarity'?"],
    ),
    "groups of a loss that scores each list by itself": (
        {"losses.retrieval": {"type": "list_softmax", "cross_device": False}},
        ["losses.retrieval: cross_device: got False", "list_softmax"],
    ),
    "no steps": ({"train.max_steps": 0}, ["train.max_steps: got 0", "at least 1, or -1"]),
    "scheduler with settings of its own": (
        {"train.lr_scheduler_type": "warmup_stable_decay"},
        ["train.lr_scheduler_type: got warmup_stable_decay", "as linear or cosine"],
    ),
    "scheduler that follows a score": ({"train.lr_scheduler_type": "reduce_lr_on_plateau"}, ["train", "eval"]),
    "optimizer that is not installed": ({"train.optim": "paged_adamw_8bit"}, ["train.optim: got paged_adamw_8bit ("]),
    "optimizer with two sets of weights": ({"train.optim": "schedule_free_adamw"}, ["train.optim", "its steps alone"]),
    "scheduler that transformers lacks": ({"train.lr_scheduler_type": "liner"}, ["train", "liner"]),
    "optimizer that transformers lacks": ({"train.optim": "adamm"}, ["train", "adamm"]),
    "tracker that is not installed": ({"train.report_to": "no_such_tracker"}, ["no_such_tracker"]),
    "bundled model unknown": ({"model.base": "bundled:big"}, ["bundled:big", "all-MiniLM-L6-v2"]),
    "positions": ({"model.max_length.query": 4096}, ["model.max_length.query", "4096", "32"]),
    "huge number": ({"seed": 2**70}, ["seed"]),
    "long value": ({"train.max_steps": LONG}, ["train.max_steps"]),
}


def put(config: dict, key: str, value: object) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        config = config[int(parent)] if isinstance(config, list) else config.setdefault(parent, {})
    config[int(last) if isinstance(config, list) else last] = value


@pytest.mark.parametrize("case", SETTINGS)
def test_setting(workplace, case):
    settings, words = SETTINGS[case]
    for key, value in settings.items():
        put(workplace.config, key, value)
    workplace.refused(*words)


@pytest.mark.parametrize("reason", ["PEFT is not installed", "use a version >= 0.99"])
def test_adapters_without_a_peft_that_fits(workplace, monkeypatch, reason):
    def refuse(min_version):
        raise ValueError(reason)

    monkeypatch.setattr("codiemb.encoder.adapters.check_peft_version", refuse)
    workplace.config["model"]["lora"] = {}
    workplace.refused("model.lora: got", reason, "pip install 'codiemb[lora]'")


@needs_peft
@pytest.mark.parametrize("modules", [["nope"], ["LayerNorm"]])
def test_adapters_of_modules_that_cannot_have_them(workplace, modules):
    workplace.config["model"]["lora"] = {"target_modules": modules}
    workplace.refused("model.lora: got", modules[0], "target_modules")


OVERRIDES = {
    "no equals sign": ("train.max_steps", ["'train.max_steps'", "no '='"]),
    "no key": ("=3", ["'=3'"]),
    "place out of the list": ("data.7.split=a", ["'data.7.split=a'", "from 0 to 1"]),
    "word in a list": ("data.first=a", ["data.first", "from 0 to 1"]),
    "below a value": ("output_dir.low=3", ["output_dir.low", "a section"]),
    "empty part": ("train..x=3", ["train"]),
    "unknown key": ("train.max_step=3", ["max_step", "did you mean 'max_steps'?"]),
    "not YAML": ("train.run_name={", ["train.run_name", "YAML"]),
    "wrong type": ("train.max_steps=soon", ["train.max_steps: got 'soon'"]),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_override(workplace, case):
    override, words = OVERRIDES[case]
    workplace.refused(*words, arguments=(override,))


def test_config_that_is_missing_or_a_folder(workplace):
    workplace.refuses(lambda: cli.main(["train", str(workplace.folder / "none.yaml")]), "none.yaml", "check the path")
    workplace.refuses(lambda: cli.main(["train", str(workplace.folder)]), str(workplace.folder), "YAML file")


# ---- data files ----


def line(**fields: object) -> str:
    return json.dumps(fields) + "\n"


GOOD = line(query="a cat", positives=["the cat"])
PAIR = line(query="a cat", positives=["the cat"], positive_scores=[0.5])
RETRIEVAL_FILES = {
    "empty": ("", ["an empty file"]),
    "blank lines": ("\n  \n\n", ["an empty file"]),
    "only a BOM": (b"\xef\xbb\xbf", ["an empty file"]),
    "invalid JSON at line 3": (GOOD + GOOD.replace("cat", "dog") + '{"query": "x", \n', ["line 3", "invalid JSON"]),
    "two objects in a line": ('{"query": "x"} {}\n', ["line 1", "invalid JSON"]),
    "JSON array over many lines": (
        json.dumps([{"query": "a", "positives": ["b"]}], indent=1),
        ["line 1", "JSON array", "one JSON object a line"],
    ),
    "JSON array in one line": ('[{"query": "a", "positives": ["b"]}]', ["line 1", "array", "one JSON object a line"]),
    "an array a line": ('["a", "b"]\n', ["line 1", "array"]),
    "one object over many lines": (
        json.dumps({"query": "a", "positives": ["b"]}, indent=1),
        ["line 1", "invalid JSON"],
    ),
    "without query": (GOOD + line(positives=["b"]), ["line 2", "query", "positives"]),
    "query is a number": (line(query=3, positives=["b"]), ["line 1, query", "got 3", "a text"]),
    "query is null": (line(query=None, positives=["b"]), ["line 1, query"]),
    "positives empty": (GOOD + line(query="a", positives=[]), ["line 2, positives", "at least one positive"]),
    "positives missing": (line(query="a", text="b"), ["line 1, positives", "query, text"]),
    "positives of blanks": (line(query="a", positives=["  "]), ["no usable row of 1", "no positive with text"]),
    "positives hold a number": (line(query="a", positives=["b", 5]), ["line 1, positives", "got 5"]),
    "positives are an object": (line(query="a", positives={"b": 1}), ["line 1, positives"]),
    "positives are a number": (line(query="a", positives=7), ["line 1, positives", "got 7"]),
    "instruction is a number": (line(query="a", positives=["b"], instruction=7), ["line 1, instruction", "got 7"]),
    "scores too few": (
        line(query="a", positives=["b", "c"], positive_scores=[1]),
        ["positive_scores", "1 scores", "2"],
    ),
    "not UTF-8": (GOOD.encode() + '{"query": "caf\xe9"}'.encode("latin-1"), ["line 2", "0xe9", "UTF-8"]),
    "UTF-16": (GOOD.encode("utf-16"), ["line 1", "UTF-8"]),
    "binary": (bytes(range(256)), ["line 1"]),
    "zero bytes": (b"\x00" * 4096, ["binary"]),
    "a long line": (json.dumps({"query": LONG, "positives": 3}), ["line 1, positives"]),
    "a long broken line": ('{"query": "' + LONG, ["line 1", "invalid JSON"]),
    "a long wrong value": (json.dumps({"query": {"a": LONG}, "positives": ["b"]}), ["line 1, query"]),
    "a long key": (json.dumps({LONG: "a"}), ["line 1, query"]),
    "deep nesting": ("[" * 100_000, ["line 1"]),
    "huge integer": ('{"query": ' + "9" * 5000 + "}", ["line 1"]),
    "lone surrogate": ('{"query": "\\ud800", "positives": ["b"]}', ["line 1", "surrogates not allowed"]),
    "lone surrogate in a list": ('{"query": "a", "positives": ["\\udfff"]}', ["line 1", "surrogates not allowed"]),
}
PAIR_FILES = {
    "no score": (line(query="a", positives=["b"]), ["line 1, positive_scores", "no score"]),
    "score is a word": (
        PAIR + line(query="a", positives=["b"], positive_scores=["high"]),
        ["line 2", "'high'", "number"],
    ),
    "score is a number in quotes": (line(query="a", positives=["b"], positive_scores=["0.5"]), ["'0.5'", "number"]),
    "score is a bool": (line(query="a", positives=["b"], positive_scores=[True]), ["True", "number"]),
    "score is NaN": ('{"query": "a", "positives": ["b"], "positive_scores": [NaN]}', ["line 1", "nan", "finite"]),
    "score is infinite": (
        '{"query": "a", "positives": ["b"], "positive_scores": [1e999]}',
        ["line 1", "inf", "finite"],
    ),
    "score is a huge integer": (line(query="a", positives=["b"], positive_scores=[10**400]), ["line 1", "number"]),
    "score too high": (
        PAIR + line(query="a", positives=["b"], positive_scores=[4.5]),
        ["line 2", "4.5", "from 0 to 1", "score_range"],
    ),
    "score too low": (line(query="a", positives=["b"], positive_scores=[-0.1]), ["-0.1", "from 0 to 1"]),
    "two positives": (line(query="a", positives=["b", "c"], positive_scores=[0, 1]), ["2 positives", "one positive"]),
    "two scores": (line(query="a", positives=["b"], positive_scores=[0, 1]), ["2 scores"]),
}


@pytest.mark.parametrize("case", RETRIEVAL_FILES)
def test_retrieval_file(workplace, case):
    content, words = RETRIEVAL_FILES[case]
    workplace.write("queries.jsonl", content)
    workplace.refused("queries", *words)


@pytest.mark.parametrize("case", PAIR_FILES)
def test_similarity_file(workplace, case):
    content, words = PAIR_FILES[case]
    workplace.write("pairs.jsonl", content)
    workplace.refused("pairs", *words)


def csv_columns() -> dict[str, str]:
    return {"query": "q", "positive": "p"}


MANY = b"".join(line(q=f"{number}", p=os.urandom(20).hex()).encode() for number in range(3000))
TABLES = {
    "missing column": ("a.csv", "q,text\nx,y\n", ["a.csv", "line 2, p", "q, text"]),
    "missing query column": ("a.csv", "x,p\nx,y\n", ["line 2, q", "x, p"]),
    "ragged: too few": ("a.csv", "q,p\nx,y\nz\n", ["line 3", "number of columns", "2"]),
    "ragged: too many": ("a.csv", "q,p\nx,y,z\n", ["line 2", "number of columns", "2"]),
    "open quote": ("a.csv", 'q,p\nx,"y\n', ["a.csv", "CSV"]),
    "only a header": ("a.csv", "q,p\n", ["empty"]),
    "empty": ("a.tsv", "", ["empty"]),
    "not UTF-8": ("a.tsv", "q\tp\nx\tcaf\xe9\n".encode("latin-1"), ["line 2", "UTF-8"]),
    "column twice": ("a.csv", "q,p,p\nx,y,z\n", ["p", "twice"]),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(MANY)[:-20], ["a.jsonl.gz, after line", "Truncated"]),
    "truncated zstd": ("a.jsonl.zst", zstandard.compress(MANY)[:-20], ["a.jsonl.zst, after line", "Truncated"]),
    "not gzip": ("a.jsonl.gz", GOOD, ["a.jsonl.gz, after line 0: got", "header"]),
    "not zstd": ("a.csv.zst", "q,p\n", ["a.csv.zst, after line 0: got", "frame"]),
    "empty gzip": ("a.jsonl.gz", b"", ["a.jsonl.gz", "an empty file"]),
    "not Parquet": ("a.parquet", GOOD, ["a.parquet"]),
    "empty Parquet": ("a.parquet", b"", ["a.parquet"]),
    "unknown suffix": ("a.xlsx", b"PK\x03\x04", ["a.xlsx", ".jsonl"]),
    "no suffix": ("data", GOOD, ["data", ".jsonl"]),
}


@pytest.mark.parametrize("case", TABLES)
def test_table(workplace, case):
    name, content, words = TABLES[case]
    workplace.write(name, content)
    workplace.config["data"][0] |= {"path": name, "columns": csv_columns()}
    workplace.refused(*words)


def test_parquet(workplace):
    path = workplace.folder / "a.parquet"
    table = pa.table({"q": ["a"] * 2000, "p": ["b"] * 2000})
    workplace.config["data"][0] |= {"path": "a.parquet", "columns": csv_columns()}
    pq.write_table(table, path)
    path.write_bytes(path.read_bytes()[:-30])
    workplace.refused("a.parquet", "Parquet")
    pq.write_table(table, path, compression="none", use_dictionary=False)
    damaged = bytearray(path.read_bytes())
    damaged[4:400] = b"\xff" * 396
    path.write_bytes(damaged)
    workplace.refused("a.parquet")
    pq.write_table(pa.table({"other": ["a"]}), path)
    workplace.refused("a.parquet", "row 1", "other")
    pq.write_table(pa.table({"q": pa.array([], pa.string()), "p": pa.array([], pa.string())}), path)
    workplace.refused("a.parquet", "empty")


def test_places_of_data(workplace):
    source = workplace.config["data"][0]
    for path, words in {
        "none.jsonl": ["none.jsonl", "no such file", "check `path`"],
        "nowhere/at/all": ["nowhere/at/all", "no such file"],
        "empty-folder": ["empty-folder", "without data files"],
        "queries.jsonl/below": ["queries.jsonl/below"],
        "": ["path"],
    }.items():
        (workplace.folder / "empty-folder").mkdir(exist_ok=True)
        source["path"] = path
        (workplace.folder / "config.yaml").unlink(missing_ok=True)
        workplace.refused(*words)


def test_a_folder_named_like_a_file(workplace):
    (workplace.folder / "queries.jsonl").unlink()
    (workplace.folder / "queries.jsonl").mkdir()
    workplace.refused("queries.jsonl", "without data files")


def test_split(workplace):
    workplace.rows("folder/train.jsonl", {"query": "a", "positives": ["b"]})
    workplace.config["data"][0] |= {"path": "folder", "split": "tets"}
    workplace.refused("'queries', split", "'tets'", "train")


QRELS = {
    "split unknown": ("dev", "q1\td1\t1\n", ["'queries', split", "'dev'", "test"]),
    "no split": (None, "q1\td1\t1\n", ["'queries', split", "none", "test"]),
    "no document left": (
        "test",
        "query-id\tcorpus-id\tscore\nq1\tx1\t1\nq2\tx2\t1\n",
        ["test.tsv", "no relevant pair", "2 judgement of an absent document"],
    ),
    "no query left": ("test", "z1\td1\t1\n", ["no relevant pair", "1 judgement of an absent query"]),
    "zero gains": ("test", "q1\td1\t0\n", ["no relevant pair", "no gain above 0"]),
    "empty": ("test", "", ["test.tsv", "no judgement"]),
    "only a header": ("test", "query-id\tcorpus-id\tscore\n", ["no judgement"]),
    "no score": ("test", "query-id\tcorpus-id\tscore\nq1\td1\n", ["test.tsv, line 2"]),
    "score a word": ("test", "q1\td1\t1\nq1\td2\tyes\n", ["test.tsv, line 2", "score"]),
    "score NaN": ("test", "q1\td1\t1\nq1\td2\tnan\n", ["test.tsv, line 2", "score"]),
    "binary": ("test", bytes(range(200, 256)), ["test.tsv, line 1", "UTF-8"]),
}


@pytest.mark.parametrize("case", QRELS)
def test_qrels(workplace, case):
    split, qrels, words = QRELS[case]
    workplace.beir("beir", qrels)
    workplace.config["data"][0] |= {"path": "beir", "split": split}
    workplace.refused(*words)


def test_beir_folder(workplace):
    workplace.beir("beir", "q1\td1\t1\n")
    workplace.config["data"][0] |= {"path": "beir", "split": "test"}
    workplace.write("beir/corpus.jsonl", '{"_id": "d1", "text": "a"}\n{"_id": "d2"}\n')
    workplace.refused("corpus.jsonl, line 2", '"text"')
    workplace.write("beir/corpus.jsonl", '{"_id": "d1", "text": "a"}\n')
    workplace.write("beir/queries.jsonl", '{"_id": "q1", "text": "a", "instruction": 5}\n')
    workplace.refused("queries.jsonl, line 1", "instruction")
    (workplace.folder / "beir" / "queries.jsonl").unlink()
    workplace.refused("beir", "queries.jsonl")
    workplace.config["data"][0] |= {"task": "similarity"}
    (workplace.folder / "config.yaml").unlink()
    workplace.refused("beir")


def test_where_names_no_column(workplace):
    workplace.config["data"][0]["where"] = {"langauge": "en"}
    workplace.refused("queries.jsonl, line 1, where.langauge", "query, positives, negatives")


# ---- suite ----

SUITES = {
    "missing": (None, ["suite.yaml", "check the path"]),
    "empty": ("", ["suite.yaml", "nothing", "a list"]),
    "mapping": ("a: 1\n", ["suite.yaml", "a list of data sets"]),
    "no entry": ("[]\n", ["suite.yaml"]),
    "unknown key": (
        "- {name: a, task: retrieval, path: queries.jsonl, splti: x}\n",
        ["0.splti", "did you mean 'split'?"],
    ),
    "unknown task": ("- {name: a, task: search, path: queries.jsonl}\n", ["0.task: got 'search'"]),
    "entry is a word": ("- a\n", ["suite.yaml", "'a'"]),
    "name twice": ("- {name: a, task: retrieval, path: queries.jsonl}\n" * 2, ["'a' twice"]),
    "syntax": ("- {name: a\n- b\n", ["suite.yaml", "line 3"]),
    "missing file": ("- {name: a, task: similarity, path: none.jsonl}\n", ["'a'", "none.jsonl"]),
    "pairs without scores": ("- {name: a, task: similarity, path: queries.jsonl}\n", ["queries.jsonl, line 1"]),
    "corpus broken": (
        "- {name: a, task: retrieval, path: beir, split: test}\n",
        ["corpus.jsonl, line 2", "invalid JSON"],
    ),
    "graded pairs of two classes": (
        "- {name: a, task: pair_classification, path: pairs.jsonl}\n",
        ["'a'", "pair 1", "the label 0.9"],
    ),
    "a file without training texts": (
        "- {name: a, task: classification, path: labelled.jsonl}\n",
        ["'a'", "train_path: got none"],
    ),
    "training texts of another task": (
        "- {name: a, task: similarity, path: pairs.jsonl, train_split: train}\n",
        ["0: train_split: got 'train'", "the task is similarity"],
    ),
    "no label": ("- {name: a, task: clustering, path: queries.jsonl}\n", ["queries.jsonl, line 1, label"]),
    "lists of one kind": (
        "- {name: a, task: reranking, path: lists.jsonl}\n",
        ["'a'", "no list of 1 with a relevant document and another"],
    ),
    "a BEIR folder of labels": (
        "- {name: a, task: clustering, path: none, split: test}\n",
        ["a BEIR folder", "texts with labels"],
    ),
    "qrels of which nothing is left": ("- {name: a, task: retrieval, path: none, split: test}\n", ["no relevant pair"]),
}


@pytest.mark.parametrize("case", SUITES)
@pytest.mark.parametrize("verb", ["check", "train", "evaluate"])
def test_suite(workplace, case, verb):
    content, words = SUITES[case]
    workplace.beir("beir", "q1\td1\t1\n")
    workplace.write("beir/corpus.jsonl", '{"_id": "d1", "text": "a"}\nnot json\n')
    workplace.beir("none", "q1\tx1\t1\n")
    workplace.rows("labelled.jsonl", {"query": "a", "label": "x"}, {"query": "b", "label": "y"})
    workplace.rows("lists.jsonl", {"query": "a", "positives": ["b"]})
    if content is not None:
        workplace.write("suite.yaml", content)
    workplace.config["evaluation"] = {"suite": "suite.yaml"}
    if verb != "evaluate":
        workplace.refused(*words, verb=verb)
        return
    base = workplace.config["model"]["base"]
    suite, out = str(workplace.folder / "suite.yaml"), str(workplace.folder / "out")
    workplace.refuses(lambda: cli.main(["evaluate", base, "--suite", suite, "--out", out]), *words)


def test_evaluate(workplace):
    """A faulty second model or data set is told before the first is scored."""
    base, out = workplace.config["model"]["base"], str(workplace.folder / "out")
    good = "- {name: a, task: retrieval, path: queries.jsonl}\n"
    suite = str(workplace.write("suite.yaml", good))
    file = str(workplace.write("a-file", ""))
    for models, to, words in (
        ([str(workplace.folder / "none")], out, ["none", "no such folder"]),
        ([base, str(workplace.folder / "none")], out, ["none", "no such folder"]),
        ([str(workplace.folder / "suite.yaml")], out, ["suite.yaml"]),
        (["no-such-model"], out, ["no-such-model"]),
        ([base], file, ["a-file", "a folder"]),
        ([base, base], out, ["twice"]),
    ):
        workplace.refuses(lambda m=models, t=to: cli.main(["evaluate", *m, "--suite", suite, "--out", t]), *words)
    workplace.write("suite.yaml", good + "- {name: b, task: similarity, path: queries.jsonl}\n")
    workplace.refuses(lambda: cli.main(["evaluate", base, "--suite", suite, "--out", out]), "queries.jsonl, line 1")


ENCODINGS = {
    "no input": (["none.jsonl", "out.npy"], ["--input", "none.jsonl", "no such file"]),
    "a bad line": (["texts.jsonl", "out.npy"], ["texts.jsonl, line 2", "invalid JSON"]),
    "another column": (["pairs.jsonl", "out.npy"], ["pairs.jsonl, line 1, text", "one of query, positives"]),
    "another suffix": (["lines.txt", "out.csv"], ["--output", "out.csv", ".npy, .parquet"]),
    "the input": (["in.parquet", "in.parquet"], ["--output", "the input"]),
    "below a file": (["lines.txt", "pairs.jsonl/out.npy"], ["--output", "pairs.jsonl", "a folder"]),
    "not Parquet": (["in.parquet", "out.npy"], ["in.parquet", "a readable Parquet file"]),
    "binary": (["binary.txt", "out.npy"], ["binary.txt, line 1", "UTF-8"]),
}


@pytest.mark.parametrize("case", ENCODINGS)
def test_encode(workplace, case):
    (source, target), words = ENCODINGS[case]
    workplace.write("texts.jsonl", '{"text": "a"}\n{"text": \n')
    workplace.write("lines.txt", "the cat\n")
    workplace.write("in.parquet", "no")
    workplace.write("binary.txt", b"\xff\xfe\x00")
    base, files = workplace.config["model"]["base"], [str(workplace.folder / name) for name in (source, target)]
    workplace.refuses(lambda: cli.main(["encode", base, "--input", files[0], "--output", files[1]]), *words)


def test_encode_without_a_model(workplace):
    workplace.write("lines.txt", "the cat\n")
    files = [str(workplace.folder / name) for name in ("lines.txt", "out.npy")]
    command = ["encode", str(workplace.folder / "gone"), "--input", files[0], "--output", files[1]]
    workplace.refuses(lambda: cli.main(command), "gone", "no such folder")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--inspect", "--by-run"], ["--by-run", "none with this option"]),
        (["--inspect", "--suite", "dev.yaml"], ["--suite", "scores nothing"]),
        (["--inspect", "--force"], ["--force", "merges nothing"]),
        (["--data-root", "data"], ["--data-root", "none without --suite"]),
        (["--trials", "5"], ["--trials", "none without --search layers"]),
        (["--search", "grid"], ["--suite", "a dev suite"]),
        (["--method", "greedy"], ["--suite", "a dev suite"]),
        (["--method", "greedy", "--search", "grid"], ["--search", "none with --method greedy"]),
    ],
)
def test_options_of_fuse_that_have_no_meaning_together(workplace, options, words):
    base = workplace.config["model"]["base"]
    command = ["fuse", base, base, "--base", base, "--out", str(workplace.folder / "out"), *options]
    workplace.refuses(lambda: cli.main(command), *words)


# ---- model ----


def changed(file: str, **settings: object):
    def change(folder):
        content = json.loads((folder / file).read_text()) | settings
        (folder / file).write_text(json.dumps(content))

    return change


def written(file: str, content: bytes):
    return lambda folder: (folder / file).write_bytes(content)


def without(*files: str):
    return lambda folder: [(folder / file).unlink() for file in files]


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def larger_vocabulary(folder):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"new{number}" for number in range(9)])
    tokenizer.save(str(folder / "tokenizer.json"))


def without_a_layer(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "attention" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def not_a_number(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["embeddings.LayerNorm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


MODELS = {
    "no weights": (without("model.safetensors"), ["without weights", "model.safetensors"]),
    "no config": (without("config.json"), ["config.json"]),
    "config is not JSON": (written("config.json", b"{"), ["config.json"]),
    "config is a list": (written("config.json", b"[]"), ["model"]),
    "config is binary": (written("config.json", b"\xff\xfe\x00"), ["model"]),
    "config without model type": (written("config.json", b"{}"), ["model"]),
    "unknown model type": (changed("config.json", model_type="no_such_type"), ["no_such_type"]),
    "hidden size changed": (changed("config.json", hidden_size=16), ["weights of other sizes than config.json"]),
    "heads do not divide": (changed("config.json", hidden_size=9), ["model"]),
    "more layers than weights": (
        changed("config.json", num_hidden_layers=3),
        ["no weights for encoder.layer.1", "and 31 more", "config.json"],
    ),
    "vocabulary of the config": (changed("config.json", vocab_size=50), ["weights of other sizes than config.json"]),
    "intermediate size": (changed("config.json", intermediate_size=32), ["weights of other sizes than config.json"]),
    "a size that is a word": (changed("config.json", hidden_size="big"), ["model"]),
    "weights of a layer missing": (without_a_layer, ["no weights for encoder.layer.0.attention", "and 9 more"]),
    "weights truncated": (truncated, ["model.safetensors"]),
    "weights empty": (written("model.safetensors", b""), ["model.safetensors"]),
    "weights are text": (
        written("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        ["model.safetensors"],
    ),
    "weights hold NaN": (not_a_number, ["nan"]),
    "no tokenizer": (without("tokenizer.json"), ["tokenizer"]),
    "no tokenizer files": (without("tokenizer.json", "tokenizer_config.json"), ["tokenizer", "special tokens only"]),
    "tokenizer is garbage": (written("tokenizer.json", b"garbage"), ["tokenizer"]),
    "tokenizer is an empty object": (written("tokenizer.json", b"{}"), ["tokenizer"]),
    "tokenizer is empty": (written("tokenizer.json", b""), ["tokenizer"]),
    "tokenizer config is garbage": (written("tokenizer_config.json", b"{{"), ["tokenizer"]),
    "vocabulary too large": (larger_vocabulary, ["tokenizer", "embedding matrix"]),
    "modules.json is garbage": (written("modules.json", b"["), ["model"]),
    "codiemb.json is garbage": (written("codiemb.json", b"["), ["codiemb.json"]),
    "codiemb.json lacks lengths": (written("codiemb.json", b"{}"), ["codiemb.json"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_model(workplace, case, model_folder):
    damage, words = MODELS[case]
    folder = workplace.folder / "model"
    shutil.copytree(model_folder, folder)
    damage(folder)
    workplace.config["model"]["base"] = "model"
    workplace.refused(str(folder), *words)


@pytest.mark.parametrize(
    "base", ["", ".", "./none", "none", "queries.jsonl", "~/no-such-model", "a/b/c", "org/none", "x\ny"]
)
def test_place_of_the_model(workplace, base):
    workplace.config["model"]["base"] = base
    workplace.refused("model")


# ---- run folder and disk ----


def test_output_dir_with_a_finished_run(workplace):
    workplace.write("run/model/model.safetensors", b"")
    workplace.refused("run", "a finished run", "--overwrite")


def test_output_dir_with_an_unfinished_run(workplace):
    workplace.write("run/checkpoint-2/model.safetensors", b"")
    workplace.refused("run", "checkpoint-2", "--resume")


def test_output_dir_that_a_running_process_trains_in(workplace):
    (workplace.folder / "run").mkdir()
    hold = "import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.lockf(lock, fcntl.LOCK_EX)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{hold}; print(flush=True); input()", workplace.folder / "run" / ".lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "\n"
        workplace.refused("run", "a running process", "one run to a folder")
        other.communicate("\n")


def test_resume_without_a_checkpoint(workplace):
    workplace.refused("--resume", "no complete checkpoint", arguments=("--resume",))


def test_resume_from_a_checkpoint_without_a_manifest(workplace):
    workplace.write("run/checkpoint-2/model.safetensors", b"")
    workplace.refused("checkpoint-2/manifest.json", "no checkpoint is whole", arguments=("--resume",))


@pytest.fixture
def unfinished(workplace):
    """A run of two steps with a checkpoint of each, as if it had been killed before its end."""
    workplace.config["train"] |= {"save_strategy": "steps", "save_steps": 1}
    workplace.run("train")
    workplace.capsys.readouterr()
    shutil.rmtree(workplace.folder / "run" / "model")
    return workplace


def test_resume_when_every_checkpoint_is_damaged(unfinished):
    for path in (unfinished.folder / "run").glob("checkpoint-*/optimizer.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    unfinished.refused("--resume", "checkpoint-2/optimizer.pt", "no checkpoint is whole", arguments=("--resume",))


def test_resume_with_other_data(unfinished):
    unfinished.rows("pairs.jsonl", *PAIRS[:2], {**PAIRS[2], "positive_scores": [0.5]})
    unfinished.refused("--resume, source 'pairs'", "other rows", "checkpoint-2", arguments=("--resume",))


def test_resume_with_another_base(unfinished, tmp_path):
    """The path is the same, the weights are not."""
    weights = Path(unfinished.config["model"]["base"])
    unfinished.config["model"]["base"] = str(shutil.copytree(weights, tmp_path / "other"))
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    save_file({name: weight + 0.1 for name, weight in tensors.items()}, tmp_path / "other" / "model.safetensors")
    unfinished.write("config.yaml", yaml.safe_dump(unfinished.config))
    unfinished.refused("--resume, model.base", "another model", arguments=("--resume",))


def test_resume_with_another_pooling_of_the_base(unfinished, monkeypatch):
    """Same weights, other embeddings."""
    monkeypatch.setattr("codiemb.encoder.model.SentenceTransformer", with_cls_pooling)
    unfinished.refused("--resume, model.base", "another model", arguments=("--resume",))


def with_cls_pooling(*arguments, **settings):
    model = SentenceTransformer(*arguments, **settings)
    model[1] = Pooling(8, "cls")
    return model


def test_resume_with_other_settings(unfinished):
    changed = ("seed=7", "train.learning_rate=0.5")
    said = unfinished.refused("other settings", "checkpoint-2", "--resume", arguments=(*changed, "--resume"))
    assert "--resume, seed 7 (was 42), train.learning_rate 0.5 (was 5e-05): got" in said


def test_resume_with_settings_that_do_not_change_the_model(unfinished):
    """They are those of now: the checkpoint of step 2 is the newest, and step 1 saves no more."""
    shutil.rmtree(unfinished.folder / "run" / "checkpoint-2")
    unfinished.run("train", "train.save_total_limit=1", "train.save_steps=5", "train.logging_steps=1", "--resume")
    assert (unfinished.folder / "run" / "model").is_dir()
    state = json.loads((unfinished.folder / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert (state["save_steps"], state["logging_steps"]) == (5, 1)
    assert not (unfinished.folder / "run" / "checkpoint-1").exists()


def test_resume_with_settings_of_a_task_that_has_no_source(workplace):
    """They do nothing and are not kept in the run's config.yaml, so they are no other settings."""
    workplace.config["losses"] = {"reranking": {"temperature": 0.2}}
    workplace.config["train"] |= {"save_strategy": "steps", "save_steps": 1}
    workplace.run("train")
    shutil.rmtree(workplace.folder / "run" / "model")
    workplace.run("train", "--resume")
    assert (workplace.folder / "run" / "model").is_dir()
    shutil.rmtree(workplace.folder / "run" / "model")
    workplace.config["losses"]["retrieval"] = {"temperature": 0.2}
    workplace.write("config.yaml", yaml.safe_dump(workplace.config))
    workplace.capsys.readouterr()
    workplace.refused("--resume, losses.retrieval.temperature 0.2 (was 0.02)", arguments=("--resume",))


@pytest.mark.parametrize("emphasis", [0.5, 1])
def test_weights_that_train_no_source(workplace, emphasis):
    workplace.config["losses"] = {"emphasis": emphasis, "retrieval": {"weight": 0}, "similarity": {"weight": 0}}
    workplace.refused("losses.<task>.weight", "above 0")


@pytest.mark.parametrize(
    ("task", "rows", "losses", "warning"),
    [
        ("similarity", PAIRS, {"info_nce": 1}, "no score reaches mid_nce_threshold 1 of the range; info_nce learns"),
        ("similarity", PAIRS, {}, "; mid_nce learns nothing from it"),
        ("similarity", PAIRS, {"mid_nce": 0}, None),
        ("similarity", PAIRS, {"mid_nce_threshold": 0.9}, None),
        ("classification", [{"query": "a", "label": "x"}, {"query": "b", "label": "x"}], {}, "the same label"),
        ("reranking", QUERIES, {}, "1 of 3 lists hold one document; list_softmax learns nothing there"),
        ("reranking", QUERIES, {"type": "info_nce"}, None),
        ("retrieval", QUERIES, {"type": "list_softmax"}, "1 of 3 lists hold one document"),
    ],
)
def test_a_source_from_which_a_loss_learns_nothing_is_warned_of(workplace, task, rows, losses, warning):
    workplace.rows("source.jsonl", *rows)
    workplace.config |= {
        "data": [{"name": "source", "task": task, "path": "source.jsonl"}],
        "losses": {task: losses},
    }
    workplace.run("check")
    shown = workplace.capsys.readouterr().out
    assert (warning in shown) if warning else ("learns nothing" not in shown)


@pytest.mark.parametrize("column", ["positive_scores", "negative_scores"])
def test_scores_below_0_of_a_list_softmax(workplace, column):
    """Of reranking the reader refuses them; any list may be trained so, and other losses do not look at scores."""
    row = {"query": "a b", "positives": ["c"], "negatives": ["d"], "positive_scores": [2], "negative_scores": [0]}
    workplace.rows("source.jsonl", *QUERIES, row | {column: [-0.5]})
    workplace.config["data"] = [{"name": "source", "task": "retrieval", "path": "source.jsonl"}]
    workplace.run("check")
    words = ("source 'source', query 'a b'", "got a score of -0.5", "list_softmax")
    workplace.refused(*words, arguments=("losses.retrieval.type=list_softmax",))


def test_output_dir_is_a_file(workplace):
    workplace.write("run", "a file")
    workplace.refused("run", "a file", "a folder")
    workplace.refused("run", "a file", "a folder", arguments=("--overwrite",))


def test_output_dir_below_a_file(workplace):
    workplace.write("file", "a file")
    workplace.config["output_dir"] = str(workplace.folder / "file" / "run")
    workplace.refused("file", "a folder")


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_not_enough_disk(workplace, monkeypatch, strategy):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    workplace.config["train"]["save_strategy"] = strategy
    workplace.refused("free disk", "expected at least", "output_dir")


def test_overwrite_keeps_the_earlier_run_if_the_new_one_is_refused(workplace):
    workplace.write("run/model/model.safetensors", b"")
    workplace.write("queries.jsonl", "")
    workplace.refused("queries", arguments=("--overwrite",))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_training_after_the_step_in_hand(workplace, monkeypatch, number, code):
    """Checkpoints are written every 100 steps, so the one of step 3 is written for the signal."""
    workplace.config["train"] |= {"save_strategy": "steps", "save_steps": 100, "max_steps": 5}
    at_step(3, monkeypatch, lambda: os.kill(os.getpid(), number))
    shown = ends_with(code, workplace)
    assert shown.endswith("checkpoint-3; go on with --resume\n")
    assert [path.name for path in (workplace.folder / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (workplace.folder / "run" / "model").exists()
    monkeypatch.undo()
    workplace.run("train", "--resume")
    assert (workplace.folder / "run" / "model" / "model.safetensors").is_file()


def test_a_second_ctrl_c_ends_at_once(workplace, monkeypatch):
    workplace.config["train"] |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}
    at_step(3, monkeypatch, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    shown = ends_with(130, workplace)
    assert shown.endswith("checkpoint-2; go on with --resume\n")


def test_a_signal_in_the_last_checkpoint_is_not_lost(workplace, monkeypatch):
    workplace.config["train"] |= {"save_strategy": "steps", "save_steps": 1}
    seal = checkpoint.seal

    def signalled(folder, **what):
        if what["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        seal(folder, **what)

    monkeypatch.setattr(checkpoint, "seal", signalled)
    assert ends_with(143, workplace).endswith("checkpoint-2; go on with --resume\n")


def test_a_signal_in_an_evaluation_loses_no_step(workplace, monkeypatch):
    """Checkpoints are due every 100 steps: the data set in hand is scored, then one is written, and the rest is scored
    when the run goes on."""
    sources = [{"name": name, "task": "similarity", "path": "pairs.jsonl"} for name in ("one", "other")]
    workplace.config["evaluation"] = {"suite": "suite.yaml", "every_steps": 2}
    workplace.config["train"] |= {"save_strategy": "steps", "save_steps": 100, "max_steps": 5}
    workplace.write("suite.yaml", yaml.safe_dump(sources))
    evaluate = SIMILARITY.evaluate

    def signalled(*arguments):
        if (workplace.folder / "run" / "metrics.jsonl").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setitem(EVALUATIONS, "similarity", SIMILARITY._replace(evaluate=signalled))
    assert ends_with(143, workplace).endswith("checkpoint-2; go on with --resume\n")
    scored = workplace.folder / "run" / "eval" / "step-2"
    assert [path.name for path in scored.glob("*.json")] == ["one.json"]
    monkeypatch.setitem(EVALUATIONS, "similarity", SIMILARITY)
    workplace.run("train", "--resume")
    assert {path.name for path in scored.glob("*.json")} == {"one.json", "other.json"}


def test_the_checkpoint_of_a_step_is_written_before_its_evaluation(workplace, monkeypatch):
    workplace.config["evaluation"] = {"suite": "suite.yaml", "every_steps": 2}
    workplace.config["train"] |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    workplace.write("suite.yaml", yaml.safe_dump([{"name": "pairs", "task": "similarity", "path": "pairs.jsonl"}]))

    def evaluate(encoder, suite, out, **settings):
        if out.name == "step-2":
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return {"pairs": {"spearman": 0.0, "pearson": 0.0}}

    monkeypatch.setattr("codiemb.training.run.evaluate_suite", evaluate)
    assert ends_with(130, workplace).endswith("checkpoint-2; go on with --resume\n")


def test_a_signal_at_the_end_of_an_epoch_writes_its_checkpoint_once(workplace, monkeypatch):
    """The second would take the place of the first, and for a moment there would be none."""
    workplace.config["train"] |= {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
    sealed, seal = [], checkpoint.seal

    def sealing(folder, **what):
        sealed.append(what["step"])
        seal(folder, **what)

    monkeypatch.setattr(checkpoint, "seal", sealing)
    at_step(2, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    ends_with(143, workplace)
    assert sealed == [2]


def test_a_signal_while_the_base_is_scored_ends_at_once(workplace, monkeypatch):
    workplace.config["evaluation"] = {"suite": "suite.yaml"}
    workplace.write("suite.yaml", yaml.safe_dump([{"name": "pairs", "task": "similarity", "path": "pairs.jsonl"}]))
    monkeypatch.setattr("codiemb.training.run.evaluate_suite", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    shown = ends_with(143, workplace)
    assert shown.endswith("no checkpoint was written\n")
    monkeypatch.undo()
    monkeypatch.setenv("CODIEMB_CACHE", str(workplace.folder / "cache"))
    workplace.run("train", "--resume")  # a run that was begun, and has no checkpoint yet
    assert "starting from the beginning" in workplace.capsys.readouterr().out
    assert (workplace.folder / "run" / "model" / "model.safetensors").is_file()


def test_signals_are_the_callers_again_after_a_run(workplace):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    workplace.run("train")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_the_run_goes_on_from_the_newest_checkpoint_that_is_whole(unfinished):
    """The newest is cut: what it held is trained again, to the same weights; it is replaced."""
    run = unfinished.folder / "run"
    newest = {path.name: path.read_bytes() for path in (run / "checkpoint-2").iterdir() if path.is_file()}
    (run / "checkpoint-2" / "model.safetensors").write_bytes(newest["model.safetensors"][:1000])
    unfinished.run("train", "--resume")
    shown = unfinished.capsys.readouterr().out
    assert f"checkpoint-2/model.safetensors: got 1000 bytes, expected {len(newest['model.safetensors'])} bytes" in shown
    assert f"resuming from {run / 'checkpoint-1'}" in shown
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        assert (run / "checkpoint-2" / name).read_bytes() == newest[name], name


def test_a_full_disk_ends_the_run_with_one_line_and_keeps_the_checkpoints(workplace, monkeypatch):
    workplace.config["train"] |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_step(2, monkeypatch, lambda: monkeypatch.setattr("torch.save", full))
    shown = ends_with(2, workplace)
    assert shown.startswith(f"error: writing {workplace.folder / 'run'}: got [Errno 28] No space left on device")
    assert "--resume" in shown
    run = workplace.folder / "run"
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (run / ".writing").exists()
    monkeypatch.undo()
    workplace.run("train", "--resume")
    assert (run / "model" / "model.safetensors").is_file()


def at_step(number, monkeypatch, act):
    """Does `act` in the middle of a step."""
    from codiemb.training.trainer import JointTrainer

    step = JointTrainer.training_step

    def wrapped(trainer, *arguments, **settings):
        if trainer.state.global_step == number - 1:
            act()
        return step(trainer, *arguments, **settings)

    monkeypatch.setattr(JointTrainer, "training_step", wrapped)


def ends_with(code, workplace):
    """What is said on stderr, its last line, by a training that ends with `code` and no traceback."""
    with pytest.raises(SystemExit) as stop:
        workplace.run("train")
    shown = workplace.capsys.readouterr().err
    assert stop.value.code == code, shown
    assert "Traceback" not in shown
    return shown.splitlines(keepends=True)[-1]


def test_debug_shows_the_traceback(workplace):
    from codiemb.errors import DataError

    workplace.write("queries.jsonl", "")
    with pytest.raises(DataError):
        workplace.run("check", "--debug")


def test_absent_documents_are_counted_and_said(workplace):
    workplace.beir("beir", "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\tx9\t1\nq2\td2\t1\nz\td1\t1\n")
    workplace.config["data"][0] |= {"path": "beir", "split": "test"}
    workplace.run("check")
    shown = workplace.capsys.readouterr().out
    assert "queries: 1 judgement of an absent document" in shown
    assert "queries: 1 judgement of an absent query" in shown


def test_a_byte_order_mark_is_no_fault(workplace):
    workplace.write("queries.jsonl", b"\xef\xbb\xbf" + GOOD.encode())
    workplace.write("config.yaml", b"\xef\xbb\xbf" + yaml.safe_dump(workplace.config).encode())
    workplace.run("check")


def test_a_very_long_text_is_no_fault(workplace):
    workplace.rows("queries.jsonl", {"query": "a", "positives": ["the cat " * 100_000]})
    workplace.run("check")

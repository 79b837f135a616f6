"""What a configuration says after it is read: defaults, overrides, paths, and every fault told at once."""

import os
import sys
from pathlib import Path

import pytest
import yaml

from codiemb.config import Config, Evaluation, dump_config, load_config
from codiemb.errors import CodiembError, ConfigError, short
from codiemb.suites.suite import load_suite
from codiemb.tasks import TASKS

MINIMAL = """\
output_dir: run
model: {base: some-model}
data:
  - {name: faq, task: retrieval, path: data/faq.jsonl}
"""


@pytest.fixture
def write(tmp_path):
    def write(content: str, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return path

    return write


def fault(path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_defaults(write):
    config = load_config(write(MINIMAL))
    assert config.seed == 42
    assert (config.batching.schedule, config.batching.retrieval.batch_size) == ("proportional", 32)
    assert (config.losses.similarity.pearson, config.losses.similarity.rank_kl) == (2.0, 5.0)
    assert (config.losses.similarity.pro, config.losses.similarity.mid_nce) == (0.5, 1.0)
    assert config.losses.retrieval.temperature == 0.02
    assert (config.train.learning_rate, config.train.warmup_ratio, config.train.bf16) == (5e-5, 0.03, "auto")
    assert config.model.dropout.attention == 0.0


def test_overrides_replace_and_add(write):
    config = load_config(
        write(MINIMAL),
        [
            "train.max_steps=20",
            'model.prompts.query="query: "',
            "data.0.split=train",
            "train.learning_rate=1e-5",
            "model.max_length={query: 64}",
            "evaluation.suite=null",
            "train.bf16=false",
            "train.run_name=a=b",
        ],
    )
    assert config.train.max_steps == 20
    assert config.model.prompts.query == "query: "
    assert config.data[0].split == "train"
    assert config.train.learning_rate == 1e-5  # YAML 1.1 alone reads it as text
    assert config.model.max_length.query == 64
    assert config.train.bf16 is False
    assert config.train.run_name == "a=b"


def test_paths_start_from_the_config_or_the_data_root(write, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = write(MINIMAL)
    assert load_config(path).data[0].path == str(tmp_path / "data" / "faq.jsonl")
    assert load_config(path).output_dir == "run"  # resolved against the working directory, when it is used
    in_file = write("data_root: up\n" + MINIMAL, "rooted.yaml")
    assert load_config(in_file).data[0].path == str(tmp_path / "up" / "data" / "faq.jsonl")
    assert load_config(in_file, ["data_root=here"]).data[0].path == str(
        tmp_path / "elsewhere" / "here" / "data" / "faq.jsonl"
    )
    assert load_config(path, ["data.0.path=/data/a.jsonl"]).data[0].path == "/data/a.jsonl"
    assert load_config(path, ["data.0.path=org/data-set"]).data[0].path == "org/data-set"  # a hub id
    assert load_config(path, ["evaluation.suite=suite.yaml"]).evaluation.suite == str(tmp_path / "suite.yaml")


def test_a_model_folder_beside_the_config_is_found(write, tmp_path):
    path = write(MINIMAL)
    assert load_config(path).model.base == "some-model"
    (tmp_path / "some-model").mkdir()
    assert load_config(path).model.base == str(tmp_path / "some-model")


def test_the_dumped_config_reads_back_the_same_from_anywhere(write, tmp_path):
    config = load_config(write(MINIMAL), ["train.max_steps=7", "data.0.score_range=[0, 5]"])
    (tmp_path / "run").mkdir()
    again = load_config(write(dump_config(config), "run/config.yaml"))
    assert again == config


def test_suite_paths_start_from_its_folder_or_the_data_root(write, tmp_path):
    path = write("- {name: a, task: similarity, path: a.jsonl}\n", "suite.yaml")
    assert load_suite(path)[0].path == str(tmp_path / "a.jsonl")
    assert load_suite(path, tmp_path / "root")[0].path == str(tmp_path / "root" / "a.jsonl")


def test_all_faults_are_told_at_once(write):
    message = fault(
        write(MINIMAL), "train.max_steps=many", "train.lerning_rate=1", "seed=-1", "batching.similarity.batch_size=1"
    )
    assert "train.max_steps: got 'many', expected a valid integer" in message
    assert "train.lerning_rate: got an unknown key" in message
    assert "did you mean 'learning_rate'?" in message
    assert "seed: got -1" in message
    assert "batching.similarity.batch_size: got 1, expected at least 2, because a rank loss" in message
    assert message.count("; ") == 4  # four clauses; one of them has an advice


def test_the_branches_of_a_union_make_one_clause(write):
    assert fault(write(MINIMAL), "train.bf16=maybe").endswith(
        "train.bf16: got 'maybe', expected 'auto' or a valid boolean"
    )
    message = fault(write(MINIMAL), "train.report_to=3")
    assert message.count("train.report_to") == 1
    assert message.endswith("got 3, expected a valid list or a valid string")


@pytest.mark.parametrize("key", ["bf17", "Bf16", "bf_16"])
def test_the_nearest_known_key_is_named(write, key):
    assert "did you mean 'bf16'?" in fault(write(MINIMAL), f"train.{key}=auto")


def test_no_key_is_proposed_where_none_is_near(write):
    message = fault(write(MINIMAL), "train.zzzzzz=1")
    assert "did you mean" not in message
    assert "expected one of learning_rate, " in message


def test_every_section_refuses_unknown_keys():
    """Guards against a new section that forgets it."""

    def sections(model):
        for field in model.model_fields.values():
            for section in [field.annotation, *getattr(field.annotation, "__args__", [])]:
                if hasattr(section, "model_fields"):
                    yield section
                    yield from sections(section)

    found = {Config, *sections(Config)}
    assert len(found) >= 12
    assert Evaluation in found
    assert {section.model_config.get("extra") for section in found} == {"forbid"}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("output_dir: run\nmodel: {base: a\ndata: []\n", 3),
        ("output_dir: run\n  model: a\n", 2),
        ("a: 'open\n", 2),
        ("seed: 1\nmodel: {base: a}\nseed: 2\n", 3),
        ("model:\n  base: a\n  base: b\n", 3),
    ],
)
def test_a_yaml_fault_names_its_line(write, content, line):
    message = fault(write(content))
    assert f"config.yaml at line {line}," in message
    assert "expected valid YAML" in message


def test_yaml_merge_keys_still_work(write):
    anchored = MINIMAL + "train: &t {max_steps: 3}\n"
    assert load_config(write(anchored)).train.max_steps == 3
    merged = MINIMAL + "batching:\n  retrieval: &r {batch_size: 4}\n  similarity: {<<: *r, batch_size: 6}\n"
    assert load_config(write(merged)).batching.similarity.batch_size == 6


def test_a_message_is_one_line_of_bounded_length():
    error = CodiembError("file\na", got="x\n" * 5000, expected="some\nlines")
    assert "\n" not in str(error)
    assert len(str(error)) < 400
    assert short("a" * 100) == "'" + "a" * 56 + "..."
    assert short(3) == "3"


def test_the_shipped_demo_config_is_valid():
    import codiemb.demo

    config = load_config(codiemb.demo.CONFIG)
    assert config.evaluation.suite is not None
    assert all(os.path.exists(source.path) for source in [*config.data, *load_suite(config.evaluation.suite)])
    assert yaml.safe_load(dump_config(config))["batching"]["schedule"] == "paired"


def test_an_unknown_ready_suite_is_told_with_the_known():
    with pytest.raises(
        ConfigError, match=r"suite nano-bier: got nothing there.* cmteb-ir-sts, mteb-eng-ir-sts, nano-beir"
    ):
        load_suite("nano-bier")


def test_a_ready_suite_stands_behind_a_file_of_its_name(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("output_dir: run\nmodel: {base: m}\ndata: [{name: a, task: retrieval, path: a.jsonl}]\n")
    found = Path(load_config(path, ["evaluation.suite=nano-beir"]).evaluation.suite)
    assert (found.name, found.parent.name) == ("nano-beir.yaml", "suites")
    (tmp_path / "nano-beir").write_text("- {name: a, task: retrieval, path: a.jsonl}\n")
    found = load_config(path, ["evaluation.suite=nano-beir"]).evaluation.suite
    assert [source.name for source in load_suite(found)] == ["a"]


def test_a_suite_without_mteb_installed_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    (tmp_path / "suite.yaml").write_text("- {mteb: STS12}\n")
    with pytest.raises(ConfigError, match=r"mteb: STS12: got no package mteb.*pip install 'codiemb\[mteb\]'"):
        load_suite(tmp_path / "suite.yaml")


def test_the_template_of_a_suite_can_be_read():
    suite = load_suite(Path(__file__).parents[1] / "recipes" / "suite.yaml")
    assert {source.task for source in suite} == set(TASKS)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("fusion={temperature: 0.5}", "temperature: got 0.5, expected none, because it is of softmax"),
        ("fusion={method: ema, checkpoints: 5}", "checkpoints: got 5, expected none without a method that merges"),
        ("fusion={method: uniform, norm: l1}", "norm: got l1, expected none without a method delta"),
        ("evaluation.every_steps=5", "every_steps: got 5, expected none without a suite"),
        ("train.run_name=2025-13-01", "a value that is not YAML"),
    ],
)
def test_a_setting_that_nothing_would_look_at_is_refused(write, override, told):
    """At the end of the run it would be refused too late, or never be missed."""
    assert told in fault(write(MINIMAL), override)


def test_a_date_that_no_calendar_has(write):
    assert "expected valid YAML" in fault(write(MINIMAL + "train: {run_name: 2025-02-30}"))

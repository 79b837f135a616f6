"""A tiny model made here, and a workplace of data, model and config in which one thing at a time is broken."""

import json
from pathlib import Path

import pytest
import yaml

from codiemb import cli

TEXT = "the cat sat on a mat dogs bark loud birds sing at dawn rain falls who where what"
QUERIES = [
    {"query": "who sat", "positives": ["the cat sat on a mat"], "negatives": ["dogs bark loud"]},
    {"query": "what falls", "positives": ["rain falls at dawn"], "negatives": []},
    {"query": "what bark", "positives": ["dogs bark loud"], "negatives": ["birds sing"]},
]
PAIRS = [
    {"query": "the cat sat", "positives": ["a cat sat"], "positive_scores": [0.9]},
    {"query": "dogs bark", "positives": ["rain falls"], "positive_scores": [0.1]},
    {"query": "birds sing", "positives": ["birds sing at dawn"], "positive_scores": [0.6]},
]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A transformers folder: a random BERT of one layer and eight dimensions, with a WordPiece tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: number for number, token in enumerate([*special, *TEXT.split()])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    folder = tmp_path_factory.mktemp("model") / "tiny"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names).save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


class Workplace:
    """A folder in which a run would succeed, until a test breaks something in it."""

    def __init__(self, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.config = {
            "output_dir": str(folder / "run"),
            "model": {"base": str(model)},
            "data": [
                {"name": "queries", "task": "retrieval", "path": "queries.jsonl"},
                {"name": "pairs", "task": "similarity", "path": "pairs.jsonl"},
            ],
            "train": {"max_steps": 2, "save_strategy": "no"},
        }
        self.rows("queries.jsonl", *QUERIES)
        self.rows("pairs.jsonl", *PAIRS)

    def rows(self, name: str, *rows: object) -> Path:
        return self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def beir(self, name: str, qrels: str) -> None:
        self.rows(f"{name}/corpus.jsonl", {"_id": "d1", "text": "the cat"}, {"_id": "d2", "text": "dogs bark"})
        self.rows(f"{name}/queries.jsonl", {"_id": "q1", "text": "who sat"}, {"_id": "q2", "text": "what bark"})
        self.write(f"{name}/qrels/test.tsv", qrels)

    def run(self, verb: str, *arguments: str) -> None:
        """Runs a verb on the config, written now unless a test wrote its own."""
        config = self.folder / "config.yaml"
        if not config.exists():
            config.write_text(yaml.safe_dump(self.config))
        cli.main([verb, str(config), *arguments])

    def refused(self, *words: str, verb: str = "train", arguments: tuple[str, ...] = ()) -> str:
        """Asserts one error line that holds `words`, exit 2 and nothing left behind; returns the line."""
        return self.refuses(lambda: self.run(verb, *arguments), *words)

    def refuses(self, act, *words: str) -> str:
        config = self.folder / "config.yaml"
        if not config.exists():
            config.write_text(yaml.safe_dump(self.config))
        before = self._files()
        with pytest.raises(SystemExit) as stop:
            act()
        shown = self.capsys.readouterr().err
        assert stop.value.code == 2, shown
        assert shown.startswith("error: ")
        assert shown.count("\n") == 1, shown
        assert shown.endswith("\n")
        assert len(shown) < 700, shown
        for word in words:
            assert word in shown
        assert self._files() == before
        cached = [
            path.name for path in (self.folder / "cache").rglob("*") if path.suffix not in (".arrow", ".json", "")
        ]
        assert cached == []
        assert not list((self.folder / "cache").rglob("writing-*"))
        return shown

    def _files(self) -> dict[str, int]:
        return {
            str(path.relative_to(self.folder)): path.stat().st_mtime_ns if path.is_file() else 0
            for path in sorted(self.folder.rglob("*"))
            if "cache" not in path.relative_to(self.folder).parts
        }


@pytest.fixture
def workplace(tmp_path, model_folder, capsys, monkeypatch) -> Workplace:
    monkeypatch.setenv("CODIEMB_CACHE", str(tmp_path / "cache"))
    return Workplace(tmp_path, model_folder, capsys)

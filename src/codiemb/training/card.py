"""The model card: what the model is for, its scores before and after, its data and every setting."""

from __future__ import annotations

import json
from pathlib import Path

from codiemb.config import Config, Source, dump_config
from codiemb.data.checks import Report

Results = dict[str, dict[str, float]]


def write_card(
    folder: Path, config: Config, report: Report, base: Results, trained: Results, suite: list[Source]
) -> None:
    """Writes `README.md` into a model folder, in the form the Hugging Face hub reads."""
    tasks = {source.name: source.task for source in suite}
    head = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "base_model": config.model.base,
        "tags": ["sentence-transformers", "feature-extraction", "codiemb"],
    }
    scores = [
        f"| {name} | {tasks[name]} | {metric} | {100 * base[name][metric]:.2f} | {100 * value:.2f} |"
        for name, metrics in trained.items()
        for metric, value in metrics.items()
    ]
    data = [
        f"| {name} | {facts['task']} | {facts['rows']} | {facts['rows_used']} | "
        f"{facts['batches']} | {facts['passes']:.2f} |"
        for name, facts in report.content["sources"].items()
    ]
    text = f"""---
{json.dumps(head, indent=2)}
---

# {Path(config.output_dir).name}

A text-embedding model for retrieval and for semantic similarity, trained jointly by CoDiEmb from {config.model.base}.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
queries = model.encode_query(["..."])
documents = model.encode_document(["..."])
pairs = model.encode(["...", "..."], prompt_name="similarity")
```

## Scores

In points of 0 to 100, on the untouched base and on this model, with the prompts and lengths saved here.

| data set | task | metric | base | this model |
|---|---|---|---:|---:|
{chr(10).join(scores) or "| no suite was configured | | | | |"}

## Training data

| source | task | rows | rows used | batches an epoch | passes |
|---|---|---:|---:|---:|---:|
{chr(10).join(data)}

## Settings

```yaml
{dump_config(config).rstrip()}
```
"""
    (folder / "README.md").write_text(text, encoding="utf-8")

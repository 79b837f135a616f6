"""Run folders made by hand: every file that the report knows, in the agreed form, without a training."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq

SOURCES = {"faq": "retrieval", "pairs": "similarity"}
BEFORE = {"faq-test": 0.6800, "manuals": 0.4105, "sts": 0.5553}
AFTER = {"faq-test": 0.7429, "manuals": 0.4090, "sts": 0.6721}
TASKS = {"faq-test": "retrieval", "manuals": "retrieval", "sts": "similarity"}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def step_line(step, source="faq", task="retrieval", **others):
    """A line of metrics.jsonl whose loss falls as 3 / step."""
    parts = (
        {"loss/info_nce": 3 / step} if task == "retrieval" else {"loss/pearson": 1 / step, "loss/rank_kl": 0.2 / step}
    )
    return {
        "step": step, "source": source, "task": task, "loss": 3 / step, **parts, "candidates_per_query": 63.0,
        "seconds/data": 0.01, "seconds/forward": 0.3, "seconds/loss": 0.02, "seconds/backward": 0.5,
        "seconds/optimizer": 0.07, "seconds/communication": 0.0, "seconds/tokenizer": 0.05, "seconds": 0.9,
        "peak_memory_bytes": 1_500_000_000 + step, "learning_rate": 5e-5 * (1 - step / 100), "rows": 32,
        "tokens": 3600, "padded_tokens": 4000, **others,
    }  # fmt: skip


def alternating(count):
    """Steps of both sources in turn."""
    return [step_line(n, *[*SOURCES.items()][n % 2]) for n in range(1, count + 1)]


def write_steps(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_plan(folder, sources=SOURCES, warnings=()):
    facts = {
        name: {
            "task": task, "rows": 1000, "rows_used": 990, "dropped": {"duplicates": 10}, "texts_left_out": {},
            "batch_size": 32, "batches": 20, "passes": 1.0, "share_of_steps": 0.5,
            "tokens": {
                role: {"p50": 9, "p90": 30, "p99": 60, "max": 130, "max_length": 64,
                       "truncated": 0.012, "sampled_texts": 990,
                       "histogram": {"width": 8, "counts": [120, 400, 250, 100, 60, 30, 12, 8, 10]}}
                for role in (["query", "document"] if task == "retrieval" else ["similarity"])
            },
            **({"scores": {"range": [0, 5], "lowest": 0, "highest": 5, "histogram": [9, 8, 7, 6, 5, 4, 3, 2, 1, 12]}}
               if task == "similarity" else {}),
        }
        for name, task in sources.items()
    }  # fmt: skip
    overlap = [{"data_set": "sts", "source": "pairs", "texts": 200, "shared": 3}]
    write_json(folder / "plan.json", {
        "schedule": "proportional", "seed": 42, "steps_per_epoch": 20, "steps": 40, "longest_run": 3,
        "sources": facts, "overlap": overlap, "warnings": list(warnings),
    })  # fmt: skip


def write_environment(folder):
    write_json(folder / "environment.json", {
        "versions": {"python": "3.11.7", "codiemb": "0.1.0", "torch": "2.13.0"}, "device": "cpu", "device_name": "AVX2",
        "threads": 2, "world_size": 1, "bf16": False, "seed": 42,
    })  # fmt: skip


def retrieved(words, relevant):
    return [
        {"id": f"d{n}", "score": 0.9 - n / 10, "gain": float(n == relevant), "text": f"{words} result {n}"}
        for n in range(5)
    ]


def write_items(folder, data_set, task, shift, texts=("what is", "a thing")):
    """Ten items; query n scores n / 10, moved by `shift` up to a half and down from there."""
    first, second = texts
    if task == "retrieval":
        scores = [min(1.0, max(0.0, n / 10 + (shift if n < 5 else -shift / 2))) for n in range(10)]
        columns = {
            "query_id": [f"q{n}" for n in range(10)], "query": [f"{first} {n}" for n in range(10)],
            **{metric: scores for metric in ("ndcg_at_10", "mrr_at_10", "map", "recall_at_100")},
            "retrieved": [retrieved(second, 0 if shift else 3) for n in range(10)],
        }  # fmt: skip
    else:
        columns = {
            "pair": [*range(10)],
            **{key: [f"{text} {n}" for n in range(10)] for key, text in (("text1", first), ("text2", second))},
            "cosine": [math.sin(n) * (1 - shift) + n / 10 for n in range(10)], "label": [n / 10 for n in range(10)],
        }  # fmt: skip
    pq.write_table(pa.table(columns), folder / f"{data_set}.items.parquet")


def write_evaluation(folder, model, scores, tasks=None, shift=0.0, texts=("what is", "a thing"), prompt=""):
    out = folder / "eval" / model
    for data_set, score in scores.items():
        task = (tasks or TASKS)[data_set]
        metrics = (
            {"ndcg_at_10": score, "map": score - 0.1}
            if task == "retrieval"
            else {"spearman": score, "pearson": score + 0.01}
        )
        write_json(out / f"{data_set}.json", {
            "dataset": data_set, "task": task, "split": "test", "metrics": metrics, "n": 10,
            "items": f"{data_set}.items.parquet",
            "prompt": {"query": prompt, "document": ""}, "max_length": {"query": 64, "document": 256}, "bf16": False,
            "seconds": 1.5, "versions": {},
        })  # fmt: skip
        write_items(out, data_set, task, shift, texts)


def difference(name, before, after, verdict, task, **others):
    return {
        "name": name, "task": task, "metric": "ndcg_at_10" if task == "retrieval" else "spearman", "n": 200,
        "reference": before, "model": after, "difference": after - before,
        "interval": [after - before - 0.02, after - before + 0.02], "p": 0.0004, "p_holm": 0.0012, "effect_size": 0.4,
        "verdict": verdict, **others,
    }  # fmt: skip


def compared(model, scores):
    verdicts = {"faq-test": "better", "manuals": "no difference shown", "sts": "better"}
    lines = [difference(name, BEFORE[name], score, verdicts[name], TASKS[name]) for name, score in scores.items()]
    means = []
    for task in ("retrieval", "similarity"):
        one, other = ([side[name] for name in scores if TASKS[name] == task] for side in (BEFORE, scores))
        means.append(difference("", sum(one) / len(one), sum(other) / len(other), "better", task))
    means.append(
        difference(
            "", sum(BEFORE[name] for name in scores) / len(scores), sum(scores.values()) / len(scores), "better", "all"
        )
    )
    return {"model": model, "data_sets": lines, "means": means}


def write_comparison(folder, fused=None):
    comparisons = [compared("model", AFTER), *([compared("delta", fused)] if fused else [])]
    settings = {"resamples": 10000, "confidence": 0.95, "seed": 0, "test": "paired bootstrap"}
    write_json(folder / "comparison.json", {"reference": "base", "comparisons": comparisons, "settings": settings})


def write_geometry(folder):
    models = [
        {
            "model": model,
            "layers": [
                {
                    "layer": layer,
                    "token_similarity": 0.2 + 0.03 * layer * pull,
                    "condition_number": 10.0 ** (1 + layer / 2),
                }
                for layer in range(7)
            ],
            "pooled": {"anisotropy": 0.3 * pull, "effective_rank": 120.5 / pull, "uniformity": -2.5},
        }
        for model, pull in (("base", 1.0), ("model", 0.7))
    ]
    layers = [{"layer": layer, "reference_layer": layer, "cka": 1 - layer / 50} for layer in range(7)]
    cka = {"reference": "base", "models": [{"model": "model", "layers": layers, "pooled": 0.87}]}
    write_json(folder / "geometry.json", {"texts": 500, "models": models, "cka": cka})


def write_conflict(folder, count=30, every=10):
    lines = [
        {
            "step": every * n,
            "cosine": {
                "all": 0.05 * math.cos(n), "embeddings": -0.1,
                **{f"layer {layer}": 0.2 * math.sin(n / 4 + layer) for layer in range(12)},
            },
            "gradient_norm": {"retrieval": 3.0 / n, "similarity": 0.4},
        }
        for n in range(1, count + 1)
    ]  # fmt: skip
    (folder / "conflict.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def trial(checkpoints, settings, retrieval, similarity):
    return {
        "checkpoints": checkpoints,
        "settings": settings,
        "scores": {"retrieval": retrieval, "similarity": similarity},
    }


def write_fusion(folder):
    parents = [{"path": f"/somewhere/run/checkpoint-{n}", "sha256": {}} for n in (20, 40)]
    write_json(folder / "fused" / "delta" / "fusion.json", {
        "method": "delta", "scale": 1.0, "granularity": "tensor", "base": {"path": "/somewhere/base"},
        "parents": parents,
        "weights": {"a.weight": [0.4, 0.6], "b.weight": [0.5, 0.5]}, "delta_length": 7.25, "versions": {},
    })  # fmt: skip
    fused = {name: score + 0.004 for name, score in AFTER.items()}
    write_evaluation(folder, "delta", fused, shift=0.2)
    return fused


def write_pareto(folder):
    points = [
        trial(
            ["/r/a", "/r/b"],
            {"method": "weighted", "weights": [1 - n / 10, n / 10]},
            0.60 - 0.004 * n**1.5,
            0.70 + 0.02 * n**0.7,
        )
        for n in range(11)
    ]
    points.append(trial(["/r/c"], {}, 0.5, 0.7))
    write_json(folder / "pareto.json", {
        "tasks": ["retrieval", "similarity"], "points": points, "front": [*range(10, -1, -1)], "knee": 4,
    })  # fmt: skip


def whole_run(folder):
    """A run with every file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("output_dir: runs/joint\nseed: 42\nmodel:\n  base: bundled:all-MiniLM-L6-v2\n")
    write_environment(folder)
    write_plan(folder, warnings=["faq: read 12 times an epoch; it may be learnt by heart"])
    write_steps(folder, alternating(40))
    write_evaluation(folder, "base", BEFORE)
    write_evaluation(folder, "model", AFTER, shift=0.2)
    write_evaluation(folder, "step-20", {name: score + 0.03 for name, score in BEFORE.items()})
    fused = write_fusion(folder)
    write_comparison(folder, fused)
    write_geometry(folder)
    write_conflict(folder)
    write_pareto(folder)
    return folder

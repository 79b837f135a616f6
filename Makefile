PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test check chaos bench gpu clean
.DEFAULT_GOAL := test

# torch first and pinned, so that nothing else pulls a build with GPU libraries onto a machine without one.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo,dev]'
	touch $@

install: .venv/installed

demo: install
	$(BIN)/codiemb demo --out runs/demo --overwrite

test: install
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile --durations 5
	$(BIN)/python -m pytest -m "slow and not gpu" -n 2 --dist loadfile --durations 5

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

chaos: install
	$(BIN)/python benchmarks/chaos.py

bench: install
	$(BIN)/python benchmarks/check_million.py
	$(BIN)/python benchmarks/losses.py
	$(BIN)/python benchmarks/door.py
	$(BIN)/python benchmarks/scaling.py

# On a machine with a GPU: its tests, and training beside sentence-transformers with an encoder of bge-large's size.
DATA ?= ../shared/data
gpu: install
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/train.py $(DATA) --model large --dtype bf16 --warm-up 10 --steps 20 \
		--sides ours theirs ours-dropout theirs-dropout0 --out benchmarks/results/gpu.jsonl

clean:
	rm -rf .venv

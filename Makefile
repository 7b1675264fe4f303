# `make demo` and `make test` are all a new user needs; both make the environment first.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test lint format environment

demo: environment
	$(BIN)/python -m instdisc.train sample --overwrite

test: environment
	$(BIN)/python -m pytest

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: environment
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

environment: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dali,onnx,dev]'
	touch $@

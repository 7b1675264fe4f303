# `make demo` and `make test` are all a new user needs; both make the environment first.
# For the environment: the newest Python that can make one, or PYTHON=... of your own.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11; do \
	$$python -c 'import ensurepip, venv' 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
# Two files of tests at a time, as many tests wait for other processes.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test quick coverage lint format environment

demo: environment
	$(BIN)/python -m instdisc.train sample --overwrite

test: environment
	$(BIN)/python -m pytest $(TWO)

# For the inner loop: what needs no Ray, browser or Prometheus server and does not take long.
quick: environment
	$(BIN)/python -m pytest --quick $(TWO)

# Branch coverage of the three packages by all tests, in the processes that they start too.
coverage: export PYTHONPATH := $(CURDIR)
coverage: environment
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest $(TWO)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: environment
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

environment: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dali,onnx,dev]'
	touch $@

$(BIN)/python:
	$(or $(PYTHON),$(error No Python 3.11 to 3.13 that can make an environment: on Debian and Ubuntu run \
	`sudo apt-get install python3-venv`, or name one that can with PYTHON=...)) -m venv $(VENV)

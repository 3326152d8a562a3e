# make demo   set up, then prune a ResNet-18 until it is 1.5 times as fast on this CPU
# make test   set up, then run the tests
# make check  formatting, lint, types and tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := prune2deploy tests $(wildcard tools)

.PHONY: setup demo test check lint format zoo clean

setup: $(READY)

$(VENV)/.uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	touch $@

$(VENV)/.shown: EXTRAS := vision
$(READY): EXTRAS := dev
$(VENV)/.shown $(READY): $(VENV)/.uv pyproject.toml constraints.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

demo: $(VENV)/.shown
	$(BIN)/prune2deploy run --model resnet18 --target ort --speedup 1.5

test: $(READY)
	$(BIN)/python -m pytest -q

lint: $(READY)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

check: lint test

zoo: $(READY)
	$(BIN)/python tools/zoo.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

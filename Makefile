# Thin on purpose: every target is one command that can be typed by hand.
# The first call makes .venv; PyTorch is installed by itself and first, so that its version is
# the one that was tested. Another one: make TORCH=torch==... demo
TORCH  ?= torch==2.13.0
PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.ready
RUN    := $(VENV)/bin

.PHONY: demo test lint bench clean

demo: $(READY)
	$(RUN)/still-agent demo

test: $(READY)
	$(RUN)/python -m pytest -q

lint: $(READY)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

bench: $(READY)
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(RUN)/python $$script; done

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet "$(TORCH)"
	$(RUN)/python -m pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) still-demo

# make demo   a whole training run with a tiny model: no GPU, no download of a model
# make demo-flux2   the same for FLUX.2, images with reference images
# make test   everything that must hold before a change goes in
#
# Both work in .venv, which they create with PYTHON (3.11 or later):  make demo PYTHON=python3.12

PYTHON = python3
BIN = .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet -c constraints.txt
# Tests that run side by side
JOBS = 2

help:
	@sed -n 's/^# make/make/p' Makefile
	@echo "make lint   style and types only"
	@echo "make docs   write docs/config.md anew, from the code"
	@echo "make clean  remove .venv and what the tools and the demo left"

demo: .venv/installed
	$(BIN)/tworeel demo demo-output

demo-flux2: .venv/installed
	$(BIN)/tworeel demo demo-output-flux2 --family flux2

# One thread each: the tests' models are tiny, and several tests run side by side; the tests of a file mostly
# on one worker, which makes what they share once.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/python -m tworeel.config.reference > docs/config.md

clean:
	rm -rf .venv build demo-output demo-output-flux2 .pytest_cache .mypy_cache .ruff_cache src/*.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed: make demo PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing into .venv: the first time takes minutes, most of it for torch."
	$(INSTALL) -e .
	@touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt requirements-diffsynth.txt
	@echo "Installing into .venv: the first time takes minutes, most of it for torch."
	$(INSTALL) -e '.[dev]'
# Without what it depends on: its tests need neither torchvision nor a torch of its choice.
	$(INSTALL) --no-deps -r requirements-diffsynth.txt
	@touch .venv/installed $@

.PHONY: help demo demo-flux2 test lint docs clean

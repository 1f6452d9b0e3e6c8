# make demo   the whole pipeline on the embedded world, then one answered question
# make test   the fast tests        make test-all   the slow ones too
# make check  lint, format, types, floors  make lock      renew constraints.txt
# make bench-gpu  what one card makes of it, in eight minutes (benchmarks/README.md)
# make test-floor  the fast tests on the oldest torch and transformers that pyproject.toml allows
# make test-gpu    what means something on a GPU only, and what must hold there too; with the python on PATH where no .venv is

PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-floor test-gpu bench-gpu faults check lock clean

help:
	@sed -n 's/^# //p' Makefile | head -6

# What constraints.txt lists is installed and nothing else, each file by its SHA-256: torch's CPU build where it is to be had (it
# lies beside the package index, so its hash stands here: of 2.13.0, Python 3.11, Linux x86-64), else that with CUDA and what it needs.
TORCH_CPU := 6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
LOCKED := --require-hashes --no-deps -r .venv/locked.txt
without_torch = awk '/^[a-zA-Z0-9]/ { skip = $$0 ~ /^(torch==|triton==|cuda-|nvidia-c|nvidia-n[cv])/ } !skip' constraints.txt

# The stamp is newer than what decides the environment, so a second run installs nothing.
$(BIN)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + " -> make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (about 1.6 GB, once; with torch's CUDA build 5 GB)"
	@sed -n 's/^\(torch==[^ ]*\).*/\1+cpu --hash=sha256:$(TORCH_CPU)/p' constraints.txt > .venv/locked.txt
	@if $(INSTALL) $(LOCKED) 2> /dev/null; then $(without_torch) > .venv/locked.txt; else cp constraints.txt .venv/locked.txt; fi
	@$(INSTALL) $(LOCKED)
	@$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

demo: $(BIN)/.installed
	@dvc repro
	@python -m pipeline.report
	@echo; echo 'data/samples/test-7.png (held out)   "what color is the shape?"'
	@python -m pipeline.chat data/samples/test-7.png "what color is the shape?"

test: $(BIN)/.installed
	@python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-all: $(BIN)/.installed
	@python -m pytest -n 2 --dist loadfile -m "not gpu"

FLOOR := .venv-floor
floor_of = $(1)==$(shell sed -n 's/.*"$(1)>=\([0-9.]*\),.*/\1/p' pyproject.toml).*

# torch 2.11 wants an older setuptools than the lock has
$(FLOOR)/.installed: pyproject.toml constraints.txt
	@test -x $(FLOOR)/bin/python || $(PYTHON) -m venv $(FLOOR)
	@$(without_torch) | sed -n 's/^\([a-z0-9].*[^ ]\) *\\$$/\1/p' | grep -vE '^(transformers|tokenizers|huggingface|setuptools)' > $(FLOOR)/constraints.txt
	@echo "installing $(call floor_of,torch) and $(call floor_of,transformers) into $(FLOOR) (over 5 GB where torch comes with CUDA only)"
	@$(FLOOR)/bin/pip install --quiet --disable-pip-version-check -c $(FLOOR)/constraints.txt "$(call floor_of,torch)" "$(call floor_of,transformers)" -e '.[dev]'
	@touch $@

test-floor: $(FLOOR)/.installed
	@PATH=$(CURDIR)/$(FLOOR)/bin:$$PATH python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

# GPU machines come with torch and without a network: nothing is installed.
test-gpu:
	@python -m pytest tests/gpu
# .venv's python where there is one, else the first on PATH: a machine with a card brings its own torch
bench-gpu:
	@python -m benchmarks.gpu

# Kills, errors, power losses, flipped bits, hostile inputs, guards taken out; hours. SECTIONS="points power" is a portion.
faults: $(BIN)/.installed
	@PYTHONPATH=.:tests python tests/faults/long.py $(SECTIONS)

check: $(BIN)/.installed
	@ruff check . && ruff format --check . && mypy && lint-imports --no-logo

# Hashes are those of every file of a version, for every platform, as the package index gives them.
LOCK := .venv-lock
lock:
	@test -x $(LOCK)/bin/uv || { $(PYTHON) -m venv $(LOCK) && $(LOCK)/bin/pip install --quiet uv; }
	@$(LOCK)/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --upgrade --generate-hashes \
	  --no-annotate --no-header --quiet -o $(LOCK)/locked.txt
	@(echo "# Exact versions of everything \`make\` installs, with the SHA-256 of their files; pyproject.toml has the ranges."; \
	  echo "# Renewed by \`make lock\`."; \
	  cat $(LOCK)/locked.txt) > constraints.txt

clean:
	rm -rf .venv .venv-floor .venv-lock .dvc/cache .dvc/tmp .dvc/features data/features data/features_* data/tokens models results

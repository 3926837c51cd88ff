# `make demo` and `make test` each work from a fresh clone: they need Python 3.10 or later, git and make, nothing else.
# pip's own settings (mirrors, proxies, a CPU-only torch) are respected: set them as for any other install.

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do \
	if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then echo "$$p"; exit; fi; done)
# Installed only where torch did not bring its own Triton (a CPU build): the tests run kernels in Triton's interpreter.
TRITON := 'triton==3.9.0; platform_system == "Linux" and python_version >= "3.11"' \
	'triton; platform_system == "Linux" and python_version < "3.11"'

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq -c constraints.txt
STAMP := $(VENV)/.installed
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: help demo test lint format bench doctor wheel clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## Draw the same prompts eager and compiled: out/demo.png and a table (ARGS="--steps 10 ...")
	$(BIN)/python -m sfast demo $(ARGS)

test: $(STAMP) ## Run every test this machine can run (ARGS="-k group_norm ...")
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest $(ARGS)

lint: $(STAMP) ## ruff, mypy, clang-format: complain, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@shopt -s nullglob globstar; files=(csrc/**/*.{h,cpp,cu,cuh}); \
	if ((!$${#files[@]})); then exit 0; fi; \
	echo "clang-format --dry-run -Werror (in csrc: $${#files[@]} files)"; $(BIN)/clang-format --dry-run -Werror "$${files[@]}"

format: $(STAMP) ## ruff and clang-format: rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@shopt -s nullglob globstar; files=(csrc/**/*.{h,cpp,cu,cuh}); \
	if (($${#files[@]})); then $(BIN)/clang-format -i "$${files[@]}"; fi

bench: $(STAMP) ## Run the pipeline benchmarks (a GPU; ARGS="--help" lists the options)
	$(BIN)/python -m sfast bench $(if $(ARGS),$(ARGS),pipelines)

doctor: $(STAMP) ## What is installed, what is missing, and the command that adds it
	$(BIN)/python -m sfast doctor

wheel: $(STAMP) ## Build dist/*.whl, with the native ops where a CUDA toolkit and a CUDA torch are there
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps -w dist .

clean: ## Remove what was built and drawn (.venv stays; the next call installs into it anew)
	rm -rf $(STAMP) build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache sfast/*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# torch goes first: the build of the native ops asks the torch that is there, so the last install is not isolated.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@if [ -z "$(PYTHON)" ]; then echo "sfast needs Python 3.10 or later, and none was found: make PYTHON=/path/to/python3" >&2; exit 1; fi
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@echo "[1/3] torch into $(VENV) (once; minutes where it must be downloaded)"
	@$(PIP) torch setuptools wheel packaging ninja
	@echo "[2/3] Triton"
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) $(TRITON)
	@echo "[3/3] sfast, its requirements and its development tools"
	@$(PIP) --no-build-isolation -e '.[dev]' || { echo "That failed; once more, without the native ops" && \
	SFAST_BUILD_NATIVE=0 $(PIP) --no-build-isolation -e '.[dev]'; }
	@touch $@

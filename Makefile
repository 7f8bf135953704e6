# Every target first brings $(VENV) up to date, so a fresh clone needs nothing but one of them.
#
#   make test ARGS="-k recentre"                  one part of the tests
#   make venv PYTHON=python3.12                   with this Python
#   make test VENV=.venv-2.11 TORCH=2.11.0        against another torch, beside the usual environment

VENV   ?= .venv
TORCH  ?= 2.13.0
PYTHON ?=
JOBS   ?= 2
ARGS   ?=
ZOO    ?= ../shared/zoo

PY    := $(VENV)/bin/python
STAMP := $(VENV)/.up-to-date
# Two --quiet: one still prints a warning for every index that lacks a package.
PIP   := $(PY) -m pip --quiet --quiet --disable-pip-version-check

# A name is tried before it is trusted: a version manager leaves names on the PATH that run nothing. 3.11, because the
# pinned tools and transformers need it (normfx itself runs on 3.10).
CANDIDATES := $(or $(PYTHON),python3 python3.11 python3.12 python3.13)
PROBE      := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
# Fails where torch requires a Triton of its own.
NO_TRITON  := import sys, importlib.metadata as m; sys.exit(any("triton" in r for r in m.requires("torch")))

# pyright would ask the network whether there is a newer one.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

# The tests of the page of a diff drive a real browser, and say so where they skip for want of one.
CHROMIUM   := if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v chromium >/dev/null; then \
		echo "environment: chromium"; \
		apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium \
			>/dev/null || echo "environment: no chromium here; tests of the page will skip"; \
	fi

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test zoo lint fix docs site clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

venv: $(STAMP) ## create or update the environment; all other targets do it too

demo: $(STAMP) ## embed sentences with a compiled model, and show what was done to it
	@$(PY) examples/embed_sentences.py $(ARGS)

# One thread a worker: the tensors are small, and workers that share the cores slow each other down.
test: $(STAMP) ## run the tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal --durations 10 $(ARGS)

zoo: $(STAMP) ## compare each norm of the models in ZOO with what it replaced
	@OMP_NUM_THREADS=1 $(PY) -m benchmarks.zoo --zoo $(ZOO) --jobs $(JOBS) --check $(ARGS)

lint: $(STAMP) ## check format, lint and types
	@echo "ruff format"; $(PY) -m ruff format --quiet --check .
	@echo "ruff check"; $(PY) -m ruff check --quiet .
	@echo "pyright"; $(PY) -m pyright --pythonpath $(PY)

fix: $(STAMP) ## format, and fix what ruff can
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .

docs: $(STAMP) ## write docs/rules.md, docs/options.md and a table of docs/kernels.md from the code
	@$(PY) docs/generate.py $(ARGS)

site: $(STAMP) $(VENV)/.docs ## build the documentation site into site/, and check its links
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

clean: ## remove caches and builds, not the environment
	@rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis torch_compile_debug
	@find . -name '.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, at one version: a range would let pip choose a build with several GB of CUDA packages on
# a machine that has the CPU build at hand.
$(STAMP): $(PY) $(wildcard requirements/*.txt) pyproject.toml Makefile
	@echo "environment: torch $(TORCH)"
	@$(PIP) install torch==$(TORCH)
	@echo "environment: tools, examples"
	@$(PIP) install -r requirements/dev.txt
	@$(CHROMIUM)
	@if $(PY) -c '$(NO_TRITON)'; then $(PIP) install -r requirements/triton.txt; fi
	@$(PIP) install --no-deps -r requirements/no-deps.txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@echo "environment: $(VENV) is up to date"
	@touch $@

$(VENV)/.docs: $(STAMP) requirements/docs.txt
	@echo "environment: documentation"
	@$(PIP) install -r requirements/docs.txt
	@touch $@

# Also runs when the Python that the environment was made with has gone, as the link then leads nowhere.
$(PY):
	@for python in $(CANDIDATES); do \
		if $$python -c '$(PROBE)' 2>/dev/null; then \
			echo "environment: $(VENV) with $$($$python --version)"; \
			exec $$python -m venv --clear $(VENV); \
		fi; \
	done; \
	echo "no Python 3.11 or newer with venv among: $(CANDIDATES); try make PYTHON=..." >&2; exit 1

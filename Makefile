# `make` alone prints the targets. Everything lives in .venv; delete it to start over.

VENV := .venv
BIN := $(VENV)/bin
# Conflict warnings are off because one is expected and harmless: "torchrec 1.8.0 requires fbgemm-gpu, which is not installed".
# fbgemm-gpu is the CUDA build; on a CPU its place is taken by fbgemm-gpu-cpu. `distmtl doctor` checks what matters.
PIP_INSTALL := $(BIN)/python -m pip install -qq --no-warn-conflicts --disable-pip-version-check -c constraints.txt
# By a path, not by setuptools' finder: beside a clone that is itself called distmtl, Python would find that folder first.
EDITABLE := --config-settings editable_mode=compat -e
TORCHREC := torchrec==1.8.0
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install install-dev quickstart test docs docs-check test-slow chaos bench bench-check bench-heads bench-quality bench-conflict bench-drift bench-reproduce bench-sizes bench-weighting peers lint clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## create .venv with the pinned CPU stack; the command is .venv/bin/distmtl

install-dev: $(VENV)/.installed-dev ## the same, with pytest, ruff, mypy and import-linter

quickstart: install ## generate the synthetic log and train MMoE on two Ray Train workers
	@test -e data/synthetic/mmoe.yaml || $(BIN)/distmtl synth --out data/synthetic
	@rm -rf runs/quickstart
	@$(BIN)/distmtl train data/synthetic/mmoe.yaml --workers 2 run.dir=runs/quickstart

test: install-dev ## run every test that is not slow and needs no GPU
	@$(PYTEST) -n 2 --dist loadgroup -m "not slow and not gpu"

test-slow: install-dev ## run the slow tests
	@$(PYTEST) -m "slow and not gpu"

docs: $(VENV)/.installed-docs ## the documentation as a site in build/site; docs/reference is written anew
	@$(BIN)/python -m documentation.reference
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "built build/site; to read it: $(BIN)/python -m http.server -d build/site"

docs-check: $(VENV)/.installed-docs ## run every command, config and notebook of the documentation; a part of it: SHARD=3/24
	@$(BIN)/python -m documentation.check $(SHARD)

chaos: install-dev ## 24 random failures against a run on several nodes, on a fixed number of workers, then elastic (root, half an hour)
	@$(BIN)/python tests/chaos.py --workers 2
	@$(BIN)/python tests/chaos.py --workers 1-2

bench: data/wide/mmoe.yaml ## ratios to the machine's limit, beside TorchRec, PyTorch and peers; 15 minutes, on a quiet machine
	@$(BIN)/python -m benchmarks.suite data/wide/mmoe.yaml

bench-check: data/wide/mmoe.yaml ## the same, failing where a ratio has dropped by more than 15 % since the committed results
	@$(BIN)/python -m benchmarks.suite data/wide/mmoe.yaml --rounds 3 --out build/bench
	@$(BIN)/python -m benchmarks.check benchmarks/results/suite.json build/bench/suite.json

bench-heads: data/wide/mmoe.yaml ## every head's speed beside its own matrix products; about 2 minutes, on a quiet machine
	@$(BIN)/python -m benchmarks.heads data/wide/mmoe.yaml

bench-weighting: data/wide/mmoe.yaml ## what methods that read the tasks' gradients cost a step; 4 minutes, on a quiet machine
	@$(BIN)/python -m benchmarks.weighting data/wide/mmoe.yaml

bench-quality: install ## heads, features and losses where the truth is planted; about 40 minutes
	@$(BIN)/python -m benchmarks.quality

bench-conflict: install ## every weighting against static weights where conflict is planted, and where not; about two hours
	@$(BIN)/python -m benchmarks.conflict

bench-drift: install ## a model that follows drifting data against a frozen one and daily new ones; about 4 minutes
	@$(BIN)/python -m benchmarks.drift

bench-reproduce: install ## results of the MMoE, PLE, ESMM and ESCM² papers; 2 hours; raw files: CENSUS=DIR MOVIELENS=DIR
	@$(BIN)/python -m benchmarks.reproduce.mmoe_synthetic
	@$(BIN)/python -m benchmarks.reproduce.funnel
	@$(BIN)/python -m benchmarks.reproduce.census $(if $(CENSUS),--source $(CENSUS))
	@$(BIN)/python -m benchmarks.reproduce.movielens $(if $(MOVIELENS),--source $(MOVIELENS))

bench-sizes: data/wide/mmoe.yaml ## curves over sizes with plots, peak memory, bytes sent; about 10 minutes
	@$(BIN)/python -m benchmarks.curves
	@$(BIN)/python -m benchmarks.memory
	@$(BIN)/python -m benchmarks.traffic data/wide/mmoe.yaml

peers: | install ## torch-rechub and deepctr-torch in build/peers, for `make bench`
	@$(BIN)/python -m venv build/peers
	@build/peers/bin/python -m pip install -qq --disable-pip-version-check -r benchmarks/peers/requirements.txt

data/wide/mmoe.yaml: | install-dev
	@$(BIN)/distmtl synth --wide --rows 1310720 --out data/wide

lint: install-dev ## ruff, mypy, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

clean: ## remove caches and build leftovers; .venv, data and runs stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@python=; for name in python3.11 python3 python3.12; do \
	  if $$name -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then python=$$name; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "distmtl needs Python 3.11 or 3.12 on PATH (found: $$(python3 --version 2>/dev/null || echo none))" >&2; exit 1; fi; \
	echo "creating $(VENV) with $$($$python --version)"; \
	$$python -m venv $(VENV) || { rm -rf $(VENV); echo "could not create $(VENV); on Debian and Ubuntu: apt-get install $$python-venv" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the CPU stack (torch, fbgemm, ray, pyarrow) and distmtl: a few minutes"
	@$(PIP_INSTALL) $(EDITABLE) '.[cpu]'
	@echo "installing $(TORCHREC) (alone: its metadata asks for the CUDA fbgemm)"
	@$(PIP_INSTALL) --no-deps $(TORCHREC)
	@touch $@
	@echo "installed: $(BIN)/distmtl"

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the development tools (pytest, ruff, mypy, import-linter)"
	@$(PIP_INSTALL) $(EDITABLE) '.[cpu,dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	@echo "installing what builds and runs the documentation (mkdocs-material, nbclient)"
	@$(PIP_INSTALL) $(EDITABLE) '.[cpu,dev,docs]'
	@touch $@

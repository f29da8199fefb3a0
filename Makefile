# make demo and make test set everything up by themselves; the second run is quick
SHELL := /bin/bash
BIN := .venv/bin
STAMP := .venv/.ready
OUT ?= demo_out

# real data: a folder named shared beside this one, unless the variable is set already (set it empty to do without)
ifeq ($(origin GENEFORMER_NB_DATA),undefined)
ifneq ($(wildcard ../shared/.),)
GENEFORMER_NB_DATA := $(abspath ../shared)
endif
endif
export GENEFORMER_NB_DATA

# notebooks are tested two at a time: each gets half of the cores
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
THREADS := $(shell echo $$(( ($(CORES) + 1) / 2 )))
OMP_NUM_THREADS ?= $(THREADS)
FLAGS := $(if $(GENEFORMER_NB_DATA),$(if $(wildcard $(GENEFORMER_NB_DATA)/.),--flags realdata))

.PHONY: help setup demo test docs bench readme notebooks sidebar data clean
help:
	@echo "make demo       a target screen on a simulated cohort with known drivers; results in $(OUT)"
	@echo "make test       every check: notebooks, modules, README, pytest"
	@echo "make docs       the site, into _docs"
	@echo "make bench      the benchmarks, into benchmarks/RESULTS.md (BENCH=\"rank --pairs 5\" for some)"
	@echo "make setup      only the virtual environment in .venv"
	@echo "make notebooks  run every notebook and store its outputs (NB=nbs/07_model.ipynb for one)"
	@echo "make sidebar    list every notebook in the sidebar of the site"
	@echo "make readme     README.md from nbs/index.ipynb"
	@echo "make clean      remove what was built; .venv stays"

setup: $(STAMP)
$(STAMP): settings.ini setup.py constraints.txt .ci/setup
	@.ci/setup $(STAMP)

demo: $(STAMP)
	@$(BIN)/geneformer-nb demo --out $(OUT)

test: export OMP_NUM_THREADS := $(OMP_NUM_THREADS)
test: export NUMBA_NUM_THREADS := $(OMP_NUM_THREADS)
test: $(STAMP) data
	@echo "--- notebooks clean, modules in sync, sidebar and README up to date"
	@$(BIN)/python .ci/nb.py check
	@echo "--- notebooks run"
	@$(BIN)/python .ci/nb.py skips
	@$(BIN)/nbdev_test --n_workers 2 --timing $(FLAGS)
	@echo "--- pytest"
	@$(BIN)/python -m pytest -rs -n 2 --dist loadfile tests

data:
	@if [ -d "$$GENEFORMER_NB_DATA" ]; then echo "real data: here, realdata cells and golden tests run $(FLAGS)"; \
	else echo "real data: not here (GENEFORMER_NB_DATA names no folder), realdata cells and golden tests are skipped"; fi

docs: $(STAMP)
	@if command -v quarto >/dev/null; then $(BIN)/nbdev_docs; \
	else echo "Quarto is not on PATH: building the preview"; $(BIN)/python .ci/nb.py preview --out _docs; fi

bench: $(STAMP)
	@$(BIN)/python benchmarks/run.py --write $(BENCH)

readme: $(STAMP)
	@$(BIN)/python .ci/nb.py readme

sidebar: $(STAMP)
	@$(BIN)/python .ci/nb.py sidebar

notebooks: $(STAMP)
	@$(BIN)/python .ci/nb.py save $(NB)

clean:
	rm -rf _proc _docs _site build dist $(OUT) .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

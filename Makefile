# `make demo` and `make test` each do everything on a fresh machine; `make setup` only installs.
VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
DEMO_OUT := bonbon-demo
# In front of true servers, which take long to start; the engine's own tests run in its environment.
WITH_VLLM := tests/end_to_end/test_vllm.py tests/end_to_end/test_remote_vllm.py
# Folders whose tests are mostly quick; collecting the others would take longer than running these.
QUICK := $(addprefix tests/,config demo evaluation groups objectives planning report runs system tilt)
export BONBON_VLLM_ENV ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/bonbon/vllm-env

.PHONY: setup test quick test-vllm lint demo demo-short clean

setup: $(INSTALLED)

# torch first and pinned: another version may be a build for a GPU that is not there.
$(INSTALLED): pyproject.toml
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet torch==2.13.0
	$(PYTHON) -m pip install --quiet --editable '.[demo,dev]'
	touch $@

test: setup
	$(PYTHON) -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations 15 \
		$(addprefix --ignore=,$(WITH_VLLM) tests/models/test_vllm_engine.py)

# What loads no model, starts no process, server or browser, and does not compute for long.
quick: setup
	$(PYTHON) -m pytest -q -p no:schemathesis -n 2 --dist loadfile -m "not (model or process or server or browser or slow)" $(QUICK)

# With vLLM itself, which has an environment of its own outside the checkout (a long download, once).
test-vllm: setup
	scripts/setup_vllm.sh
	PYTHONPATH=src $(BONBON_VLLM_ENV)/bin/python -m pytest -rs tests/models/test_vllm_engine.py
	$(PYTHON) -m pytest -rs $(WITH_VLLM)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PYTHON) scripts/check_layout.py
	$(PYTHON) scripts/write_configuration.py --check

# Both go on with an earlier demo in the same folder; `make clean` removes it.
demo: setup
	$(VENV)/bin/bonbon demo --out $(DEMO_OUT)

demo-short: setup
	$(VENV)/bin/bonbon demo --short --out $(DEMO_OUT)-short

clean:
	rm -rf $(VENV) $(DEMO_OUT) $(DEMO_OUT)-short build dist

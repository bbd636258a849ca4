# `make demo` and `make test` set up what they need in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
DEMO_ARGS ?=
TEST_WORKERS ?= 2

.PHONY: demo demo-real test test-all lint clean

demo: $(VENV)/.installed-bench
	$(VENV)/bin/python examples/demo/run.py --seed $(SEED) $(DEMO_ARGS)

# Two pretrained models, from the hub or (MODELS=folder, DATA=mbpp.jsonl) from disk
demo-real: $(VENV)/.installed-bench
	$(VENV)/bin/python examples/demo_real/run.py $(if $(MODELS),--models $(MODELS)) $(if $(DATA),--data $(DATA)) $(DEMO_ARGS)

# One thread a process: the models are tiny, and more threads only wait for each other. A file stays with one worker, since
# its tests share what they train.
PYTEST = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1 $(VENV)/bin/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
test: $(VENV)/.installed-test
	$(PYTEST) -m "not slow" $(TEST_ARGS)

test-all: $(VENV)/.installed-test $(VENV)/.installed-quantized
	$(PYTEST) $(TEST_ARGS)

RUFF_FLAGS = --isolated --line-length 120
lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check $(RUFF_FLAGS) --select E,F,W,I,B,UP,SIM --ignore E402,E501 --config 'lint.isort.lines-after-imports = 2' .
	$(VENV)/bin/ruff format $(RUFF_FLAGS) --exclude '*.md' --check .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"trl_ctopd needs Python 3.11 or newer, and $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)

# torch comes first and pinned: left to the others' ranges, pip may pick another build
$(VENV)/.installed-%: setup.cfg setup.py pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) demo_output build *.egg-info

# `make demo` and `make test` set up what they need in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
DEMO_ARGS ?=
TEST_WORKERS ?= 2

.PHONY: demo demo-real test test-all test-lowest test-newest lint clean

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

# The lowest versions that setup.cfg allows of what it names, and the newest of everything, each in an environment of its own.
# torch comes first, so that another build can be asked for: TORCH_LOWEST="--index-url ... torch==2.9.0".
EDGE_TESTS ?= tests/text tests/losses tests/trainer/test_trainer.py
TORCH_LOWEST ?= torch==2.9.0
TORCH_NEWEST ?= torch
TEST_TOOLS = pytest pytest-xdist hypothesis sentencepiece protobuf tiktoken matplotlib
test-lowest: RESOLUTION = lowest-direct
test-lowest: TORCH = $(TORCH_LOWEST)
test-newest: RESOLUTION = highest
test-newest: TORCH = $(TORCH_NEWEST)
test-lowest test-newest: test-%:
	$(PYTHON) -m venv --clear $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet uv
	$(VENV)-$*/bin/uv pip install --quiet --python $(VENV)-$*/bin/python $(TORCH)
	$(VENV)-$*/bin/uv pip install --quiet --python $(VENV)-$*/bin/python --resolution $(RESOLUTION) .
	$(VENV)-$*/bin/uv pip freeze --quiet --python $(VENV)-$*/bin/python --exclude trl_ctopd > $(VENV)-$*/versions.txt
	$(VENV)-$*/bin/uv pip install --quiet --python $(VENV)-$*/bin/python --constraint $(VENV)-$*/versions.txt $(TEST_TOOLS)
	$(subst $(VENV)/bin,$(VENV)-$*/bin,$(PYTEST)) -m "not slow" $(EDGE_TESTS)

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
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest demo_output build *.egg-info

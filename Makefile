# make demo   sets up and runs the main job        make test        sets up and passes every fast-enough test
# make check  lint, types, import law, unit tests  make test-slow   the demo and other minutes-long tests
# make prove  every fault in every phase and stage make soak        random kills; both write bench/results
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check lint unit distributed road ranks test-slow prove soak clean

demo: $(READY)
	$(BIN)/foretune demo

test: lint unit ranks

check: lint unit

lint: $(READY)
	$(BIN)/ruff format --check foretune tests bench
	$(BIN)/ruff check foretune tests bench
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(READY)
	$(BIN)/pytest tests/unit -m "not slow and not gpu" --numprocesses auto --maxprocesses 4 \
	  --dist loadfile --no-loadscope-reorder

distributed: $(READY)
	$(BIN)/pytest tests/distributed -m "not slow and not gpu"

road: $(READY)
	$(BIN)/pytest tests/road -m "not slow and not gpu"

# Two files at a time: they wait for processes more than they compute.
ranks: $(READY)
	$(BIN)/pytest tests/distributed tests/road -m "not slow and not gpu" \
	  --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	$(BIN)/pytest tests -m slow

prove: $(READY)
	$(BIN)/python bench/prove.py

soak: $(READY)
	$(BIN)/python bench/prove.py --minutes 15

# pip, not another installer: CPU builds of torch are found as pip is set up to find them.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

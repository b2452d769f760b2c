# make demo           install into .venv, then train the sample style on the embedded base and show it
# make test           install into .venv, then lint, types and all tests but the long ones
# make test-long      the same with the long tests
# make gpu            install into .venv, then run the tests and the benchmarks that need a CUDA device
# make simulated-card install into .venv, then run the CUDA path on a simulated GPU (needs torch 2.11 for CUDA 13)
# make sketch         continue training the embedded base (hours on a CPU, minutes on a GPU; needs npm)

PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
BIN := $(VENV)/bin
TWO := -n 2 --dist loadscope  # processes, each with one thread; the tests of a file stay together

export HF_HUB_OFFLINE := 1

.PHONY: demo test test-long gpu simulated-card sketch clean

demo: $(VENV)/.demo
	$(BIN)/scumble train datasets/samples/clay-style --base sketch --preset sketch-demo --output-dir demo

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --python $(VENV)
	$(BIN)/pytest $(TWO)

test-long: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --python $(VENV)
	$(BIN)/pytest $(TWO) -m ""

gpu: $(VENV)/.test
	$(BIN)/pytest -m gpu
	$(BIN)/python tests/benchmarks/speed.py --device cuda --layouts sd15 sdxl --batches 1 4 8 --minutes 8
	$(BIN)/python tests/benchmarks/memory.py --device cuda

simulated-card: $(VENV)/.test
	@$(BIN)/python tests/benchmarks/simulated_card/card.py check
	$(BIN)/pytest tests/benchmarks/simulated_card/test_simulated_card.py

sketch: $(VENV)/.sketch
	$(BIN)/python -m scumble.configs.bases.sketch.recipe --work build/sketch --out configs/bases/sketch
	$(BIN)/scumble preview --base sketch --out configs/bases/sketch/grid.png --force

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/pip pyproject.toml
	$(BIN)/pip install -q "$(TORCH)" -e .
	touch $@

$(VENV)/.test: $(VENV)/bin/pip pyproject.toml
	$(BIN)/pip install -q "$(TORCH)" -e ".[test]"
	touch $@ $(VENV)/.demo

$(VENV)/.sketch: $(VENV)/bin/pip pyproject.toml
	$(BIN)/pip install -q "$(TORCH)" -e ".[sketch]"
	touch $@

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .ruff_cache

# The two commands to start with are `make demo` and `make test`. Everything happens in a virtual environment of its own.
PYTHON ?= python3
VENV   ?= .venv
# The version that is tested. `pip` finds it by your own settings; the README says how to get the small CPU build.
TORCH  ?= torch==2.13.0
MODEL  ?= smollm2
BIN    := $(VENV)/bin
SOURCES := $(shell find csrc llmbuilder kernels cmake -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.inc' -o -name '*.py' -o -name '*.cmake') CMakeLists.txt pyproject.toml

.PHONY: demo test ladder lint mutations bench bench-gpu bench-forgetting clean
demo: $(VENV)/.installed
	$(BIN)/python examples/demo --model $(MODEL)

test: $(VENV)/.installed
	$(BIN)/pytest

# Proves the GPU kernels without a GPU, rung by rung (docs/kernels.md); `make ladder RUNGS="6 8"` climbs some.
ladder: $(VENV)/.installed
	$(BIN)/python tests/ladder.py $(RUNGS)

lint: $(VENV)/.developer
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	git ls-files '*.h' '*.cpp' '*.cu' '*.inc' | xargs -r $(BIN)/clang-format --dry-run -Werror

# Seeds bugs into the CPU kernels, and into the methods against forgetting; each must be caught by a test.
mutations: $(VENV)/.developer
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/mutations/cpu.py
	$(BIN)/python tests/mutations/methods.py

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/run.py

bench-gpu: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu/run.py

# What the methods against forgetting keep: five seeds, under an hour. `MODEL=smollm2` takes the demo's model, one seed.
bench-forgetting: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet '.[bench]'
	$(BIN)/python benchmarks/forgetting/run.py $(if $(filter file default,$(origin MODEL)),,$(MODEL))

# One environment for all of them. Installed, not linked: what is tested is what a user gets.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet '.[test]'
	touch $@

$(VENV)/.developer: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet '.[dev]'
	touch $@

clean:
	rm -rf build dist runs .cache $(VENV)

# The two commands to start with are `make demo` and `make test`. Everything happens in a virtual environment of its own.
PYTHON ?= python3
VENV   ?= .venv
# The version that is tested. `pip` finds it by your own settings; the README says how to get the small CPU build.
TORCH  ?= torch==2.13.0
MODEL  ?= smollm2
BIN    := $(VENV)/bin
SOURCES := $(shell find csrc llmbuilder kernels -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.py') CMakeLists.txt pyproject.toml

.PHONY: demo test lint mutations bench clean
demo: $(VENV)/.installed
	$(BIN)/python examples/demo --model $(MODEL)

test: $(VENV)/.installed
	$(BIN)/pytest

lint: $(VENV)/.developer
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	git ls-files '*.h' '*.cpp' '*.inc' | xargs -r $(BIN)/clang-format --dry-run -Werror

# Seeds bugs into the CPU kernels; each must be caught by a test.
mutations: $(VENV)/.developer
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/mutations/cpu.py

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/run.py

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

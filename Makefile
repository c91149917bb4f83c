# Every target does its own set-up: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-slow test-browser check format docs docs-serve benchmark benchmark-study benchmark-scaling benchmark-cuda benchmark-faults benchmark-sensitivity clean

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

# llama-cpp-python is built from source, about 5 minutes on two cores; pip keeps the wheel for the next time.
$(VENV)/.dev: $(VENV)/.base
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.base  ## the whole analysis of the bundled trained model
	$(BIN)/quantscope demo

test: $(VENV)/.dev  ## unit, oracle and end-to-end tests
	$(BIN)/python -m pytest -m "not slow and not long and not browser"

test-long: $(VENV)/.dev  ## the tests that take half a minute each: clusters, converters, planted engines
	$(BIN)/python -m pytest -m "long and not slow and not browser"

test-slow: $(VENV)/.dev  ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow

# where there is no Chromium the tests are skipped and say so; Debian's is installed where that is allowed
test-browser: $(VENV)/.dev  ## the HTML pages in a real browser
	command -v chromium >/dev/null || (apt-get install -y -qq chromium fonts-noto-cjk >/dev/null 2>&1 || true)
	$(BIN)/python -m pytest -m browser

check: $(VENV)/.dev  ## formatting, lint, types, import order, catalogue of sentences
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m tools.check_imports
	$(BIN)/python -m tools.check_catalogue

format: $(VENV)/.dev  ## apply formatting and safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

PAGES := cli_reference api_reference architecture fault_table

docs: $(VENV)/.dev  ## write the generated pages and build the documentation site, strictly, into build/site
	for page in $(PAGES); do $(BIN)/python -m tools.$$page || exit 1; done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Open build/site/index.html."

docs-serve: $(VENV)/.dev  ## the documentation site while you write
	$(BIN)/mkdocs serve

benchmark: $(VENV)/.dev  ## throughput beside ggml's own functions
	$(BIN)/python -m benchmarks.codecs

# builds llama.cpp's programs on first use, some minutes; on an otherwise idle machine with 4 GB of free disk
benchmark-study: $(VENV)/.dev  ## a whole study beside llama.cpp's own programs
	$(BIN)/python -m benchmarks.study --profile

benchmark-scaling: $(VENV)/.dev  ## cost by variants and tokens
	$(BIN)/python -m benchmarks.scaling

benchmark-cuda: $(VENV)/.dev  ## a study and the codecs on a GPU beside the CPU
	$(BIN)/python -m benchmarks.cuda

# about 20 minutes on two idle cores
benchmark-faults: $(VENV)/.dev  ## what the verdict says of faults planted in three engines
	$(BIN)/python -m benchmarks.faults

benchmark-sensitivity: $(VENV)/.dev  ## predicted beside measured KL of every matrix in every type
	$(BIN)/python -m benchmarks.sensitivity --seeds 2

clean:  ## remove what the targets made
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

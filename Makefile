# Thin front of CMake: `make help` lists what there is.
JOBS ?= $(shell nproc)
BUILD := build
CUDA_BUILD := $(BUILD)/cuda
KERNELS := $(CUDA_BUILD)/kernels/cuda/libredknot_kernels.so
CTEST_ARGS ?=

.PHONY: help setup setup-test build demo test cuda test-cuda bench bench-data-plane bench-kernels verify clean format lint

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

PROGRAMS := redknot redknot-coordinator redknot-kvstore redknot-worker

demo: setup ## Build what runs, start a cluster on loopback, ask questions over examples/, stop it
	@tools/build.sh $(BUILD) $(JOBS) $(PROGRAMS)
	@$(BUILD)/bin/redknot demo --examples examples

test: build ## The whole test suite; at the end what this machine had to skip, and why
	@ctest --test-dir $(BUILD) --output-on-failure $(CTEST_ARGS); code=$$?; tests/support/skipped.sh $(BUILD); exit $$code

setup: ## Install what building and running needs (Debian packages, the model)
	@tools/setup.sh

setup-test: ## Install what the tests need, too
	@tools/setup.sh tools/packages-test.txt

build: setup-test ## Build all into build/, binaries in build/bin
	@tools/build.sh $(BUILD) $(JOBS)

bench: build ## The CPU benchmarks of docs/benchmarks.md without foreign peers, some 15 minutes
	@bench/run.sh

bench-data-plane: ## Reads and writes against Mooncake, Redis and bare TCP, UCX and gRPC (QUICK=1: two minutes)
	@$(MAKE) --no-print-directory build >&2
	@bench/peers/install.sh
	@bench/data_plane.py $(if $(QUICK),--quick)

cuda: setup-test ## Build the kernels of a GPU and their tests into build/cuda; needs no GPU
	@PATH="$$(tools/setup_cuda.sh):$$PATH" && cmake --preset cuda -Wno-dev >$(BUILD).log 2>&1 || { cat $(BUILD).log; exit 1; }
	@rm -f $(BUILD).log
	@PATH="$$(tools/setup_cuda.sh):$$PATH" && cmake --build $(CUDA_BUILD) -j $(JOBS) --target redknot_kernels test_kernels_cuda -- --quiet

test-cuda: ## On a machine with a GPU: its kernels against the references, 10,000 random cases
	@[ -x $(CUDA_BUILD)/tests/test_kernels_cuda ] || $(MAKE) --no-print-directory cuda
	@$(CUDA_BUILD)/tests/test_kernels_cuda --cases 10000

bench-kernels: ## On a machine with a GPU and PyTorch: attention against cuDNN, FlashInfer, flex (QUICK=1: seconds)
	@[ -f $(KERNELS) ] || $(MAKE) --no-print-directory cuda
	@bench/kernels/bench_kernels.py --library $(KERNELS) --flex $(if $(QUICK),--quick)

verify: ## Check the model of the store's protocol with spin, a minute
	@tools/setup.sh tools/packages-test.txt tools/packages-ci.txt
	@tests/model/run.sh

lint: build ## Format, clang-tidy and include direction
	@tools/setup.sh tools/packages-test.txt tools/packages-ci.txt
	@tests/lint/run_format.sh
	@/usr/bin/python3 tests/lint/include_direction.py
	@tests/lint/run_tidy.sh $(BUILD)

format: ## Format all C files
	@tests/lint/run_format.sh --fix

clean: ## Remove build/
	@rm -rf $(BUILD)

# Thin front of CMake: `make help` lists what there is.
JOBS ?= $(shell nproc)
BUILD := build
CTEST_ARGS ?=

.PHONY: help setup build demo test bench bench-data-plane verify clean format lint

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: build ## Start a cluster on loopback, ask questions over examples/, show a table, stop it
	@$(BUILD)/bin/redknot demo --examples examples

test: build ## The whole test suite
	@ctest --test-dir $(BUILD) --output-on-failure $(CTEST_ARGS)

setup: ## Install what building and testing needs (Debian packages, the model)
	@tools/setup.sh

build: setup ## Build into build/, binaries in build/bin
	@[ -f $(BUILD)/build.ninja ] || cmake --preset release -Wno-dev >$(BUILD).log 2>&1 || { cat $(BUILD).log; exit 1; }
	@rm -f $(BUILD).log
	@cmake --build $(BUILD) -j $(JOBS) -- --quiet

bench: build ## The benchmarks of docs/benchmarks.md, some minutes
	@bench/run.sh

bench-data-plane: ## Reads and writes against Mooncake, Redis and bare TCP, UCX and gRPC (QUICK=1: two minutes)
	@$(MAKE) --no-print-directory build >&2
	@bench/peers/install.sh
	@bench/data_plane.py $(if $(QUICK),--quick)

verify: ## Check the model of the store's protocol with spin, a minute
	@tools/setup.sh tools/packages-ci.txt
	@tests/model/run.sh

lint: build ## Format, clang-tidy and include direction
	@tools/setup.sh tools/packages-ci.txt
	@tests/lint/run_format.sh
	@/usr/bin/python3 tests/lint/include_direction.py
	@tests/lint/run_tidy.sh $(BUILD)

format: ## Format all C files
	@git ls-files '*.c' '*.h' | xargs clang-format-14 -i

clean: ## Remove build/
	@rm -rf $(BUILD)

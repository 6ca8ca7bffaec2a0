# Two commands on a bare Debian 12: `make demo` and `make test`. `make help` lists the rest.
JOBS ?= $(shell nproc)
FUZZ_SECONDS ?= 10
SOURCES = $(shell git ls-files -co --exclude-standard 'src/*.h' 'src/*.cpp' 'tests/*.h' 'tests/*.cpp')
PY = .venv/bin/python

.PHONY: help setup setup-dev build cuda dist demo test test-peers debug-test fuzz format format-check tidy bench clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## install what the build needs (Debian packages; sudo or root)
	@scripts/setup.sh

setup-dev: # also clang and its tools, for fuzz, format and tidy
	@scripts/setup.sh --dev

build: setup ## build build/release/minimind
	@scripts/build.sh release $(JOBS)

cuda: setup ## build build/cuda/minimind, which trains and generates on an NVIDIA GPU too (needs nvcc, 12.4 or newer)
	@scripts/setup_cuda.sh
	@scripts/build.sh cuda $(JOBS) minimind

dist: setup-dev ## pack build/cuda/minimind, or build/release/minimind, with its libraries into build/dist/*.tar.gz
	@scripts/dist.sh

demo: build ## train a tokenizer and a model from nothing, then chat with it
	@build/release/minimind demo

test: build .venv/light.done ## unit, golden, oracle, end-to-end tests and light Python peers
	@$(PY) tests/run.py --build build/release --gtest --pytest tests/layers_test.py tests/docs_test.py tests/interop tests/e2e

test-peers: build .venv/peers.done ## compare with torch and transformers (a large download, once)
	@$(PY) tests/run.py --build build/release --pytest tests/peers

debug-test: setup ## the unit tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@scripts/build.sh debug $(JOBS) unit_tests
	@python3 tests/run.py --build build/debug --gtest --parallel 2

fuzz: setup-dev ## every libFuzzer target for FUZZ_SECONDS=10 each
	@scripts/build.sh fuzz $(JOBS)
	@tests/fuzz/run.sh $(FUZZ_SECONDS)

format: setup-dev ## clang-format all sources in place
	@clang-format -i $(SOURCES)

format-check: setup-dev ## fail where clang-format would change something
	@clang-format --dry-run -Werror $(SOURCES)

tidy: setup-dev ## clang-tidy over src/
	@cmake --preset release >/dev/null
	@scripts/tidy.sh $(JOBS)

bench: build ## measure this machine and every op on it
	@build/release/minimind bench train

clean: ## remove build folders and virtual environments
	@rm -rf build .venv

.venv/light.done: tests/requirements.txt | setup
	@echo "installing Python peers into .venv (once)"
	@python3 -m venv .venv
	@.venv/bin/pip install -qq --disable-pip-version-check -r tests/requirements.txt </dev/null
	@touch $@

.venv/peers.done: tests/requirements-peers.txt .venv/light.done
	@echo "installing torch and transformers into .venv (once)"
	@.venv/bin/pip install -qq --disable-pip-version-check -r tests/requirements-peers.txt </dev/null
	@touch $@

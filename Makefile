# Two commands on a bare Debian 12: `make demo` and `make test`. `make help` lists the rest.
BUILD ?= build/release
JOBS ?= $(shell nproc)

.PHONY: help setup build demo test test-peers debug-test fuzz format tidy bench clean

help:            ## this list
	@grep -E '^[a-z-]+: .*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## install what the build needs (Debian packages; sudo or root)
	@scripts/setup.sh

build: setup ## build build/release/minimind
	@cmake --preset release >build.log 2>&1 || (cat build.log; exit 1)
	@cmake --build --preset release -j $(JOBS)

# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs first; see scripts/setup.

SHELL := /bin/bash
# Debian keeps mkfs.xfs, losetup and others off the PATH of ordinary users.
export PATH := $(PATH):/usr/sbin:/sbin

# Thousands of short processes would each compile all sources anew.
unexport PYTHONDONTWRITEBYTECODE

# The directory of another QEMU's commands.
QEMU ?=
ifneq ($(QEMU),)
export PATH := $(QEMU):$(PATH)
export CHAINMERGE_OTHER_QEMU := $(QEMU)
endif

BIN := .venv/bin
RELEASE_TOOLS := build/release-tools
WORKERS ?= 2
PYTEST_ARGS ?=
FUZZ_ARGS ?=

.PHONY: help setup demo quick test test-browser test-metrics test-vm soak fuzz fuzz-guided bench \
	lint format schema screenshots dist lock test-packages clean

help:
	@echo 'make demo    what chainmerge saves you from, on real images'
	@echo 'make quick   the tests of a change: the pure ones, and one of each kind of real one'
	@echo 'make test    the test suite (PYTEST_ARGS="-k name" for some of it)'
	@echo '             QEMU="$$(scripts/newer-qemu)" tests with the QEMU of Debian backports'
	@echo 'make test-browser'
	@echo '             reports in a real browser, which it installs'
	@echo 'make test-metrics'
	@echo '             metrics and alerts with promtool, which it installs'
	@echo 'make test-vm real logical volumes, power cuts and faults, in a virtual machine'
	@echo 'make soak    the test suite with its long runs'
	@echo 'make fuzz    all commands on damaged images (FUZZ_ARGS="--minutes 60 --seed 1")'
	@echo 'make fuzz-guided'
	@echo '             what looks at images, on damaged ones that find new ways through it'
	@echo 'make bench   measurements against QEMU'\''s own tools'
	@echo 'make lint    style, types, layers'
	@echo 'make format  rewrite the sources in the project'\''s style'
	@echo 'make schema  rewrite docs/schema from the types'
	@echo 'make screenshots'
	@echo '             rewrite the pictures in docs'
	@echo 'make dist    source, wheel, packages for Debian and RPM, one file, list of parts, sums'
	@echo 'make test-packages'
	@echo '             the packages on Debian 12 and 13 as they are when just installed'
	@echo 'make lock    what packages carry, in the newest versions'
	@echo 'make clean   remove what the targets made'

setup:
	@scripts/setup

demo: setup
	@$(BIN)/python -m demo $(DEMO_ARGS)

quick: setup
	@$(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal $$(sed 's/#.*//' tests/quick.txt) \
		$(PYTEST_ARGS)

test: setup
	@$(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal $(PYTEST_ARGS)

# Not a part of the set-up of all: a browser is 80 MB to fetch, for what few changes touch.
test-browser:
	@scripts/setup chromium:chromium
	@$(BIN)/python -m pytest tests/browser $(PYTEST_ARGS)

# Neither is Prometheus, of which only promtool is used: its daemon need not run.
test-metrics:
	@scripts/setup promtool:prometheus
	@$(BIN)/python -m pytest tests/promtool $(PYTEST_ARGS)

# First what only the machine's kernel can do, then what is judged outside of it.
test-vm: setup
	@status=0; \
	$(BIN)/python -m tests.vm.guest_suite $(VM_ARGS) || status=1; \
	$(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal --ignore=tests/vm/guest tests/vm \
		$(PYTEST_ARGS) || status=1; \
	exit $$status

soak: setup
	@CHAINMERGE_SOAK=1 $(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal --timeout=0 $(PYTEST_ARGS)

fuzz: setup
	@$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

# Not a part of the set-up: atheris comes for fewer versions of Python and fewer machines.
fuzz-guided: setup
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet atheris
	@mkdir -p build/fuzz
	@$(BIN)/python -m tests.fuzz.guided -max_total_time=600 -artifact_prefix=build/fuzz/ \
		build/fuzz $(FUZZ_ARGS)

bench: setup
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

lint: setup
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup
	@$(BIN)/ruff check --fix-only
	@$(BIN)/ruff format

schema: setup
	@$(BIN)/python -m chainmerge.report.schema docs/schema

screenshots:
	@scripts/setup chromium:chromium
	@$(BIN)/python -m tests.browser.screenshots docs/pictures

# An environment of their own: their exact versions are nobody else's concern.
$(RELEASE_TOOLS)/.stamp: pyproject.toml | setup
	@echo 'setup: installing what releases are made with'
	@rm -rf $(RELEASE_TOOLS)
	@$(BIN)/python -m venv $(RELEASE_TOOLS)
	@$(RELEASE_TOOLS)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	@$(RELEASE_TOOLS)/bin/python -m pip install --quiet --group release
	@touch $@

dist: $(RELEASE_TOOLS)/.stamp
	@scripts/setup rpmbuild:rpm
	@$(RELEASE_TOOLS)/bin/python -m release dist

lock: $(RELEASE_TOOLS)/.stamp
	@$(RELEASE_TOOLS)/bin/python -m release lock

test-packages: dist
	@scripts/setup mmdebstrap:mmdebstrap buildah:buildah
	@$(BIN)/python -m pytest --timeout=1800 tests/packages $(PYTEST_ARGS)

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

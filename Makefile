# Everything a user or developer runs. `make help` lists the targets; docs/development.md explains them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
LOCKS := deploy/locks
PYTHON_FITS := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3 python3.11 python3.12; do \
	if $$p -c '$(PYTHON_FITS)' 2>/dev/null; then echo $$p; break; fi; done)
# The dependency set: gpu where nvidia-smi answers, else cpu. `make SET=cpu ...` overrides.
SET ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
PIP_INSTALL := $(PY) -m pip install --quiet --no-deps --disable-pip-version-check
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# Debian packages the tests need. Prometheus is run by its test: the daemon that the package starts
# is stopped, unless it was there before.
APT_PACKAGES := chromium openssl prometheus

# Flags of `make serve` and `make demo`; an empty one leaves tandem's default.
PREFILL ?=
DECODE ?=
PORT ?=
MODEL ?=
ARGS ?=
TANDEM_FLAGS = $(if $(PREFILL),--prefill $(PREFILL)) $(if $(DECODE),--decode $(DECODE)) \
	$(if $(PORT),--port $(PORT)) $(if $(MODEL),--model $(MODEL)) $(ARGS)

COLOUR := $(if $(MAKE_TERMOUT),auto,no)
PYTEST := $(PY) -m pytest --color=$(COLOUR)
ifeq ($(MAKE_TERMOUT),)
export NO_COLOR := 1
endif
# Set, every process of every test would compile again what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- environment

RUNTIME_STAMP := $(VENV)/.installed-$(SET)
DEV_STAMP := $(VENV)/.installed-$(SET)-dev

.PHONY: venv
venv: $(RUNTIME_STAMP) ## make .venv and install the locked runtime packages

.PHONY: venv-dev
venv-dev: $(DEV_STAMP) ## the same, with the packages that lint and tests need

$(PY):
	@test -n "$(PYTHON)" || { echo "error: needs Python 3.11 or 3.12 with venv" \
		"(Debian: apt-get install python3-venv); name it with PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUNTIME_STAMP): $(LOCKS)/cpu.txt $(LOCKS)/cpu-torch.txt $(LOCKS)/gpu.txt pyproject.toml | $(PY)
	rm -f $(VENV)/.installed-*
	@echo "installing the $(SET) set into $(VENV); the first time this takes minutes"
ifeq ($(SET),cpu)
	$(PIP_INSTALL) -r $(LOCKS)/cpu-torch.txt || \
		$(PIP_INSTALL) --index-url $(TORCH_CPU_INDEX) -r $(LOCKS)/cpu-torch.txt
endif
	$(PIP_INSTALL) -r $(LOCKS)/$(SET).txt
	$(PIP_INSTALL) --no-build-isolation -e .
	touch $@

# One property test compiles all of its tier, and reads for hypothesis, what a first run would. If it
# fails, the tier says so.
$(DEV_STAMP): $(RUNTIME_STAMP) $(LOCKS)/dev.txt
	$(PIP_INSTALL) -r $(LOCKS)/dev.txt
	-$(PYTEST) tests/unit --quiet -k test_messages_survive_the_wire > /dev/null
	touch $@

.PHONY: system-deps
system-deps: ## install the Debian packages that tests need (as root; else print the line)
	@missing=""; for p in $(APT_PACKAGES); do \
		[ "$$(dpkg-query -W -f '$${db:Status-Status}' $$p 2>/dev/null)" = installed ] \
			|| missing="$$missing $$p"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ]; then \
		apt-get update; \
		DEBIAN_FRONTEND=noninteractive \
			apt-get install -y --no-install-recommends $$missing; \
		case "$$missing" in *prometheus*) \
			systemctl disable --now prometheus 2>/dev/null || true;; esac; \
	else \
		echo "error: the tests need Debian packages; run:" \
			"sudo apt-get install -y --no-install-recommends$$missing" >&2; exit 1; \
	fi

.PHONY: lock
lock: $(DEV_STAMP) ## resolve the dependencies of pyproject.toml again and rewrite deploy/locks
	$(PY) $(LOCKS)/update.py $(ARGS)

# --- running

.PHONY: demo
demo: $(RUNTIME_STAMP) ## start a local deployment, replay a trace slice, report, stop
	$(BIN)/tandem demo $(TANDEM_FLAGS)

.PHONY: serve
serve: $(RUNTIME_STAMP) ## start a local deployment and stay up (PREFILL= DECODE= PORT= MODEL=)
	$(BIN)/tandem serve $(TANDEM_FLAGS)

.PHONY: down
down: $(RUNTIME_STAMP) ## stop whatever a deployment on this machine left behind
	$(BIN)/tandem down $(ARGS)

.PHONY: screenshot
screenshot: $(DEV_STAMP) system-deps ## take the pictures of the dashboard for README and docs
	$(PY) -m tests.screenshot $(ARGS)

# --- checking

.PHONY: lint
lint: $(DEV_STAMP) ## format check, lint, types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

.PHONY: fmt
fmt: $(DEV_STAMP) ## format and apply safe lint fixes
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

.PHONY: unit
unit: $(DEV_STAMP) ## the unit tier: no Ray, no sockets, under 10 s
	$(PYTEST) tests/unit -n 2 --dist loadfile --durations=3 $(ARGS)

# What neither times anything nor needs both cores runs beside another such file, the longest of them
# first and the shortest last; the rest by itself.
define other-tiers
	$(call judged,tests/e2e tests/chaos tests/contract tests/integration -m "not alone$(1)", \
		-n 2 --dist loadfile --no-loadscope-reorder)
	$(call judged,tests/e2e tests/chaos -m "alone$(1)")
endef

# Tests that failed only while the host of a virtual machine had taken its cores away (status 75) run
# once more, when it is quiet; tests/stolen_time.py tells.
define judged
	run() { $(PYTEST) -p tests.stolen_time $(1) "$$@" $(ARGS); }; \
	run $(2) || { test $$? -eq 75 && $(PY) -m tests.stolen_time && run --last-failed; }
endef

.PHONY: test
test: system-deps lint unit ## lint, then every test that needs no GPU (at most 30 minutes)
	$(call other-tiers, and not full)

.PHONY: test-full
test-full: system-deps lint ## the same with the long tests, properties tried 500 times each
	$(PYTEST) tests/unit -n 2 --hypothesis-profile=full $(ARGS)
	$(call other-tiers)

# Not among the locked packages: nothing else needs it. Without a version: each Python has another.
FUZZER := atheris
FUZZER_AT := .cache/fuzz/python

$(FUZZER_AT): | $(DEV_STAMP)
	$(PIP_INSTALL) --target $@ $(FUZZER)

.PHONY: fuzz
fuzz: $(FUZZER_AT) ## a coverage-guided fuzzer at the decoders (a minute; ARGS are libFuzzer's)
	PYTHONPATH=$(FUZZER_AT) $(PY) -m tests.fuzz $(ARGS)

.PHONY: bench
bench: bench-serve ## this path beside a monolithic `vllm serve`

.PHONY: bench-%
bench-%: $(DEV_STAMP)
	$(PY) -m tests.benchmarks.$* $(ARGS)

# --- cleaning

.PHONY: clean
clean: ## remove caches and build outputs; keeps .venv
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis ./*.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

.PHONY: distclean
distclean: clean ## the same, and .venv
	rm -rf $(VENV)

# Each target does the set-up that it needs; `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CACHE := $(or $(LLMUX_TEST_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/llmux-tests)

SEEDS ?= 0:10000
MINUTES ?= 30
WORKERS ?= -n logical --maxprocesses 4
RELAY ?= --check

.PHONY: help demo demo-stop test lint sim soak bench bench-relay bench-policies test-floor test-clients test-vllm test-criu test-store deb test-deb clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "python3-venv is missing: apt-get install python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV) (once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP) ## start a daemon with three simulated models in the background
	@sh tools/demo.sh start $(BIN)

demo-stop: ## stop it
	@sh tools/demo.sh stop $(BIN)

test: $(STAMP) lint ## lint, types, and the tests that need no vLLM
	@$(BIN)/coverage run -m pytest tests/core
	@$(BIN)/coverage report --include='llmuxd/core/*' --fail-under=100
	@$(BIN)/python -m pytest $(WORKERS) tests/unit tests/integration tests/wire
	@LLMUX_TEST_LOOP=uvloop $(BIN)/python -m pytest $(WORKERS) tests/integration/test_proxy_*.py

lint: $(STAMP)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy

sim: $(STAMP) ## the switching core under virtual time with faults, SEEDS=0:10000
	@$(BIN)/python -m llmuxd.sim --seeds $(SEEDS)

soak: $(STAMP) ## MINUTES=30 of clients of all kinds, killed engines and clients that leave, and an account of it all
	@$(BIN)/python -m tests.soak --minutes $(MINUTES)

bench: bench-relay ## what the project promises of its speed

bench-relay: ## llmuxd beside Caddy and nginx, 5 minutes; RELAY='--check --write' for docs/performance.md, too
	@sh benchmarks/relay/setup.sh "$(CACHE)"
	@$(CACHE)/bench/bin/python -m benchmarks.relay $(RELAY)

bench-policies: $(STAMP) ## compare the switching policies; writes docs/policies.md
	@$(BIN)/python -m llmuxd.sim report --traces benchmarks/traces

# Without those of the core, which uses nothing but the standard library; and without uvloop, which is optional.
test-floor: ## the same tests on the oldest versions that are supported, Debian 12's
	@$(PYTHON) -m venv $(CACHE)/floor
	@$(CACHE)/floor/bin/pip install --quiet --disable-pip-version-check -c tests/floor.txt -e '.[test]'
	@$(CACHE)/floor/bin/python -m pytest $(WORKERS) tests/unit tests/integration tests/wire

test-clients: $(STAMP) ## openai, anthropic, litellm, curl and WebSocket clients, as they are, against llmuxd
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[clients]'
	@$(BIN)/python -m pytest tests/clients

test-vllm: $(STAMP) ## the tests over real vLLM engines (CPU build; downloads about 1 GB once)
	@sh tests/real/setup-vllm.sh "$(CACHE)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[real]'
	@LLMUX_TEST_CACHE="$(CACHE)" $(BIN)/python -m pytest tests/real

test-criu: $(STAMP) ## real vLLM engines saved and restored by a real CRIU (as root; downloads 60 MB more once)
	@sh tests/real/setup-vllm.sh "$(CACHE)"
	@sh tests/criu/setup-criu.sh "$(CACHE)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[real]'
	@LLMUX_TEST_CACHE="$(CACHE)" $(BIN)/python -m pytest tests/criu

test-store: $(STAMP) ## images in a real S3 server (downloads 50 MB once)
	@sh tests/store/setup-store.sh "$(CACHE)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[store]'
	@LLMUX_TEST_CACHE="$(CACHE)" $(BIN)/python -m pytest tests/store

deb: ## the Debian package, into dist/
	@sh packaging/deb/build

test-deb: $(STAMP) ## the package on Debian 12 and 13 with a real systemd (as root; downloads 0.5 GB once)
	@sh tests/criu/setup-criu.sh "$(CACHE)"
	@sh tests/deb/setup.sh "$(CACHE)" bookworm trixie
	@LLMUX_TEST_CACHE="$(CACHE)" $(BIN)/python -m pytest tests/deb

clean: ## remove what the targets made in this folder
	rm -rf $(VENV) build dist *.egg-info .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache

# Every command runs from a fresh checkout. `make setup` is part of the others and does nothing when nothing changed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What `make test` runs; override it to choose tests: make test PYTEST=".venv/bin/python -m pytest tests/cli"
# Many tests wait for processes and servers, so that three files at a time keep two cores busy.
PYTEST ?= $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder
# What `make demo` asks for; empty is the command's own example.
GOAL ?=
FUZZ_SECONDS ?= 600

export PYTHON VENV GOAL

.PHONY: help setup setup-dev demo up test chaos chaos-events chaos-tasks chaos-live chaos-cancels bench-calls bench-capabilities bench-events bench-live bench-tasks bench-answers fuzz docs structure lint clean

help: ## Say what there is
	@echo "OctoLLM: make TARGET"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  \1|\2/' | column -t -s '|' 2>/dev/null \
	  || grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST)

setup: ## Make .venv and install into it
	@scripts/setup local

setup-dev:
	@scripts/setup dev

demo: setup ## Start everything in one process, do one goal live, save the result
	@exec $(BIN)/octollm demo $${GOAL:+"$$GOAL"}

up: setup ## Run every service on this machine until Ctrl-C
	@exec $(BIN)/octollm up

test: setup-dev ## Run every test; says loudly what this machine lacks
	@scripts/test $(PYTEST)

chaos: setup-dev ## Run the tests that kill processes and servers; with SEEDS=10 TASKS=500 also as chaos-tasks does
	@scripts/test $(BIN)/python -m pytest tests/chaos $${TASKS:+-s}

chaos-events: setup-dev ## Print a table of faults on events: EVENTS=100000, SEED=7, PAUSE=60 seconds without Redis
	EVENTS=$${EVENTS:-100000} scripts/test $(BIN)/python -m pytest tests/chaos/test_events_faults.py -s

chaos-tasks: setup-dev ## Print a table of faults on tasks: SEEDS=10, TASKS=500, SEED=1 is the first seed
	SEEDS=$${SEEDS:-10} TASKS=$${TASKS:-500} SEED=$${SEED:-1} scripts/test $(BIN)/python -m pytest tests/chaos/test_tasks_faults.py -s

chaos-cancels: setup-dev ## Cancel CANCELS=300 tasks at random moments, and print how long the model goes on
	CANCELS=$${CANCELS:-300} scripts/test $(BIN)/python -m pytest tests/chaos/test_tasks_cancelled.py -s

bench-calls: setup-dev ## Measure service calls beside gRPC, FastAPI and httpx (about five minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	cd bench && ../$(BIN)/python -m calls

bench-capabilities: setup-dev ## Measure minting and verifying capabilities beside the raw signatures (half a minute)
	cd bench && ../$(BIN)/python -m capabilities

bench-events: setup-dev ## Measure events beside Redis Pub/Sub, Redis Streams and NATS JetStream, and webhooks (some minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	cd bench && PYTHONPATH=../tests/support ../$(BIN)/python -m events

bench-tasks: setup-dev ## Measure tasks beside DBOS on the same PostgreSQL, and embedded on SQLite (ten minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	cd bench && PYTHONPATH=../tests/support ../$(BIN)/python -m tasks

bench-answers: setup-dev ## Read a corpus of 179 files; ask its questions with MODEL=qwen2.5-coder-0.5b SAMPLE=40
	cd bench && PYTHONPATH=../tests/support ../$(BIN)/python -m answers $${MODEL:+--model "$$MODEL"} $${SAMPLE:+--sample "$$SAMPLE"}

chaos-live: setup-dev ## Let 1,000 watchers of a task reconnect 20 times each to two gateways, one of which is replaced (WATCHERS)
	cd bench && PYTHONPATH=../tests/services/reflex:../tests/support ../$(BIN)/python -m live.reconnects $${WATCHERS:+--watchers $$WATCHERS}

bench-live: setup-dev ## Measure watchers of one task beside a bare WebSocket server (five minutes)
	cd bench && PYTHONPATH=../tests/services/reflex:../tests/support ../$(BIN)/python -m live $${WATCHERS:+--watchers $$WATCHERS}

bench-search: setup-dev ## Measure search in nine languages beside plain FTS5 and vectors alone, with 100,000 passages (five minutes)
	cd bench && PYTHONPATH=../tests/support ../$(BIN)/python -m search $${PASSAGES:+--passages "$$PASSAGES"} $${POSTGRES:+--postgres "$$POSTGRES"}

fuzz: setup-dev ## Fuzz the verifier of capabilities and the HTTP/1.1 parser, ten minutes each (FUZZ_SECONDS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	mkdir -p build/fuzz build/fuzz-http1
	$(BIN)/python tests/fuzz/fuzz_verifier.py -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -len_control=0 build/fuzz
	$(BIN)/python tests/fuzz/fuzz_http1.py -max_total_time=$(FUZZ_SECONDS) -max_len=1024 -len_control=0 build/fuzz-http1

docs: setup-dev ## Build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

structure: setup-dev ## Count files, importers, class names, and the calls of a task and its watchers
	$(BIN)/python scripts/structure

lint: setup-dev ## Check style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pyright -p bench
	$(BIN)/lint-imports

clean: ## Remove .venv and what tools left behind; models and homes stay
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

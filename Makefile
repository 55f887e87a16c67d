# fleecenbd: everything a contributor does, by name. `make` alone explains the targets.
#
# Setting up is a step of its own (`make venv`), because it alone needs the network and, where
# packages are missing, root. Every other target does it first if it was not done yet.

SHELL := /bin/sh
.DEFAULT_GOAL := help

# Formatters of file systems live in sbin, which is not on everybody's path.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin

PYTHON := .venv/bin/python
READY := .venv/.ready
TOOLS := .venv/.tools
SHELLCHECK := .venv/.shellcheck
MUTMUT := .venv/.mutmut
FUZZER := .venv/.fuzzer

DEBIAN ?= 12
SEEDS ?= 200
RUNS ?= 20
SECONDS ?= 60

# Most tests wait for programs of their own: one process more than processors. A file's tests stay
# together, in one process. With options of your own (PYTEST=...) there is one, to be looked at.
WORKERS ?= $(shell echo $$(($$(nproc) + 1)))
SPREAD := $(if $(PYTEST),$(PYTEST),-n $(WORKERS) --dist loadfile)

.PHONY: help venv tools demo test lint format simulate explore interop differential fuzz stress kills kills-pull guest bare bench bench-storm bench-scale coverage mutate dist drawings clean

help:  ## this text
	@echo "fleecenbd - make targets:"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  WORKERS=N               processes that tests run in (one more than processors): test, interop"
	@echo "  SEEDS=N SEED=n RUNS=N SECONDS=N   how many, which one, how long: simulate, differential, stress, kills, kills-pull, fuzz"
	@echo "  PEERS=trixie            Debian 13's clients and QEMU: interop, differential, bench"
	@echo "  DEBIAN=12               or 13: bare"
	@echo "  QUICK=1 KEEP=1 STRICT=1 short, also into docs/benchmarks, fail where a row falls short: bench"
	@echo "  PYTEST='-k trim -x'     options for pytest: test, interop, guest (test and interop: then in one process)"
	@echo "  DEMO='--size 64'        options for the demo"
	@echo "  ORDERS='--scenario stat_trim'        options for explore"
	@echo "  MUTATE='engine --sample 40 --seed 7' options for mutate"
	@echo "  BENCH='--rows p99'                   options for bench, bench-storm, bench-scale"

venv: $(READY)  ## set up only: missing packages (root or sudo), then .venv; runs once

# A venv knows its own place: after the checkout was moved it is made anew.
MOVED := $(shell [ ! -e .venv/.place ] || [ "$$(cat .venv/.place)" = "$$(pwd -P)" ] || echo moved)

$(READY): pyproject.toml scripts/setup.sh $(MOVED)
	@sh scripts/setup.sh base
	@touch $@

.PHONY: moved
moved:

tools: $(TOOLS)  ## set up what tests and benchmarks need besides: fio, QEMU's tools, nbdkit

$(TOOLS): $(READY) scripts/setup.sh
	@sh scripts/setup.sh tools
	@touch $@

demo: $(READY)  ## back up a disk while it is being overwritten, with and without TRIM
	$(PYTHON) examples/demo.py $(DEMO)

test: lint $(TOOLS)  ## everything that must pass: lint, unit tests, simulation, interop, examples
	$(PYTHON) -m pytest $(SPREAD)

lint: $(READY) $(SHELLCHECK)  ## ruff format (check only), ruff, mypy --strict, shellcheck
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	shellcheck -x .ci/run scripts/*.sh $(wildcard examples/*.sh examples/*/*.sh)

$(SHELLCHECK): $(READY) scripts/setup.sh
	@sh scripts/setup.sh lint
	@touch $@

format: $(READY)  ## let ruff format the code and sort the imports
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

simulate: $(READY)  ## seeded runs of the engine against its checkers: SEEDS=N, or one SEED=n with a trace
	$(PYTHON) -m tests.simulation $(if $(SEED),--seed $(SEED) --trace,--seeds $(SEEDS))

explore: $(READY)  ## every order of events, the long set; ORDERS='--scenario NAME' for one of them
	$(PYTHON) -m tests.orders $(ORDERS)

# Of the examples, those that depend on what a system has.
INTEROP := tests/client/test_source.py tests/storage/test_nbd_client.py tests/storage/test_nbd_reconnect.py tests/interop tests/plugin tests/differential tests/peers tests/e2e/test_images.py tests/e2e/test_temps.py tests/examples/test_libvirt.py tests/examples/test_systemd.py tests/examples/test_systemd_backup.py

interop: $(if $(PEERS),,$(TOOLS))  ## only the tests with other people's NBD clients; PEERS=trixie: Debian 13's (root)
	$(if $(PEERS),sh scripts/peers.sh $(PEERS) python,$(PYTHON)) -m pytest $(INTEROP) $(SPREAD)

differential: $(if $(PEERS),,$(TOOLS))  ## scripts drawn from seeds to us and to QEMU: SEEDS=N, SEED=n; PEERS=trixie: QEMU 10
	$(if $(PEERS),sh scripts/peers.sh $(PEERS) python,$(PYTHON)) -m tests.differential $(if $(SEED),--seed $(SEED) --show,--seeds $(SEEDS))

fuzz: $(FUZZER)  ## libFuzzer on the handshake, then on requests: SECONDS=N each
	$(PYTHON) -m tests.wire.fuzz --seconds $(SECONDS)

$(FUZZER): $(READY)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check 'atheris>=3.0'
	@touch $@

stress: $(TOOLS)  ## fio with verify, two pulls, a trimmer and a killed client: RUNS=N
	$(PYTHON) -m tests.e2e.stress --runs $(RUNS)

kills: $(TOOLS)  ## a server killed with work in flight, and started again: RUNS=N times (20), SEED=n
	$(PYTHON) -m tests.durability.kills $(RUNS) $(SEED)

kills-pull: $(TOOLS)  ## a pull whose client, server or both are killed, and resumed: RUNS=N backups (20), SEED=n
	$(PYTHON) -m tests.durability.pull_kills $(RUNS) $(SEED)

guest: $(TOOLS)  ## a Linux guest on the guest export: backups, discards, restarts under it
	$(PYTHON) -m pytest -s tests/guest/test_*.py tests/guest/long_*.py $(PYTEST)

bare:  ## the README's commands on a bare Debian: DEBIAN=12 or 13 (root)
	sh scripts/bare.sh $(DEBIAN)

BENCH_PYTHON := $(if $(PEERS),sh scripts/peers.sh $(PEERS) python,$(PYTHON))

# The storm has options of its own: BENCH=... is for the rows, and alone then.
bench: $(if $(PEERS),,$(TOOLS))  ## fleecenbd beside QEMU and nbdkit, and under a storm: tables; QUICK=1 KEEP=1 STRICT=1 BENCH='--rows p99' PEERS=trixie
	$(BENCH_PYTHON) -m benchmarks \
	    $(if $(QUICK),--quick) $(if $(KEEP),--keep) $(if $(STRICT),--strict) $(BENCH)
	$(if $(BENCH),,$(BENCH_PYTHON) -m benchmarks.storm $(if $(QUICK),--quick) $(if $(KEEP),--keep))

bench-storm: $(TOOLS)  ## the second part of bench alone: pulls under a write storm; QUICK=1 KEEP=1 BENCH='--rate 60'
	$(PYTHON) -m benchmarks.storm $(if $(QUICK),--quick) $(if $(KEEP),--keep) $(BENCH)

bench-scale: $(TOOLS)  ## what grows with disk size, sessions, clients and fragmentation; KEEP=1 BENCH='--only disk'
	$(PYTHON) -m benchmarks.scale $(if $(KEEP),--keep) $(BENCH)

coverage: $(TOOLS)  ## the unit tests with branch coverage
	$(PYTHON) -m coverage run -m pytest --ignore=tests/e2e --ignore=tests/interop
	$(PYTHON) -m coverage report --skip-covered --show-missing

mutate: $(MUTMUT)  ## mutants of engine and nbd: do the tests notice? MUTATE='engine --sample 40'
	$(PYTHON) -m tests.mutation $(MUTATE)

$(MUTMUT): $(READY)
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check 'mutmut>=3.8,<4'
	@touch $@

dist: $(READY)  ## wheel and source archive into dist/
	@rm -rf dist
	$(PYTHON) -m build --no-isolation --quiet

drawings: $(TOOLS)  ## docs/images: every .dot there becomes an .svg, by Graphviz
	$(PYTHON) scripts/drawings.py

clean:  ## remove .venv and everything that tools leave behind
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* htmlcov build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# `make` or `make help` lists the targets. Each of them sets up by itself what it needs.
#
#   PYTHON=python3.12 make test     another interpreter (3.11 or newer)
#   VENV=.venv-312 make test        another virtual environment than .venv

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup packages demo test lint test-faults test-gpu test-stack stack stack-down
.PHONY: bench-merge bench-merge-s3 bench-score bench-scale experiments clean

PYTHON ?=
VENV ?= .venv
BIN := $(VENV)/bin
# There once the set-up is complete. With PYTHON given, one for that interpreter.
READY := $(VENV)/.ready$(if $(PYTHON),-$(subst /,_,$(PYTHON)))

# No telemetry from any of the parts.
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
export DVC_NO_ANALYTICS := 1
# Many short processes import the same large libraries: let the first one keep its bytecode.
unexport PYTHONDONTWRITEBYTECODE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## make .venv with the versions of constraints.txt (only when they changed)

packages: ## install the Debian packages that the stack and the tests run, if they are missing
	@infra/native/packages.sh

demo: $(READY) ## pretrain a small model while the service watches, fuses, registers and versions it
	$(BIN)/ckptfuse demo

# Three processes: those of the service wait for servers and for each other much of the time.
test: packages $(READY) lint ## lint, types and the tests
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not faults and not stack and not gpu"

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-faults: $(READY) ## the tests that kill the service again and again
	$(BIN)/python -m pytest -n 2 --dist load -m faults

# Without the conftest.py above it wants torch, transformers and what the library imports, no more.
test-gpu: $(READY) ## scoring on this machine's GPU (1 min)
	$(BIN)/python -m pytest tests/gpu --confcutdir tests/gpu

test-stack: packages $(READY) ## the native stack: a trainer, workers that score and merge, a killed one (20 min)
	$(BIN)/python -m pytest -m stack

# Elsewhere than in workspace/stack: make stack STATE=/srv/ckptfuse PARAMS=/where/params.yaml
STATE ?= workspace/stack
PARAMS ?= params.yaml

stack: packages $(READY) ## PostgreSQL, Prefect, MLflow, S3 and workers as processes of this machine
	$(BIN)/python -m infra.native.stack up --state "$(STATE)" --params "$(PARAMS)"

stack-down: $(READY) ## end them; their state stays
	$(BIN)/python -m infra.native.stack down --state "$(STATE)" --params "$(PARAMS)"

# mergekit needs other versions than ours of some packages: an environment of its own.
bench-merge: $(READY) $(VENV)/mergekit/.ready ## the merge against mergekit and the machine (30 min, 20 GB)
	$(BIN)/python -m bench.merge --folder workspace/bench --mergekit $(VENV)/mergekit

bench-merge-s3: $(READY) ## the merge from S3, on loopback, against bare ranged reads (5 min, 4 GB)
	$(BIN)/python -m bench.merge_s3 --folder workspace/bench/s3

bench-score: $(READY) ## the scorer against lm-evaluation-harness and the plain loop (30 min)
	$(BIN)/python -m bench.score

bench-scale: packages $(READY) ## 10,000 known checkpoints, overheads, 200 at once (30 min)
	$(BIN)/python -m bench.scale --folder workspace/bench/scale

experiments: $(READY) ## the reference study: trains, compares all rules, writes experiments/results.md
	$(BIN)/python -m experiments

$(VENV)/mergekit/.ready: bench/mergekit-constraints.txt
	"$(BIN)/python" -m venv --clear $(VENV)/mergekit
	$(VENV)/mergekit/bin/python -m pip install -q --disable-pip-version-check \
	    -c bench/mergekit-constraints.txt mergekit
	@touch $@

clean: ## remove .venv and all caches (workspace/ stays)
	rm -rf "$(VENV)" build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./workspace -prune -o -type d -name __pycache__ -print0 | xargs -0 rm -rf

# A set-up that was cut short leaves no stamp, and the next one starts from an empty folder; one that
# was complete is brought up to date in place. Everything comes as the lock says, pip and the build
# backend first: without build isolation no newer setuptools gets in by the back door. Compiling
# every file of every package would double the time: what the service runs is compiled here, on all
# cores, and the rest when something first imports it.
NOT_COMPILED := /(tests?|testing|physics|lexers|_inductor|databricks|apprise|dulwich|mypyc?)/
NOT_COMPILED := $(NOT_COMPILED)|/moto/(iam|ec2|stepfunctions)/|/models/(?!auto/|llama/|__init__)

$(READY): pyproject.toml constraints.txt
	@$(find_python); \
	if ! { [ -e $@ ] && "$(BIN)/python" --version >/dev/null; }; then \
	    echo "New $(VENV), $$("$$python" --version): takes a few minutes, once"; \
	    "$$python" -m venv --clear "$(VENV)"; \
	fi; \
	rm -f "$(VENV)"/.ready*
	@log="$(VENV)/setup.log"; \
	pip() { "$(BIN)/python" -m pip --disable-pip-version-check "$$@"; }; \
	install() { \
	    pip install -c constraints.txt pip setuptools && \
	    pip install -c constraints.txt --no-build-isolation --no-compile --progress-bar off \
	        -e '.[test]' && \
	    pip check; \
	}; \
	install 2>&1 | tee "$$log" | awk ' \
	    /^ *(Collecting|Processing) / && ++n % 50 == 0 { print "  " n " packages found" } \
	    /Downloading .*\(([0-9.]+ GB|[0-9][0-9][0-9]\.[0-9] MB)\)/ { print } \
	    /^Installing collected/ && n > 9 { print "  installing them" } \
	    { fflush() }' \
	|| { tail -n 30 "$$log" >&2; \
	    echo "make: the set-up failed; all of it is in $$log; make clean starts anew" >&2; exit 1; }
	@echo "  compiling them"
	@"$(BIN)/python" -m compileall -qq -j 0 -x 'site-packages.*($(NOT_COMPILED))' \
	    "$(VENV)"/lib/python*/site-packages || true
	@touch "$(VENV)/.ready" $@

# Checks what a set-up needs, names what is missing, and sets $python.
define find_python
fail() { echo "make: $$1" >&2; exit 1; }; \
command -v git >/dev/null || fail "git is missing (Debian: apt-get install git)"; \
python=; candidates="$(or $(PYTHON),python3 python3.13 python3.12 python3.11)"; \
for p in $$candidates; do \
    if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
        python=$$p; break; \
    fi; \
done; \
[ -n "$$python" ] || fail "no Python 3.11 or newer among: $$candidates. Install one \
(Debian: apt-get install python3 python3-venv) or name one: make PYTHON=/where/it/is/python3"; \
"$$python" -c 'import venv, ensurepip' 2>/dev/null || fail "$$python has no venv or no ensurepip, so \
it cannot make a virtual environment (Debian: apt-get install python3-venv)"
endef

# The short names. Each target says what it does while it does it; `make help` lists them.

# A finished .venv goes on with its own Python, whichever it was made with.
PYTHON ?= $(shell [ -e .venv/stamp.json ] && .venv/bin/python -c '' 2>/dev/null \
	&& echo .venv/bin/python || echo python3)
# The SIF to build on; empty: the site's, else one that is made for this machine's CPU.
BASE ?=
# What `make lock` resolves the requirements with.
UV ?= uv

BOOTSTRAP = $(PYTHON) -m toolkit.bootstrap
BIN = .venv/bin

.DEFAULT_GOAL := help
.PHONY: help build-monai-sif venv venv-dev apptainer test-packages check doctor test test-fast \
	bench reliability lint lock clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

build-monai-sif: venv  ## build and verify the MONAI image (BASE=file.sif to name its base)
	@$(BIN)/python -m toolkit.bootstrap apptainer --quiet
	@$(BIN)/toolkit build monai $(if $(BASE),--base '$(BASE)')

venv:  ## make the private Python environment, .venv (PYTHON=python3.12 to name a Python)
	@$(BOOTSTRAP) venv

venv-dev:
	@$(BOOTSTRAP) venv --dev

apptainer: venv  ## make a private Apptainer in .tools where the host has none
	@$(BIN)/python -m toolkit.bootstrap apptainer

check: venv  ## look at this machine's devices and say what to do about what is found
	@$(BIN)/toolkit check

doctor: venv  ## say whether this host can build and run images, and what it lacks
	@$(BIN)/toolkit doctor

test-packages: venv-dev
	@$(BIN)/python -m toolkit.bootstrap test-packages

test: venv-dev apptainer test-packages  ## run all tests (as root this installs Slurm for them)
	@$(BIN)/python -m pytest -n 2 --dist loadfile --durations 25

test-fast: venv-dev  ## run the tests that need no container, no Slurm and no other user
	@$(BIN)/python -m pytest -q -n 2 -m 'not slow and not image and not slurm and not users'

bench: venv apptainer  ## print times as ratios, and the CPU's speed against a plain loop
	@$(BIN)/python tests/bench.py
	@$(BIN)/python tests/bench_builds.py
	@$(BIN)/python tests/bench_mednist.py
	@$(BIN)/python tests/bench_federated.py

reliability: venv-dev apptainer  ## break builds in many ways and print what happened
	@$(BIN)/python tests/reliability.py

lint: venv-dev  ## check style, types and shell scripts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	find jobs .ci \( -name '*.sh' -o -name run \) -type f -exec $(BIN)/shellcheck {} +

lock:  ## resolve the requirements anew into the lock files (needs uv)
	$(UV) pip compile $(LOCKING) --extra host --output-file requirements.lock pyproject.toml
	$(UV) pip compile $(LOCKING) --extra host --extra dev --constraint requirements.lock \
		--output-file requirements-dev.lock pyproject.toml

LOCKING = --universal --python-version 3.10 --generate-hashes --upgrade --no-config --quiet \
	--no-emit-index-url --no-emit-find-links --no-emit-build-options --no-annotate \
	--custom-compile-command 'make lock'

clean:  ## remove what make has made: .venv, .tools, build and caches
	rm -rf .venv .tools build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find toolkit tests jobs -name __pycache__ -type d -prune -exec rm -rf {} +

# Each target calls a Python script that needs only the standard library; without make, run the commands directly.
PYTHON ?= python3
VENV_PYTHON = .venv/bin/python

.PHONY: help install doctor smoke test slow chaos coverage check docs quickstart clean

help:
	@echo "make quickstart  install, then run every step from text to a Hugging Face model in runs/quickstart/"
	@echo "make install     create .venv with the extras test, dev, hf, gguf, data, plots, quickstart, serve"
	@echo "make doctor      examine this machine: torch, devices, kernels, compiler, memory, disk, each with its remedy"
	@echo "make smoke       run a few quick tests, and every step from text to a generated text; less than a minute"
	@echo "make test        run the tests (ARGS='-k loss' goes to pytest)"
	@echo "make slow        run the tests that take minutes, including the kill tests"
	@echo "make chaos       run only the kill tests and print their counts (docs/reliability.md); about an hour"
	@echo "make coverage    run the tests with coverage.py and print the lines they miss; twice the time of make test"
	@echo "make check       check lint, format and types"
	@echo "make docs        write the documentation as a site to site/, with links and anchors checked"
	@echo "make clean       remove .venv and caches, but not runs/"

install:
	$(PYTHON) scripts/install.py

doctor: install
	$(VENV_PYTHON) scripts/doctor.py

smoke: install
	$(VENV_PYTHON) scripts/run_tests.py -m smoke $(ARGS)

test: install
	$(VENV_PYTHON) scripts/run_tests.py $(ARGS)

slow: install
	$(VENV_PYTHON) scripts/run_tests.py -m "slow or chaos" --timeout 5400 $(ARGS)

# -rP: print the tests' counts.
chaos: install
	$(VENV_PYTHON) scripts/run_tests.py -m chaos --timeout 5400 -rP $(ARGS)

coverage: install
	$(VENV_PYTHON) scripts/run_tests.py --coverage $(ARGS)

check: install
	$(VENV_PYTHON) scripts/run_checks.py

docs: install
	$(VENV_PYTHON) -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --strict

quickstart: install
	$(VENV_PYTHON) scripts/quickstart.py $(ARGS)

clean:
	rm -rf .venv .venv.lock .mypy_cache .ruff_cache .pytest_cache .hypothesis build site *.egg-info

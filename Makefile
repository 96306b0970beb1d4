# `make demo` and `make test` work on a fresh machine: they create .venv and install what they need, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= a big yellow triangle moves to the right on a gray dotted background
OUT ?= results/demo.mp4

# Two threads that wait by sleeping: spinning barriers cost 100x when anything else runs.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-slow check docs format clean

demo: $(VENV)/.installed
	@mkdir -p $(dir $(OUT))
	$(BIN)/python generate.py --task t2v-demo --prompt "$(PROMPT)" --save_file $(OUT)
	@echo
	@echo "The video: $(abspath $(OUT))"
	@echo "Watch it:  open it in a browser or a player (Linux: xdg-open $(OUT), macOS: open $(OUT))"
	@echo "Your own:  make demo PROMPT=\"a small blue square moves up\"   (what it understands: demo/README.md)"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not gpu and not slow" -n auto --dist worksteal

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow and not gpu" -n auto --dist worksteal

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	$(BIN)/python tools/gen_docs.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp records a finished installation, so that an interrupted one is repeated.
$(VENV)/.installed: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@ $(VENV)/.installed

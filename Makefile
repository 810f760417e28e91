# Everything here works on a machine with Linux, Python 3.11 or newer, pip and make. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH := torch==2.13.0
TORCH_INDEX ?=
WORKERS ?= 2
TESTS = $(BIN)/python -m pytest -n $(WORKERS) --benchmark-disable

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow bench lint size

help:
	@echo "make demo       train a 10 M-parameter model on a Chinese novel (5 minutes on 2 CPU cores) and complete text"
	@echo "make test       run every test that is not slow"
	@echo "make test-slow  run the slow ones"
	@echo "make bench      time every op that a CPU runs beside plain torch; python -m bench measures at Phi's shapes"
	@echo "make lint       style and layering"
	@echo "make size       lines of code by room"
	@echo
	@echo "The first run makes $(VENV) and installs pinned versions. To have PyTorch without CUDA (200 MB instead of 3 GB):"
	@echo "    make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu"
	@echo "PYTHON=python3.12 chooses the interpreter, WORKERS=8 the number of test processes."

# Debian's python3 may lack ensurepip; its pip can then fill the environment from outside.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) \
	    && $(PYTHON) -m pip --python $@ install --quiet pip; }

$(VENV)/torch.stamp: constraints.txt | $(BIN)/python
	@echo "==> Installing $(TORCH)"
	$(PIP) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) $(TORCH)
	@touch $@

$(VENV)/train.stamp: pyproject.toml $(VENV)/torch.stamp
	@echo "==> Installing the project"
	$(PIP) $(TORCH) triton==3.7.1 -e ".[train]"
	@touch $@

$(VENV)/test.stamp: pyproject.toml $(VENV)/torch.stamp
	@echo "==> Installing the project and what its tests need"
	$(PIP) $(TORCH) triton==3.7.1 -e ".[train,test]"
	@touch $@

demo: $(VENV)/train.stamp
	@$(BIN)/python train/demo.py

# Triton's interpreter and its compiler exclude each other in a process, so the tests are two.
test: $(VENV)/test.stamp
	$(TESTS)
	TRITON_INTERPRET=1 $(TESTS) -m interpreter

test-slow: $(VENV)/test.stamp
	$(TESTS) -m slow
	TRITON_INTERPRET=1 $(TESTS) -m "interpreter and slow"

bench: $(VENV)/test.stamp
	$(BIN)/python -m pytest bench

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=.:kernels $(BIN)/lint-imports

size:
	@for room in kernels xiangxin_fast train bench tests; do \
	    printf '%-14s %6d lines\n' $$room "$$(git ls-files "$$room/*.py" | xargs cat | wc -l)"; done

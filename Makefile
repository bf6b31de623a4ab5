# `make demo` and `make test` do all of their own set-up, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/installed
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-all lint clean help

help:
	@echo "make demo      train a small SMYRF-BigGAN on drawn faces, on the CPU, and show samples"
	@echo "make test      run the default tests"
	@echo "make test-all  run every test that this machine can run"
	@echo "make lint      check the style"

demo: $(INSTALLED)
	$(BIN)/biggan train --preset demo --out runs/demo

# Two processes of one thread each, a file of tests at a time: the files share what is slow to make.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(INSTALLED)
	$(PYTEST)

test-all: $(INSTALLED)
	$(PYTEST) -m "slow or not slow"

lint: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt ruff
	$(BIN)/ruff check .

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=/path/to/it")'
	$(PYTHON) -m venv .venv
	@echo "installing torch and the rest; a few minutes, once"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[tpu,test]'
	@touch $@

clean:
	rm -rf .venv *.egg-info

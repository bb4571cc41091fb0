# Everything goes through .venv; nothing needs to be installed by hand but Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin
# Two processes on two cores: more threads each would only wait for each other.
export OMP_NUM_THREADS ?= 2

.PHONY: demo test test-slow lint types clean

demo: .venv/installed  ## train four ways on real images and compare
	$(BIN)/lockfree compare --rules backprop,dni,cdni,dfa --data fashion-mnist --epochs 10 --out $$(mktemp -d runs/demo-XXXX)

test: .venv/installed-dev  ## the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --max-worker-restart 0

test-slow: .venv/installed-dev  ## the long ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --max-worker-restart 0 -m slow

lint: .venv/installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("lockfree needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	mkdir -p runs
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv

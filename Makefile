PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test slow lint types docs notebooks lock

install: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: install
	$(BIN)/permafrost demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n 2

slow: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

docs: install
	$(BIN)/pdoc --docformat numpy --output-directory docs-build features pipeline

notebooks: install
	$(BIN)/python tests/notebooks.py

lock: install
	$(BIN)/pip install --quiet pip-tools
	$(BIN)/pip-compile --quiet --extra dev --strip-extras --allow-unsafe --no-annotate --no-header \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --output-file requirements.lock pyproject.toml

# `make demo` and `make test` are all a newcomer needs; each sets up .venv first if that has not been done.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export RAY_DEDUP_LOGS ?= 1

.PHONY: demo test check lint bench lock clean

demo: $(INSTALLED)
	$(BIN)/krd demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -q tests

check: lint
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_layers.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.teacher_path

$(INSTALLED): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Writes down what .venv holds now, after trying newer versions in it.
lock: $(INSTALLED)
	{ sed -n '/^#/p' requirements.lock; $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip \
		| sed 's/+cpu$$//'; } > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean:
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

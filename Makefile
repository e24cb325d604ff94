# make setup: the .venv alone.   make demo [TASK=nlvr]: compress a small model, here.   make test: the style and the tests.
# TASK: nlvr, retrieval, retrieval_clip, caption or vqa.

PYTHON := $(shell for p in python3.12 python3.11 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$p && break; done)
PY := .venv/bin/python
STAMP := .venv/.installed

.PHONY: setup demo test

setup: $(STAMP)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10, 3.11 or 3.12 found; install one" >&2; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[all,dev]"
	touch $(STAMP)

demo: setup
	$(PY) tools/demo.py --task $(or $(TASK),nlvr)

test: setup
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest -q

# make setup: the .venv alone.   make demo [TASK=nlvr]: compress a small model, here.   make test: style, types and tests.
# make gpu: measure on a GPU, in 25 minutes, what only a GPU can show.
# make test-oldest: the tests with the oldest supported versions of the dependencies, in .venv-oldest.
# TASK: nlvr, retrieval, retrieval_clip, caption or vqa.

PYTHON := $(shell for p in python3.12 python3.11 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$p && break; done)
PY := .venv/bin/python
OLDEST := constraints/oldest.txt
# By files, so that what the tests of a file share is made once; some 2 GB of memory a process.
PYTEST := -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: setup demo test test-oldest gpu

setup: .venv/.installed

.venv-oldest/.installed: $(OLDEST)
.venv-oldest/.installed: CONSTRAINTS := --constraint $(OLDEST)
.venv/.installed .venv-oldest/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10, 3.11 or 3.12 found; install one" >&2; exit 2; }
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e ".[all,onnx,dev]"
	touch $@

demo: setup
	$(PY) tools/demo.py --task $(or $(TASK),nlvr)

test: setup
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) $(PYTEST)

gpu: setup
	$(PY) tools/gpu_day.py

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python $(PYTEST)

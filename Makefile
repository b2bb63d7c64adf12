# `make run` and `make test` set up .venv first, where it is missing or constraints.txt or pyproject.toml changed since.
SHELL := /bin/bash
.PHONY: run serve test lint bench seeds faults
export DO_NOT_TRACK = true

PYTHON = $(firstword $(foreach name,python3.11 python3,$(if $(filter 3.11,$(shell $(name) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)),$(name))))
READY := .venv/ready

run: $(READY)
	.venv/bin/rlhf run

test: $(READY)
	.venv/bin/pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder --durations=10

lint: $(READY)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy rlhf tasks flows tests bench

serve: $(READY)
	.venv/bin/rlhf serve

bench: $(READY)
	.venv/bin/python bench/speed/run.py

seeds: $(READY)
	.venv/bin/python bench/learning/seeds.py

faults: $(READY)
	.venv/bin/python bench/faults/run.py

$(READY): constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 is needed, and neither python3.11 nor python3 is that — install it, with its venv module" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

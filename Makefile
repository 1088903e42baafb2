# make run   the toy model's video, on a fresh machine with only Python 3.11
# make test  lint, types and all tests
# make bench denoising and decoding by one and two ranks beside diffusers, interleaved (minutes)
.PHONY: env run test lint bench clean
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python
STAMP := .venv/.installed

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

run: env
	$(PY) launch.py

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: lint
	$(PY) -m pytest

bench: env
	$(PY) benchmarks/vae.py
	$(PY) benchmarks/denoise.py

clean:
	rm -rf .venv outputs multirun

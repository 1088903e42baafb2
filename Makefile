# make run   the toy model's video, on a fresh machine with only Python 3.11
# make test  lint, types and all tests
# make quick lint, types and the tests that start no ranks or processes and take no seconds
# make bench the VAE and the denoiser by one and two ranks beside others, interleaved (two hours)
.PHONY: env run test quick lint bench clean
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

# By file: the tests of a file share what they compare with. In the order of the folders, because the longest files are
# in the first. Three processes on two cores, because many tests wait. One thread each: so ranks are bitwise equal.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

quick: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist loadfile tests/unit -m 'not ranks and not long'

bench: env
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(PY) benchmarks/vae.py --out outputs/bench/small
	$(PY) benchmarks/vae.py --width full --out outputs/bench/full
	$(PY) benchmarks/denoise.py

clean:
	rm -rf .venv outputs multirun

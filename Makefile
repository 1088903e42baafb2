# make run   the toy model's video, on a fresh machine with only Python 3.11
# make test  lint, types and all tests
# make quick lint, types and the tests that start no ranks or processes and take no seconds
# make interop  what is too large for the tests' environment: ray as a launcher, MLflow and other trackers
# make bench measures the VAE and the denoiser beside others, and writes docs/performance.md (two hours)
.PHONY: env run test quick lint interop bench clean
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

# Beside the environment of the tests, whose packages it sees: these ask for other versions of some.
interop: env
	$(PY) -m venv --without-pip .venv/interop
	$(PY) -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> $$(echo .venv/interop/lib/python*/site-packages)/outer.pth
	$(PY) -m pip --python .venv/interop/bin/python install --quiet \
		hydra-ray-launcher 'boto3>=1.43' mlflow tensorboard wandb
	OMP_NUM_THREADS=1 .venv/interop/bin/python -m pytest tests/e2e/test_ray.py tests/e2e/test_trackers.py

bench: env
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(PY) benchmarks/vae.py --out docs/results/small
	$(PY) benchmarks/vae.py --width full --out docs/results/full
	$(PY) benchmarks/denoise.py --out docs/results/denoise
	$(PY) benchmarks/performance.py

clean:
	rm -rf .venv outputs multirun

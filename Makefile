# make run   the toy model's video, on a fresh machine with only Python 3.11
# make test  lint, types and the tests
# make thorough  the same tests in more cases: every strategy through the kit, every placement on every layout
# make quick lint, types and the first case of each test that starts no ranks or processes and takes no seconds
# make docs  the site in site/, in an environment of its own; fails on a broken link or anchor
# make hooks lint and spelling before every commit
# make wheel builds the wheel, and makes the toy's video with it in an empty environment and directory
# make interop  what is too large for the tests' environment: ray as a launcher, MLflow and other trackers
# make fuzz  every value of tests/config_fuzz.py on every key of the schema (one to two hours of one core)
# make bench measures the VAE and the denoiser beside others, and writes docs/performance.md (two hours)
# make faults 300 runs that are hit by signals, stopped, started twice or over, and docs/reliability.md
.PHONY: env run test thorough quick lint docs hooks wheel fuzz interop bench faults clean
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python
STAMP := .venv/.installed
DOCS := .venv-docs/bin/python
# One thread each: so ranks are bitwise equal. Bytecode is kept, because tests start many interpreters.
ALONE := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1
TESTS := $(ALONE) $(PY) -m pytest

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
# in the first. Three processes on two cores, because many tests wait.
test: lint
	$(TESTS) --numprocesses 3 --dist loadfile --no-loadscope-reorder -m 'not thorough'

thorough: env
	$(TESTS) --numprocesses 3 --dist loadfile -m thorough

quick: lint
	$(TESTS) --numprocesses 2 --dist loadfile --first-case tests/unit \
		-m 'not ranks and not long and not thorough'

# Only the packages of the extra `docs`, without the project and torch: the API pages are made from the sources.
.venv-docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	$(DOCS) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" \
		> .venv-docs/requirements.txt
	$(DOCS) -m pip install --quiet --constraint constraints.txt --requirement .venv-docs/requirements.txt
	touch $@

docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS) -m mkdocs build --strict
	$(DOCS) -m codespell_lib README.md CONTRIBUTING.md CHANGELOG.md docs

hooks: env .venv-docs/.installed
	.venv-docs/bin/pre-commit install

# pip builds it in an environment of its own. The clip is the toy's default.
wheel:
	rm -rf dist build/empty
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv build/empty/venv
	build/empty/venv/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	mkdir build/empty/here
	cd build/empty/here && ../venv/bin/cosmos3 hydra.run.dir=made
	test -s build/empty/here/made/video.mp4

fuzz: env
	COSMOS3_FUZZ=all $(TESTS) -n0 tests/unit/test_fuzzed_keys.py

# Beside the environment of the tests, whose packages it sees: these ask for other versions of some.
interop: env
	$(PY) -m venv --without-pip .venv/interop
	$(PY) -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> $$(echo .venv/interop/lib/python*/site-packages)/outer.pth
	$(PY) -m pip --python .venv/interop/bin/python install --quiet \
		hydra-ray-launcher 'boto3>=1.43' mlflow tensorboard wandb
	$(ALONE) .venv/interop/bin/python -m pytest tests/e2e/test_ray.py tests/e2e/test_trackers.py

bench: env
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(PY) benchmarks/vae.py --out docs/results/small
	$(PY) benchmarks/vae.py --width full --out docs/results/full
	$(PY) benchmarks/denoise.py --out docs/results/denoise
	$(PY) benchmarks/performance.py

# Half a minute a case on two cores; SEED=1 draws others.
faults: env
	$(PY) tests/faults.py --seed $(or $(SEED),0) --count $(or $(COUNT),300) \
		--out docs/results/faults.json --page docs/reliability.md

clean:
	rm -rf .venv .venv-docs outputs multirun site dist build

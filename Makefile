# `make demo` and `make test` need Python 3.11 or newer and nothing else: each makes its environment first, once.

PYTHON ?= python3
VENV ?= .venv
OLDEST_TRANSFORMERS := 5.17.0
# Tests that follow one another run in one worker, which makes the decoders they share once.
WORKERS := -n 2 --dist worksteal

export PYTHON
# Once installed, nothing here needs the network.
export HF_HUB_OFFLINE := 1
# Every process that a test starts would compile torch and transformers anew, ten seconds each, where this is set.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint type pytest kernels suite docs package gpu
.PHONY: test-real test-serving test-matrix test-nightly test-cpus clean

$(VENV)/.installed: pyproject.toml constraints.txt tools/environment.sh
	tools/environment.sh $(VENV)
	@touch $@

demo: $(VENV)/.installed  ## Let a chat model (downloaded once, 93 MB) read a novel with notes in it, and ask for them
	$(VENV)/bin/mplus demo

test: $(VENV)/.installed  ## Everything a change must pass
	$(MAKE) -j 2 lint type kernels docs package
	$(MAKE) suite

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

type: $(VENV)/.installed
	$(VENV)/bin/mypy

pytest: kernels suite

kernels: $(VENV)/.installed  # in one process: `make test` checks the types beside it
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(VENV)/bin/pytest tests/interpreted tests/mutants

suite: $(VENV)/.installed
	$(VENV)/bin/pytest $(WORKERS)
	$(VENV)/bin/pytest plugins $(WORKERS)

docs: $(VENV)/.installed  ## The documentation, in site/
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

package: $(VENV)/.installed  ## The sdist and the wheel, in dist/, and the wheel tried in an environment of its own
	$(VENV)/bin/python -m tools.package

gpu: $(VENV)/.installed  ## Try and measure everything that is made for a GPU on the first NVIDIA GPU, in nine minutes
	$(VENV)/bin/python -m benchmarks.gpu

test-real: $(VENV)/.installed  ## The tests with a chat model, which is downloaded (93 MB) where it is not there yet
	$(VENV)/bin/mplus get smollm2
	$(VENV)/bin/pytest tests/real

test-serving: $(VENV)/.installed  ## The tests of the server, those with openai's client, Ray and Chromium too, which it installs
	command -v chromium > /dev/null || apt-get install --yes --no-install-recommends chromium
	$(VENV)/bin/pip install --no-compile -c constraints.txt -e '.[ray]' openai playwright
	MPLUS_RAY=1 MPLUS_SCREENSHOTS=1 $(VENV)/bin/pytest tests/serving

test-matrix:  ## The tests with the oldest supported transformers and with the newest release
	tools/environment.sh .venv-transformers-oldest transformers==$(OLDEST_TRANSFORMERS)
	.venv-transformers-oldest/bin/pytest $(WORKERS)
	tools/environment.sh .venv-transformers-newest transformers
	.venv-transformers-newest/bin/pytest $(WORKERS)

test-nightly: $(VENV)/.installed  ## The tests in their long modes; commits a record of the run
	$(VENV)/bin/python tools/nightly.py

test-cpus: $(VENV)/.installed  ## The tests that compare two computations, as processors of other kinds round
	$(VENV)/bin/python tools/cpus.py

clean:  ## Remove what was built, but keep the environments
	rm -rf build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache

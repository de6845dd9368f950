# Two targets do it all: `make demo` shows the framework at work, `make test` proves it.
.PHONY: help demo test bench-gpu other-loaders install install-dev system-packages ffcv lint unit clean
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
OTHER_LOADERS := .venv-other-loaders
# what some tests need beside Python packages: a browser for the MLflow pages, FFmpeg for torchcodec, a Slurm
SYSTEM_PACKAGES := chromium ffmpeg slurm-wlm:slurmctld munge:munged
# apart, because not every release has them under these names: what `sacct` needs
ACCOUNTING_PACKAGES := slurmdbd mariadb-server-core:mariadbd mariadb-client-core:my_print_defaults

FFCV_PACKAGES := g++ pkg-config libopencv-dev:/usr/include/opencv4/opencv2/core.hpp \
  libturbojpeg0-dev:/usr/include/turbojpeg.h

help:
	@echo "make demo     install, make a small data set, shard it, train, evaluate, print a table"
	@echo "make test     install, then lint, types and tests"
	@echo "make bench-gpu  measure the training step on a CUDA GPU (under 8 minutes)"
	@echo "make other-loaders  make .venv-other-loaders, for benchmarks.loader --others (5 minutes, 7 GB)"
	@echo "make install  make .venv with .venv/bin/tubeworks"
	@echo "make lint     ruff and pyright only"
	@echo "make clean    remove the virtual environments, demo/ and caches"

install:
	@$(PYTHON) launch/bootstrap.py

install-dev:
	@$(PYTHON) launch/bootstrap.py dev s3 simplejpeg torchcodec hf onnx

demo: install
	@$(BIN)/python -m launch.demo

test: install-dev system-packages ffcv lint unit

bench-gpu: install
	$(BIN)/python -m benchmarks.train_step --out benchmarks/results/train_step_gpu.json

# apart from .venv, because they need another torch than the one that is pinned there
other-loaders:
	$(PYTHON) -m venv $(OTHER_LOADERS)
	$(OTHER_LOADERS)/bin/python -m pip install --quiet --requirement benchmarks/other_loaders.txt
	$(OTHER_LOADERS)/bin/python -m benchmarks.other_loaders versions

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@if $(BIN)/pyright --version >/dev/null 2>&1; then echo "$(BIN)/pyright"; $(BIN)/pyright; \
	else echo "types: NOT CHECKED, pyright cannot start here (it needs node)"; fi

unit: install-dev
	$(BIN)/python -m pytest -q --durations=10

system-packages:
	@.ci/system-packages $(SYSTEM_PACKAGES)
	@.ci/system-packages $(ACCOUNTING_PACKAGES)

# apart from the other extras, because it is compiled here and may fail
ffcv: install-dev
	@.ci/system-packages $(FFCV_PACKAGES)
	@$(BIN)/python -c "import ffcv.reader" 2>/dev/null \
	|| $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[ffcv]" \
	|| echo "ffcv: could not be built here: tests that need it skip"

clean:
	rm -rf .venv $(OTHER_LOADERS) demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

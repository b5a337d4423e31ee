# make demo: train a small GPT on real text and show what it learned.   make test: the tests that need Python alone.
# make test-all: the same with every case of those that are alike (layouts, codecs, planted faults).
# make test-real: the tests under real launchers, Slurm, DeepSpeed and Horovod, which it installs (Debian or Ubuntu, root).
# TORCH_ARGS: further words for installing torch, for example --index-url and the address of torch's CPU builds.
PYTHON ?= python3
TORCH_ARGS ?=
TEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# fresh processes are many: they need not compile what the last one has compiled
unexport PYTHONDONTWRITEBYTECODE

REAL := tests/cluster tests/launchers tests/engines tests/faults

.PHONY: demo test test-all test-real check bench verify verify-bert chaos golden clean

demo: $(READY)
	$(BIN)/disttrain demo configs/gpt_tiny.yaml --nproc 2

test: $(READY)
	$(BIN)/python -m pytest -n 4 --dist worksteal $(addprefix --ignore=,$(REAL)) $(TEST_ARGS)

test-all:
	DISTTRAIN_EVERY_CASE=1 $(MAKE) test

test-real: $(READY)
	tests/install.sh
	DISTTRAIN_TEST_ALL=1 $(BIN)/python -m pytest -n 2 --dist worksteal -o cache_dir=.pytest_cache/real $(REAL) $(TEST_ARGS)

check: $(READY)
	$(BIN)/ruff check disttrain tests benchmarks
	$(BIN)/ruff format --check disttrain tests benchmarks
	$(BIN)/pyright
	$(BIN)/python -m pytest tests/test_layers.py

bench: $(READY)
	$(BIN)/python benchmarks/throughput.py

# every legal layout on up to 8 ranks, of a small GPT (816) or a small BERT: some 75 minutes on two idle cores; it goes on where it stopped
verify: $(READY)
	$(BIN)/disttrain verify configs/verify_gpt.yaml --matrix full --resume

verify-bert: $(READY)
	$(BIN)/disttrain verify configs/verify_bert.yaml --matrix full --resume

# an hour of killed ranks, spoiled checkpoints and full disks, in one layout after the other
chaos: $(READY)
	$(BIN)/python -m tests.faults.chaos --seconds 3600

golden: $(READY)
	$(BIN)/python tests/golden/regenerate.py

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH_ARGS) torch numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) runs build dist *.egg-info

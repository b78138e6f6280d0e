# Two commands for a fresh machine: `make demo` and `make test`. Both set up what they need first.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?=
PY := $(VENV)/bin/python
READY := $(VENV)/.ready$(if $(EXTRAS),-$(EXTRAS))
COMMA := ,
# Test files that run at the same time: many tests wait for other programs. Those of one file share what they started.
# One thread a process then: more would wait for each other.
WORKERS ?= 2

.PHONY: setup demo test lint clean
.DELETE_ON_ERROR:

setup: $(READY)

# The environment of the pipeline itself; the server's is built by the `sandbox` stage.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else "error: PYTHON=$(PYTHON) is %d.%d; use Python 3.10, 3.11 or 3.12, as in: make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev$(if $(EXTRAS),$(COMMA)$(EXTRAS))]'
	@touch $@

# The whole chain: models made on the spot, SFT, reward model, tritonserver, PPO, evaluation.
demo: $(READY)
	$(PY) -m pipeline.submit --stage sandbox --preset demo --run-dir runs/demo
	$(PY) -m pipeline.submit --stage all --preset demo --run-dir runs/demo

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

clean:
	rm -rf $(VENV) runs build dist *.egg-info

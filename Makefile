# Two commands for users (demo, test); the rest for developers. Everything lives in .venv.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The supported versions of vLLM, the oldest and the newest. Each has an environment of its own.
VLLM_OLDEST := 0.27.1
VLLM := 0.32.0

.PHONY: demo test fuzz test-oldest test-vllm test-vllm-matrix e2e-vllm mutants audit soak lint format docs clean

demo: $(READY)
	$(BIN)/vllm-metal-tq generate --model demo --preset tq4 --max-tokens 120 \
	  --prompt "Why do people like to drink tea? Answer in one short paragraph."

test: $(READY)
	$(BIN)/python -m pytest

fuzz: $(READY)
	$(BIN)/python tests/fuzz/run.py

test-oldest:
	PIP_CONSTRAINT=scripts/oldest.txt sh scripts/setup.sh .venv-oldest
	.venv-oldest/bin/python -m pytest -m "not slow and not nightly"

test-vllm: .venv-vllm-$(VLLM)/.ready
	.venv-vllm-$(VLLM)/bin/python -m pytest tests/integrations/vllm

test-vllm-matrix: test-vllm
	$(MAKE) test-vllm VLLM=$(VLLM_OLDEST)

.venv-vllm-%/.ready: pyproject.toml scripts/setup_vllm.sh | $(READY)
	PYTHON=$(BIN)/python sh scripts/setup_vllm.sh .venv-vllm-$* $*
	touch $@

# The real vLLM and vllm-metal on Linux: make e2e-vllm VLLM_METAL_SRC=/path/to/vllm-metal
e2e-vllm: .venv-e2e-vllm/.ready
	.venv-e2e-vllm/bin/python -m pytest tests/e2e_vllm

.venv-e2e-vllm/.ready: pyproject.toml scripts/setup_e2e_vllm.sh tests/e2e_vllm/shim/pyproject.toml
	sh scripts/setup_e2e_vllm.sh .venv-e2e-vllm
	touch $@

mutants: $(READY)
	$(BIN)/python -m pytest -m nightly

# Known vulnerabilities of the dependencies, and their licences; asks PyPI.
audit: $(READY)
	$(BIN)/python scripts/audit.py

# Half an hour of random traffic against a real server; results in soak/.
soak: $(READY)
	$(BIN)/python benchmarks/soak.py --model demo --minutes 30 --out soak

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/mkdocs build --strict

$(READY): pyproject.toml Makefile scripts/setup.sh
	sh scripts/setup.sh $(VENV)
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-vllm-* .venv-e2e-vllm site dist soak

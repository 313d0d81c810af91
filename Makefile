# Everything starts from python3 and make alone: the first target that needs it makes .venv.
# An index of CPU builds of torch can be named: make test TORCH_INDEX=<url>

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help demo test lint types unit wheel laws triton format bench-conventions bench-twin bench-train bench-attention bench-quantizers bench-codebooks bench-facade clean

help:
	@echo "make demo         train on this machine's Python library, measure, sample (minutes)"
	@echo "make test         lint, type check, all tests, wheel"
	@echo "make lint         ruff: rules and format"
	@echo "make types        pyrefly"
	@echo "make unit         the tests of the rooms; ARGS='-k name' to choose"
	@echo "make laws         the laws of the quantizers: every option, every law"
	@echo "make triton       the CUDA kernels under Triton's interpreter, and compiled; installs triton (700 MB)"
	@echo "make wheel        build the wheel and use it from a folder of its own"
	@echo "make format       let ruff write the format"
	@echo "make bench-conventions  which conventions, forms and optimizers learn better"
	@echo "make bench-twin   the quickstart's model beside the same with full attention, at equal steps and in equal time"
	@echo "make bench-train  training speed against a bare matrix product"
	@echo "make bench-attention  the attention alone, models and decoding against ordinary attention"
	@echo "make bench-quantizers  the quantizers against the peer, faiss and a bare matrix product"
	@echo "make bench-codebooks   every quantizer in the same autoencoder at equal bits, and beside the peer"
	@echo "make bench-facade   the facade for vector-quantize-pytorch beside the library itself"
	@echo "make clean        remove .venv and what was built"

demo: $(VENV)/.train
	$(BIN)/vqkit train quickstart

test: lint types
	$(MAKE) --jobs=2 --output-sync=target unit laws
	$(MAKE) wheel

lint: $(VENV)/.dev
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --quiet --check || { echo "run: make format"; exit 1; }

types: $(VENV)/.dev
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

unit: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

laws: $(VENV)/.dev
	VQKIT_COMPILED=1 $(BIN)/python -m pytest tests/laws $(ARGS)
	VQKIT_COMPILED=0 $(BIN)/python -m pytest tests/laws/test_value_laws.py tests/laws/test_compiled_form.py $(ARGS) || [ $$? = 5 ]  # 5: none chosen

triton: $(VENV)/.triton
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops/test_nearest_code_triton.py -rs $(ARGS)

wheel: $(VENV)/.dev
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	CXX=no-compiler $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/pure .
	for kind in wheel pure; do \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/$$kind/site build/$$kind/*.whl || exit; \
		$(BIN)/python -I .ci/check_wheel.py build/$$kind || exit; \
	done

format: $(VENV)/.dev
	$(BIN)/ruff check --quiet --fix-only
	$(BIN)/ruff format --quiet

bench-conventions: $(VENV)/.train
	$(BIN)/python benchmarks/compare_conventions.py $(ARGS)

bench-twin: $(VENV)/.train
	$(BIN)/python benchmarks/compare_twin.py $(ARGS)

bench-train: $(VENV)/.train
	$(BIN)/python benchmarks/bench_train.py

bench-attention: $(VENV)/.train
	$(BIN)/python benchmarks/bench_attention.py $(ARGS)

bench-quantizers: $(VENV)/.bench
	$(BIN)/python benchmarks/bench_quantizers.py $(ARGS)

bench-codebooks: $(VENV)/.bench
	$(BIN)/python benchmarks/bench_codebooks.py $(ARGS)

bench-facade: $(VENV)/.bench
	$(BIN)/python benchmarks/bench_facade.py $(ARGS)

clean:
	rm -rf $(VENV) build

# Installed anew only when the wanted versions change, or what is compiled at installation: the stamps say with what.
BUILT := pyproject.toml constraints.txt hatch_build.py $(addprefix src/vqkit/ops/nearest_code/,compiled.cpp libraries.py)

$(VENV)/.train: $(BUILT) | $(BIN)/python
	$(INSTALL) -e ".[train]"
	@touch $@

$(VENV)/.dev: $(BUILT) | $(BIN)/python
	$(INSTALL) -e ".[train,dev]"
	@touch $@ $(VENV)/.train

$(VENV)/.triton: $(BUILT) | $(BIN)/python
	$(INSTALL) -e ".[train,dev,triton]"
	@touch $@ $(VENV)/.dev $(VENV)/.train

$(VENV)/.bench: $(BUILT) | $(BIN)/python
	$(INSTALL) -e ".[train,bench]"
	@touch $@ $(VENV)/.train

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vqkit needs Python 3.11 or newer; $(PYTHON) is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

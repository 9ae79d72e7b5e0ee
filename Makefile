PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
INSTALL := $(PIP) --build-constraint constraints.txt
# One thread a worker: two workers on two cores would otherwise fight over them.
# Threads that wait by spinning make a busy machine many times slower.
export OMP_WAIT_POLICY := PASSIVE
SINGLE := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# Servers and trainers need environments of their own, and minutes.
IGNORED := --ignore=tests/serving --ignore=tests/trainers
SERVING := .venv/serving
LOWEST := sh tests/install_lowest.sh $(PYTHON)
EXTRAS := sklearn:ipa_sklearn arrow:pyarrow hdf5:h5py dask:ipa_core.dask_backend plot:ipa_core.plotting \
	torch:ipa_torch hf:ipa_hf
# timm and torchvision stay out of the environment: transformers would import torchvision, too.
VISION := PYTHONPATH=.venv/vision
# A test that hangs prints where, and fails: its worker ends, and another one goes on.
HANGING := -o faulthandler_timeout=480 -o faulthandler_exit_on_timeout=true
PYTEST := $(SINGLE) $(BIN)/python -m pytest -n 2 $(HANGING)

.DEFAULT_GOAL := help
.PHONY: help demo test check bench evidence-quick docs test-search test-jax test-quantized test-timm \
	test-families test-foreign test-hf-families test-moe-families test-serving test-trainers \
	test-lowest test-release clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

demo: .venv/.installed-demo  ## fine-tune a real model with a learned projection
	$(BIN)/python -m benchmarks.demo

test: .venv/.installed-test  ## everything that must pass before a commit
	$(PYTEST) --ignore=tests/timm $(IGNORED)
	$(MAKE) test-timm check

check: .venv/.installed-test docs  ## style, language, types, doctests, documentation
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(SINGLE) $(BIN)/python -m pytest --doctest-modules tests/test_language.py ipa_core integrations \
		--ignore=integrations/ipa_timm

bench: .venv/.installed-bench  ## the quick benchmarks
	env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks --quick  # on a machine with nothing else

evidence-quick: .venv/.installed-bench .venv/.installed-vision  ## one cell of each table again
	$(BIN)/python -m benchmarks.evidence.quick
	$(VISION) $(BIN)/python -m benchmarks.evidence.quick_vision

docs: .venv/.installed-test  ## build the documentation into site/
	$(BIN)/mkdocs build --strict --quiet

test-search: .venv/.installed-test  ## search longer, from a fresh seed, for counterexamples
	$(PYTEST) --hypothesis-profile=search tests/core

test-jax: .venv/.installed-jax  ## the core tests with JAX among the array libraries
	XLA_FLAGS=--xla_backend_optimization_level=0 $(PYTEST) --hypothesis-profile=jax tests/core -k jax

test-quantized: .venv/.installed-quantized  ## PEFT on bases in 4 and 8 bits
	$(PYTEST) tests/hf/test_quantized.py

test-timm: .venv/.installed-vision  ## the tests that need timm, in a process of their own
	$(VISION) $(PYTEST) --doctest-modules tests/timm integrations/ipa_timm

test-families: .venv/.installed-vision  ## one small model of each family that timm has
	$(SINGLE) $(BIN)/python -m benchmarks.timm_families

test-moe-families: .venv/.installed-test  ## one tiny model of each family with fused experts
	$(SINGLE) $(BIN)/python -m benchmarks.hf_moe_families

test-serving: $(addprefix $(SERVING)/.installed-,llama_cpp vllm sglang)  ## adapters in inference servers
	$(SINGLE) IPA_RESULTS=benchmarks/results timeout 20m $(BIN)/python -m pytest tests/serving

test-trainers: $(addprefix .venv/.installed-,trainers llamafactory axolotl)  ## programs that train adapters
	$(SINGLE) IPA_RESULTS=benchmarks/results PYTHONPATH="$(CURDIR):$(CURDIR)/integrations" timeout 20m \
		.venv/trainers/bin/python -m pytest tests/trainers

test-foreign: .venv/.installed-foreign  ## models of other packages, each from fit to load
	$(SINGLE) PYTHONPATH=.venv/foreign $(BIN)/python -m benchmarks.foreign_walk

test-hf-families: .venv/.installed-test  ## one tiny model of each family of transformers
	$(SINGLE) $(BIN)/python -m benchmarks.hf_families

test-lowest:  ## each extra by itself with its lowest versions; the tests of the core with all of them
	for pair in $(EXTRAS); do \
		$(LOWEST) $${pair%%:*} && .venv/lowest/bin/python -c "import ipa_core, $${pair##*:}" || exit 1; \
	done
	$(LOWEST) sklearn arrow hdf5 dask plot
	.venv/lowest/bin/python -m pip install --quiet pytest hypothesis array-api-strict 'pandas<3'
	$(SINGLE) .venv/lowest/bin/python -m pytest -W default tests/core tests/sklearn -k 'not jax' \
		--ignore=tests/core/test_threads.py

test-release: .venv/.installed-release  ## contents and metadata of the distributions
	.venv/release/bin/python -m pytest tests/test_packaging.py

clean:  ## remove what the other targets made
	rm -rf .venv site dist .hypothesis .mypy_cache .pytest_cache .ruff_cache

.venv/.installed-pip: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) pip
	touch $@

.venv/.installed-demo: .venv/.installed-pip pyproject.toml
	$(INSTALL) --editable '.[hf,plot]'
	touch $@

.venv/.installed-test: .venv/.installed-pip pyproject.toml
	$(INSTALL) --group dev --editable '.[hf,plot]'
	touch $@

.venv/.installed-bench: .venv/.installed-pip pyproject.toml
	$(INSTALL) --group bench --editable '.[hf,plot]'
	touch $@

.venv/.installed-jax: .venv/.installed-test
	$(INSTALL) --editable '.[jax]'
	touch $@

.venv/.installed-quantized: .venv/.installed-test
	$(INSTALL) --group quantized
	touch $@

.venv/.installed-vision: .venv/.installed-test
	$(PIP) --no-deps --upgrade --target .venv/vision timm torchvision ml-dtypes onnx protobuf
	touch $@

# Lists of all packages with their versions: nothing is left to be solved.
$(SERVING)/.installed-vllm: .venv/.installed-test tests/serving/vllm.txt
	$(PYTHON) -m venv $(SERVING)/vllm
	$(SERVING)/vllm/bin/python -m pip install --quiet --no-deps --requirement tests/serving/vllm.txt
	touch $@

.venv/.installed-trainers .venv/.installed-llamafactory .venv/.installed-axolotl: .venv/.installed-%: tests/trainers/%.txt
	$(PYTHON) -m venv .venv/$*
	.venv/$*/bin/python -m pip install --quiet --no-deps --requirement tests/trainers/$*.txt
	touch $@

LLAMA := llama_cpp_python-0.3.36
# Its converters come with its sources. Only what the Python package loads is compiled.
$(SERVING)/.installed-llama_cpp: .venv/.installed-test tests/serving/llama_cpp.txt
	$(PYTHON) -m venv $(SERVING)/llama_cpp
	$(SERVING)/llama_cpp/bin/python -m pip install --quiet --upgrade pip
	$(SERVING)/llama_cpp/bin/python -m pip install --quiet --no-deps --requirement tests/serving/llama_cpp.txt
	$(SERVING)/llama_cpp/bin/python -m pip download --quiet --no-deps \
		--no-binary llama-cpp-python --dest $(SERVING) $(subst python-,python==,$(LLAMA))
	tar -C $(SERVING) -xzf $(SERVING)/$(LLAMA).tar.gz
	ln -sfn ../$(LLAMA)/vendor/llama.cpp $(SERVING)/llama_cpp/source
	CMAKE_ARGS=-DLLAVA_BUILD=OFF $(SERVING)/llama_cpp/bin/python -m pip install --quiet --no-deps \
		--config-settings 'build.targets=llama;llama-common' $(SERVING)/$(LLAMA).tar.gz
	touch $@

$(SERVING)/.installed-sglang: .venv/.installed-test
	$(BIN)/python -m pip download --quiet --no-deps --dest $(SERVING) sglang==0.5.23
	touch $@

.venv/.installed-foreign: .venv/.installed-test benchmarks/foreign_packages.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/foreign \
		--requirement benchmarks/foreign_packages.txt
	touch $@

.venv/.installed-release:
	$(PYTHON) -m venv .venv/release
	.venv/release/bin/python -m pip install --quiet . twine==7.0.0 hatchling hypothesis pytest
	touch $@

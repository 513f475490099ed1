# Common tasks. Every target first creates .venv with pinned packages.
PYTHON ?= python3
TORCH ?= torch
BIN := .venv/bin
RAY := ray attrs jsonschema jsonschema-specifications msgpack referencing rpds-py
TRACKIO := trackio gradio_client httpx httpcore orjson python-multipart websockets
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

.PHONY: demo compare test unit test-slow lint types docs docs-serve faithfulness figures readme-images view-images test-portable test-avx2 bench gpu-bench pack-offline soak weights

demo: .venv/ready  ## Train the bundled demo and write its report
	$(BIN)/flowgrain train --out runs/demo-$$(date +%Y%m%d-%H%M%S)

compare: .venv/ready  ## Compare three methods on the bundled model
	$(BIN)/flowgrain compare quick

test: lint types unit  ## Lint, types and the fast tests

unit: .venv/ready
	$(PYTEST)

test-slow: .venv/ready  ## Tests that take minutes: hostile input in processes, long fuzzing
	$(PYTEST) -m slow --timeout=900

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/ready
	$(BIN)/mypy

docs: .venv/ready  ## Build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

faithfulness: .venv/ready  ## Compare with golden numbers, and write the tables of docs/faithfulness.md
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python scripts/faithfulness.py

# Kernels of other CPUs: AVX2 without VNNI, and SSE 4.1.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
SSE41 := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41
NUMERICAL := tests/core tests/golden tests/methods tests/models/test_acceleration.py tests/training/test_tails.py \
	tests/invariants/test_ratio.py tests/distributed/test_processes.py::test_approximate_tails_of_two

test-portable: .venv/ready
	$(AVX2) $(MAKE) unit
	$(SSE41) $(MAKE) unit

test-avx2: .venv/ready
	$(AVX2) $(PYTEST) $(NUMERICAL)

figures: .venv/ready  ## Draw the architecture and the trees of the methods
	$(BIN)/python scripts/draw_figures.py

readme-images: .venv/ready  ## Train the demo and draw the README's figure from it
	$(BIN)/python scripts/readme_images.py

view-images: .venv/ready  ## Train the demo with two seeds and take the pictures of flowgrain view
	$(BIN)/python scripts/view_screenshots.py

bench: .venv/ready
	$(BIN)/python benchmarks/executor.py

gpu-bench: .venv/ready  ## Measure the GPU of this machine: correctness, then speed
	$(BIN)/flowgrain bench --out bench/gpu

pack-offline:  ## Pack the project and missing wheels for a GPU machine without network
	scripts/pack_offline.sh dist/offline

soak: .venv/ready
	$(BIN)/python scripts/soak.py --minutes 45
	$(BIN)/python scripts/soak.py --minutes 15 --processes 2 --out runs/soak-two

weights: .venv/ready  ## Train the bundled model and rewards from scratch
	$(BIN)/python scripts/train_autoencoder.py
	$(BIN)/python scripts/train_base.py
	$(BIN)/python scripts/train_rewards.py towers
	$(BIN)/python scripts/train_rewards.py preference --steps 1500
	$(BIN)/python scripts/train_features.py

# torch is installed first and pinned: pip takes the build that it is configured for.
# RapidOCR depends on opencv-python, which needs libGL. The headless build does not. Without RapidOCR its tests skip.
# torchao is installed into a separate directory, because it adds 4 s to every import of diffusers. Trackio, too, because it
# requires an older Pillow, without which it works. Ray has its own directory, because its processes need it in PYTHONPATH. Without
# Ray its tests skip.
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	-$(BIN)/pip install --quiet --constraint constraints.txt onnxruntime opencv-python-headless pyclipper shapely six tqdm
	-$(BIN)/pip install --quiet --constraint constraints.txt --no-deps rapidocr-onnxruntime
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .venv/aside torchao
	-$(BIN)/pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .venv/aside $(TRACKIO)
	-$(BIN)/pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .venv/ray $(RAY)
	touch $@

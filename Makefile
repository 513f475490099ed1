# make demo | compare | test | lint | types | bench | soak | weights
PYTHON ?= python3
TORCH ?= torch
BIN := .venv/bin
export MALLOC_TRIM_THRESHOLD_ ?= 2147483647
export MALLOC_MMAP_MAX_ ?= 0

.PHONY: demo compare test test-portable test-avx2 lint types unit bench soak weights
demo: .venv/ready
	$(BIN)/flowgrain train --out runs/demo-$$(date +%Y%m%d-%H%M%S)

compare: .venv/ready
	$(BIN)/flowgrain compare quick

test: lint types unit

# Kernels of other CPUs: AVX2 without VNNI, and SSE 4.1.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
SSE41 := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41
NUMERICAL := tests/test_sde.py tests/test_tree.py tests/test_rollout.py tests/test_credit.py tests/test_objective.py tests/test_methods.py \
	tests/test_tails.py tests/invariants/test_ratio.py tests/invariants/test_processes.py

test-portable: .venv/ready
	$(AVX2) $(MAKE) unit
	$(SSE41) $(MAKE) unit

test-avx2: .venv/ready
	$(AVX2) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal $(NUMERICAL)

unit: .venv/ready
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python benchmarks/executor.py

soak: .venv/ready
	$(BIN)/python scripts/soak.py --minutes 45
	$(BIN)/python scripts/soak.py --minutes 15 --processes 2 --out runs/soak-two

weights: .venv/ready
	$(BIN)/python scripts/train_autoencoder.py
	$(BIN)/python scripts/train_base.py
	$(BIN)/python scripts/train_rewards.py towers
	$(BIN)/python scripts/train_rewards.py preference --steps 1500
	$(BIN)/python scripts/train_features.py

# RapidOCR, for the tests of the reward `ocr`, asks for opencv-python, which needs libGL: the headless build does without. Where
# there is none for this Python, those tests skip. torchao lies aside, where its tests find it: with it in the environment diffusers
# takes 4 seconds longer to import, in each of the tests' many processes.
# Torch first, pinned: whichever build your pip is set up for (on Linux without a GPU, point pip at PyTorch's CPU builds).
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	-$(BIN)/pip install --quiet --constraint constraints.txt onnxruntime opencv-python-headless pyclipper shapely six tqdm
	-$(BIN)/pip install --quiet --constraint constraints.txt --no-deps rapidocr-onnxruntime
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .venv/aside torchao
	touch $@

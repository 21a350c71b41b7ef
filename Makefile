# The front door. `make demo` talks to the embedded model; `make test` proves the engine.
PYTHON := .venv/bin/python
MODEL ?= models/refrain-mini
LIB := bindings/llaisys/libllaisys/libllaisys.so
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: all demo test bench gpu-test peers lint format clean setup setup-dev lib

all: lib

setup:
	@scripts/setup.sh

setup-dev:
	@scripts/setup.sh dev

# The library, where the Python package loads it.
lib: setup
	@[ -e build/build.ninja ] || meson setup build
	ninja -C build
	@for f in libllaisys.so llaisys-bench; do to=$(dir $(LIB))$$f; \
	    cmp -s build/$$f $$to || { cp build/$$f $$to.new && mv $$to.new $$to; }; done

demo: lib
	$(PYTHON) scripts/demo.py --model $(MODEL)

test: setup-dev lib
	scripts/test.sh

bench: lib
	build/llaisys-bench $(BENCH)

gpu-test: setup-dev lib
	scripts/gpu_test.sh

# The engine beside transformers and cuBLAS on one GPU; PEERS: options of profiles/peers.py.
peers: setup-dev lib
	$(PYTHON) profiles/peers.py $(PEERS)

lint: setup-dev
	scripts/lint.sh

format: setup-dev
	clang-format -i $$(git ls-files '*.c' '*.h' '*.cu' '*.cuh')
	ruff format .
	ruff check --fix .

clean:
	rm -rf build build-* $(LIB)

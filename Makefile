# make help lists the targets. Needs Rust and a C compiler; the scripts in tools/ and bench-peers need Python 3.

CARGO ?= cargo
CC ?= cc
CFLAGS ?= -O2
OBJCOPY ?= objcopy
PYTHON ?= python3
LIB := target/release
DEMO := examples/demo-model
SYSTEM_LIBS := -lpthread -ldl -lm

.PHONY: help lib cli demo game test bench bench-peers bench-training frames batching cancel busy gpu-test gpu-bench header kernels kernels-check
.PHONY: check clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The staticlib by itself: with the rlib beside it rustc would leave link-time optimisation out. The shared library is
# linked from it here, since rustc would export the C functions of dependencies too; in the archive they become local.
lib: ## libgemmoe.so and libgemmoe.a, optimised at link time, in target/release (some minutes the first time)
	$(CARGO) rustc --release --locked --lib --crate-type staticlib
	$(OBJCOPY) --wildcard --localize-symbol='llg_*' $(LIB)/libgemmoe.a
	$(CC) -shared -o $(LIB)/libgemmoe.so -Wl,--version-script=src/ffi/exports.map -Wl,--gc-sections -Wl,-z,now \
		-Wl,--whole-archive $(LIB)/libgemmoe.a -Wl,--no-whole-archive $(SYSTEM_LIBS) -lgcc_s

# In a folder of its own: the other features would have cargo build the library anew each time.
cli: ## the command-line tool, target/release/gemmoe (some minutes the first time)
	$(CARGO) build --release --locked --features cli --bin gemmoe --target-dir target/cli
	@mkdir -p $(LIB) && cp target/cli/release/gemmoe $(LIB)/gemmoe

target/%: examples/c/%.c include/gemmoe.h lib
	$(CC) -std=c99 -Wall -Wextra -Wpedantic $(CFLAGS) -Iinclude $< $(LIB)/libgemmoe.a $(SYSTEM_LIBS) -o $@

demo: target/chat ## build the library and the C example, and generate from the demo model
	@echo; target/chat $(DEMO) "The reason for this is that" 60 0.6 9
	@echo; target/chat $(DEMO) "Mit dieser Option können Sie" 60 0.6 9
	@echo; target/chat $(DEMO) "def __init__(self, name" 60 0.6 9
	@echo; target/chat $(DEMO) "|- ( ( ph /\ ps ) ->" 60 0.6 9

game: target/game_loop ## a character of the demo model talks in a loop of 60 frames a second
	@echo; target/game_loop $(DEMO) "The reason for this is that" 5

test: ## all tests
	$(CARGO) test --locked --features cli,bench

bench: ## tokens/s of a slice of the real geometry beside the machine's roofs (4.1 GB of disk and memory)
	$(CARGO) bench --locked --bench slice

# PEERS="--only int8 --rounds 5" and the like; PEERS=--help lists them. All it fetches and makes is in target/peers.
bench-peers: cli ## gemmoe beside llama.cpp on the slice, pair by pair (fetches and builds it first; 13 GB of disk)
	$(CARGO) bench --locked --bench slice -- --write
	$(PYTHON) tools/peers/bench_peers.py $(PEERS)

# TRAINING="--only demo --rounds 5" and the like.
bench-training: ## router training beside PyTorch's, step by step in turn (needs torch; 4.1 GB of disk, 14 GB of memory)
	$(CARGO) bench --locked --bench slice -- --write
	$(PYTHON) tools/peers/bench_training.py $(TRAINING)

frames: ## how late calls with a time budget return, in a simulated game loop
	$(CARGO) bench --locked --bench frames

batching: ## tokens/s of 1 to 16 sessions in one batch
	$(CARGO) bench --locked --bench batching

cancel: ## how long a cancel takes
	$(CARGO) bench --locked --bench cancel

busy: ## what is left of decode when each processor has another busy process
	$(CARGO) bench --locked --bench busy

gpu-test: ## target/gpu-test.tar.gz: the CUDA tests, to run on a machine that has a GPU and nothing but the driver
	CARGO="$(CARGO)" $(PYTHON) tools/gpu/bundle.py test

gpu-bench: ## target/gpu-bench.tar.gz: speed on a GPU beside its roofs, for a machine with nothing but the driver
	CARGO="$(CARGO)" $(PYTHON) tools/gpu/bundle.py bench

header: ## write include/gemmoe.h anew from src/ffi
	GEMMOE_WRITE_HEADER=1 $(CARGO) test --locked --test header

kernels: ## compile kernels/*.cu to kernels/generated, and write docs/kernels.md (fetches the compiler: 400 MB in target)
	$(PYTHON) tools/kernels/build.py

kernels-check: ## compile them again and compare; no kernel may spill registers, or have over 48 KiB of shared memory
	$(PYTHON) -m unittest discover -s tools/kernels
	$(PYTHON) tools/kernels/build.py --check

check: ## formatting and lints
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --features cli,bench --all-targets -- -D warnings

clean: ## delete everything built
	$(CARGO) clean

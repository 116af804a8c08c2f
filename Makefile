# Every target is a script; see scripts/. ARGS go to the program behind it, as in
#   make test ARGS="tests/jobs -x"
.PHONY: demo test test-gpu chaos figures lint up clean
MAKEFLAGS += --no-print-directory
ARGS ?=

demo:  ## set up, then one video through every real part
	@scripts/demo.sh $(ARGS)

test:  ## set up, then every test that this machine can run
	@scripts/test.sh $(ARGS)

test-gpu:  ## the tests that need a CUDA GPU
	@REEL_TEST_MARKS="gpu" scripts/test.sh $(ARGS)

chaos:  ## an hour of faults over real processes, then a check of every promise; ARGS="--minutes 10"
	@scripts/chaos.sh $(ARGS)

figures:  ## every figure that needs a GPU, into out/figures; ARGS="--list" says which
	@scripts/figures.sh $(ARGS)

lint:  ## ruff and mypy
	@scripts/lint.sh

up:  ## the whole stack in the foreground
	@scripts/up.sh $(ARGS)

clean:  ## remove what can be made again: the environment, local stacks' data, caches
	@scripts/clean.sh

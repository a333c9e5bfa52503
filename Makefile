# make run    set up and start the service         make check        static checks
# make test   set up and run all tests             make docker-test  build and run the container files
# make bench  time kernels, folding, statistics and serving beside their peers
# make coverage  run all tests, half as slow again, and fail below the branch coverage asked for
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX_URL ?=
PIP_FLAGS = $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))
WORKERS ?= 2
BIN = $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: run test coverage check bench docker-test

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(PIP_FLAGS) -c constraints.txt --upgrade pip
	$(BIN)/pip install -q $(PIP_FLAGS) -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q $(PIP_FLAGS) -c constraints.txt -e '.[test,tracing,architectures,dev]'
	touch $@

run: $(VENV)/.installed
	$(BIN)/python -m service

test: $(VENV)/.installed
	$(BIN)/python -m normcore.compilation
	$(PYTEST)

coverage: $(VENV)/.installed
	$(BIN)/python -m normcore.compilation
	$(PYTEST) --cov --cov-report=
	$(BIN)/coverage report --fail-under=90
	$(BIN)/coverage report --fail-under=95 --include='normcore/*'

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.normalization
	$(BIN)/python -m benchmarks.folding
	$(BIN)/python -m benchmarks.state_dict_folding
	$(BIN)/python -m benchmarks.folding_peers
	$(BIN)/python -m benchmarks.statistics
	$(BIN)/python -m benchmarks.inference

docker-test: $(VENV)/.installed
	$(or $(DOCKER_SMOKE),./deploy/docker-test.sh) -- $(BIN)/python -m deploy.container_check 127.0.0.1:$(or $(NORMSERVE_PUBLISH),8000)

# make optimize TARGET=cpu            the starter model: environment, build, proof, report
# make optimize TARGET=cuda PRECISION=fp16  another target, another precision (qwen-onnx list)
# make optimize MODEL=qwen3-0.6b      another recipe; SOURCE=path takes local weights
# make optimize MODEL=./my-finetune   a checkpoint without a recipe; or MODEL=ORG/NAME[@REVISION], modelscope:ORG/NAME
# make finetune DATA=faq.jsonl         a LoRA adapter, in adapters/MODEL/faq; make optimize ADAPTER=adapters/starter/faq
# make optimize MODEL=mine RECIPE=path/to/mine.yaml  a recipe of your own
# make verify DEPTH=release           four times the text
MODEL  ?= starter
TARGET ?= cpu
PRECISION ?=
SOURCE ?=
OUTPUT ?=
DATA   ?=
ADAPTER ?=
DEPTH  ?=
RECIPE ?=
MATRIX ?=
ONLY   ?=
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
OWN     = $(if $(RECIPE),--recipe '$(RECIPE)')
# what has a slash is no recipe's id, and other weights have another name: qwen-onnx knows by which name an artifact is
# kept, and is asked only then
KEPT    = $(shell $(BIN)/qwen-onnx where '$(MODEL)' --target '$(TARGET)' $(if $(PRECISION),--precision '$(PRECISION)') $(if $(findstring /,$(MODEL)),,--source '$(SOURCE)') $(OWN))
PLACE   = $(if $(findstring /,$(MODEL))$(SOURCE),$(or $(KEPT),$(error MODEL=$(MODEL): see above)),artifacts/$(MODEL)/$(TARGET)-$(or $(PRECISION),int4))
# a model that is a folder says itself where its weights are
FOLDER  = $(if $(wildcard $(MODEL)/config.json),$(MODEL))
READY  := $(VENV)/.ready
DEV    := $(VENV)/.dev
TUNE   := $(VENV)/.tune

# where it is set, every process would compile torch and transformers again, for seconds each
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev finetune optimize verify package foundry-check release serve chat plans environments wheel try-wheel \
  test test-slow test-release lint clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(READY)  ## create the environment in .venv

# the stamp comes last, so that an interrupted set-up is done again
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[export,package,publish]'
	@touch $@

setup-dev: $(DEV)  ## what the tests and the linter need besides; .venv doubles

# what training needs besides
$(TUNE): $(READY)
	$(INSTALL) --editable '.[finetune]'
	@touch $@

# requirements, not the project again, whose commands may be running meanwhile
$(DEV): $(READY)
	@$(BIN)/python -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	  print(*(need for name in ("finetune", "tasks", "otel", "ray", "dev") for need in extras[name] if "qwen-onnx[" not in need), sep="\n")' >$(VENV)/dev.txt
	$(INSTALL) --requirement $(VENV)/dev.txt
	@touch $@

finetune: $(TUNE)  ## DATA=FILE.jsonl: train a LoRA adapter of MODEL, in adapters/MODEL/FILE
	@$(BIN)/qwen-onnx finetune '$(MODEL)' --data '$(or $(DATA),$(error DATA=FILE.jsonl is missing))' $(if $(SOURCE),--source '$(SOURCE)') $(if $(OUTPUT),--output '$(OUTPUT)') $(OWN)

optimize: $(READY)  ## build, prove and publish artifacts/MODEL/TARGET-PRECISION
	@$(BIN)/qwen-onnx optimize '$(MODEL)' --target $(TARGET) $(if $(PRECISION),--precision $(PRECISION)) $(if $(SOURCE),--source '$(SOURCE)') $(if $(OUTPUT),--output '$(OUTPUT)') $(if $(DEPTH),--depth $(DEPTH)) $(if $(ADAPTER),--adapter '$(ADAPTER)') $(OWN)

verify: $(READY)  ## measure the artifact against PyTorch again
	@$(BIN)/qwen-onnx verify '$(PLACE)' $(if $(or $(SOURCE),$(FOLDER)),--source '$(or $(SOURCE),$(FOLDER))') $(if $(DEPTH),--depth $(DEPTH))

package: $(READY)  ## a Foundry Local package of the artifact, in artifacts/packages; builds the artifact when it is missing
	@test -e '$(PLACE)/manifest.json' || $(MAKE) --no-print-directory optimize
	@$(BIN)/qwen-onnx package '$(PLACE)'

foundry-check: package  ## that package in Foundry Local itself: register, load, chat, serve, unregister, offline
	@$(BIN)/qwen-onnx foundry-check "$$(ls -td artifacts/packages/"$$(basename "$$(dirname '$(PLACE)')")"-* | head -1)"

release: $(READY)  ## every job of pipelines/release.yaml (or MATRIX=file; ONLY=job), proven and packaged, in artifacts/release
	@$(BIN)/qwen-onnx release $(if $(MATRIX),'$(MATRIX)') $(if $(ONLY),--only '$(ONLY)') $(if $(OUTPUT),--output '$(OUTPUT)') $(OWN)

serve: $(READY)  ## OpenAI-compatible server on port 8000
	@$(BIN)/qwen-onnx serve '$(PLACE)'

chat: $(READY)  ## chat in the terminal
	@$(BIN)/qwen-onnx chat '$(PLACE)'

plans: $(READY)  ## check all recipes, write plans.lock, golden plans and schemas
	@$(BIN)/qwen-onnx plans

environments: $(READY)  ## make the Python environments of NPU targets and Foundry Local ahead of their first use
	@$(BIN)/qwen-onnx environments

wheel: $(DEV)  ## dist/: the wheel, with recipes and pipelines inside
	@rm -rf dist && $(BIN)/python -m build --outdir dist

try-wheel: wheel  ## install it into an empty environment, away from the checkout, and build the starter there
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(PYTHON) -m venv "$$folder/venv" \
	&& "$$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
	    --constraint constraints.txt "$$(echo $(CURDIR)/dist/*.whl)[export]" \
	&& cd "$$folder" && env -u QWEN_ONNX_CACHE venv/bin/qwen-onnx optimize $(MODEL) --target $(TARGET) && ls artifacts/$(MODEL)

# processes of one thread each: those of two threads wait for one another in loops. Three on two cores: a sixth of the
# quick tests' time goes by waiting
test: $(DEV)  ## the quick tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'not slow and not release' -n 3 --dist loadfile

test-slow: $(DEV)  ## the tests that build or start something larger; CI runs them too
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'slow and not release' -n 2 --dist loadfile --durations=20

# one process, since some of these measure; threads of its own would be lost where a test forks (what measures sets its own)
test-release: $(DEV) optimize environments  ## before a release, every night: the whole matrix, the wheel alone, every slow test
	@$(MAKE) --no-print-directory release
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'slow or release' --durations=40
	@$(MAKE) --no-print-directory try-wheel

lint: $(DEV)  ## linter, formatter and type checker
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:  ## remove the environment and the caches, keep the artifacts
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache

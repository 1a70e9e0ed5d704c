# `make help` lists what can be made.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV ?= .venv
MODEL ?= models/moving-shapes
# A number, or a file with a prompt in each line; models that are not trained on moving shapes need the file.
QUALITY_PROMPTS ?= $(if $(filter models/moving-shapes,$(MODEL)),100,calibration/prompts.txt)
# Another model than the bundled one has a folder of its own, so that neither is built over the other.
HOME_OF_MODEL := build$(if $(filter-out models/moving-shapes,$(MODEL)),/$(notdir $(abspath $(MODEL))))
BUNDLE ?= $(HOME_OF_MODEL)/bundle
TARGET ?= host

# A prompt reaches the command through the environment, letter for letter: neither make nor the
# shell reads a quote, a dollar or a backtick in it.
ifeq ($(origin PROMPT), undefined)
export REELRT_PROMPT := a red circle moving right on a black background
else
export REELRT_PROMPT := $(value PROMPT)
endif
unexport PROMPT

# JetPack's TensorRT lives in the system's Python, so a Jetson's environment sees its packages.
JETSON := $(wildcard /etc/nv_tegra_release)
NVIDIA := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
DEVICE_EXTRA := $(if $(JETSON),tensorrt,$(if $(filter-out 0,$(NVIDIA))$(filter-out host,$(TARGET)),rtx))
comma := ,
# What a bundle has to be calibrated for first.
CALIBRATED := $(filter int8,$(PRECISION))
SERVED := $(filter serve,$(MAKECMDGOALS))
RUN_EXTRAS := export$(if $(SERVED),$(comma)service)$(if $(DEVICE_EXTRA),$(comma)$(DEVICE_EXTRA))$(if $(CALIBRATED),$(comma)calibration)
TEST_EXTRAS := export,rtx,calibration,service,dev
# Unit tests of what a device needs: they import no exporter.
RUNTIME_TESTS := tests/unit/test_bundle_files.py tests/unit/test_bundle_manifest.py tests/unit/test_bundle_schedule.py \
	tests/unit/test_runtime_loop.py tests/unit/test_runtime_noise.py tests/unit/test_saving.py tests/unit/test_video.py \
	tests/unit/test_service.py tests/unit/test_engines_builder.py
# Processes that run tests beside each other; most tests keep one core busy.
WORKERS ?= 2

CREATED := $(VENV)/.created
RUN_READY := $(VENV)/.ready-$(subst $(comma),-,$(RUN_EXTRAS))
TEST_READY := $(VENV)/.ready-$(subst $(comma),-,$(TEST_EXTRAS))
BIN := $(VENV)/bin
# Threads that wait in a loop slow down everything beside them.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help
help: ## List what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'

.PHONY: video
video: $(RUN_READY) ## A video: PROMPT="..." OUT=red.mp4 STEPS= SEED= MODEL= PRECISION= SIZE= FRAMES=
	@$(call make_engines,$(HOME_OF_MODEL)/engines,host,onnxruntime)
	@$(BIN)/reelrt generate "$(HOME_OF_MODEL)/engines" -o "$(or $(OUT),build/video.mp4)" \
		$(if $(STEPS),--steps "$(STEPS)") $(if $(SEED),--seed "$(SEED)") $(SIZES) -- "$$REELRT_PROMPT"

.PHONY: engines
engines: $(RUN_READY) ## Engines: MODEL= TARGET=host|rtx3060|orin-agx|... PRECISION=fp32|fp16|int8|int8-weights SIZE=WxH FRAMES= OUT=
	@$(call make_engines,$(or $(OUT),$(HOME_OF_MODEL)/engines$(CALIBRATED:%=-%)$(if $(DEVICE_EXTRA),-$(TARGET))),$(TARGET),auto)

.PHONY: serve
serve: $(RUN_READY) ## The service on http://127.0.0.1:8000, with a page: PORT= MODEL= SIZE= FRAMES=
	@$(call make_engines,$(HOME_OF_MODEL)/engines,host,onnxruntime)
	@$(BIN)/reelrt serve "$(HOME_OF_MODEL)/engines" $(if $(PORT),--port "$(PORT)")

.PHONY: test
test: lint ## Check the style and run every test that needs no GPU
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 25

.PHONY: test-oldest
test-oldest: $(TEST_READY) ## Run the unit tests with the oldest dependencies that pyproject.toml allows
	@$(BIN)/python -m tests.oldest > "$(VENV)/oldest-runtime.txt"
	@$(BIN)/python -m tests.oldest $(subst $(comma), ,$(TEST_EXTRAS)) > "$(VENV)/oldest-tools.txt"
	@"$(PYTHON)" -m venv --clear "$(VENV)-oldest"
	@"$(VENV)-oldest/bin/python" -m pip install --quiet --editable '.[$(TEST_EXTRAS)]' --constraint "$(VENV)/oldest-tools.txt"
	@"$(VENV)-oldest/bin/python" -m pip install --quiet --no-deps 'tensorrt-stubs==10.13.*'
	"$(VENV)-oldest/bin/python" -m pytest -n $(WORKERS) --dist loadfile tests/unit
	@"$(PYTHON)" -m venv --clear "$(VENV)-oldest"
	@"$(VENV)-oldest/bin/python" -m pip install --quiet --editable . --constraint "$(VENV)/oldest-runtime.txt" \
		pytest pytest-timeout pytest-xdist onnx onnx-ir psutil
	"$(VENV)-oldest/bin/python" -m pytest -n $(WORKERS) --dist loadfile $(RUNTIME_TESTS)

.PHONY: test-gpu
test-gpu: $(TEST_READY) ## Run the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest tests/gpu

.PHONY: lint
lint: $(TEST_READY) ## ruff, mypy, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

.PHONY: bench-memory
bench-memory: $(TEST_READY) ## Peak GPU memory of an ms-1.7b-size model on an RTX 3060; no GPU needed, some 20 minutes
	$(BIN)/python -m benchmarks.memory

.PHONY: proto
proto: ## Generate the gRPC door's messages from service/videos.proto
	$(PYTHON) -m venv build/protoc && build/protoc/bin/pip install -q grpcio-tools==1.76.0
	build/protoc/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. reelrt/service/videos.proto

.PHONY: clean
clean: ## Remove what was built, but not the environment
	rm -rf build/lib build/bdist.* build/bundle build/bundle-* build/engines build/engines-* build/video.mp4 .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# $(1) the engine set's folder, $(2) target, $(3) backend. Both commands keep what is up to date.
define make_engines
$(BIN)/reelrt export "$(MODEL)" -o "$(BUNDLE)"; \
$(if $(CALIBRATED),$(calibrated_bundle)) \
$(BIN)/reelrt build "$(BUNDLE)$(CALIBRATED:%=-%)" -o "$(1)" --target "$(2)" --backend "$(3)" \
	$(if $(PRECISION),--precision "$(PRECISION)") $(SIZES)
endef
# A calibrated bundle and how good its videos are; `reelrt build` asks for the latter.
define calibrated_bundle
$(BIN)/reelrt calibrate "$(BUNDLE)" -o "$(BUNDLE)-$(PRECISION)" --precision "$(PRECISION)"; \
[ -f "$(BUNDLE)-$(PRECISION)/quality.json" ] || $(BIN)/reelrt evaluate quality --reference "$(BUNDLE)" \
	--candidate "$(BUNDLE)-$(PRECISION)" -o "$(BUNDLE)-$(PRECISION).quality" --prompts "$(QUALITY_PROMPTS)" --steps 25;
endef
SIZES = $(if $(SIZE),--size "$(SIZE)") $(if $(FRAMES),--frames "$(FRAMES)")

$(CREATED):
	@version=$$("$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) \
		|| { echo "make: $(PYTHON) does not run; install Python 3.10 to 3.13 or name one: make PYTHON=python3.11 ..." >&2; exit 1; }; \
	case "$$version" in 3.10|3.11|3.12|3.13) ;; *) \
		echo "make: $(PYTHON) is Python $$version; ReelRT needs 3.10 to 3.13: make PYTHON=python3.11 ..." >&2; exit 1;; esac
	@"$(PYTHON)" -m venv $(if $(JETSON),--system-site-packages) "$(VENV)" \
		|| { echo "make: $(PYTHON) cannot make an environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch "$@"

$(VENV)/.ready-%: $(CREATED) pyproject.toml
	@echo "Installing reelrt[$(subst -,$(comma),$*)] into $(VENV); the first time takes some minutes."
	@$(BIN)/python -m pip install --quiet --editable '.[$(subst -,$(comma),$*)]'
	@# The stubs ask for TensorRT itself, which a test of names does not need.
	@case "$*" in *dev*) $(BIN)/python -m pip install --quiet --no-deps 'tensorrt-stubs==10.13.*' ;; esac
	@touch "$@"

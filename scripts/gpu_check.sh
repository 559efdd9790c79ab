#!/usr/bin/env bash
# Everything that needs a GPU, in one command and less than 9 minutes: build, tests, compute-sanitizer, benchmarks.
#
#   scripts/gpu_check.sh [FOLDER]        results go to FOLDER (default: gpu-check); summary.txt says what passed
#
# For a machine with torch (CUDA), nvcc, CMake, Ninja, pybind11 and pytest; no network is used and nothing is installed.
# LAK_CARRIED=FOLDER takes libllama_adapter_kernels*.so from there instead of building.
# Every step has a time limit of its own, and a failed step does not stop the next: what there is gets written.
set -uo pipefail
cd "$(dirname "$0")/.."
results=$(mkdir -p "${1:-gpu-check}" && cd "${1:-gpu-check}" && pwd)
python=${PYTHON:-python3}
summary=$results/summary.txt
begin=$(date +%s)
deadline=$((begin + ${LAK_SECONDS:-520}))
: > "$summary"
failed=0

say() { printf '%5ds  %s\n' $(($(date +%s) - begin)) "$*" | tee -a "$summary"; }

# step NAME SECONDS COMMAND...: runs with a limit (and within the total), output in NAME.log
step() {
  local name=$1 limit=$2 left=$((deadline - $(date +%s))) status
  shift 2
  if ((left < 10)); then say "$name: not run, the time was over" && failed=1 && return 1; fi
  timeout --kill-after=5 $((limit < left ? limit : left)) "$@" > "$results/$name.log" 2>&1
  status=$?
  if ((status == 0)); then say "$name: passed"
  elif ((status == 124 || status == 137)); then say "$name: stopped after its ${limit} s (see $name.log)" && failed=1
  else say "$name: failed with status $status (see $name.log)" && failed=1 && tail -n 25 "$results/$name.log"; fi
  tail -n 1 "$results/$name.log" | cut -c 1-200 | tee -a "$summary"
  return $status
}

# ran NAME: tests that were all skipped (no device, a library that does not load) count as failed.
ran() {
  if ! grep -qE '[0-9]+ passed' "$results/$1.log"; then say "$1: NO TEST RAN" && failed=1; fi
}

# Builds the libraries into the package folder, for the architecture of this card alone.
build() {
  local include architecture
  include=$($python -c 'from torch.utils.cpp_extension import include_paths; print(include_paths()[0])') || return
  architecture=$($python -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return
  cmake -S . -B build/gpu-check -G Ninja "-DLAK_TORCH_INCLUDE=$include" -DLAK_CUDA=1 "-DLAK_CUDA_ARCHITECTURES=$architecture" &&
    cmake --build build/gpu-check && cmake --install build/gpu-check --prefix llama_adapter_kernels
}
export -f build
export python

{ nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
  nvcc --version | tail -n 2
  $python -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
  git log -1 --format='commit %H' 2> /dev/null; } > "$results/machine.txt" 2>&1
cat "$results/machine.txt"

if [[ -n ${LAK_CARRIED:-} ]]; then
  step carry 20 cp "$LAK_CARRIED"/libllama_adapter_kernels.so "$LAK_CARRIED"/libllama_adapter_kernels_cuda.so llama_adapter_kernels/
else
  step build 200 bash -c build
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
pytest="$python -m pytest -q -m gpu -p no:cacheprovider"
step info 30 $python -m llama_adapter_kernels info
step tests_cuda 150 $pytest tests/cuda "--junitxml=$results/tests_cuda.xml"
ran tests_cuda
step tests_triton 90 $pytest tests/triton "--junitxml=$results/tests_triton.xml"
ran tests_triton
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2> /dev/null | head -n 1)
if [[ -n $sanitizer ]]; then
  # Without torch's caching allocator every tensor is an allocation of its own, whose ends the tool knows.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    step $tool 75 "$sanitizer" --tool $tool --error-exitcode 9 $pytest tests/cuda/test_cuda_on_gpu.py \
      -k "bfloat16 and (s17-17 or s65-64 or (decode and 64 and none))"
    ran $tool
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
  say "memcheck, racecheck: compute-sanitizer is not on this machine" && failed=1
fi
rm -f "$results/bench.json" # of an earlier check: the command never overwrites figures
step bench 150 $python -m llama_adapter_kernels bench --device cuda --quick --minutes 2 --output "$results/bench.json"

say "$([[ $failed == 0 ]] && echo 'all passed' || echo 'NOT all passed')"
exit $failed

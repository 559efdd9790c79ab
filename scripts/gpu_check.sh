#!/usr/bin/env bash
# Everything that needs a GPU, in one command and less than ten minutes: see scripts/gpu_check.py, which takes the same options.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"

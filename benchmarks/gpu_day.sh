#!/usr/bin/env bash
# A GPU for ten minutes: everything that a device alone can tell, by one command.
#
#     OUT=build/gpu benchmarks/gpu_day.sh [--dry-run]
#
# Installs starflow-ext if $PYTHON (python3) does not have it, without a network: the wheel in dist/ that fits it, of two
# the one with CUDA kernels, or else from source for the GPU of this machine. .ci/release makes that wheel where there is
# no GPU, for an H200: STARFLOW_CUDA_ARCHITECTURES=90a-real .ci/release cuda. Then each group of gpu_day.py runs in a process of its own, for at most its time: smoke,
# correctness, soak, timing, the rate of the 7B model, profile. After a group that fails or hangs the next one runs.
# JSON lines go to $OUT/lines.jsonl as they are found, everything else to $OUT/log.txt; a table is printed last.
# --dry-run installs nothing and goes through all groups where there is no device: what needs one is collected and
# skipped.
#
# STARFLOW_CUTLASS: folder with CUTLASS's headers, for a build from source without the package nvidia-cutlass: copy
# cutlass_library/source/include of that package (27 MB) to a machine without a network.
# GPU_DAY_SECONDS: for all groups together (600). GPU_DAY_LIMIT: for each group, in place of its own time.
# Ends with 0 if every group did what it should, 1 if not, 2 where it could not begin.
set -uo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "gpu_day: $1" >&2
  exit 2
}

dry=()
case "${1:-}" in
  "") ;;
  --dry-run) dry=(--dry-run) ;;
  *) fail "the argument is \"$1\", expected --dry-run or none" ;;
esac
export OUT=${OUT:-build/gpu}
{ mkdir -p "$OUT" && : >"$OUT/lines.jsonl" && : >"$OUT/log.txt"; } 2>/dev/null ||
  fail "OUT is \"$OUT\", expected a folder that can be written"
python=${PYTHON:-python3}
[ -n "$(command -v "$python")" ] || fail "PYTHON is \"$python\", expected a Python interpreter"

if [ ${#dry[@]} -eq 0 ] && ! "$python" -c "import starflow_ext._load" >/dev/null 2>&1; then
  source=(--no-build-isolation -C cmake.define.STARFLOW_CUDA=ON .)
  if [ -n "${STARFLOW_CUTLASS:-}" ]; then
    [ -e "$STARFLOW_CUTLASS/cutlass/cutlass.h" ] ||
      fail "STARFLOW_CUTLASS is \"$STARFLOW_CUTLASS\", expected a folder with cutlass/cutlass.h"
    source+=(-C "cmake.define.STARFLOW_CUTLASS=$STARFLOW_CUTLASS")
  fi
  if [ -z "${TORCH_CUDA_ARCH_LIST:-}${STARFLOW_CUDA_ARCHITECTURES:-}" ]; then
    TORCH_CUDA_ARCH_LIST=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | tr '\n' ' ')
    export TORCH_CUDA_ARCH_LIST
  fi
  # pip chooses among the wheels: by this Python, then by the build number, which the one with CUDA kernels has.
  "$python" -m pip install --no-index --no-deps --only-binary :all: --find-links dist starflow-ext \
    >>"$OUT/log.txt" 2>&1 ||
    "$python" -m pip install --no-index --no-deps "${source[@]}" >>"$OUT/log.txt" 2>&1 ||
    fail "neither the wheel in dist/ nor a build from source could be installed; $OUT/log.txt says why"
fi

groups=$("$python" benchmarks/gpu_day.py groups) || fail "benchmarks/gpu_day.py does not run with $python"
# timeout has a process group of its own, which an interrupt at the terminal does not reach.
child=""
trap '[ -z "$child" ] || kill "$child"; exit 130' INT TERM
end=$((SECONDS + ${GPU_DAY_SECONDS:-600}))
while read -r group limit; do
  limit=${GPU_DAY_LIMIT:-$limit}
  left=$((end - SECONDS))
  if [ "$left" -le 0 ]; then
    echo "{\"group\": \"$group\", \"ended\": \"left out: the time of all groups is over\"}" >>"$OUT/lines.jsonl"
    continue
  fi
  [ "${limit%.*}" -le "$left" ] || limit=$left
  began=$SECONDS
  echo "== $group, at most $limit s" | tee -a "$OUT/log.txt"
  timeout --kill-after=5 "$limit" "$python" benchmarks/gpu_day.py run "$group" ${dry[@]+"${dry[@]}"} \
    >>"$OUT/log.txt" 2>&1 </dev/null &
  child=$!
  wait $child
  status=$?
  case $status in
    0) ended=done ;;
    90) ended="cannot begin" ;;
    124 | 137) ended="ended after $limit s, in which it was not done" ;;
    *) ended="failed with exit status $status" ;;
  esac
  echo "{\"group\": \"$group\", \"ended\": \"$ended\", \"seconds\": $((SECONDS - began))}" >>"$OUT/lines.jsonl"
  if [ "$status" -eq 90 ] && [ ${#dry[@]} -eq 0 ]; then
    "$python" benchmarks/gpu_day.py table
    exit 2
  fi
done <<<"$groups"
"$python" benchmarks/gpu_day.py table

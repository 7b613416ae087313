#!/usr/bin/env bash
# All of the benchmarks on one H200 in ten minutes, the most telling first: gpu.sh [OUT], default benchmarks/results/gpu.
#
# Leaves OUT/results.jsonl (a row is there as soon as it is measured), OUT/results.md and OUT/log. A benchmark that fails or
# outlasts its share of the time is named at the end, and the exit code is then 1.
#   GEOMETRIES="tiny tiny" BATCHES="1 1 2" REPEATS=1 DEVICE=cpu benchmarks/gpu.sh OUT     the same at tiny size, to try it
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/results/gpu}
python=${PYTHON:-python}
device=${DEVICE:-cuda}
read -r small large <<<"${GEOMETRIES:-janus-pro-1b janus-pro-7b}"
judged=32 pairs=4
[[ $device == cuda ]] || judged=2 pairs=1
read -r few some many <<<"${BATCHES:-16 64 128}"
mkdir -p "$out"
rm -f "$out/results.jsonl" "$out/log"
failed=()

bench() { # seconds, script, flags
  local limit=$1 script=$2
  shift 2
  echo "== $script $*" | tee -a "$out/log"
  timeout "$limit" "$python" "$here/$script.py" --device "$device" --repeats "${REPEATS:-5}" --json "$out/results.jsonl" "$@" >>"$out/log" 2>&1 ||
    failed+=("$script $*")
}

bench 120 sampling --geometry "$small" --batches "$few" "$many" --theirs "$few"
bench 120 sampling --geometry "$large" --batches "$few" "$many" --theirs "$few"
bench 60 training --geometry "$large" --pairs "$pairs" --methods dpo sft --no-trl
bench 40 judging --geometry "$large" --batches "$judged"
bench 30 judging --geometry "$small" --batches "$judged"
bench 60 training --geometry "$small" --pairs "$pairs" --methods dpo
bench 60 training --geometry "$large" --pairs "$pairs" --methods dpo --no-trl --compile
bench 40 training --geometry "$large" --pairs "$pairs" --methods dpo --no-trl --lora-rank 64 --gradient-checkpointing
bench 90 sampling --geometry "$small" --batches "$some" --theirs "$some"
bench 60 masked_sampling --geometry "$([[ $small == tiny ]] && echo tiny || echo show-o)" --batches 1 "$few"

"$python" "$here/bench.py" "$out/results.jsonl" >"$out/results.md"
if ((${#failed[@]})); then
  printf 'failed or out of time: %s\n' "${failed[@]}"
  exit 1
fi
echo "$out/results.md"

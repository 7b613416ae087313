#!/usr/bin/env bash
# One round of the real commands, as small as can be, on random weights in a real geometry: time, memory and disk of each step
# beside what docs/real-models.md says of it. Janus-Pro-1B fits into 24 GB; meant to take 25 minutes on 2 cores, or two on a GPU.
#
#   benchmarks/real_size.sh [OUT]     default benchmarks/results/real-size; leaves OUT/steps.jsonl and OUT/log
#   GEOMETRY=janus-pro-7b DEVICE=cuda benchmarks/real_size.sh     also middle (0.2 billion weights) and tiny, which tests run
#
# The other benchmarks time functions in one process; what a whole command holds, reads and leaves only this one says.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/real-size}
python=${PYTHON:-python}
device=${DEVICE:-cpu}
train=(--lora-rank 16 --gradient-checkpointing --batch-size 1 --max-steps 2 --device "$device")

step() { # name, command
  "$python" benchmarks/real_size.py step "$out" "$@"
}

[[ ! -d $out || -e $out/steps.jsonl || -z $(ls -A "$out") ]] || { echo "$out: holds what this script did not make; give another OUT" >&2; exit 2; }
mkdir -p "$out"
rm -rf "$out"/{steps.jsonl,log,base,sft,dpo,data,scored.*}
printf 'a red circle\na blue square and a green ring\n' >"$out/color_val.txt"
step build "$python" benchmarks/real_size.py build "$out/base" "${GEOMETRY:-janus-pro-1b}"
step score "$python" score.py --model "$out/base" --prompts "$out/color_val.txt" --candidates 2 --out "$out/scored.jsonl" --device "$device"
step pairs "$python" make_pairs.py --scored "$out/scored.jsonl" --out "$out/data" --force \
  --threshold "$("$python" benchmarks/real_size.py threshold "$out/scored.jsonl")"
step sft "$python" sft.py --data "$out/data/sft.jsonl" --out "$out/sft" "${train[@]}"
step dpo "$python" dpo.py --pairs "$out/data/pairs.jsonl" --out "$out/dpo" "${train[@]}"
"$python" benchmarks/real_size.py table "$out"

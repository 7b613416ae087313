#!/usr/bin/env bash
# A noisy judge: 0 to 40 % of its verdicts turned round before data are selected.
source "$(dirname "$0")/common.sh"
one_seed() {
  local share
  draw_base "$1"
  train sft "$1" sft "$base/data"
  train dpo "$1" dpo "$base/data"
  for share in 0.2 0.4 0.1 0.3; do
    run "$base/noise$share/scored.jsonl" experiments/vary.py noise $share "$base/scored8.jsonl" --out "$base/noise$share/scored.jsonl" --seed "$1"
    select_data "$base/noise$share" "$base/noise$share/scored.jsonl" --force
    train sft-noise$share "$1" sft "$base/noise$share"
    train dpo-noise$share "$1" dpo "$base/noise$share"
  done
}
each_seed one_seed
tables noise

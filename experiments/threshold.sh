#!/usr/bin/env bash
# From which P(yes) a picture counts as accepted: one round of SFT and of DPO at 0.3 to 0.9.
source "$(dirname "$0")/common.sh"
one_seed() {
  local threshold
  draw_base "$1"
  for threshold in 0.3 0.7 0.9; do
    select_data "$base/data-$threshold" "$base/scored8.jsonl" --threshold $threshold
    train sft-t$threshold "$1" sft "$base/data-$threshold"
    train dpo-t$threshold "$1" dpo "$base/data-$threshold"
  done
  train sft "$1" sft "$base/data"
  train dpo "$1" dpo "$base/data"
}
each_seed one_seed
tables threshold

#!/usr/bin/env bash
# How many candidates a prompt: one round of SFT and of DPO on the first 2, 4, 8 and 16 of each.
source "$(dirname "$0")/common.sh"
one_seed() {
  local n
  draw_base "$1"
  for n in 2 4 16; do
    run "$base/scored$n.jsonl" experiments/vary.py candidates $n "$base/scored.jsonl" --out "$base/scored$n.jsonl"
    select_data "$base/data$n" "$base/scored$n.jsonl"
    train sft-n$n "$1" sft "$base/data$n"
    train dpo-n$n "$1" dpo "$base/data$n"
  done
  train sft "$1" sft "$base/data"
  train dpo "$1" dpo "$base/data"
}
each_seed one_seed
tables candidates

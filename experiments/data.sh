#!/usr/bin/env bash
# How often the data are right on which the other experiments train, counted by the oracle: nothing is trained.
source "$(dirname "$0")/common.sh"
count() { "$PYTHON" experiments/measure.py --data --base "$base" --dir "$base/$1" --name "data${2-}" --family "$FAMILY" --seed "$seed"; }
one_seed() {
  local seed=$1 n threshold share kind
  draw_base "$1"
  run "$base/scored-labels.jsonl" shapes/world.py label "$base/scored.jsonl" --out "$base/scored-labels.jsonl"
  count data
  for n in 2 4 6 16; do
    run "$base/scored$n.jsonl" experiments/vary.py candidates $n "$base/scored.jsonl" --out "$base/scored$n.jsonl"
    select_data "$base/data$n" "$base/scored$n.jsonl"
    count data$n -n$n
  done
  for threshold in 0.3 0.7 0.9; do
    select_data "$base/data-$threshold" "$base/scored8.jsonl" --threshold $threshold
    count data-$threshold -t$threshold
  done
  for share in 0.1 0.2 0.3 0.4; do
    run "$base/noise$share/scored.jsonl" experiments/vary.py noise $share "$base/scored8.jsonl" --out "$base/noise$share/scored.jsonl" --seed "$1"
    select_data "$base/noise$share" "$base/noise$share/scored.jsonl" --force
    count noise$share -noise$share
  done
  for share in 0.2 0.5 1; do
    invert $share "$1"
    count invert$share -invert$share
  done
  for kind in rejected lot; do
    pick $kind "$1"
    count $kind -$kind
  done
}
each_seed one_seed

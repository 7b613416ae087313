#!/usr/bin/env bash
# Do drawing and looking share their learning dynamics? One small step of SFT and one of DPO, and what it does to log p and to
# P(yes) of the trained pictures, of others of their prompts, and of other prompts.
source "$(dirname "$0")/common.sh"
one_seed() {
  local method file input dir
  draw_base "$1"
  for method in sft dpo; do
    file=sft input=--data dir=$OUT/$FAMILY/seed$1/dynamics-$method
    [[ $method == sft ]] || file=pairs input=--pairs
    run "$dir/dynamics.json" analysis/dynamics.py $input "$base/data/$file.jsonl" --probes "$base/scored8.jsonl" --out "$dir/dynamics.jsonl" \
      --lr 1e-5 --seed "$1"
    "$PYTHON" experiments/kernel.py --dir "$dir" --name "dynamics-$method" --family "$FAMILY" --seed "$1"
  done
}
each_seed one_seed
tables dynamics

#!/usr/bin/env bash
# Do drawing and looking share their learning dynamics? One small step of SFT and one of DPO, and what it does to log p and to
# P(yes) of the trained pictures, of others of their prompts, and of other prompts. Then plain gradient descent at several rates:
# whether the first-order formula of the paper's Proposition 1 holds. PROBES of each kind; each takes seconds.
source "$(dirname "$0")/common.sh"
PROBES=${PROBES:-64}
one_seed() {
  local method file input dir lr
  draw_base "$1"
  for method in sft dpo; do
    file=sft input=--data dir=$OUT/$FAMILY/seed$1/dynamics-$method
    [[ $method == sft ]] || file=pairs input=--pairs
    run "$dir/dynamics.json" analysis/dynamics.py $input "$base/data/$file.jsonl" --probes "$base/scored8.jsonl" --out "$dir/dynamics.jsonl" \
      --lr 1e-5 --n-probes "$PROBES" --seed "$1"
    "$PYTHON" experiments/kernel.py --dir "$dir" --name "dynamics-$method" --bayes-name "bayes-$method" \
      --family "$FAMILY" --seed "$1"
  done
  for lr in 1 0.1 0.01; do
    dir=$OUT/$FAMILY/seed$1/descent-$lr
    run "$dir/dynamics.json" analysis/dynamics.py --data "$base/data/sft.jsonl" --probes "$base/scored8.jsonl" --out "$dir/dynamics.jsonl" \
      --optimizer sgd --lr $lr --n-probes 8 --seed "$1"
    "$PYTHON" experiments/kernel.py --dir "$dir" --bayes-name "descent$lr" --family "$FAMILY" --seed "$1"
  done
}
each_seed one_seed
for table in dynamics bayes kernel descent; do tables $table; done

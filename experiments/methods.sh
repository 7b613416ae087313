#!/usr/bin/env bash
# SFT and DPO, with and without the curriculum's replay of the discard pool: three rounds each of self_improve.sh, next to the
# base and to one round on inverted pairs. The same number of training steps in all. About 25 minutes on 2 cores.
source "$(dirname "$0")/common.sh"
guided=1
one_seed() {
  local method replay loop round flags
  draw_base "$1"
  for method in sft dpo; do
    for replay in replay no-replay; do
      loop=$OUT/$FAMILY/seed$1/$method-$replay flags=''
      [[ $replay == replay ]] || flags=--no-replay
      improve "$loop" "$1" $method "$flags" $([[ $method == sft ]] && echo $sft_lr || echo $dpo_lr)
      for round in 1 2 3; do measure "$loop/round$round" "$method-$replay-$round" "$1"; done
    done
  done
  run "$base/invert1/pairs.jsonl" experiments/vary.py invert 1 "$base/data/pairs.jsonl" --out "$base/invert1/pairs.jsonl" --seed "$1"
  train dpo-invert1 "$1" dpo "$base/invert1"
}
each_seed one_seed
tables methods

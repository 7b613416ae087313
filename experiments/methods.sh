#!/usr/bin/env bash
# SFT and DPO, with and without the curriculum's replay of the discard pool: three rounds each of self_improve.sh, next to the
# base and to one round on inverted pairs. The same number of training steps in all.
source "$(dirname "$0")/common.sh"
guided=1
one_seed() {
  local dir=$OUT/$FAMILY/seed$1 method lr loop replay round
  draw_base "$1"
  for method in sft dpo; do
    lr=$sft_lr; [[ $method == sft ]] || lr=$dpo_lr
    train $method "$1" $method "$base/data"
    for replay in --no-replay ''; do
      loop=$dir/$method${replay:--replay}
      improve "$loop" "$1" $method "$replay" "$lr" "$dir/$method"
      for round in 1 2 3; do measure "$loop/round$round" "${loop##*/}-$round" "$1" --trained-on "$loop/round$round/$(data_of $method)"; done
    done
  done
  invert 1 "$1"
  train dpo-invert1 "$1" dpo "$base/invert1"
}
each_seed one_seed
tables methods

#!/usr/bin/env bash
# When does looking move, if only drawing is trained? Steps, rate, layers, embeddings and head: one round each, and the judge on
# the base's pictures, near its decision too.
source "$(dirname "$0")/common.sh"
one_seed() {
  local method lr
  draw_base "$1"
  for method in sft dpo; do
    lr=$sft_lr; [[ $method == sft ]] || lr=$dpo_lr
    train $method "$1" $method "$base/data"
    train $method-steps4 "$1" $method "$base/data" --max-steps $((4 * STEPS))
    train $method-lr3 "$1" $method "$base/data" --lr "$(times 3 $lr)"
    train $method-lr10 "$1" $method "$base/data" --lr "$(times 10 $lr)"
    train $method-first "$1" $method "$base/data" --layers 0-1
    train $method-last "$1" $method "$base/data" --layers 2-3
    train $method-drawing "$1" $method "$base/data" --train drawing
  done
}
each_seed one_seed
tables understanding

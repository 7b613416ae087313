#!/usr/bin/env bash
# What is trained: the language model only (the paper's best), or the parts that draw as well.
source "$(dirname "$0")/common.sh"
guided=1
one_seed() {
  local method
  draw_base "$1"
  for method in sft dpo; do
    train $method "$1" $method "$base/data"
    train $method-drawing "$1" $method "$base/data" --train drawing
  done
}
each_seed one_seed
tables scope

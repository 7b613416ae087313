#!/usr/bin/env bash
# Whether a prompt gains by its own data or by all of them: trained on half of the prompts, by lot, both halves are drawn again;
# and after DPO on pairs of which half, by lot, are turned round, those of both kinds.
source "$(dirname "$0")/common.sh"
drawn() {  # drawn NAME SEED DATA: the training prompts by the model of NAME, with the base's noise
  local dir=$OUT/$FAMILY/seed$2/$1
  run "$dir/drawn.jsonl" score.py --model "$dir/model" --prompts "$base/prompts.jsonl" --out "$dir/drawn.jsonl" --candidates 8 \
    --guidance 1 --seed $((1 + $2)) --batch 256 --chunk 32
  run "$dir/drawn-labels.jsonl" shapes/world.py label "$dir/drawn.jsonl" --out "$dir/drawn-labels.jsonl"
  "$PYTHON" experiments/measure.py --base "$base" --dir "$dir" --name "$1" --family "$FAMILY" --seed "$2" --prompts --trained-on "$3"
}
one_seed() {
  local method
  draw_base "$1"
  run "$base/scored8-labels.jsonl" shapes/world.py label "$base/scored8.jsonl" --out "$base/scored8-labels.jsonl"
  run "$base/half/scored.jsonl" experiments/vary.py prompts 0.5 "$base/scored8.jsonl" --out "$base/half/scored.jsonl" --seed "$1"
  select_data "$base/half" "$base/half/scored.jsonl"
  for method in sft dpo; do
    train $method-half "$1" $method "$base/half"
    drawn $method-half "$1" "$base/half/$(data_of $method)"
  done
  invert 0.5 "$1"
  train dpo-invert0.5 "$1" dpo "$base/invert0.5"
  drawn dpo-invert0.5 "$1" "$base/invert0.5/pairs.jsonl"
}
each_seed one_seed
tables prompts

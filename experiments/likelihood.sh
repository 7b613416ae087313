#!/usr/bin/env bash
# The model as a judge that draws: is a picture likelier given its prompt than given the foil? Of the base and of models trained
# on good and on bad data. And whether log p fell of the false positives that training corrected.
source "$(dirname "$0")/common.sh"
draws_again() {  # draws_again NAME SEED: the pictures of base and of model NAME, with likelihoods under the model, and its row
  local from=$OUT/$FAMILY/seed$2/$1 dir=$OUT/$FAMILY/seed$2/likelihood-$1 by=$model
  [[ $1 == base ]] || by=$from/model
  run "$dir/heldout.jsonl" score.py --model "$by" --rejudge "$from/heldout.jsonl" --out "$dir/heldout.jsonl" --readouts likelihood --batch 256
  copy "$from/labels.jsonl" "$dir/labels.jsonl"
  [[ $1 == base ]] || run "$dir/rejudged.jsonl" score.py --model "$by" --rejudge "$base/heldout.jsonl" --out "$dir/rejudged.jsonl" \
    --readouts likelihood --batch 256
  "$PYTHON" experiments/measure.py --base "$OUT/$FAMILY/seed$2/likelihood-base" --dir "$dir" --name "likelihood-$1" --family "$FAMILY" \
    --seed "$2" --likelihood
}
one_seed() {
  local name
  draw_base "$1"
  for name in sft dpo; do train $name "$1" $name "$base/data"; done
  pick rejected "$1"
  train sft-rejected "$1" sft "$base/rejected"
  invert 1 "$1"
  train dpo-invert1 "$1" dpo "$base/invert1"
  for name in base sft dpo sft-rejected dpo-invert1; do draws_again $name "$1"; done
}
each_seed one_seed
for table in likelihood corrected; do tables $table; done

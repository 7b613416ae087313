#!/usr/bin/env bash
# Does looking become better or worse as drawing is trained, by how good the verdicts are: the judge's own, the oracle's in their
# place, and all turned the wrong way. One round and three; made for other bases: BASE=runs/bases/janus/early500 and the like.
source "$(dirname "$0")/common.sh"
true_data() {  # true_data DIR SEED SCORED: as select_data, of the oracle's verdicts
  run "$1/labels.jsonl" shapes/world.py label "$3" --out "$1/labels.jsonl"
  run "$1/scored.jsonl" experiments/vary.py truth 0 "$3" --labels "$1/labels.jsonl" --out "$1/scored.jsonl" --seed "$2"
  select_data "$1" "$1/scored.jsonl"
}
one_seed() {
  local dir=$OUT/$FAMILY/seed$1 method lr before loop round
  draw_base "$1"
  true_data "$base/truth" "$1" "$base/scored8.jsonl"
  invert 1 "$1"
  pick rejected "$1"
  train dpo-invert1 "$1" dpo "$base/invert1"
  train sft-rejected "$1" sft "$base/rejected"
  for method in sft dpo; do
    lr=$sft_lr; [[ $method == sft ]] || lr=$dpo_lr
    train $method "$1" $method "$base/data"
    train $method-truth "$1" $method "$base/truth"
    loop=$dir/$method--no-replay
    improve "$loop" "$1" $method --no-replay "$lr" "$dir/$method"
    for round in 1 2 3; do measure "$loop/round$round" "$method--no-replay-$round" "$1"; done
    before=$dir/$method-truth
    for round in 2 3; do
      loop=$dir/$method-truth-$round
      run "$loop/scored.jsonl" score.py --model "$before/model" --prompts "$base/prompts.jsonl" --out "$loop/scored.jsonl" \
        --candidates 8 --guidance 1 --seed $((round + $1)) --batch 256 --chunk 32
      true_data "$loop/data" "$1" "$loop/scored.jsonl"
      train $method-truth-$round "$1" $method "$loop/data"
      before=$loop
    done
  done
}
each_seed one_seed
tables judges

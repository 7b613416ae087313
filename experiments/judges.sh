#!/usr/bin/env bash
# Does looking become better or worse as drawing is trained, by how good the verdicts are: the judge's own, the oracle's in their
# place, and wrong ones (of SFT rejected pictures, of DPO inverted pairs). One round and three; made for other bases:
# BASE=runs/bases/janus/early500 and the like.
source "$(dirname "$0")/common.sh"
true_data() {  # true_data DIR SEED SCORED: as select_data, of the oracle's verdicts
  run "$1/labels.jsonl" shapes/world.py label "$3" --out "$1/labels.jsonl"
  run "$1/scored.jsonl" experiments/vary.py truth 0 "$3" --labels "$1/labels.jsonl" --out "$1/scored.jsonl" --seed "$2"
  select_data "$1" "$1/scored.jsonl"
}
worst_data() {  # worst_data DIR SEED SCORED METHOD: what teaches the opposite
  if [[ $4 == sft ]]; then
    run "$1/sft.jsonl" experiments/vary.py rejected 4 "$3" --out "$1/sft.jsonl" --seed "$2"
  else
    select_data "$1/own" "$3" --force  # a model that draws badly has much to reject
    run "$1/pairs.jsonl" experiments/vary.py invert 1 "$1/own/pairs.jsonl" --out "$1/pairs.jsonl" --seed "$2"
  fi
}
further() {  # further NAME SEED METHOD DATA: second and third rounds, each by DATA of what the model before drew
  local before=$OUT/$FAMILY/seed$2/$1 loop round
  for round in 2 3; do
    loop=$OUT/$FAMILY/seed$2/$1-$round
    run "$loop/scored.jsonl" score.py --model "$before/model" --prompts "$base/prompts.jsonl" --out "$loop/scored.jsonl" \
      --candidates 8 --guidance 1 --seed $((round + $2)) --batch 256 --chunk 32
    $4 "$loop/data" "$2" "$loop/scored.jsonl" $3
    train "$1-$round" "$2" $3 "$loop/data"
    before=$loop
  done
}
one_seed() {
  local dir=$OUT/$FAMILY/seed$1 method lr loop round
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
    for round in 1 2 3; do
      measure "$loop/round$round" "$method--no-replay-$round" "$1" --trained-on "$loop/round$round/$(data_of $method)"
      second "$loop/round$round" "$method--no-replay-$round" "$1"
    done
    further $method-truth "$1" $method true_data
  done
  further sft-rejected "$1" sft worst_data
  further dpo-invert1 "$1" dpo worst_data
  second "$base" base "$1"
  for method in sft dpo; do second "$dir/$method" $method "$1"; done
  foretell forecast "$base/scored8.jsonl" "$1"
  foretell forecast-truth "$base/truth/scored.jsonl" "$1"
}
each_seed one_seed
tables judges

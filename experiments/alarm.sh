#!/usr/bin/env bash
# Bad data and bad settings next to good ones, what make_pairs.py and gate.py say of each, and forecast.py of the good ones.
source "$(dirname "$0")/common.sh"
one_seed() {
  local dir=$OUT/$FAMILY/seed$1 share method kind loop round name
  draw_base "$1"
  for method in sft dpo; do train $method "$1" $method "$base/data"; done
  for share in 0.2 0.5 1; do
    invert $share "$1"
    train dpo-invert$share "$1" dpo "$base/invert$share"
  done
  for kind in rejected lot; do
    pick $kind "$1"
    train sft-$kind "$1" sft "$base/$kind"
  done
  train sft-lot-short "$1" sft "$base/lot" --max-steps $((STEPS / 4))  # whether this foretells what training itself costs
  train sft-lr3 "$1" sft "$base/data" --lr "$(times 3 $sft_lr)"
  train sft-lr10 "$1" sft "$base/data" --lr "$(times 10 $sft_lr)"
  loop=$dir/dpo-lr5
  improve "$loop" "$1" dpo --no-replay "$(times 5 $dpo_lr)"
  for round in 1 2 3; do measure "$loop/round$round" dpo-lr5-$round "$1" --trained-on "$loop/round$round/pairs.jsonl"; done

  if [[ ! -e $dir/sft-yes/row.json ]]; then
    run "$base/yes/scored.jsonl" experiments/vary.py yes 0 "$base/scored8.jsonl" --out "$base/yes/scored.jsonl"
    if "$PYTHON" make_pairs.py --scored "$base/yes/scored.jsonl" --out "$base/yes" --per-prompt 4 > "$base/yes/log" 2>&1; then
      train sft-yes "$1" sft "$base/yes"
    elif (( $? == 3 )); then  # refused before training
      mkdir -p "$dir/sft-yes"
      echo "{\"name\": \"sft-yes\", \"family\": \"$FAMILY\", \"seed\": $1, \"refused\": 1}" > "$dir/sft-yes/row.json"
    else
      tail -n 3 "$base/yes/log" >&2; return 1
    fi
  fi
  second "$base" base "$1"
  for name in {sft,dpo}{,-invert{0.2,0.5,1},-rejected,-lot,-lr3,-lr10,-yes}; do
    [[ ! -e $dir/$name/heldout.jsonl ]] || second "$dir/$name" "$name" "$1"
  done
  for round in 1 2 3; do second "$loop/round$round" dpo-lr5-$round "$1"; done
  foretell forecast "$base/scored8.jsonl" "$1"
}
each_seed one_seed
tables alarm

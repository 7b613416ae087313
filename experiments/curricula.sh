#!/usr/bin/env bash
# Which curriculum: the paper's (only the discard pool is drawn again, what is accepted joins the data), our rounds with and without
# the pool, and none at all: every picture drawn at the start, trained on in one go or in three. The same number of steps, and as
# many pictures as whole numbers of candidates allow: 2 a prompt in the first round, so that many prompts are discarded;
# then as many pictures a round, however few prompts there are. methods.sh draws 8 of each prompt, which leaves hardly any pool.
source "$(dirname "$0")/common.sh"
draw_round() {  # draw_round LOOP SEED ROUND CURRICULUM: the prompts and the candidates of a later round, which the loop then finds
  local dir=$1/round$3 scored=() flags=() count round
  for (( round = 1; round < $3; round++ )); do scored+=("$1/round$round/scored.jsonl"); done
  [[ $4 != none ]] || flags=(--no-replay)
  [[ $4 != paper ]] || flags=(--only-discarded)
  run "$dir/prompts.jsonl" curriculum.py --prompts $prompts --exclude $heldout --scored "${scored[@]}" --seed "$2" \
    --out "$dir/prompts.jsonl" ${flags[@]+"${flags[@]}"}
  [[ -e $dir/prompts.jsonl ]] || { rm -r "$dir"; return 0; }  # the pool is empty, as the loop will find
  count=$(wc -l < "$dir/prompts.jsonl")
  run "$dir/scored.jsonl" score.py --model "$1/round$(($3 - 1))/model" --prompts "$dir/prompts.jsonl" --out "$dir/scored.jsonl" \
    --candidates $(( (pictures + count / 2) / count )) --guidance 1 --seed $(($2 + $3)) --batch 256 --chunk 32
}
one_seed() {
  local dir=$OUT/$FAMILY/seed$1 method lr loop curriculum round pictures n reference
  draw_base "$1"
  pictures=$((2 * $(wc -l < "$base/prompts.jsonl")))
  for n in 2 6; do
    run "$base/scored$n.jsonl" experiments/vary.py candidates $n "$base/scored.jsonl" --out "$base/scored$n.jsonl"
    select_data "$base/data$n" "$base/scored$n.jsonl"
  done
  for method in sft dpo; do
    lr=$sft_lr reference=()
    [[ $method == sft ]] || lr=$dpo_lr reference=(--reference $model)
    train $method-n2 "$1" $method "$base/data2"
    for curriculum in paper rounds none; do
      loop=$dir/$method-$curriculum
      for round in 1 2 3; do
        (( round == 1 )) || draw_round "$loop" "$1" $round $curriculum
        candidates=2 rounds=$round curriculum=$curriculum improve "$loop" "$1" $method '' "$lr" "$dir/$method-n2"
        [[ ! -e $loop/round$round/model ]] || measure "$loop/round$round" "$method-$curriculum-$round" "$1" --trained-on "$loop/round$round/$(data_of $method)"
      done
    done
    train $method-once "$1" $method "$base/data6" --max-steps $((3 * STEPS))
    train $method-once-1 "$1" $method "$base/data6"
    for round in 2 3; do
      train $method-once-$round "$1" $method "$base/data6" --model "$dir/$method-once-$((round - 1))/model" --other-model \
        ${reference[@]+"${reference[@]}"}
    done
  done
}
each_seed one_seed
tables curricula

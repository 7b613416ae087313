#!/usr/bin/env bash
# The forms of a judge's answer, on the base model's held-out pictures: P(yes) of the short question, replies to it, and the
# paper's judge, replies to its question. `score` is refused: these models have no tokens for 0 and 1.
source "$(dirname "$0")/common.sh"
one_seed() {
  local dir=$OUT/$FAMILY/seed$1/answers flags="--batch 256 --reply-tokens ${REPLY_TOKENS:-24}"
  draw_heldout "$dir" $model "$1"
  run "$dir/reply-short.jsonl" score.py --model $model --rejudge "$dir/heldout.jsonl" --out "$dir/reply-short.jsonl" --answer reply \
    --question "Does this image describe {prompt}?" $flags
  run "$dir/reply-published.jsonl" score.py --model $model --rejudge "$dir/heldout.jsonl" --out "$dir/reply-published.jsonl" \
    --answer reply $flags
  run "$dir/score.jsonl" score.py --model $model --rejudge "$dir/heldout.jsonl" --out "$dir/score.jsonl" --answer score \
    || (( $? == 2 ))
  "$PYTHON" experiments/answers.py --dir "$dir" --family "$FAMILY" --seed "$1"
}
each_seed one_seed
tables answers

#!/usr/bin/env bash
# The paper's table in one command: base, SFT, C-SFT, DPO and C-DPO as arXiv 2507.16663 describes them, theirs and ours side by side.
#
#   JUDGE=Qwen/Qwen2.5-VL-7B-Instruct ./experiments/paper.sh    where T2I-CompBench's twelve prompt files lie, or with PROMPTS
#   python experiments/paper.py runs/paper                      the table again, such as with an evaluator's numbers
#
# Four runs of self_improve.sh that share the base's pictures. Killed, it goes on when typed again; SIGTERM and Ctrl-C let the
# running step save what it has. Exit codes are those of the loop. OUT holds
#   sft/ c-sft/ dpo/ c-dpo/   the loops; c-* are Algorithm 2, whose one replay comes after half of the epochs
#   base/                     what JUDGE or LABELLER say of the base's pictures
#   METHOD/gen.csv            yours, for the column Gen: an evaluator's numbers, as category,score (base/gen.csv of the base)
#   table.md                  the table
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

MODEL=${MODEL:-deepseek-community/Janus-Pro-7B}
OUT=${OUT:-runs/paper}
NPROC=${NPROC:-1}                  # processes (GPUs)
JUDGE=${JUDGE-}                    # an image-text-to-text model, for Und: whose judge is right where base and trained differ
LABELLER=${LABELLER-}              # instead: a command `LABELLER heldout.jsonl --out labels.jsonl`
DEVICE=${DEVICE-}
T2I="color shape texture spatial non_spatial complex"
PROMPTS=${PROMPTS:-$(printf '%s_train.txt ' $T2I)}
EVAL_PROMPTS=${EVAL_PROMPTS:-$(printf '%s_val.txt ' $T2I)}
CANDIDATES=${CANDIDATES:-10}       # from here to ANSWER: as in the paper
GUIDANCE=${GUIDANCE:-5}
TEMPERATURE=${TEMPERATURE:-1}
SFT_EPOCHS=${SFT_EPOCHS:-20}
DPO_EPOCHS=${DPO_EPOCHS:-30}
ANSWER=${ANSWER:-reply}
QUESTION=${QUESTION-}              # empty: the published one
SFT_FLAGS=${SFT_FLAGS-}            # further flags, such as --lora-rank 64; the paper is silent on rate, batch and beta
DPO_FLAGS=${DPO_FLAGS-}
SCORE_FLAGS=${SCORE_FLAGS-}
SEED=${SEED:-0}
PYTHON=${PYTHON:-python}

for name in SFT_EPOCHS DPO_EPOCHS; do
  [[ ${!name} =~ ^[1-9][0-9]{0,5}$ && $(( ${!name} % 2 )) == 0 ]] || { echo "$name is an even number of at least 2, found ${!name}" >&2; exit 2; }
done
[[ -z $JUDGE || -z $LABELLER ]] || { echo "JUDGE is $JUDGE and LABELLER is $LABELLER: one of them" >&2; exit 2; }
paths() {  # paths TEXT: one a line, where TEXT is a path, several lines (for paths with spaces), or several words
  if [[ -e $1 || $1 == *$'\n'* ]]; then printf '%s\n' "$1"; else tr -s ' ' '\n' <<< "$1"; fi
}
prompts=() eval_prompts=()
while read -r path; do [[ -z $path ]] || prompts+=("$path"); done < <(paths "$PROMPTS")
while read -r path; do [[ -z $path ]] || eval_prompts+=("$path"); done < <(paths "$EVAL_PROMPTS")
"$PYTHON" "$here/experiments/paper.py" "$OUT" --plan --model "$MODEL" --processes "$NPROC" --candidates "$CANDIDATES" \
  --epochs "$SFT_EPOCHS" "$DPO_EPOCHS" --prompts "${prompts[@]}" --eval-prompts "${eval_prompts[@]}"

child='' stopped=''
trap 'stopped=143; [[ -z $child ]] || kill -TERM "$child"' TERM
trap 'stopped=130; [[ -z $child ]] || kill -TERM "$child"' INT
wait_for() {  # wait_for COMMAND...: as in self_improve.sh, so that the running step is told to stop, and waited for
  local code
  [[ -z $stopped ]] || exit "$stopped"
  "$@" & child=$!
  [[ -z $stopped ]] || kill -TERM "$child"
  while code=0; wait "$child" || code=$?; kill -0 "$child" 2> /dev/null; do :; done
  child=''
  [[ -z $stopped ]] || exit "$stopped"
  (( code == 0 )) || exit "$code"
}
improve() {  # improve NAME METHOD CURRICULUM ROUNDS EPOCHS: a loop; EPOCHS are a round's
  local flags="--epochs $5"
  wait_for env MODEL="$MODEL" OUT="$OUT/$1" METHOD="$2" CURRICULUM="$3" ROUNDS="$4" PROMPTS="$PROMPTS" NPROC="$NPROC" \
    EVAL_PROMPTS="$EVAL_PROMPTS" CANDIDATES="$CANDIDATES" EVAL_CANDIDATES=1 GUIDANCE="$GUIDANCE" TEMPERATURE="$TEMPERATURE" \
    ANSWER="$ANSWER" QUESTION="$QUESTION" SEED="$SEED" DEVICE="$DEVICE" SFT_FLAGS="$flags $SFT_FLAGS" DPO_FLAGS="$flags $DPO_FLAGS" \
    SCORE_FLAGS="$SCORE_FLAGS" PAIRS_FLAGS="--per-prompt 0 --force" GATE=warn GATE_FLAGS= LABELLER= LAUNCH= CURRICULUM_FLAGS= \
    PYTHON="$PYTHON" "$here/self_improve.sh"  # --force, GATE=warn: the paper has no gates; what they find is printed
}
share() {  # share NAME FILE...: files of sft/ in a loop, as hard links or, where the disk has none, as copies that appear whole
  local name=$1 file to; shift
  for file in "$@"; do
    to=$OUT/$name/$file
    mkdir -p "${to%/*}"
    [[ -e $to ]] || ln "$OUT/sft/$file" "$to" 2> /dev/null || { cp "$OUT/sft/$file" "$to.tmp" && mv "$to.tmp" "$to"; }
  done
}

improve sft sft none 0 "$SFT_EPOCHS"  # the base's pictures alone
mkdir -p "$OUT/base"
labels=''
run=("$PYTHON")
(( NPROC == 1 )) || run=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC")
if [[ -n $JUDGE ]]; then             # now, so that a bad judge is known before the long work
  labels=$OUT/base/judged-by-${JUDGE//[^A-Za-z0-9.-]/_}.jsonl
  [[ -e $labels ]] || wait_for "${run[@]}" "$here/score.py" --rejudge "$OUT/sft/round0/heldout.jsonl" --judge "$JUDGE" \
    --answer "$ANSWER" ${QUESTION:+--question "$QUESTION"} ${DEVICE:+--device "$DEVICE"} --out "$labels"
elif [[ -n $LABELLER ]]; then
  labels=$OUT/base/labels.jsonl
  [[ -e $labels ]] || wait_for $LABELLER "$OUT/sft/round0/heldout.jsonl" --out "$labels"
fi
"$PYTHON" "$here/experiments/paper.py" "$OUT" --base ${labels:+--labels "$labels"}  # refuses a judge that does not answer
improve sft sft none 1 "$SFT_EPOCHS"
for name in c-sft dpo c-dpo; do      # .safetensors first: a step is skipped where its .jsonl is there
  share $name round0/heldout.{safetensors,jsonl} round1/prompts.jsonl round1/scored.{safetensors,jsonl}
done
improve c-sft sft paper 2 $((SFT_EPOCHS / 2))
improve dpo dpo none 1 "$DPO_EPOCHS"
improve c-dpo dpo paper 2 $((DPO_EPOCHS / 2))
"$PYTHON" "$here/experiments/paper.py" "$OUT" ${labels:+--labels "$labels"}

#!/usr/bin/env bash
# The rounds of self-improvement. Every line that starts with `step` runs a command that can be typed by hand.
#
#   ./self_improve.sh                                      the demo: a tiny Janus in the shapes world
#   FAMILY=showo ./self_improve.sh                         the same with a tiny Show-o
#   MODEL=deepseek-community/Janus-Pro-7B PROMPTS="color_train.txt shape_train.txt" EVAL_PROMPTS=color_val.txt \
#   OUT=runs/janus7b ./self_improve.sh                     a real model (all settings: the variables below)
#
# A step whose output is there is skipped, and every output appears whole or not at all: after a crash, type it again.
# SIGTERM and Ctrl-C let the running step save what it has (training finishes its step) and end the loop.
# Exit codes: 0 done, 1 a fault, 2 bad input, 3 a gate said no (see what make_pairs.py or gate.py printed), 4 with GATE=strict
# nothing shows whether a round was good, 130 and 143 stopped. Of steps on several processes torchrun reports every failure as
# 1; their own message says what it was.
#
# OUT holds (.jsonl with pictures have a .safetensors beside them; their columns: docs/files-and-numbers.md)
#   loop.lock             held by the loop that is at work here
#   settings.txt          the variables below, as this run has them; another run is refused here
#   round0/               the model to improve
#     heldout.jsonl         its pictures of the evaluation prompts, judged, with the gate's read-outs
#     labels.jsonl          what LABELLER says of them
#   roundN/
#     prompts.jsonl         this round's training prompts
#     scored.jsonl          candidates of each, by the model of the round before, judged
#     sft.jsonl pairs.jsonl discard.jsonl    the training data, and the prompts without an accepted picture
#     model/                the trained model (model-sft/ before it with METHOD=sft+dpo), training/ in it: log, settings
#     heldout.jsonl labels.jsonl    as in round0, of the trained model
#     rejudged.jsonl        round0's pictures as the trained model judges them
#     gate.json             whether the round was good
#   of round0, and of rounds that were undecided
#     heldout-2.jsonl rejudged-2.jsonl    further pictures, as many as heldout has; -3: as many as both, and so on
#   best                  link to the last model that the gate called good
#   summary.jsonl         a row a round
#   report.html           all of it on one page
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

FAMILY=${FAMILY:-janus}                          # of the demo's tiny model: janus | showo | tar
case $FAMILY in
  janus) tiny=$here/shapes/base demo=runs/demo ;;
  showo) tiny=$here/shapes/showo demo=runs/demo-showo ;;
  tar) tiny=$here/shapes/tar demo=runs/demo-tar ;;
  *) echo "FAMILY is janus, showo or tar, found $FAMILY" >&2; exit 2 ;;
esac
MODEL=${MODEL:-$tiny}                            # the model to improve: a directory or a hub id
METHOD=${METHOD:-sft}                            # sft | dpo | sft+dpo
CURRICULUM=${CURRICULUM:-rounds}                 # what later rounds draw and train on: rounds | paper | none
#   rounds  learnable and discarded prompts, and a few mastered ones, are drawn again; a round trains on its own pictures
#   paper   Algorithm 2: only prompts that never had an accepted picture are drawn again; what is accepted joins the pictures of
#           all earlier rounds, on which training goes on; DPO's reference stays MODEL; it ends where no such prompt is left
#   none    as rounds, but discarded prompts do not come back
ROUNDS=${ROUNDS:-3}
OUT=${OUT:-$demo}                                # everything is written below this directory
NPROC=${NPROC:-1}                                # processes (GPUs) of this machine
LAUNCH=${LAUNCH-}                                # instead: what starts score, sft and dpo, such as "srun torchrun --nnodes 2 ..."
DEVICE=${DEVICE-}                                # cpu, cuda or, of one process, cuda:N; empty: a GPU where there is one
SEED=${SEED:-0}
ANSWER=${ANSWER:-yes-no}                         # how the model judges: yes-no | score | reply, the paper's (score.py --answer)
[[ $ANSWER != yes-no ]] || QUESTION=${QUESTION:-"Does this image describe {prompt}?"}
QUESTION=${QUESTION-}                            # what it is asked (default of score and reply: as published)
PYTHON=${PYTHON:-python}
labeller=()
if [[ $MODEL == "$here/shapes/showo" ]]; then    # eight masks a picture: a step costs more, so there are fewer of them
  SFT_FLAGS=${SFT_FLAGS:---lr 2e-4 --epochs 100 --max-steps 80 --batch-size 32 --micro-batch 32}
  DPO_FLAGS=${DPO_FLAGS:---lr 1.5e-4 --epochs 100 --max-steps 40 --batch-size 32 --micro-batch 32}
fi
if [[ $MODEL == "$here/shapes/"* ]]; then        # tiny models: they learn at other rates than a real one
  DEVICE=${DEVICE:-cpu}                          # as fast, and the README's numbers are those of float32 on a CPU
  PROMPTS=${PROMPTS:-$here/shapes/prompts_train.jsonl}
  EVAL_PROMPTS=${EVAL_PROMPTS:-$here/shapes/prompts_heldout.jsonl}
  CANDIDATES=${CANDIDATES:-8}
  GUIDANCE=${GUIDANCE:-1}
  [[ -n ${LABELLER+set} ]] || labeller=("$PYTHON" "$here/shapes/world.py" label)
  SCORE_FLAGS=${SCORE_FLAGS:---batch 256 --chunk 32}
  PAIRS_FLAGS=${PAIRS_FLAGS:---per-prompt 4}
  SFT_FLAGS=${SFT_FLAGS:---lr 3e-4 --epochs 100 --max-steps 160 --batch-size 32 --micro-batch 32}
  DPO_FLAGS=${DPO_FLAGS:---lr 2e-4 --epochs 100 --max-steps 60 --batch-size 32 --micro-batch 32}
fi
[[ -n ${LABELLER-} ]] && read -ra labeller <<< "$LABELLER"
[[ -n ${PROMPTS-} ]] || { echo "set PROMPTS to one or several prompt files" >&2; exit 2; }
[[ -n ${EVAL_PROMPTS-} ]] || { echo "set EVAL_PROMPTS to held-out prompt files; they are taken out of training" >&2; exit 2; }
CANDIDATES=${CANDIDATES:-10}                     # pictures a training prompt
EVAL_CANDIDATES=${EVAL_CANDIDATES:-4}            # pictures a held-out prompt
GUIDANCE=${GUIDANCE:-5}
TEMPERATURE=${TEMPERATURE:-1}
LABELLER=${LABELLER-${labeller[*]-}}             # a command `LABELLER scored.jsonl --out labels.jsonl`: an independent judge
CURRICULUM_FLAGS=${CURRICULUM_FLAGS:-}           # further flags of the scripts, such as --keep-mastered 0.2
SCORE_FLAGS=${SCORE_FLAGS:-}
PAIRS_FLAGS=${PAIRS_FLAGS:-}
SFT_FLAGS=${SFT_FLAGS:-}
DPO_FLAGS=${DPO_FLAGS:-}
GATE=${GATE:-stop}                               # by gate.py's verdict: stop | strict | warn
#   stop    a bad round ends the loop; an undecided one is looked at again with twice the held-out pictures, EVAL_LOOKS times in
#           all, and goes on with a warning if it then still is
#   strict  an undecided one ends the loop too
#   warn    go on whatever it says; no further pictures are drawn
EVAL_LOOKS=${EVAL_LOOKS:-3}                      # gate.py's intervals are made for up to three
GATE_FLAGS=${GATE_FLAGS:-}

[[ $METHOD == sft || $METHOD == dpo || $METHOD == sft+dpo ]] || { echo "METHOD is sft, dpo or sft+dpo, found $METHOD" >&2; exit 2; }
[[ $CURRICULUM == rounds || $CURRICULUM == paper || $CURRICULUM == none ]] || { echo "CURRICULUM is rounds, paper or none, found $CURRICULUM" >&2; exit 2; }
[[ $CURRICULUM != paper || $METHOD != sft+dpo ]] || { echo "CURRICULUM=paper trains by METHOD sft or dpo, as the paper, found $METHOD" >&2; exit 2; }
[[ $CURRICULUM != paper || " $CURRICULUM_FLAGS " != *" --no-replay "* ]] || { echo "CURRICULUM=paper takes no --no-replay, found CURRICULUM_FLAGS=$CURRICULUM_FLAGS" >&2; exit 2; }
[[ $ANSWER =~ ^(yes-no|score|reply)$ ]] || { echo "ANSWER is yes-no, score or reply, found $ANSWER" >&2; exit 2; }
[[ " $PAIRS_FLAGS" != *" --leave-out"* ]] || { echo "PAIRS_FLAGS takes no --leave-out: set CURRICULUM_FLAGS=\"--leave-out ...\", so that these prompts are not drawn either" >&2; exit 2; }
[[ -z $QUESTION || $QUESTION == *"{prompt}"* ]] || { echo "QUESTION must hold {prompt}, found $QUESTION" >&2; exit 2; }
[[ $GATE =~ ^(stop|strict|warn)$ ]] || { echo "GATE is stop, strict or warn, found $GATE" >&2; exit 2; }
[[ $DEVICE =~ ^(cpu|cuda(:[0-9]{1,2})?)?$ ]] || { echo "DEVICE is cpu, cuda or cuda:N, found $DEVICE" >&2; exit 2; }
device=${DEVICE:+--device $DEVICE}               # no setting of a run: it may go on elsewhere (docs/when-it-breaks.md)
whole() {  # whole NAME LEAST: the variable is a whole number, which bash and the scripts read alike
  [[ ${!1} =~ ^(0|[1-9][0-9]{0,8})$ && ${!1} -ge $2 ]] || { echo "$1 is a whole number of at least $2, found ${!1}" >&2; exit 2; }
}
whole ROUNDS 0; whole NPROC 1; whole SEED 0; whole CANDIDATES 1; whole EVAL_CANDIDATES 1; whole EVAL_LOOKS 1
(( EVAL_LOOKS <= 9 )) || { echo "EVAL_LOOKS is at most 9, found $EVAL_LOOKS" >&2; exit 2; }
run=("$PYTHON")
(( NPROC == 1 )) || run=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC")
[[ -z $LAUNCH ]] || read -ra run <<< "$LAUNCH"
paths() {  # paths TEXT: one a line, where TEXT is a path, several lines (for paths with spaces), or several words
  if [[ -e $1 || $1 == *$'\n'* ]]; then printf '%s\n' "$1"; else tr -s ' ' '\n' <<< "$1"; fi
}
named() { if [[ $1 == -* ]]; then printf './%s' "$1"; else printf '%s' "$1"; fi; }  # a path that no command takes for a flag
prompts=() eval_prompts=()
while read -r path; do [[ -z $path ]] || prompts+=("$(named "$path")"); done < <(paths "$PROMPTS")
while read -r path; do [[ -z $path ]] || eval_prompts+=("$(named "$path")"); done < <(paths "$EVAL_PROMPTS")

refuse() { echo "OUT=$OUT: $*" >&2; exit 2; }
OUT=$(named "$OUT")
[[ ! -L $OUT || -e $OUT ]] || refuse "is a link to $(readlink "$OUT"), which is not there"
[[ ! -e $OUT || -d $OUT ]] || refuse "is a file, a directory is wanted"
[[ ! -L $OUT/best || $(readlink "$OUT/best") =~ ^round[0-9]+/model$ ]] || refuse "best is a link that no loop made; move it away"
[[ -L $OUT/best || ! -e $OUT/best ]] || refuse "best is in the way, the link to the last good model; move it away"
for path in "$OUT"/round[0-9]*; do [[ -d $path || ! ( -e $path || -L $path ) ]] || refuse "${path##*/} is no directory; move it away"; done
for path in summary.jsonl report.html; do
  [[ -e $OUT/settings.txt || ! -e $OUT/$path ]] || refuse "holds $path, but no settings.txt that says of which run; move it away"
done
reason=$(mkdir -p "$OUT" 2>&1) || refuse "cannot be made: ${reason##*: }"
# The shell alone holds the lock, and not the steps, which hold what they write: when it has gone another may go on at once.
exec 9>> "$OUT/loop.lock" || exit 2
lock='import fcntl, sys, time
for tries in range(20):
    try:
        sys.exit(fcntl.flock(0, fcntl.LOCK_EX | fcntl.LOCK_NB))
    except BlockingIOError:
        time.sleep(0.1)
sys.exit(75)'
code=0
"$PYTHON" -c "$lock" <&9 9>&- || code=$?
[[ $code != 75 ]] || refuse "another loop is at work here"
[[ $code == 0 ]] || exit "$code"

threshold=()                                     # over which a picture is accepted into the data, and its prompt not discarded
[[ ! " $PAIRS_FLAGS " =~ \ --threshold[=\ ]([^\ ]+) ]] || threshold=(--threshold "${BASH_REMATCH[1]}")
judged=() kept=()                                # what settings.txt, of older runs too, does not name is the default
[[ -z $QUESTION ]] || judged=(--question "$QUESTION")
[[ $ANSWER == yes-no ]] || judged+=(--answer "$ANSWER") kept=(ANSWER)
[[ $CURRICULUM == rounds ]] || kept+=(CURRICULUM)
settings=$(for name in MODEL METHOD SEED QUESTION PROMPTS EVAL_PROMPTS CANDIDATES EVAL_CANDIDATES GUIDANCE TEMPERATURE \
  CURRICULUM_FLAGS SCORE_FLAGS PAIRS_FLAGS SFT_FLAGS DPO_FLAGS ${kept[@]+"${kept[@]}"}; do printf '%s=%q\n' "$name" "${!name}"; done)
begun=$(ls -A "$OUT/round0" 2> /dev/null || true)  # empty: what was asked for was refused before there was anything
if [[ -n $begun && -e $OUT/settings.txt && $(< "$OUT/settings.txt") != "$settings" ]]; then
  echo "OUT=$OUT holds another run: $(diff "$OUT/settings.txt" - <<< "$settings" | grep '^[<>]' | tr '\n' ' ')" >&2
  exit 2
fi
rm -f "$OUT"/.settings.txt.*.tmp                 # of a loop that was killed; there is no other one
temporary=$OUT/.settings.txt.$RANDOM$RANDOM.tmp
printf '%s\n' "$settings" > "$temporary"
mv "$temporary" "$OUT/settings.txt"

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}  # s that torchrun gives its ranks to save
child='' stopped=''
trap 'stopped=143; [[ -z $child ]] || kill -TERM "$child"' TERM
trap 'stopped=130; [[ -z $child ]] || kill -TERM "$child"' INT

step() {  # step OUTPUT COMMAND...: run the command unless its output is there
  local output=$1 code; shift
  [[ -z $stopped ]] || exit "$stopped"
  [[ ! -e $output ]] || return 0
  printf '\n$'; printf ' %q' "$@"; printf '\n'
  "$@" 9>&- &
  child=$!
  [[ -z $stopped ]] || kill -TERM "$child"
  while code=0; wait "$child" || code=$?; kill -0 "$child" 2> /dev/null; do :; done  # a signal interrupts wait
  child=''
  [[ -z $stopped ]] || exit "$stopped"
  return "$code"
}

draw_heldout() {  # draw_heldout DIRECTORY MODEL [LOOK]: how a model draws prompts it is never trained on
  local out=$1/heldout$(at_look "${3:-1}").jsonl n=$EVAL_CANDIDATES
  (( ${3:-1} == 1 )) || n=$((EVAL_CANDIDATES << ($3 - 2)))  # as many as there are
  step "$out" "${run[@]}" "$here/score.py" --model "$2" --prompts "${eval_prompts[@]}" --out "$out" \
    --candidates "$n" --guidance "$GUIDANCE" --temperature "$TEMPERATURE" --seed $((SEED + 1000 * ${3:-1})) \
    ${judged[@]+"${judged[@]}"} --readouts $device $SCORE_FLAGS
}
label() {  # label DIRECTORY: what LABELLER says of its first held-out pictures
  (( ! ${#labeller[@]} )) || step "$1/labels.jsonl" "${labeller[@]}" "$1/heldout.jsonl" --out "$1/labels.jsonl"
}
rejudge() {  # rejudge DIRECTORY MODEL [LOOK]: the base's pictures as another model judges them
  local name=$(at_look "${3:-1}").jsonl
  step "$1/rejudged$name" "${run[@]}" "$here/score.py" --model "$2" --rejudge "$OUT/round0/heldout$name" \
    ${judged[@]+"${judged[@]}"} --readouts --out "$1/rejudged$name" $device $SCORE_FLAGS
}
at_look() { (( $1 == 1 )) || printf -- '-%d' "$1"; }  # what the files of a look have in their names
files() {  # files NAME MOST: a round's files of that name in the order of the looks that it took, MOST at most, into `found`
  local look path
  found=()
  for (( look = 1; look <= $2; look++ )); do
    path=$1$(at_look $look).jsonl
    [[ ! -e $path ]] || found+=("$path")
  done
}
ask_gate() {  # ask_gate ROUND LOOK: gate.py's exit code for a round, by the pictures of so many looks
  local dir=$OUT/round$1 last=$OUT/round$(($1 - 1)) flags=()
  files "$OUT/round0/heldout" "$2"; flags+=(--base "${found[@]}")
  files "$dir/heldout" "$2"; flags+=(--after "${found[@]}")
  files "$dir/rejudged" "$2"; flags+=(--rejudged "${found[@]}")
  if (( $1 > 1 )); then
    files "$last/heldout" 9; flags+=(--last "${found[@]}")
    files "$last/rejudged" "$2"; flags+=(--last-rejudged "${found[@]}")
  fi
  "$PYTHON" "$here/gate.py" "${flags[@]}" --out "$dir/gate.json" $GATE_FLAGS 9>&-
}

mkdir -p "$OUT/round0"
draw_heldout "$OUT/round0" "$MODEL"
label "$OUT/round0"
"$PYTHON" "$here/analysis/summary.py" "$OUT" 9>&-

model=$MODEL good=$MODEL                         # what the next round begins with, and the last model that the gate called good
bad=0
scored=()                                        # the scores of all earlier rounds, in order
for (( round = 1; round <= ROUNDS; round++ )); do
  dir=$OUT/round$round
  replay=() merged=("$dir/scored.jsonl")         # which prompts this round draws, and the scores that its data come from
  [[ $CURRICULUM != none ]] || replay=(--no-replay)
  if [[ $CURRICULUM == paper ]] && (( round > 1 )); then
    replay=(--only-discarded) merged=("${scored[@]}" "$dir/scored.jsonl" --mix-models)
  fi
  step "$dir/prompts.jsonl" "$PYTHON" "$here/curriculum.py" --prompts "${prompts[@]}" --exclude "${eval_prompts[@]}" \
    ${scored[@]+--scored "${scored[@]}"} --seed "$SEED" --out "$dir/prompts.jsonl" ${replay[@]+"${replay[@]}"} \
    ${threshold[@]+"${threshold[@]}"} $CURRICULUM_FLAGS
  [[ -e $dir/prompts.jsonl ]] || break           # every prompt has its picture: nothing is left to be drawn
  step "$dir/scored.jsonl" "${run[@]}" "$here/score.py" --model "$model" --prompts "$dir/prompts.jsonl" --out "$dir/scored.jsonl" \
    --candidates "$CANDIDATES" --guidance "$GUIDANCE" --temperature "$TEMPERATURE" --seed $((SEED + round)) \
    ${judged[@]+"${judged[@]}"} $device $SCORE_FLAGS
  step "$dir/discard.jsonl" "$PYTHON" "$here/make_pairs.py" --scored "${merged[@]}" --out "$dir" $PAIRS_FLAGS
  if [[ $METHOD == sft ]]; then
    step "$dir/model" "${run[@]}" "$here/sft.py" --data "$dir/sft.jsonl" --out "$dir/model" --seed "$SEED" $device $SFT_FLAGS
  elif [[ $METHOD == dpo ]]; then
    step "$dir/model" "${run[@]}" "$here/dpo.py" --pairs "$dir/pairs.jsonl" --out "$dir/model" --seed "$SEED" $device $DPO_FLAGS
  else
    step "$dir/model-sft" "${run[@]}" "$here/sft.py" --data "$dir/sft.jsonl" --out "$dir/model-sft" --seed "$SEED" $device $SFT_FLAGS
    step "$dir/model" "${run[@]}" "$here/dpo.py" --pairs "$dir/pairs.jsonl" --model "$dir/model-sft" --other-model \
      --out "$dir/model" --seed "$SEED" $device $DPO_FLAGS
  fi
  draw_heldout "$dir" "$dir/model"
  label "$dir"
  rejudge "$dir" "$dir/model"
  "$PYTHON" "$here/analysis/summary.py" "$OUT" 9>&-
  ask_gate $round 1 || bad=$?
  for (( look = 2; bad == 4 && look <= EVAL_LOOKS; look++ )); do
    [[ $GATE != warn ]] || break
    draw_heldout "$OUT/round0" "$MODEL" $look
    draw_heldout "$dir" "$dir/model" $look
    rejudge "$dir" "$dir/model" $look
    bad=0
    ask_gate $round $look || bad=$?
  done
  (( bad == 0 || bad == 3 || bad == 4 )) || exit "$bad"
  if (( bad == 4 )) && [[ $GATE == stop ]]; then
    printf '\nUNDECIDED: nothing shows that round %d made the model better or worse (see %s); going on.\n\n' $round "$dir/gate.json" >&2
  elif (( bad )) && [[ $GATE != warn ]]; then
    break
  fi
  if (( ! bad )); then
    ln -sfn "round$round/model" "$OUT/best"
    good=$dir/model
  fi
  bad=0
  model=$dir/model
  scored+=("$dir/scored.jsonl")
done
if (( bad )); then
  reason='made the model worse'
  (( bad == 3 )) || reason='is not shown to have made the model better or worse'
  printf '\nSTOPPED: round %d %s, and was not built upon (see above and %s).\n' "$round" "$reason" "$dir/gate.json" >&2
  printf 'The last good model is %s. To go on all the same: GATE=warn\n\n' "$good" >&2
fi
"$PYTHON" "$here/analysis/report.py" "$OUT" $device 9>&-  # one page about all of it; its path is the last line
exit "$bad"

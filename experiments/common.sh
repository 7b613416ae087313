# What the experiments share; they begin with `source common.sh`. Everything goes to OUT/FAMILY/seedN/NAME and is skipped
# where it is there: a stopped experiment goes on when typed again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
FAMILY=${FAMILY:-janus}            # janus, showo or tar: which tiny model
BASE=${BASE:-}                     # another base of the family than the shipped one: its directory (bases.sh makes some)
SEEDS=${SEEDS:-0 1 2}              # of the loop: noise of the pictures, order of the training data
OUT=${OUT:-runs/experiments}
JOBS=${JOBS:-2}                    # seeds at the same time, a core each
STEPS=${STEPS:-100}                # of training, of 32 examples each, the same everywhere
PYTHON=${PYTHON:-python}
guided=''                          # not empty: held-out prompts are drawn with guidance 2 as well
export OMP_NUM_THREADS=1
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-}  # none: the rows are of float32 on a CPU
prompts=${PROMPTS:-shapes/prompts_train.jsonl} heldout=${HELDOUT:-shapes/prompts_heldout.jsonl}
case $FAMILY in
  janus) model=shapes/base sft_lr=3e-4 dpo_lr=2e-4 draws='' ;;
  showo) model=shapes/showo sft_lr=2e-4 dpo_lr=7e-5 draws='--mask-draws 2' ;;  # the default, 8, takes three times as long
  tar) model=shapes/tar sft_lr=3e-4 dpo_lr=2e-4 draws='' ;;  # the rates of janus, which draws alike
  *) echo "FAMILY is janus, showo or tar, found $FAMILY" >&2; exit 2 ;;
esac
if [[ -n $BASE ]]; then              # in the rows and below OUT it is a family: janus-blind-shape
  export -n FAMILY
  model=$BASE FAMILY=$FAMILY-$(basename "$BASE")
fi
mkdir -p "$OUT/$FAMILY"

# Hundreds of short commands: a Python that has imported torch once and forks a process for each saves most of the time.
if [[ -z ${COLD-} ]]; then
  warm=$(mktemp -d)
  trap 'kill "$server" 2> /dev/null || true; rm -rf "$warm"' EXIT
  "$PYTHON" tests/warm.py "$warm/socket" & server=$!
  "$PYTHON" -c "import pathlib, sys; sys.path.insert(0, 'tests'); import warm; warm.client(pathlib.Path('$warm'), '$warm/socket')"
  until [[ -S $warm/socket ]]; do kill -0 "$server"; sleep 0.2; done
  PYTHON=$warm/python
fi

run() {  # run OUTPUT SCRIPT ARGUMENTS...: unless OUTPUT is there; what it prints goes to a log beside it
  local output=$1 code=0; shift
  [[ ! -e $output ]] || return 0
  mkdir -p "$(dirname "$output")"
  "$PYTHON" "$@" > "$output.log" 2>&1 || code=$?
  (( code == 0 )) || { tail -n 3 "$output.log" >&2; return $code; }
}
draw_heldout() {  # draw_heldout DIR MODEL SEED: a model's held-out pictures, and what the oracle says of them
  run "$1/heldout.jsonl" score.py --model "$2" --prompts $heldout --out "$1/heldout.jsonl" --candidates 4 --guidance 1 \
    --seed $((1000 + $3)) --readouts --batch 256 --chunk 32
  run "$1/labels.jsonl" shapes/world.py label "$1/heldout.jsonl" --out "$1/labels.jsonl"
  [[ -n $guided ]] || return 0
  run "$1/guided.jsonl" score.py --model "$2" --prompts $heldout --out "$1/guided.jsonl" --candidates 2 --guidance 2 \
    --seed $((2000 + $3)) --batch 256 --chunk 32
  run "$1/guided-labels.jsonl" shapes/world.py label "$1/guided.jsonl" --out "$1/guided-labels.jsonl"
}
measure() {  # measure DIR NAME SEED [FLAGS]: the model in DIR/model, against the base
  draw_heldout "$1" "$1/model" "$3"
  run "$1/rejudged.jsonl" score.py --model "$1/model" --rejudge "$base/heldout.jsonl" --out "$1/rejudged.jsonl" --readouts --batch 256
  [[ -e $1/gate.json ]] || "$PYTHON" gate.py --base "$base/heldout.jsonl" --after "$1/heldout.jsonl" --rejudged "$1/rejudged.jsonl" \
    --out "$1/gate.json" > "$1/gate.log" 2>&1 || (( $? == 3 || $? == 4 ))  # bad, undecided
  "$PYTHON" experiments/measure.py --base "$base" --dir "$1" --name "$2" --family "$FAMILY" --seed "$3" "${@:4}"
}
draw_base() {  # draw_base SEED: the base model's held-out pictures, 16 candidates a training prompt, the data of the first 8
  base=$OUT/$FAMILY/seed$1/base
  guided=1 draw_heldout "$base" $model "$1"
  "$PYTHON" experiments/measure.py --base "$base" --dir "$base" --name base --family "$FAMILY" --seed "$1"
  run "$base/prompts.jsonl" curriculum.py --prompts $prompts --exclude $heldout --out "$base/prompts.jsonl" --seed "$1"
  run "$base/scored.jsonl" score.py --model $model --prompts "$base/prompts.jsonl" --out "$base/scored.jsonl" --candidates 16 \
    --guidance 1 --seed $((1 + $1)) --batch 256 --chunk 32
  run "$base/scored8.jsonl" experiments/vary.py candidates 8 "$base/scored.jsonl" --out "$base/scored8.jsonl"
  select_data "$base/data" "$base/scored8.jsonl"
}
select_data() {  # select_data DIR SCORED FLAGS...: DIR/{sft,pairs,discard}
  # of another base than the shipped one what the gate refuses is taken all the same, and the rows say so
  local dir=$1 scored=$2; shift 2
  run "$dir/discard.jsonl" make_pairs.py --scored "$scored" --out "$dir" --per-prompt 4 "$@" ${BASE:+--force}
}
second() {  # second DIR NAME SEED: a model's own pictures as the base's judge sees them, and what gate.py does not read of them
  [[ $1 == "$base" ]] || run "$1/seconded.jsonl" score.py --model $model --rejudge "$1/heldout.jsonl" --out "$1/seconded.jsonl" --batch 256
  "$PYTHON" experiments/measure.py --base "$base" --dir "$1" --name "$2" --family "$FAMILY" --seed "$3" --second
}
foretell() {  # foretell NAME SCORED SEED: what forecast.py says of a round on these pictures, from a label of each prompt's first
  local dir=$base/$1
  run "$dir/scored.jsonl" experiments/vary.py candidates 1 "$2" --out "$dir/scored.jsonl"
  run "$dir/labels.jsonl" shapes/world.py label "$dir/scored.jsonl" --out "$dir/labels.jsonl"
  run "$dir/forecast.json" analysis/forecast.py "$2" --labels "$dir/labels.jsonl" --per-prompt 4 --out "$dir/forecast.json"
  "$PYTHON" experiments/measure.py --base "$base" --dir "$dir" --name "$1" --family "$FAMILY" --seed "$3" --forecast
}
data_of() { if [[ $1 == sft ]]; then echo sft.jsonl; else echo pairs.jsonl; fi; }  # data_of METHOD
invert() {  # invert SHARE SEED: base/invertSHARE/pairs.jsonl, so many of the pairs turned round
  run "$base/invert$1/pairs.jsonl" experiments/vary.py invert "$1" "$base/data/pairs.jsonl" --out "$base/invert$1/pairs.jsonl" --seed "$2"
}
pick() {  # pick rejected|lot SEED: base/KIND/sft.jsonl, four such pictures a prompt
  run "$base/$1/sft.jsonl" experiments/vary.py "$1" 4 "$base/scored8.jsonl" --out "$base/$1/sft.jsonl" --seed "$2"
}
train() {  # train NAME SEED sft|dpo DATA FLAGS...: a model from the one that drew the data in directory DATA, and its row
  local dir=$OUT/$FAMILY/seed$2/$1 name=$1 seed=$2 method=$3 data=$4 lr=$sft_lr file=sft; shift 4
  local input=--data
  [[ $method == sft ]] || lr=$dpo_lr file=pairs input=--pairs
  run "$dir/model" "$method.py" $input "$data/$file.jsonl" --out "$dir/model" --seed "$seed" --lr $lr --epochs 1000 \
    --max-steps "$STEPS" --batch-size 32 --micro-batch 32 --save-every 0 $draws "$@"
  measure "$dir" "$name" "$seed" --trained-on "$data/$file.jsonl"
}
each_seed() {  # each_seed FUNCTION: with every seed, JOBS of them at the same time
  local seed running=0
  for seed in $SEEDS; do
    if (( running == JOBS )); then wait -n; running=$((running - 1)); fi
    ( trap - EXIT; "$1" "$seed" ) & running=$((running + 1))
  done
  for (( ; running; running-- )); do wait -n; done
}
improve() {  # improve OUT SEED sft|dpo CURRICULUM_FLAGS LR [FIRST]: self_improve.sh from the pictures that the base has drawn
  # FIRST: a model of `train` by the same data, rate and seed, which is what the first round would make
  # candidates, rounds, curriculum: variables of the caller, for others than 8, 3 and rounds
  local flags="--lr $5 --epochs 1000 --max-steps $STEPS --batch-size 32 --micro-batch 32 --save-every 0 $draws" name
  mkdir -p "$1/round0" "$1/round1"
  for name in heldout.safetensors heldout.jsonl labels.jsonl; do copy "$base/$name" "$1/round0/$name"; done
  copy "$base/prompts.jsonl" "$1/round1/prompts.jsonl"
  for name in safetensors jsonl; do copy "$base/scored${candidates:-8}.$name" "$1/round1/scored.$name"; done
  if [[ -n ${6-} ]]; then
    for name in model {heldout,rejudged,guided}.{safetensors,jsonl} {guided-,}labels.jsonl; do
      [[ ! -e $6/$name ]] || copy "$6/$name" "$1/round1/$name"  # guided: where it is drawn
    done
  fi
  [[ -e $1/report.html && ( -z ${rounds-} || -e $1/round$rounds/gate.json ) ]] || ROUNDS=${rounds:-3} CURRICULUM=${curriculum:-rounds} \
    MODEL=$model METHOD=$3 OUT=$1 SEED=$2 CURRICULUM_FLAGS=$4 SFT_FLAGS=$flags DPO_FLAGS=$flags PROMPTS=$prompts \
    EVAL_PROMPTS=$heldout CANDIDATES=${candidates:-8} GUIDANCE=1 SCORE_FLAGS="--batch 256 --chunk 32" PAIRS_FLAGS="--per-prompt 4${BASE:+ --force}" GATE=warn \
    LABELLER="$PYTHON shapes/world.py label" PYTHON=$PYTHON ./self_improve.sh > "$1/log" 2>&1 || { tail -n 3 "$1/log" >&2; return 1; }
}
copy() { [[ -e $2 ]] || cp -r "$1" "$2"; }
times() { awk "BEGIN { print $1 * $2 }"; }
tables() { "$PYTHON" experiments/tables.py "$OUT" --table "$1"; }

#!/usr/bin/env bash
# Other bases than the shipped one, to be told by BASE=DIRECTORY to the experiments: each skipped where it is there.
#   BASES="seed1 early400 blind-shape" MADE=runs/bases FAMILY=showo ./experiments/bases.sh      some of them
# At the end: how often each draws right, and judges its own drawings right (its pretrain.json, guidance 1).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
FAMILY=${FAMILY:-janus}
BASES=${BASES:-early300 early500 early800 early1200 seed1 blind-shape blind-side blind-number}
#   earlyN          seed 1's as good as it is after N steps of drawing and looking together, in growing order; no stage of wrong
#                   captions
#   seedN           pretrained as the shipped one is, from seed N; seed 1 goes on from the last of its early ones
#   blind-ATTRIBUTE the shipped one, taught that this attribute does not matter to a yes or no (shapes/blind.py)
MADE=${MADE:-runs/bases}/$FAMILY
PRETRAIN_FLAGS=${PRETRAIN_FLAGS:-}  # further flags of shapes/pretrain.py, such as --threads 2
BLIND_FLAGS=${BLIND_FLAGS:-}        # of shapes/blind.py
PYTHON=${PYTHON:-python}
case $FAMILY in
  janus) shipped=shapes/base ;;
  showo | tar) shipped=shapes/$FAMILY ;;
  *) echo "FAMILY is janus, showo or tar, found $FAMILY" >&2; exit 2 ;;
esac
mkdir -p "$MADE"

pretrain() {  # pretrain OUT SEED STEPS FLAGS...: of seed 1 from where the last early one of fewer STEPS stood, if that is there
  local out=$1 seed=$2 steps=$3 other before=''; shift 3
  for other in $(find "$MADE" -maxdepth 1 -name 'early*.pretraining' | sort -V); do
    other=${other##*/early}
    (( seed != 1 || ${other%.pretraining} >= steps )) || before=$MADE/early$other
  done
  if [[ -n $before && ! -e $out.pretraining ]]; then
    cp -r "$before" "$out.pretraining"
    rm -f "$out.pretraining"/{before-the-gap,gap}.pt  # measured at fewer steps
  fi
  "$PYTHON" shapes/pretrain.py --family "$FAMILY" --out "$out" --seed "$seed" "$@" $PRETRAIN_FLAGS
}
for name in $BASES; do
  out=$MADE/$name
  [[ ! -e $out/pretrain.json ]] || continue
  case $name in
    seed*) pretrain "$out" "${name#seed}" 1000000 ;;
    early*) pretrain "$out" 1 "${name#early}" --joint-steps "${name#early}" --gap-steps 0 --keep-states ;;
    blind-*) "$PYTHON" shapes/blind.py --model $shipped --to "${name#blind-}" --out "$out" $BLIND_FLAGS ;;
    *) echo "BASES are seedN, earlyN and blind-ATTRIBUTE, found $name" >&2; exit 2 ;;
  esac
done
[[ -e $shipped/pretrain.json ]] || shipped=''
"$PYTHON" - $shipped $(printf "$MADE/%s " $BASES) <<'END'
import json, sys
for path in sys.argv[1:]:
    told = json.load(open(f"{path}/pretrain.json"))
    own = told["after"] if "after" in told else told["heldout"]["drawing, guidance 1"]
    numbers = {"draws right": own["right"]} | own["judge"]["all"] | {k: own[k] for k in own if k.startswith("accepted")}
    print(f"{path}: " + ", ".join(f"{key} {value}" for key, value in numbers.items()))  # None: of nothing drawn, no rate
END

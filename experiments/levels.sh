#!/usr/bin/env bash
# The paper's survey where the truth is known: what the base model rejects, and whose fault it is, by level of difficulty. Its
# training never asks for one object: these 24 prompts are made here, all foils are of another colour.
source "$(dirname "$0")/common.sh"
colors=(red yellow green blue purple white) single=$OUT/$FAMILY/levels-prompts.jsonl
for i in "${!colors[@]}"; do
  for shape in circle square triangle cross; do
    printf '{"id": "single-%s-%s", "prompt": "a %s %s", "category": "single", "foil": "a %s %s"}\n' "${colors[i]}" $shape \
      "${colors[i]}" $shape "${colors[(i + 1) % 6]}" $shape
  done
done | cat $heldout - > "$single"
heldout=$single
one_seed() {
  local dir=$OUT/$FAMILY/seed$1/levels
  draw_heldout "$dir" $model "$1"
  "$PYTHON" experiments/measure.py --base "$dir" --dir "$dir" --name levels --family "$FAMILY" --seed "$1" --levels
}
each_seed one_seed
tables levels

#!/usr/bin/env bash
# Every benchmark at its smallest, on a CPU, in three to four minutes on one thread: all.sh [OUT], default benchmarks/results/tiny.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/results/tiny}
python=${PYTHON:-python}
export OMP_NUM_THREADS=1  # at this size a second thread only waits
mkdir -p "$out"
rm -f "$out/results.jsonl"
for name in sampling masked_sampling judging training scaling; do
  "$python" "$here/$name.py" --tiny --device cpu --json "$out/results.jsonl"
done
"$python" "$here/bench.py" "$out/results.jsonl" >"$out/results.md"
echo "$out/results.md"

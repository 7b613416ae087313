"""What the results tables say of one run of dynamics.py, as a row for each kind of probe.

Reads   DIR/dynamics.json
Writes  with --name DIR/{matching,near,random}/row.json, with --bayes-name the numbers of Proposition 1 in
        DIR/{matching,near,random}/bayes/row.json; for DPO chosen and rejected instead of matching

    python experiments/kernel.py --dir runs/experiments/janus/seed0/dynamics-sft --name dynamics-sft --family janus --seed 0
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.command import Parser, run_script
from common.writing import write_json
from experiments.measure import commit

NUMBERS = ("delta_g", "delta_u", "delta_margin", "cosine", "cosine_foil", "g_rises", "u_rises", "sign_agreement", "spearman")

BAYES = (
    *("delta_u_bayes", "u_bayes_rises", "u_rises", "sign_agreement_g_bayes", "pearson_g_bayes", "sign_agreement_u_bayes"),
    *("pearson_u_bayes", "spearman_u_bayes", "cosine_g", "cosine_g_foil", "cosine_g_others"),
    *("slope_g", "slope_u", "slope_u_bayes"),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="directory of dynamics.json, and of the rows")
    parser.add_argument("--name", help="what was trained on, as tables.py knows it")
    parser.add_argument("--bayes-name", help="the same, of the row with the numbers of Proposition 1")
    parser.add_argument("--family", required=True, help="janus, showo or tar")
    parser.add_argument("--seed", type=int, required=True, help="seed of the loop")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    for kind, found in json.loads((args.dir / "dynamics.json").read_text())["kinds"].items():
        for name, keys, path in ((args.name, NUMBERS, args.dir / kind), (args.bayes_name, BAYES, args.dir / kind / "bayes")):
            if name:
                row = {"name": f"{name}-{kind}", "family": args.family, "seed": args.seed, "probes": found["n_probes"]}
                row |= {key: found[key] and found[key]["value"] for key in keys} | {"commit": commit()}
                path.mkdir(exist_ok=True, parents=True)
                write_json(path / "row.json", row)
                print(f"{row['name']} seed {args.seed}: {keys[0]} {row[keys[0]]}")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))

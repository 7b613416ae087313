"""How time and memory grow: with prompts (x1, x10, x100), with ranks (1, 2) and with image tokens; the exponents.

    python benchmarks/scaling.py --tiny
    python benchmarks/scaling.py --ranks 1 2 4 8 --device cuda

The real commands run on the shapes world's model; image tokens are varied on a random one. Times leave start-up out: what a
script says of its own speed counts. An exponent is the slope of log(value) over log(size): 1 is proportional, 0 constant.
One run each, whatever --repeats says, but for the image tokens.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import bench
import numpy as np
import torch

# Runs a command and says how many KiB its largest process held. A process of its own, because a child's maximum begins with
# what its parent holds.
MEASURE = """import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(status)"""
BASE = bench.ROOT / "shapes" / "base"


def run(script: str, *flags: object, ranks: int = 1) -> SimpleNamespace:
    """A script's output, its seconds with start-up, and the most memory that any of its processes held, in MB."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launch, bench.ROOT / script, *flags]
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr}")
    return SimpleNamespace(
        stdout=done.stdout, seconds=time.perf_counter() - started, memory=int(done.stderr.split()[-1]) / 1024
    )


def speed(stdout: str) -> float:
    """Pictures a second, as score.py says at its end."""
    return float(re.search(r"speed +([\d.]+)", stdout)[1])


def exponent(sizes: list[float], values: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def over_prompts(folder: Path, counts: list[int], device: str) -> list[dict]:
    """score.py over so many prompts, 2 pictures each."""
    lines = (bench.ROOT / "shapes" / "prompts_train.jsonl").read_text().splitlines()
    rows = []
    for count in counts:
        prompts = folder / f"{count}.jsonl"
        repeated = [json.loads(lines[i % len(lines)]) | {"id": str(i)} for i in range(count)]
        for i, row in enumerate(repeated):
            row["prompt"] += " ." * (i // len(lines))  # other texts, or they would be dropped as duplicates
        prompts.write_text("\n".join(map(json.dumps, repeated)))
        flags = ("--candidates", 2, "--guidance", 1, "--device", device, "--out", folder / f"{count}-scored.jsonl")
        done = run("score.py", "--model", BASE, "--prompts", prompts, *flags)
        rows.append({"what": "score.py", "prompts": count, "seconds": count * 2 / speed(done.stdout), "MB": done.memory})
    return rows


def over_rows(folder: Path, counts: list[int]) -> list[dict]:
    """make_pairs.py over scored files of so many pictures of 576 tokens, ten a prompt."""
    from common.records import TokenWriter, tokens_path
    from common.writing import whole_file

    empty = run("make_pairs.py", "--help").seconds
    rows, rng = [], np.random.default_rng(0)
    for count in counts:
        path = folder / f"rows{count}.jsonl"
        header = {"kind": "scored", "model": "random", "model_hash": "0", "codebook_size": "16384", "image_tokens": "576"}
        with whole_file(path, "w") as lines, whole_file(tokens_path(path)) as tensors:
            writer = TokenWriter(tensors, count, 576, header | {"threshold": "0.5"})
            for row in range(count):
                p = float(rng.random())
                values = {"id": str(row // 10), "prompt": f"prompt {row // 10}", "category": "color", "candidate": row % 10}
                values |= {"p_yes": p, "coverage": 1.0, "foil": "foil", "p_yes_foil": p / 3, "row": row}
                lines.write(json.dumps(values) + "\n")
            for start in range(0, count, 1000):
                writer.write(rng.integers(0, 16384, (min(1000, count - start), 576)))
            writer.close()
        done = run("make_pairs.py", "--scored", path, "--out", folder / f"pairs{count}")
        rows.append({"what": "make_pairs.py", "pictures": count, "seconds": done.seconds - empty, "MB": done.memory})
    return rows


def over_ranks(folder: Path, scored: Path, ranks: list[int], steps: int, device: str) -> list[dict]:
    """score.py --rejudge and sft.py on so many processes: pictures a second."""
    run("make_pairs.py", "--scored", scored, "--out", folder / "data", "--force")
    rows = []
    for n in ranks:
        judged = run(
            "score.py", "--model", BASE, "--rejudge", scored, "--device", device, "--out", folder / f"{n}.jsonl", ranks=n
        )
        flags = ("--max-steps", steps, "--batch-size", 32, "--micro-batch", 8, "--save-every", 0, "--device", device)
        run("sft.py", "--data", folder / "data" / "sft.jsonl", *flags, "--out", folder / f"model{n}", ranks=n)
        metrics = (folder / f"model{n}" / "training" / "metrics.jsonl").read_text().splitlines()[1:]
        speeds = [json.loads(line)["images_per_s"] for line in metrics]
        rows.append({"ranks": n, "judged, images/s": speed(judged.stdout), "trained, images/s": float(np.median(speeds))})
    return rows


def over_image_tokens(geometry: bench.Geometry, sides: list[int], args) -> list[dict]:
    """Sampling, judging and one training pass of two pictures, in one process: seconds."""
    rows = []
    for side in sides:
        policy = bench.build(
            geometry._replace(side=side), args.device, torch.bfloat16 if args.device == "cuda" else torch.float32
        )
        policy.trainable_parameters()
        prompts = bench.prompts(policy, 2)
        tokens = policy.sample(prompts, 1, 5.0, 1.0).flatten(0, 1)
        pictures = policy.decode(tokens)
        work = {
            "sample, s": lambda: policy.sample(prompts, 1, 5.0, 1.0),
            "judge, s": lambda: policy.judge(pictures, [["red", "blue"]] * 2),
            "train, s": lambda: policy.logps(prompts, tokens).sum().backward(),
        }
        rows.append({"image tokens": side**2} | bench.alternate(work, args.repeats, args.device))
    return rows


def with_exponents(rows: list[dict], size: str) -> list[dict]:
    numbers = [key for key, value in rows[0].items() if isinstance(value, float)]
    sizes = [row[size] for row in rows]
    return [*rows, {size: "exponent"} | {key: exponent(sizes, [row[key] for row in rows]) for key in numbers}]


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes (default 1 2)")
    parser.add_argument("--rows", type=int, nargs="+", help="pictures for make_pairs.py (default 10^4, 10^5 and 10^6)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counts = [4, 40, 400] if args.tiny else [64, 640, 6400]
        bench.table("scaling, prompts", with_exponents(over_prompts(folder, counts, args.device), "prompts"), args)
        pictures = args.rows or ([1000, 10_000, 100_000] if args.tiny else [10_000, 100_000, 1_000_000])
        bench.table("scaling, rows", with_exponents(over_rows(folder, pictures), "pictures"), args)
        scored = folder / f"{counts[1]}-scored.jsonl"
        rows = over_ranks(folder, scored, args.ranks, 10 if args.tiny else 50, args.device)
        bench.table("scaling, ranks", rows, args)
    geometry = bench.GEOMETRIES["tiny"] if args.device == "cpu" else bench.GEOMETRIES[args.geometry]
    rows = over_image_tokens(geometry._replace(layers=2), [6, 12, 18] if args.tiny else [6, 12, 24], args)
    bench.table("scaling, image tokens", with_exponents(rows, "image tokens"), args)


if __name__ == "__main__":
    main()

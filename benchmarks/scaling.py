"""How time and memory grow: with prompts (x1, x10, x100), rows, ranks (1, 2) and image tokens; the exponents.

    python benchmarks/scaling.py --tiny
    python benchmarks/scaling.py --ranks 1 2 4 8 --device cuda
    OMP_NUM_THREADS=1 python benchmarks/scaling.py --only-rows --rows 10000 100000 1000000

The real commands run on the shapes world's model, those over rows on made-up files; image tokens are varied on a random one.
Times over prompts leave start-up out: what a script says of its own speed counts. Those over rows are processor seconds. An
exponent is the slope of log(value) over log(size): 1 is proportional, 0 constant. One run each, whatever --repeats says, but
for the image tokens.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import bench
import numpy as np
import torch

from common.writing import write_rows

# Runs a command and says how many processor seconds it took and how many KiB its largest process held. A process of its own,
# because a child's maximum begins with what its parent holds.
MEASURE = """import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss, file=sys.stderr)
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
    processor_seconds, kib = map(float, done.stderr.split()[-2:])
    elapsed = time.perf_counter() - started
    return SimpleNamespace(stdout=done.stdout, seconds=elapsed, processor_seconds=processor_seconds, memory=kib / 1024)


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


def write_run(run: Path, count: int, n_categories: int) -> None:
    """A run of one round over so many pictures of 576 tokens, four a prompt: all files that the commands below read."""
    from common.records import TokenWriter, tokens_path
    from common.writing import whole_file

    rng = np.random.default_rng(0)
    shared = {
        "codebook_size": "16384",
        "image_tokens": "576",
        "threshold": "0.5",
        "seed": "0",
        "questions": "q",
        "readouts": "r",
    }
    texts = [
        {"id": f"bench-{i:06d}", "prompt": f"a red cube beside thing {i}", "category": f"category {i % n_categories}"}
        for i in range(-(-count // 4))
    ]

    def judged(path: Path, model: str, judge: str, shift: float, pictures: Path | None = None) -> None:
        """A scored file; `pictures`: the file whose pictures these are."""
        with whole_file(path, "w") as lines:
            for row in range(count):
                p = rng.random(6).tolist()
                values = texts[row // 4] | {"candidate": row % 4, "p_yes": 0.8 * p[0] + shift, "coverage": 1.0}
                values |= {"foil": f"a blue cube beside thing {row // 4}", "p_yes_foil": p[1] / 2, "row": row}
                values |= {
                    "p_yes_again": 0.8 * p[2] + shift,
                    "p_yes_foil_again": p[3] / 2,
                    "caption": 10 * shift - 9 * p[4] - 2,
                    "caption_foil": -9 * p[5] - 5,
                }
                lines.write(json.dumps(values) + "\n")
        header = shared | {"kind": "scored", "model": model, "model_hash": model, "judge": judge, "judge_hash": judge}
        pixels = np.random.default_rng([count, model == "new"])
        with whole_file(tokens_path(path)) as tensors:
            writer = TokenWriter(tensors, count, 576, header)
            for start in range(0, count, 1000):
                writer.write(pixels.integers(0, 16384, (min(1000, count - start), 576)))
            writer.close()

    judged(run / "round0" / "heldout.jsonl", "base", "base", 0.1)
    judged(run / "round1" / "heldout.jsonl", "new", "new", 0.15)
    judged(run / "round1" / "rejudged.jsonl", "base", "new", 0.12)
    judged(run / "round1" / "scored.jsonl", "base", "base", 0.1)
    write_rows(run / "round1" / "prompts.jsonl", texts)
    for number in (0, 1):
        labels = ({"id": texts[i // 4]["id"], "candidate": i % 4, "label": int(rng.random() < 0.5)} for i in range(count))
        write_rows(run / f"round{number}" / "labels.jsonl", (row | {"source": "an oracle"} for row in labels))


def over_rows(folder: Path, counts: list[int], n_categories: int) -> list[dict]:
    """The commands that only read and write files, on a run of so many pictures in every scored file: processor seconds."""
    rows: list[dict] = []
    for count in counts:
        run_dir = folder / f"rows{count}"
        before, after = run_dir / "round0", run_dir / "round1"
        write_run(run_dir, count, n_categories)
        pictures = ("--base", before / "heldout.jsonl", "--after", after / "heldout.jsonl")
        compared = ("--before", *pictures[1:], "--labels", before / "labels.jsonl", "--labels-after", after / "labels.jsonl")
        rejudged = ("--rejudged", after / "rejudged.jsonl")
        commands = {
            "curriculum.py": (
                "--prompts",
                after / "prompts.jsonl",
                "--scored",
                after / "scored.jsonl",
                "--out",
                run_dir / "next",
            ),
            "make_pairs.py": ("--scored", after / "scored.jsonl", "--out", after),
            "gate.py": (*pictures, *rejudged),
            "gate.py --last": (*pictures, *rejudged, "--last", *pictures[3:], "--last-rejudged", *rejudged[1:]),
            "analysis/diagnose.py": (*compared, *rejudged),
            "analysis/summary.py": (run_dir,),
            "analysis/report.py": (run_dir,),
        }
        found = {}
        for script, flags in commands.items():
            done = run(script.split()[0], *flags)
            found |= {f"{Path(script).name}, s": done.processor_seconds, f"{Path(script).name}, MB": done.memory}
        rows.append({"pictures": count} | found)
        shutil.rmtree(run_dir)
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
    parser.add_argument("--rows", type=int, nargs="+", help="pictures a scored file (default 10^4, 10^5 and 10^6)")
    parser.add_argument("--categories", type=int, default=10, help="of the prompts of these files (default 10)")
    parser.add_argument("--only-rows", action="store_true", help="nothing but the commands over these files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = args.rows or ([1000, 10_000, 100_000] if args.tiny else [10_000, 100_000, 1_000_000])
        bench.table("scaling, rows", with_exponents(over_rows(folder, pictures, args.categories), "pictures"), args)
        if args.only_rows:
            return
        counts = [4, 40, 400] if args.tiny else [64, 640, 6400]
        bench.table("scaling, prompts", with_exponents(over_prompts(folder, counts, args.device), "prompts"), args)
        scored = folder / f"{counts[1]}-scored.jsonl"
        rows = over_ranks(folder, scored, args.ranks, 10 if args.tiny else 50, args.device)
        bench.table("scaling, ranks", rows, args)
    geometry = bench.GEOMETRIES["tiny"] if args.device == "cpu" else bench.GEOMETRIES[args.geometry]
    rows = over_image_tokens(geometry._replace(layers=2), [6, 12, 18] if args.tiny else [6, 12, 24], args)
    bench.table("scaling, image tokens", with_exponents(rows, "image tokens"), args)


if __name__ == "__main__":
    main()

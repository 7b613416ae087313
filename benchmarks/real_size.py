"""What real_size.sh runs: build a random model, run and measure one command, print all beside the arithmetic of the docs.

python benchmarks/real_size.py build OUT/base janus-pro-1b
python benchmarks/real_size.py step OUT score python score.py ...     appends a line to OUT/steps.jsonl
python benchmarks/real_size.py threshold OUT/scored.jsonl             between a prompt's pictures, so that there is a pair
python benchmarks/real_size.py table OUT
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROGRAM = 0.43e9  # what Python with torch and transformers holds without a model
OFF = 0.15  # a number that differs by more from what was promised is marked


def build(directory: Path, name: str) -> None:
    """Write a random Janus in bfloat16, as the published ones are stored."""
    import bench
    import torch

    geometries = bench.GEOMETRIES | {
        "tiny": bench.GEOMETRIES["tiny"]._replace(side=8),
        "middle": bench.Geometry(8, 1024, 8, 2816, 32000, 16384, 8, 16, 6, 512, 64, 1),
    }
    bench.build(geometries[name], "cpu", torch.bfloat16).save(directory, torch.bfloat16)


def step(out: Path, name: str, command: list[str]) -> int:
    """Run a command; its seconds, peak memory, bytes from the disk and bytes left in OUT as a line of OUT/steps.jsonl."""
    before = disk_bytes(out)
    forget_pages(out)
    print(f"{name:<8}", end="", flush=True)
    started = time.perf_counter()
    with open(out / "log", "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is over, but /proc still knows it
        seconds = time.perf_counter() - started
        io = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
        _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        print(f"failed with exit code {code}; the end of {out / 'log'}:")
        print("\n".join((out / "log").read_text().splitlines()[-8:]))
        return 1
    row: dict[str, Any] = {"step": name, "seconds": round(seconds, 1), "peak_bytes": usage.ru_maxrss * 1024}
    row |= {"read_bytes": int(io["read_bytes"]), "left_bytes": disk_bytes(out) - before}
    metrics = out / name / "training" / "metrics.jsonl"
    if metrics.is_file():  # on a GPU the allocator's peak, else that of the process until then
        row["training_bytes"] = 1e9 * json.loads(metrics.read_text().splitlines()[-1])["peak_memory_gb"]
    with open(out / "steps.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{seconds:7.1f} s, {row['peak_bytes'] / 1e9:.2f} GB")
    return 0


def disk_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file() and file.name != "log")


def forget_pages(directory: Path) -> None:
    """Have the next command read its files from the disk, as the first one on a machine does."""
    for file in directory.rglob("*.safetensors"):
        with open(file, "rb+") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def threshold(scored: Path) -> float:
    """The middle between the two pictures of the prompt whose answers are furthest apart."""
    answers: dict[str, list[float]] = {}
    for line in scored.read_text().splitlines():
        row = json.loads(line)
        answers.setdefault(row["id"], []).append(row["p_yes"])
    low, high = max((sorted(values) for values in answers.values()), key=lambda values: values[1] - values[0])
    return (low + high) / 2


def promised(out: Path) -> dict[str, dict[str, float]]:
    """What docs/real-models.md says of each step ("Hours and memory"), in bytes of memory, from the disk, and left on it."""
    from safetensors import safe_open

    config = json.loads((out / "base" / "config.json").read_text())
    text, sizes = config["text_config"], {}
    for file in (out / "base").glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            sizes |= {name: math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    weights = sum(sizes.values())
    frozen = sum(size for name, size in sizes.items() if ".language_model.layers." in name and name.endswith("_proj.weight"))
    layers, width, mlp = text["num_hidden_layers"], text["hidden_size"], text["intermediate_size"]
    vision = config["vision_config"]
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 64
    cache = 4 * 2 * tokens * 2 * layers * width * 4  # 4 pictures, guided: keys and values in float32
    adapters = 16 * 16 * layers * (4 * 2 * width + 3 * (width + mlp))  # 16 bytes each, rank 16
    layer = tokens * (2 * (40 * width + 8 * mlp) + 4 * layers * width)  # one recomputed layer, and every layer's input
    logits = 4 * tokens * config["vq_config"]["num_embeddings"] * 4  # and their gradients, in float32
    loading = 4 * weights + 2 * weights  # the model, and the file's pages until it is whole
    training = 4 * weights - 2 * frozen + adapters
    return {
        "build": {"left": 2 * weights},
        "score": {"peak": PROGRAM + max(loading, 4 * weights + cache), "read": 2 * weights},
        "sft": {"peak": PROGRAM + max(loading, training + layer + logits), "read": 2 * weights, "left": 4 * weights},
        "dpo": {"peak": PROGRAM + max(loading, training + 2 * (layer + logits)), "read": 2 * weights, "left": 4 * weights},
    }


def table(out: Path) -> None:
    """Print what was measured as a markdown table; numbers that are OFF are marked with what was promised."""
    wanted = promised(out)
    print("\n| step | seconds | peak memory, GB | promised | from the disk, GB | promised | left on it, GB | promised |")
    print("|---|---|---|---|---|---|---|---|")
    for row in map(json.loads, (out / "steps.jsonl").read_text().splitlines()):
        cells = [row["step"], f"{row['seconds']:.0f}"]
        for key in ("peak", "read", "left"):
            found, promise = row[f"{key}_bytes"] / 1e9, wanted.get(row["step"], {}).get(key, 0) / 1e9
            off = promise and abs(found / promise - 1) > OFF
            cells += [f"**{found:.2f}**" if off else f"{found:.2f}", f"{promise:.2f}" if promise else "-"]
        print("| " + " | ".join(cells) + " |")
    print(
        f"\nBold: more than {OFF:.0%} off. A CPU's numbers are promised; on a GPU see training_bytes in {out / 'steps.jsonl'}."
    )


def main(argv: list[str]) -> int:
    what, path = argv[0], Path(argv[1])
    if what == "build":
        build(path, argv[2])
    elif what == "step":
        return step(path, argv[2], argv[3:])
    elif what == "threshold":
        print(threshold(path))
    else:
        table(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

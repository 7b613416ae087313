"""Sampling: ours against transformers' own `generate(generation_mode="image")`, same weights, same prompts, greedy.

    python benchmarks/sampling.py --tiny
    python benchmarks/sampling.py --geometry janus-pro-1b --batches 16 128 --theirs 1 8 16 64

The floor of a step is the time to read the weights (or to do the arithmetic, whichever is longer) plus the time to read the
used part of the cache, on one H200; it is stated for GPU runs only.
"""

import sys

import bench
import torch


def floor_s(geometry: bench.Geometry, n: int, prompt: int) -> float:
    """Seconds for n guided pictures at the limits of an H200, in bfloat16: 2 n rows, T steps, half the cache on average."""
    weights = geometry.layer_weights + 2 * geometry.width * geometry.codebook  # the head is read, and multiplied with, too
    rows = 2 * n
    read = 2 * weights / bench.H200["bytes_per_s"]
    multiply = 2 * weights * rows / bench.H200["flops_per_s"]
    cache = 2 * rows * (prompt + geometry.image_tokens / 2) * geometry.cache_numbers / bench.H200["bytes_per_s"]
    return geometry.image_tokens * (max(read, multiply) + cache)


def check_equal(policy, ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Share of equal tokens: all of them in float32; in bfloat16 near ties fall either way, and what follows differs."""
    same = (ours == theirs[:, -ours.shape[1] :]).float().mean().item()
    if policy.model.dtype == torch.float32 and same < 1:
        sys.exit(f"the tokens differ: {same:.3f} are equal")
    return same


def measure(geometry: bench.Geometry, n: int, compare: bool, args) -> dict:
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    policy = bench.build(geometry, args.device, dtype)
    prompts = bench.prompts(policy, n)
    ids = torch.tensor([policy.prompt_ids(prompt) for prompt in prompts], device=args.device)
    drawn = {}

    def ours() -> None:
        drawn["ours"] = policy.sample(prompts, 1, 5.0, 0.0, batch=n)[:, 0]

    def theirs() -> None:
        mask = torch.ones_like(ids)
        drawn["theirs"] = policy.model.generate(
            ids, attention_mask=mask, generation_mode="image", do_sample=False, guidance_scale=5.0
        )

    seconds = bench.alternate({"ours": ours} | ({"theirs": theirs} if compare else {}), args.repeats, args.device)
    row = {
        "layers": geometry.layers,
        "width": geometry.width,
        "codebook": geometry.codebook,
        "image tokens": geometry.image_tokens,
        "batch": n,
        "ours, images/s": n / seconds["ours"],
        "generate, images/s": n / seconds["theirs"] if compare else None,
        "ratio": seconds["theirs"] / seconds["ours"] if compare else None,
        "tokens equal": check_equal(policy, drawn["ours"], drawn["theirs"]) if compare else None,
    }
    if args.device == "cuda":
        floor = floor_s(geometry, n, ids.shape[1])
        row |= {"floor, images/s": n / floor, "of the floor": floor / seconds["ours"], "peak GB": bench.peak_gb(args.device)}
    return row


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", help="pictures at a time (default 1 8 64; tiny: see the table)")
    parser.add_argument("--theirs", type=int, nargs="*", help="batches at which generate runs too (default: all)")
    args = parser.parse_args()
    geometry = bench.GEOMETRIES[args.geometry]
    if args.tiny:
        small = geometry._replace(side=12)
        cases = [(geometry._replace(layers=2), 1), (small, 4), (small._replace(codebook=16384), 4)]
    else:
        cases = [(geometry, n) for n in args.batches or (1, 8, 64)]
    rows = (measure(case, n, args.theirs is None or n in args.theirs, args) for case, n in cases)
    bench.table("sampling", rows, args)


if __name__ == "__main__":
    main()

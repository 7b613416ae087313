"""One call on one GPU that tells the truth: is it right, how fast against the card's own limits, where does the time go.

    OUT=results BUDGET=520 python benchmarks/gpu.py
    python benchmarks/gpu.py --out results --tiny        every stage at tiny size, on a CPU, under a minute

One process, random weights, seed 0. Stages run in the order of how much they tell. One that fails is recorded with its last
frames and the next one runs; one that would not fit into what is left of the budget is skipped, and named. OUT and BUDGET may
be flags as well (--out, --budget); torch's import comes before the budget begins. Writes findings.jsonl, a line a finding as
it is made; table.md, anew after every stage, ready for README.md; profiles.txt, the profiler's tables. Exit code 1 if a stage
failed.

Limits are what this card was measured to do in a copy of 1 GB and in a matrix product of width 8,192. Targets are for an H100
or H200 in bfloat16, and not judged at tiny size. Attention by cuDNN is off on both sides, as model.load has it.
"""

import argparse
import math
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import bench
import checks
import judging
import masked_sampling
import numpy as np
import sampling
import torch
import training
from findings import Profile, Report, peak, seconds_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import families.autoregressive
from common.sharding import compute_type

AT_LEAST = lambda least: (least, math.inf)
WITHIN_A_TENTH = (0.9, 1.1)


class Sizes(NamedTuple):
    """What the stages run: geometries by their names, pictures at a time."""

    small: str
    large: str
    small_batches: tuple[int, ...]
    large_batches: tuple[int, ...]
    beside: int  # the batch at which transformers draws too
    judged: int
    trained: int
    pairs: int
    lora_pairs: int
    showo: str
    showo_side: int
    showo_batch: int


REAL = Sizes("janus-pro-1b", "janus-pro-7b", (16, 128, 1), (16, 48), 16, 34, 8, 4, 4, "show-o", 16, 16)
TINY = Sizes("tiny", "tiny", (2, 1), (2,), 2, 2, 2, 1, 1, "tiny", 4, 2)


def sizes(report: Report) -> Sizes:
    return TINY if report.tiny else REAL


def geometry_of(name: str) -> bench.Geometry:
    """At tiny size less than the other benchmarks' tiny: what counts is that every line runs."""
    tiny = {"layers": 2, "width": 128, "mlp": 352, "side": 6, "vision_layers": 1} if name == "tiny" else {}
    return bench.GEOMETRIES[name]._replace(**tiny)


# ---------------------------------------------------------------------------------------------------------------------
# Stages


def machine(report: Report) -> None:
    limits = bench.limits(report.device)
    profile = Profile(report, "nothing")  # the first profile of a process sets CUPTI up, which recordings must find there
    profile.start()
    profile.profiler.stop()
    report.tell("matrix products", limits.flops_per_s / 1e12, "TFLOP/s")
    report.tell("copy, read and written", limits.bytes_per_s / 1e12, "TB/s")


def correct(report: Report) -> None:
    missed = []
    for _, findings in checks.every(report.device):
        for one in findings:
            report.tell(one.what, one.found, target=(one.least, one.most))
        missed += checks.misses(findings)
    assert not missed, "; ".join(missed)


def draws(report: Report, name: str, batches: tuple[int, ...], target: float) -> Any:
    """Draw pictures, tell the share of the floor and the kernels of a step; returns the model."""
    geometry = geometry_of(name)
    policy = bench.build(geometry, report.device, report.dtype)
    report.tell(f"{name}: weights", sum(p.nbytes for p in policy.model.parameters()) / 1e9, "GB")
    for n in batches:
        prompts = bench.prompts(policy, n)
        peak(report)
        first, seconds = seconds_of(report, lambda: policy.sample(prompts, 1, 5.0, 1.0, batch=n))
        floor = n / sampling.floor_s(geometry, n, len(policy.prompt_ids(prompts[0])), bench.limits(report.device))
        wanted = AT_LEAST(target) if n == max(batches) else None
        more = {"ms_a_step": 1e3 * seconds / geometry.image_tokens, "first_s": first, "peak_gb": peak(report)}
        report.tell(f"drawing {name}, {n} at a time", n / seconds, "images/s", floor, "floor", wanted, **more)
        policy.sample(
            prompts, 1, 5.0, 1.0, batch=n, advance=Profile(report, f"a step of {name}, {n} at a time", policy.image_tokens)
        )
    return policy


def drawn_at(report: Report, name: str, n: int) -> float:
    """Images/s of ours in an earlier stage."""
    found = [row["found"] for row in report.rows if row["what"] == f"drawing {name}, {n} at a time"]
    assert found, f"drawing {name}, {n} at a time, was not measured"
    return found[0]


def small_draws(report: Report) -> None:
    draws(report, sizes(report).small, sizes(report).small_batches, 0.65)


def beside_generate(report: Report, name: str, target: float) -> None:
    n, policy = sizes(report).beside, bench.build(geometry_of(name), report.device, report.dtype)
    ids = torch.tensor([policy.prompt_ids(prompt) for prompt in bench.prompts(policy, n)], device=report.device)
    _, seconds = seconds_of(report, lambda: sampling.generate(policy, ids, 5.0), 0)
    report.tell(
        f"{name}, {n} at a time: ours", drawn_at(report, name, n), "images/s", n / seconds, "generate", AT_LEAST(target)
    )


def beside_compiled(report: Report, name: str) -> None:
    n, policy = sizes(report).beside, bench.build(geometry_of(name), report.device, report.dtype)
    ids = torch.tensor([policy.prompt_ids(prompt) for prompt in bench.prompts(policy, n)], device=report.device)
    loop = sampling.CompiledLoop(policy, n, ids.shape[1], 5.0)
    first, seconds = seconds_of(report, lambda: loop.draw(ids, policy.unconditional(ids)), 3)
    ours, theirs = (
        policy.sample(bench.prompts(policy, n), 1, 5.0, 0.0, batch=n)[:, 0],
        loop.draw(ids, policy.unconditional(ids)),
    )
    same, start = checks.equal(ours, theirs), checks.equal(ours[:, 0], theirs[:, 0])
    more = {"first_s": first, "tokens_equal": same, "first_tokens_equal": start}  # near ties fall either way in bfloat16
    report.tell(
        f"{name}, {n} at a time: ours", drawn_at(report, name, n), "images/s", n / seconds, "compiled", AT_LEAST(1.5), **more
    )


def attention(report: Report) -> None:
    """Our shapes by every kernel: decoding (one query, a mask for each row) and judging (one mask).

    cuDNN builds a plan at the first call. Flash takes no mask: its rows begin at place 0 and it is told their lengths.
    """
    shapes = {"decode 1B, 128": (256, 16, 1, 320, 640), "decode 1B, 16": (32, 16, 1, 320, 640)}
    shapes |= {"decode 1B, 1": (2, 16, 1, 320, 640), "decode 7B, 48": (96, 32, 1, 320, 640)}
    shapes |= {"judge 7B": (32, 32, 90, 700, 704), "judge 7B, odd": (32, 32, 78, 689, 689)}
    ways = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
    new = {"device": report.device, "dtype": report.dtype}
    for name, (rows, heads, length, end, room) in ({"decode": (4, 2, 1, 64, 128)} if report.tiny else shapes).items():
        query = torch.randn(rows, heads, length, 128, **new)
        keys, values = (torch.randn(rows, heads, room, 128, **new)[:, :, :end] for _ in range(2))
        mask = torch.zeros(rows if length == 1 else 1, 1, length, -(-room // 8) * 8, **new)[..., :end]
        mask[..., :5] = -math.inf
        few = [tensor[:4].float() for tensor in (query, keys, values)]
        exact = scaled_dot_product_attention(*few, attn_mask=mask[:4].float())
        read = 2 * rows * heads * end * 128 * query.itemsize
        runs = {way: lambda: scaled_dot_product_attention(query, keys, values, attn_mask=mask) for way in ways}
        if length == 1 and report.device == "cuda":
            k, v = (torch.randn(rows, room, heads, 128, **new) for _ in range(2))
            starts = torch.arange(rows + 1, device=report.device, dtype=torch.int32)
            used = torch.full((rows,), end, device=report.device, dtype=torch.int32)
            packed = (query[:, :, 0], k.flatten(0, 1), v.flatten(0, 1), starts, starts * room, 1, end, 0.0, False, False)
            runs["flash, lengths"] = lambda: torch.ops.aten._flash_attention_forward(*packed, scale=128**-0.5, seqused_k=used)[
                0
            ]
        for way, run in runs.items():
            try:
                with sdpa_kernel(ways.get(way, SDPBackend.FLASH_ATTENTION)):
                    first, seconds = seconds_of(report, run, 11)
                    answer = run()[:4].float()
            except RuntimeError as error:  # a kernel that does not take this shape, or is not in this build
                report.write(what=f"attention, {name}, {way}", refused=str(error)[:200])
                continue
            wanted = exact
            if way == "flash, lengths":
                lengths = [tensor[:4, :end].transpose(1, 2).float() for tensor in (k, v)]
                wanted = scaled_dot_product_attention(few[0], *lengths)[:, :, 0]
            more = {"first_ms": 1e3 * first, "largest_error": (answer - wanted).abs().max().item()}
            limit = bench.limits(report.device).bytes_per_s / 1e12
            report.tell(f"attention, {name}, {way}", read / seconds / 1e12, "TB/s", limit, "copy", us=1e6 * seconds, **more)


def judges(report: Report, name: str, policy: Any = None) -> None:
    """Three questions a picture; what the first batch of a new width costs; the VQ decoder in both layouts."""
    geometry, n = geometry_of(name), sizes(report).judged
    policy = policy or bench.build(geometry, report.device, report.dtype)
    question = judging.question_like(policy, 1)
    asked = [[question, question.replace("red", "blue"), question.replace("red", "green")]] * n
    size = policy.model.config.vision_config.image_size
    pictures = torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, device=report.device)
    tokens = torch.randint(0, geometry.codebook, (n, geometry.image_tokens), device=report.device)
    peak(report)
    first, seconds = seconds_of(report, lambda: policy.judge(pictures, asked, n), 4)
    flops = judging.flops(geometry, geometry.image_tokens + judging.TEXT + 2 * len(policy.question_ids(question)[1]))
    floor, more = bench.limits(report.device).flops_per_s / flops, {"first_s": first, "peak_gb": peak(report)}
    report.tell(f"judging {name}, three questions", n / seconds, "images/s", floor, "floor", AT_LEAST(0.5), **more)
    for words in (2, 5, 11):
        first, _ = seconds_of(
            report, lambda: policy.judge(pictures, [[q + " red" * words for q in row] for row in asked], n), 1
        )
        report.tell(f"judging {name}, first batch with {words} more words", first, "s", seconds, "later batches")
    for layout in (torch.contiguous_format, torch.channels_last):
        policy.model.model.vqmodel.to(memory_format=layout)
        _, seconds = seconds_of(report, lambda: policy.decode(tokens), 4)
        report.tell(f"decoding {name}, {str(layout).removeprefix('torch.')}", n / seconds, "images/s")
    profile = Profile(report, f"judging {n} with {name}")
    profile.start()
    policy.judge(pictures, asked, n)
    profile.stop(1)


def large_draws(report: Report) -> None:
    judges(report, sizes(report).large, draws(report, sizes(report).large, sizes(report).large_batches, 0.65))


def trains(report: Report, name: str, method: str, n: int, target: float, **flags: Any) -> None:
    """Whole optimizer steps of sft.py or dpo.py: the share of the card's arithmetic, and the memory that was foreseen."""
    geometry, limits = geometry_of(name), bench.limits(report.device)
    args = Namespace(pairs=n, gradient_checkpointing=False, lora_rank=0, compile=False, device=report.device)
    vars(args).update(flags)
    tokens = np.random.default_rng(0).integers(0, geometry.codebook, (2 * n, geometry.image_tokens)).astype(np.uint16)
    step = training.our_step(lambda dtype: bench.build(geometry, report.device, dtype), tokens, args, method)
    peak(report)
    first, seconds = seconds_of(report, step, 3)
    pictures, weights = n * (2 if method == "dpo" else 1), list(step.policy.model.parameters())
    flops = training.flops_a_picture(geometry, training.PROMPT + geometry.image_tokens - 1, 4 if args.lora_rank else 6)
    what, most = f"{method} of {name}{''.join(f', {key} {value}' for key, value in flags.items())}", peak(report)
    floor = limits.flops_per_s / flops
    report.tell(what, pictures / seconds, "images/s", floor, "floor", AT_LEAST(target), first_s=first, peak_gb=most)
    if most and not flags:
        held = sum(weight.nbytes for weight in weights) + 14 * sum(weight.numel() for weight in weights if weight.requires_grad)
        foreseen = (held + pictures * step.policy.activation_bytes) / 1e9
        report.tell(f"{what}: peak memory foreseen", foreseen, "GB", most, "allocator", WITHIN_A_TENTH)
    profile = Profile(report, f"a step of {what}")
    profile.start()
    step()
    profile.stop(1)


def activations(report: Report, name: str, policy: Any, n: int) -> None:
    """What a forward pass keeps for its backward pass, by the allocator, beside what the model foresees."""
    policy.trainable_parameters()
    policy.branch.train()
    tokens = torch.randint(0, policy.codebook_size, (n, policy.image_tokens), device=report.device)
    allocated = torch.cuda.memory_allocated if report.device == "cuda" else lambda: 0
    with compute_type(torch.device(report.device)):
        before = allocated()
        logps = policy.logps(bench.prompts(policy, n), tokens, [0] * n)
        copies = 2 * sum(weight.numel() for block in policy.blocks for weight in block.parameters())  # in bfloat16, kept too
        kept = (allocated() - before - copies) / 1e9
    if report.device == "cuda":
        foreseen = n * policy.activation_bytes / 1e9
        report.tell(f"{name}: activations foreseen, {n} pictures", foreseen, "GB", kept, "allocator", WITHIN_A_TENTH)
    assert logps.requires_grad


def memory(report: Report) -> None:
    """Estimates beside the allocator: what training keeps, what a picture in flight takes; and drawing at the chosen batch."""
    name = sizes(report).small
    activations(report, name, bench.build(geometry_of(name), report.device, torch.float32), sizes(report).pairs)
    policy = bench.build(geometry_of(name), report.device, report.dtype)
    peaks, few, prompt = [], 2 if report.tiny else 8, bench.prompts(policy, 1)
    with mock.patch.object(families.autoregressive, "pictures_that_fit", lambda *given: given[-2]):
        foreseen = policy.drawing_batch(prompt, 5.0)
    for n in (few, 5 * few):
        peak(report)
        policy.sample(prompt, n, 5.0, 1.0, batch=n)
        peaks.append(peak(report))
    if report.device == "cuda":
        each = (peaks[1] - peaks[0]) / (4 * few)
        report.tell(f"{name}: a picture in flight, foreseen", foreseen / 1e9, "GB", each, "allocator", WITHIN_A_TENTH)
    chosen = few if report.tiny else policy.drawing_batch(prompt, 5.0)
    _, seconds = seconds_of(report, lambda: policy.sample(prompt, chosen, 5.0, 1.0, batch=chosen), 0)
    report.tell(f"drawing {name}, at the batch chosen for it", chosen, "pictures", seconds=seconds, peak_gb=peak(report))


@torch.no_grad()
def noise(report: Report) -> None:
    """How far log-probs of the same pictures are apart in another composition of the pass: what dpo.py sees at step 0.

    The head is scaled until logits are as far apart as a trained model's: a random one's are too small to be rounded much.
    """
    policy = bench.build(geometry_of(sizes(report).small), report.device, torch.float32)
    tokens = torch.randint(0, policy.codebook_size, (8, policy.image_tokens), device=report.device)
    prompts, longer = bench.prompts(policy, 8), bench.prompts(policy, 4, 70)
    last = [module for module in policy.branch.generation_head.modules() if isinstance(module, torch.nn.Linear)][-1]
    with compute_type(torch.device(report.device)):
        last.weight.mul_(3 / policy.logps(prompts[:2], tokens[:2]).std())
        alone = policy.logps(prompts[:2], tokens[:2])
        among = policy.logps([*prompts, *longer], torch.cat([tokens, tokens[:4]]))[:2]
    apart = alone - among
    more = {"largest": apart.abs().max().item(), "spread_of_logps": alone.std().item()}
    report.tell("log-probs in another pass, mean difference", apart.abs().mean().item(), "nats a token", **more)
    report.tell("log-probs in another pass, of a picture", apart.sum(-1).abs().mean().item(), "nats")


def showo(report: Report) -> None:
    """Show-o's drawing, the whole sequences beside it; then a step of training and what it keeps."""
    geometry, n, side = masked_sampling.GEOMETRIES[sizes(report).showo], sizes(report).showo_batch, sizes(report).showo_side
    limits = bench.limits(report.device)
    make = lambda dtype: masked_sampling.build(geometry, side, report.device, dtype)
    policy = make(report.dtype)
    prompts = bench.prompts(policy, n, 20)
    _, seconds = seconds_of(report, lambda: policy.sample(prompts, 1, 5.0, 0.0, batch=n))
    passes = policy.steps * 2 * masked_sampling.flops_a_row(geometry, policy.image_tokens + 2)
    most = peak(report)
    report.tell("drawing Show-o", n / seconds, "images/s", limits.flops_per_s / passes, "floor", peak_gb=most)
    with torch.no_grad():
        _, theirs = seconds_of(report, lambda: masked_sampling.whole_sequences(policy, prompts, 5.0), 0)
    report.tell("drawing Show-o: ours", n / seconds, "images/s", n / theirs, "whole sequences")
    policy.sample(prompts, 1, 5.0, 0.0, batch=n, advance=Profile(report, f"a pass of Show-o, {n} at a time", policy.steps))
    n = -(-sizes(report).pairs // 2)  # a picture is eight rows
    activations(report, "Show-o", make(torch.float32), n)
    args = Namespace(pairs=n, gradient_checkpointing=False, lora_rank=0, compile=False, device=report.device)
    tokens = np.random.default_rng(0).integers(0, 2**geometry.bits, (2 * n, side**2)).astype(np.uint16)
    step = training.our_step(make, tokens, args, "sft")
    first, seconds = seconds_of(report, step, 3)
    each = 3 * step.policy.mask_draws * masked_sampling.flops_a_row(geometry, training.PROMPT + side**2 + 2)
    report.tell(
        "sft of Show-o", n / seconds, "images/s", limits.flops_per_s / each, "floor", first_s=first, peak_gb=peak(report)
    )


def compiled_training(report: Report) -> None:
    with torch.compiler.set_stance("force_eager" if report.tiny else "default"):  # a CPU's compiler takes a minute
        trains(report, sizes(report).small, "sft", sizes(report).trained, 0.4, compile=True)


def with_cudnn(report: Report) -> None:
    """Drawing with cuDNN's attention allowed, as torch has it by default; the last stage, for it stays allowed."""
    name = sizes(report).small
    for n in sizes(report).small_batches[:2]:
        policy = bench.build(geometry_of(name), report.device, report.dtype)
        torch.backends.cuda.enable_cudnn_sdp(True)
        prompts = bench.prompts(policy, n)
        first, seconds = seconds_of(report, lambda: policy.sample(prompts, 1, 5.0, 1.0, batch=n))
        without = drawn_at(report, name, n)
        report.tell(f"{name}, {n}, cuDNN's attention", n / seconds, "images/s", without, "without", first_s=first)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    out = Path(os.environ.get("OUT") or "benchmarks/results/gpu")
    parser.add_argument("--out", type=Path, default=out, help="default OUT, or benchmarks/results/gpu")
    parser.add_argument(
        "--budget", type=float, default=float(os.environ.get("BUDGET") or 540), help="seconds (default BUDGET, or 540)"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="every stage at tiny size, on a CPU; so it is where there is no GPU"
    )
    args = parser.parse_args()
    os.environ |= {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}  # torch: CUDA graphs do not survive its teardown
    tiny = args.tiny or not torch.cuda.is_available()
    report = Report(args.out, args.budget, "cpu" if tiny else "cuda", tiny)
    s = sizes(report)
    adapters = {"lora_rank": 64, "gradient_checkpointing": True}
    for name, stage, seconds in (  # about what each takes on an H100, by arithmetic
        ("machine", machine, 10),
        ("correct", correct, 40),
        ("draw 1B", small_draws, 60),
        ("generate 1B", lambda report: beside_generate(report, s.small, 5), 25),
        ("compiled 1B", lambda report: beside_compiled(report, s.small), 75),
        ("attention", attention, 25),
        ("judge 1B", lambda report: judges(report, s.small), 15),
        ("train 1B", lambda report: trains(report, s.small, "sft", s.trained, 0.4), 25),
        ("memory", memory, 35),
        ("noise", noise, 8),
        ("draw and judge 7B", large_draws, 75),
        ("train 7B with LoRA", lambda report: trains(report, s.large, "dpo", s.lora_pairs, 0.35, **adapters), 40),
        ("Show-o", showo, 40),
        ("dpo 1B", lambda report: trains(report, s.small, "dpo", s.pairs, 0.4), 20),
        ("generate 7B", lambda report: beside_generate(report, s.large, 2), 35),
        ("compiled training 1B", compiled_training, 75),
        ("compiled 7B", lambda report: beside_compiled(report, s.large), 100),
        ("cuDNN", with_cudnn, 45),
    ):
        report.run(name, stage, seconds)
    print(report.table())
    print(report.out / "table.md")
    return int(any(how.startswith("failed") for how in report.ended.values()))


if __name__ == "__main__":
    sys.exit(main())

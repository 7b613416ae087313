"""Whether a GPU computes what a CPU computes: the checks that gpu.py begins with and tests/test_gpu.py makes.

Each takes a device and returns its findings, a number beside what is allowed, with the reason for every tolerance on its line.
They use the shipped tiny models, of which the Tar has grouped heads and biases, and for recorded steps a random Janus whose
pictures need several recordings. On a CPU they compare it with itself: that shows that the checks run, no more.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import bench
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from model import load

SHIPPED = {family: bench.ROOT / "shapes" / name for family, name in (("janus", "base"), ("showo", "showo"), ("tar", "tar"))}
PROMPTS = ["a red circle", "a blue square above a green cross and a yellow ring", "two red squares"]
QUESTIONS = [f"Does this image describe {prompt}?" for prompt in PROMPTS]  # three lengths: padded and masked


class Finding(NamedTuple):
    what: str
    found: float
    least: float
    most: float

    @property
    def allowed(self) -> bool:
        return self.least <= self.found <= self.most  # NaN is not


def equal(a: Tensor, b: Tensor) -> float:
    """The share of equal numbers."""
    return (a.cpu() == b.cpu()).double().mean().item()


def both(family: str, device: str) -> tuple[Any, Any]:
    """A shipped model in float32 on the CPU, and on the device."""
    return load(SHIPPED[family], "cpu"), load(SHIPPED[family], device, torch.float32)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Without TensorFloat-32, which cuDNN's convolutions use by default and which keeps ten bits."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def tokens(family: str, device: str) -> list[Finding]:
    """Pictures in float32, greedy and drawn, on the device and the CPU; and again, all replayed where steps are recorded."""
    cpu, there = both(family, device)
    found = []
    for temperature in (0.0, 1.0):
        flags = (PROMPTS, 4, 3.0, temperature, [5, 6, 7], 5)
        first, again = there.sample(*flags), there.sample(*flags)
        # All of them: rounding in the last bits moves a choice across its border about once in 10^5 tokens; these are 108.
        found.append(
            Finding(f"{family}: tokens as on a CPU, temperature {temperature:g}", equal(cpu.sample(*flags), first), 1, 1)
        )
        found.append(Finding(f"{family}: drawn twice, temperature {temperature:g}", equal(first, again), 1, 1))  # same kernels
    return found


def answers(family: str, device: str) -> list[Finding]:
    """P(yes) and coverage of questions of several lengths, and log-probs of captions, in float32."""
    cpu, there = both(family, device)
    images = cpu.sample(PROMPTS, 2, 3.0, 1.0, [5, 6, 7]).flatten(0, 1)
    asked, captions = [QUESTIONS] * len(images), [PROMPTS] * len(images)
    with full_float32():
        here, other = (policy.judge_with_captions(images.to(policy.device), asked, captions, 4) for policy in (cpu, there))
    names = ("P(yes)", "coverage", "log p(caption)")
    # A byte in thousands of a decoded picture may round the other way; half of them moved P(yes) by .0005 on average
    # (docs/real-models.md). A caption's log-prob adds up some tens of tokens, each with float32's 1e-5.
    allowed = dict(zip(names, (1e-3, 1e-3, 1e-2), strict=True))
    return [
        Finding(f"{family}: {name} as on a CPU, largest difference", (a.cpu() - b.cpu()).abs().max().item(), 0, allowed[name])
        for name, a, b in zip(names, here, other, strict=True)
    ]


def gradients(policy: Any, images: Tensor, low: bool) -> tuple[Tensor, Tensor]:
    """Log-probs of pictures (B, T) and the gradient of their sum, one long float64 vector, on the CPU; low: in bfloat16."""
    trained = policy.trainable_parameters()
    policy.model.zero_grad(set_to_none=True)
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=low):
        logps = policy.logps(PROMPTS, images, [1, 2, 3])
    logps.sum().backward()
    return logps.detach().cpu(), torch.cat([parameter.grad.flatten().cpu().double() for parameter in trained.values()])


def training(family: str, device: str) -> list[Finding]:
    """Log-probs and gradients in float32 on the device and the CPU, and in bfloat16 on the device against float32 there."""
    cpu, there = both(family, device)
    images = cpu.sample(PROMPTS, 1, 3.0, 1.0, [5, 6, 7])[:, 0]
    with full_float32():
        here, full = gradients(cpu, images, False), gradients(there, images, False)
    rounded = gradients(there, images, True)
    found = []
    for name, (a, b), nats, cosine, stretched in (
        # float32: sums in another order, 1e-7 of logits of about 10 in each of some tens of roundings.
        ("float32 as on a CPU", (here, full), 1e-4, 1 - 1e-6, 1e-3),
        # bfloat16: 8 bits, so the head's logits of 4 to 8 are 1/64 off at most: .003, .004 and .005 on average on a CPU, whose
        # cosines are .9997, .99996 and .99993 and lengths .991, .998 and .996; a GPU's autocast rounds at other places.
        ("bfloat16 as float32", (full, rounded), 0.015, 0.998, 0.03),
    ):
        apart = (a[0] - b[0]).abs().mean().item()
        found.append(Finding(f"{family}: log-probs in {name}, mean difference in nats", apart, 0, nats))
        found.append(
            Finding(f"{family}: gradient in {name}, cosine", cosine_similarity(a[1], b[1], 0).item(), cosine, 1 + 1e-9)
        )
        length = (b[1].norm() / a[1].norm()).item()
        found.append(Finding(f"{family}: gradient in {name}, length", length, 1 - stretched, 1 + stretched))
    return found


@contextlib.contextmanager
def eager(policy: Any) -> Iterator[None]:
    """Every step of drawing run, and none recorded, as on a CPU."""
    with mock.patch.object(policy, "record", False):
        yield


def graph_launches(run: Any) -> int:
    """How many recorded graphs a function launches."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.key == "cudaGraphLaunch")


def recorded(device: str) -> list[Finding]:
    """Recorded steps against eager ones, float32, of new pictures each time: a recording that does nothing shows old ones."""
    geometry = bench.GEOMETRIES["tiny"]._replace(layers=2, width=128, mlp=352, side=10, vision_layers=1)
    policy = bench.build(geometry, device, torch.float32)
    prompts = bench.prompts(policy, 3)
    found, drawn = [], {}
    for temperature in (0.0, 1.0):
        draws = [
            (prompts[::-1] if turned else prompts, 2, 3.0, temperature, [turned, turned + 2, turned + 4], 3)
            for turned in (0, 1)
        ]
        drawn[temperature] = torch.stack([policy.sample(*draw) for draw in draws])
        with eager(policy):
            wanted = torch.stack([policy.sample(*draw) for draw in draws])
        # All of them: other kernels of the same shapes' last bits move a choice once in 10^5 tokens; these are 1,200.
        found.append(Finding(f"recorded as eager, temperature {temperature:g}", equal(drawn[temperature], wanted), 1, 1))
    different = 1 - equal(*drawn[1.0])
    found.append(Finding("other seeds draw other tokens", different, 0.9, 1))  # of 1,024 codes one in a few hundred is the same
    if device == "cuda":
        steps = geometry.image_tokens - 1
        launched = graph_launches(lambda: policy.sample(prompts, 1, 3.0, 1.0, batch=3)) / steps
        # The first step of each of the few kinds, a kind for every 64 tokens, runs before it is recorded; none would be 0.
        found.append(Finding("steps launched as recorded graphs", launched, 0.9, 1.1))
    return found


def every(device: str) -> Iterator[tuple[str, list[Finding]]]:
    """All checks, one after the other: (its name, its findings)."""
    yield "recorded", recorded(device)
    for family in SHIPPED:
        for check in (tokens, answers, training):
            yield f"{check.__name__}, {family}", check(family, device)


def misses(findings: list[Finding]) -> list[str]:
    """What is not as it must be, a line each."""
    return [
        f"{one.what}: {one.found:.6g}, allowed {one.least:g} to {one.most:g}"
        if math.isfinite(one.found)
        else f"{one.what}: NaN"
        for one in findings
        if not one.allowed
    ]

"""Low-rank adaptation: train a small addition to every linear layer instead of the layer (Hu et al. 2021, arXiv 2106.09685).

add_adapters(policy.blocks, rank=64, alpha=128, seed=0)     # y = W x + (alpha / rank) B A x, with W frozen
... train the parameters named *.lora_a and *.lora_b ...
adapters(model)["...q_proj"].merged(stored_weight)          # W + (alpha / rank) B A, of an ordinary checkpoint again
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Widened(torch.autograd.Function):
    """x W^T + b with a frozen W that is kept in bfloat16, in float32: what the same W in float32 gives, bit for bit.

    Of all W only one at a time is there in float32; autograd by itself would keep each from the forward pass to the backward.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = context.saved_tensors
        return gradients[0] @ weight.to(gradients[0].dtype), None, None


class Adapted(nn.Linear):
    """A linear layer with an addition of low rank. A is random and B is 0, so at first nothing is added.

    The layer's own weight, which no longer learns, is kept in bfloat16 where that loses nothing, having been stored so.
    """

    def __init__(self, plain: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        half = plain.weight.detach().bfloat16()
        if torch.equal(half.to(plain.weight.dtype), plain.weight):
            plain.weight.data = half
        self.weight, self.bias, self.scale = plain.weight, plain.bias, alpha / rank
        a = torch.empty(rank, plain.in_features).uniform_(-1, 1, generator=generator) / plain.in_features**0.5
        self.lora_a = nn.Parameter(a.to(plain.weight.device))  # float32, whatever the frozen weight is
        self.lora_b = nn.Parameter(torch.zeros(plain.out_features, rank, device=plain.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        as_it_is = x.dtype == self.weight.dtype or torch.is_autocast_enabled(x.device.type)
        own = super().forward(x) if as_it_is else Widened.apply(x, self.weight, self.bias)
        return own + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self, stored: Tensor) -> Tensor:
        """The weight as it is stored, on the CPU, with what was learnt added, in float32.

        The live one may be rounded to bfloat16, which would swallow what was learnt, in this round and in those before.
        """
        return stored.float() + (self.scale * (self.lora_b @ self.lora_a)).to(stored.device, torch.float32)


def add_adapters(blocks: Iterable[nn.Module], rank: int, alpha: float, seed: int) -> None:
    """Replace every linear layer inside the blocks by an adapted one. A depends on the seed alone, not on the device."""
    generator = torch.Generator().manual_seed(seed)
    for block in blocks:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, Adapted(child, rank, alpha, generator))


def adapters(model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a model's checkpoint holds, by name, in its order: no adapters, and one that has two names once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not name.endswith((".lora_a", ".lora_b")):
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())

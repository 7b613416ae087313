"""Low-rank adaptation: train a small addition to every linear layer instead of the layer (Hu et al. 2021, arXiv 2106.09685).

add_adapters(policy.blocks, rank=64, alpha=128, seed=0)     # y = W x + (alpha / rank) B A x, with W frozen
... train the parameters named *.lora_a and *.lora_b ...
merge_adapters(trained_model, plain_model)                  # W + (alpha / rank) B A, an ordinary checkpoint again
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapted(nn.Linear):
    """A linear layer with an addition of low rank. A is random and B is 0, so at first nothing is added."""

    def __init__(self, plain: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight, self.bias, self.scale = plain.weight, plain.bias, alpha / rank
        a = torch.empty(rank, plain.in_features).uniform_(-1, 1, generator=generator) / plain.in_features**0.5
        self.lora_a = nn.Parameter(a.to(plain.weight.device))  # float32, whatever the frozen weight is
        self.lora_b = nn.Parameter(torch.zeros(plain.out_features, rank, device=plain.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


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


@torch.no_grad()
def merge_adapters(model: nn.Module, plain: nn.Module) -> None:
    """Add what the adapters of `model` have learnt to the weights of the same names in `plain`."""
    for name, module in adapters(model).items():
        layer = plain.get_submodule(name)
        assert isinstance(layer, nn.Linear), name
        layer.weight += (module.scale * (module.lora_b @ module.lora_a)).to(layer.weight.device, layer.weight.dtype)

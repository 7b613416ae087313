"""A transformers Llama read for inference: the same sums, without what its own forward does anew at every token.

    llama = Llama(model.model.language_model)
    cache = llama.cache(rows, room)
    hidden = llama.forward(embeddings, llama.angles(positions), cache, place, end, mask)

Keys and values have their place from the start; query, key and value come from one matrix product, and so do the two halves
of the MLP; rotary angles and mask are made once by the caller and not in every layer. Nothing here waits for the device, so
a GPU can record a step and replay it (see janus_drawing.py).

Legend: R rows in flight, S new tokens of a row, C hidden size, H query heads, K key heads, D head size.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaModel


class KeyValueCache(NamedTuple):
    """Keys and values, one tensor (R, K, room, D) a layer, allocated once; zeros, because masked NaN is NaN still."""

    keys: list[Tensor]
    values: list[Tensor]

    def fill(self, other: "KeyValueCache", rows: Tensor) -> None:
        """Begin row i with a copy of other's row rows[i]."""
        for mine, theirs in zip(self.keys + self.values, other.keys + other.values, strict=True):
            mine[:, :, : theirs.shape[2]] = theirs[rows]


class Layer(NamedTuple):
    """One decoder layer's weights as its matrix products want them: (in, out), products of the same input joined."""

    attention_norm: Tensor
    to_qkv: Tensor
    to_out: Tensor
    mlp_norm: Tensor
    to_gate_up: Tensor
    to_down: Tensor


def joined(*parts: nn.Linear) -> Tensor:
    """The weights of several projections of one input as one matrix (in, out); their own become views of it."""
    for part in parts:
        assert type(part) is nn.Linear and part.bias is None, f"{part}: not a plain projection, something would be left out"
    weight = torch.cat([part.weight.detach() for part in parts]) if len(parts) > 1 else parts[0].weight.detach()
    for part, view in zip(parts, weight.split([part.out_features for part in parts]), strict=True):
        part.weight.data = view
    return weight.t()


class Llama:
    """The lean forward of one transformers LlamaModel; its weights are that model's."""

    def __init__(self, model: LlamaModel) -> None:
        self.model: Any = model  # what its modules hold is theirs to say
        self._layers: list[Layer] = []
        self._source: list[int] = []
        first: Any = model.layers[0]
        config: Any = model.config
        self.head_dim: int = first.self_attn.head_dim
        self.n_key_heads: int = config.num_key_value_heads
        self.n_query_heads: int = config.num_attention_heads
        self.grouped = self.n_key_heads != self.n_query_heads
        self.scale: float = first.self_attn.scaling

    def layers(self) -> list[Layer]:
        """The layers' weights, joined at the first call and anew where casting or loading has replaced them since."""
        if self._source != self._addresses():
            self._layers = [
                Layer(
                    layer.input_layernorm.weight.detach(),
                    joined(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                    joined(layer.self_attn.o_proj),
                    layer.post_attention_layernorm.weight.detach(),
                    joined(layer.mlp.gate_proj, layer.mlp.up_proj),
                    joined(layer.mlp.down_proj),
                )
                for layer in self.model.layers
            ]
            self._source = self._addresses()
        return self._layers

    def _addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.model.layers.parameters()]

    def cache(self, rows: int, room: int) -> KeyValueCache:
        """An empty cache for `rows` rows of at most `room` tokens; joins the weights if that is to be done."""
        self.layers()
        weight, shape = self.model.norm.weight, (rows, self.n_key_heads, room, self.head_dim)
        layers = range(len(self.model.layers))
        keys, values = ([torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in layers] for _ in range(2))
        return KeyValueCache(keys, values)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines of positions (...), each (..., D); the sines' first half negated (see `rotate`)."""
        cos, sin = self.model.rotary_emb(self.model.norm.weight, positions.reshape(1, -1))  # (1, positions, D)
        sin = torch.cat([-sin[..., : self.head_dim // 2], sin[..., self.head_dim // 2 :]], dim=-1)
        return cos.view(*positions.shape, self.head_dim), sin.view(*positions.shape, self.head_dim)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: KeyValueCache,
        place: Tensor,
        end: int,
        mask: Tensor | None,
    ) -> Tensor:
        """Last hidden states (R, S, C), after the final norm, of S new tokens a row; their keys and values go into the cache.

        x (R, S, C): embeddings. angles: two of (R or 1, S, D). place (S,) int64: the new tokens' places in the cache. end:
        the first `end` places are read. mask (R or 1, 1, S, end): to be added to the scores; None is plainly causal for
        tokens that begin a cache, and everything visible for one new token.
        """
        rows, new, _ = x.shape
        causal = mask is None and new > 1
        assert not causal or new == end
        heads = [self.n_query_heads, self.n_key_heads, self.n_key_heads]
        cos, sin = (part[:, None] for part in angles)  # (R or 1, 1, S, D)
        eps, act = self.model.norm.variance_epsilon, self.model.layers[0].mlp.act_fn
        x = x.flatten(0, 1)  # (R S, C)
        for layer, keys, values in zip(self._layers, cache.keys, cache.values, strict=True):
            qkv = torch.mm(norm(x, layer.attention_norm, eps), layer.to_qkv).view(rows, new, -1, self.head_dim).transpose(1, 2)
            query, key, value = qkv.split(heads, dim=1)  # (R, H or K, S, D)
            keys.index_copy_(2, place, rotate(key, cos, sin))
            values.index_copy_(2, place, value)
            mixed = F.scaled_dot_product_attention(
                rotate(query, cos, sin),
                keys.narrow(2, 0, end),
                values.narrow(2, 0, end),
                attn_mask=mask,
                is_causal=causal,
                scale=self.scale,
                enable_gqa=self.grouped,
            )  # (R, H, S, D)
            x = torch.addmm(x, mixed.transpose(1, 2).reshape(x.shape[0], -1), layer.to_out)
            gate, up = torch.mm(norm(x, layer.mlp_norm, eps), layer.to_gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, act(gate).mul_(up), layer.to_down)
        return norm(x, self.model.norm.weight, eps).view(rows, new, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: x cos + (-x2, x1) sin, the exchange of halves written as a roll."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019) over the last dimension."""
    return torch.rms_norm(x, weight.shape, weight, eps)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask, True where a token may look, as what attention adds to its scores: 0 there, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))

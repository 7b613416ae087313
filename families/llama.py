"""A lean forward pass for inference of the decoders that transformers writes alike: Llama, Qwen2, Gemma.

    llama = Llama(model)
    cache = llama.cache(rows, room)
    hidden = llama.forward(embeddings, llama.angles(positions), cache, cache_position, end, mask)

The same sums as transformers' own forward without what that does anew at every token: keys and values have their place from
the start; query, key and value come from one matrix product, and so do the two halves of the MLP; rotary angles and mask are
made once by the caller and not in every layer. Nothing here waits for the device, so a GPU can record a step and replay it.

Of the three kinds Qwen2 adds biases to query, key and value, and Gemma scales what it has normed by 1 + w, in float32; their
activations and head sizes are the model's own. Embeddings are the caller's, scaled where a family scales them.

Legend: R rows in flight, S new tokens of a row, C hidden size, H query heads, K key heads, D head size.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeyValueCache = list[Tensor]  # of each layer, (R, 2 K, room, D): the keys of all heads, then their values


class Layer(NamedTuple):
    """One decoder layer's weights as its matrix products want them: (in, out), products of the same input joined."""

    attention_norm: Tensor
    to_qkv: Tensor
    qkv_bias: Tensor | None
    to_out: Tensor
    mlp_norm: Tensor
    to_gate_up: Tensor
    to_down: Tensor


def joined(*parts: nn.Linear) -> Tensor:
    """The weights of several projections of one input as one matrix (in, out); their own become views of it."""
    for part in parts:
        assert type(part) is nn.Linear, f"{part}: not a plain projection, something would be left out"
    weight = torch.cat([part.weight.detach() for part in parts]) if len(parts) > 1 else parts[0].weight.detach()
    for part, view in zip(parts, weight.split([part.out_features for part in parts]), strict=True):
        part.weight.data = view
    return weight.t()


def joined_biases(*parts: nn.Linear) -> Tensor | None:
    """What the same projections add, (out,), their own biases views of it; None where they add nothing."""
    found = [part.bias.detach() for part in parts if part.bias is not None]
    assert len(found) in (0, len(parts)), "some of the projections have a bias and some have none"
    if not found:
        return None
    bias = torch.cat(found)
    for part, view in zip(parts, bias.split([part.out_features for part in parts]), strict=True):
        part.bias.data = view
    return bias


class Llama:
    """The lean forward of one transformers LlamaModel, Qwen2Model or GemmaModel; its weights are that model's."""

    def __init__(self, model: Any) -> None:
        self.model = model  # what its modules hold is theirs to say
        self._layers: list[Layer] = []
        self._source: list[int] = []
        first: Any = model.layers[0]
        config: Any = model.config
        self.head_dim: int = first.self_attn.head_dim
        self.n_key_heads: int = config.num_key_value_heads
        self.n_query_heads: int = config.num_attention_heads
        self.grouped = self.n_key_heads != self.n_query_heads
        self.scale: float = first.self_attn.scaling
        self.eps: float = config.rms_norm_eps
        self.norm = norm_of_one_more if config.model_type == "gemma" else norm

    def layers(self) -> list[Layer]:
        """The layers' weights, joined at the first call and anew where casting or loading has replaced them since."""
        if self._source != self._addresses():
            self._layers = [self._joined(layer) for layer in self.model.layers]
            self._source = self._addresses()
        return self._layers

    def _joined(self, layer: Any) -> Layer:
        qkv = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        others = (layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
        assert all(part.bias is None for part in others), "a bias would be left out"
        return Layer(
            layer.input_layernorm.weight.detach(),
            joined(*qkv),
            joined_biases(*qkv),
            joined(layer.self_attn.o_proj),
            layer.post_attention_layernorm.weight.detach(),
            joined(layer.mlp.gate_proj, layer.mlp.up_proj),
            joined(layer.mlp.down_proj),
        )

    def _addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.model.layers.parameters()]

    def cache(self, rows: int, room: int) -> KeyValueCache:
        """An empty cache for `rows` rows of at most `room` tokens; joins the weights if that is to be done.

        Of zeros, because masked NaN is NaN still.
        """
        self.layers()
        weight, shape = self.model.norm.weight, (rows, 2 * self.n_key_heads, room, self.head_dim)
        return [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in self.model.layers]

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines of positions (...), each (..., D); the sines' first half negated (see `rotate_`)."""
        cos, sin = self.model.rotary_emb(self.model.norm.weight, positions.reshape(1, -1))  # (1, positions, D)
        sin = torch.cat([-sin[..., : self.head_dim // 2], sin[..., self.head_dim // 2 :]], dim=-1)
        return cos.view(*positions.shape, self.head_dim), sin.view(*positions.shape, self.head_dim)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: KeyValueCache,
        cache_position: Tensor,
        end: int,
        mask: Tensor | None,
    ) -> Tensor:
        """Last hidden states (R, S, C), after the final norm, of S new tokens a row; their keys and values go into the cache.

        x (R, S, C): embeddings. angles: two of (R or 1, S, D). cache_position (S,) int64: where in the cache the new tokens
        go. end: so much of the cache is read. mask (R or 1, 1, S, end): to be added to the scores; None is plainly causal for
        tokens that begin a cache, and everything visible for one new token.
        """
        rows, new, _ = x.shape
        n_query, n_rotated = self.n_query_heads, self.n_query_heads + self.n_key_heads
        cos, sin = (part[:, :, None] for part in angles)  # (R or 1, S, 1, D)
        norm, eps, act = self.norm, self.eps, self.model.layers[0].mlp.act_fn
        x = x.flatten(0, 1).clone()  # (R S, C); the layers add to it in place, and the embeddings are the caller's
        for layer, cached in zip(self._layers, cache, strict=True):
            qkv = project(norm(x, layer.attention_norm, eps), layer.to_qkv, layer.qkv_bias).view(rows, new, -1, self.head_dim)
            rotate_(qkv[:, :, :n_rotated], cos, sin)
            qkv = qkv.transpose(1, 2)  # (R, H + 2 K, S, D)
            cached.index_copy_(2, cache_position, qkv[:, n_query:])
            mixed = self.attend(qkv[:, :n_query], cached.narrow(2, 0, end), mask)  # (R, H, S, D)
            x.addmm_(mixed.transpose(1, 2).reshape(len(x), -1), layer.to_out)
            gate, up = torch.mm(norm(x, layer.mlp_norm, eps), layer.to_gate_up).chunk(2, dim=-1)
            x.addmm_(act(gate).mul_(up), layer.to_down)
        return norm(x, self.model.norm.weight, eps).view(rows, new, -1)

    def attend(self, query: Tensor, cached: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of new tokens (R, H, S, D) to cached ones (R, 2 K, end, D): (R, H, S, D); mask as for `forward`.

        A kernel that takes each row's length from the device, and no mask, would go here: benchmarks/README.md says when.
        """
        keys, values = cached.chunk(2, dim=1)  # (R, K, end, D)
        rows, heads, new, width = query.shape
        causal = mask is None and new > 1
        assert not causal or new == keys.shape[2]
        # No fused kernel takes a mask and grouped heads at once: one token's heads of a group stand as if they were tokens,
        # and several tokens (a prompt, a question) have the keys and values repeated.
        one = self.grouped and new == 1
        if one:
            query = query.reshape(rows, keys.shape[1], -1, width)  # (R, K, H / K, D)
        elif self.grouped and mask is not None:
            keys, values = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (keys, values))
        grouped = self.grouped and mask is None and not one
        mixed = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=grouped
        )
        return mixed.reshape(rows, heads, new, width)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding in place: x cos + (-x2, x1) sin, where `sin` has the minus (see `Llama.angles`)."""
    first, second = x.chunk(2, dim=-1)
    exchanged = torch.cat([second, first], dim=-1)
    x.mul_(cos).addcmul_(exchanged, sin)


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (rows, in) times weight (in, out), and the bias (out,) where there is one."""
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019) over the last dimension."""
    return torch.rms_norm(x, weight.shape, weight, eps)


def norm_of_one_more(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gemma's: what is stored is the weight less 1, and it is float32 that is normed and scaled, then rounded."""
    return torch.rms_norm(x.float(), weight.shape, 1.0 + weight.float(), eps).type_as(x)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask, True where a token may look, as what attention adds to its scores: 0 there, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))

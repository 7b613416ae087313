"""A transformers Phi read for drawing with Show-o: prompts run once, and the pictures' many passes use what is left of them.

    _, text = phi_forward(phi, embed(prompts), positions, mask)
    hidden, _ = phi_forward(phi, embed(codes), positions, mask, text)

Legend: R rows in flight, S new tokens of a row, L tokens of text before them, C hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PhiModel
from transformers.models.phi.modeling_phi import apply_rotary_pos_emb

KeysValues = list[tuple[Tensor, Tensor]]  # of each layer, (R, heads, L, head size)


def phi_forward(
    phi: PhiModel, embeddings: Tensor, positions: Tensor, mask: Tensor | None, before: KeysValues | None = None
) -> tuple[Tensor, KeysValues]:
    """Run a transformers PhiModel over S tokens a row that also see tokens of which only keys and values are left.

    embeddings (R, S, C); positions (R, S); mask bool, to be broadcast to (R, heads, S, L + S), True where a token may look,
    None for everywhere; before: keys and values of L earlier tokens. Returns the last hidden states (R, S, C) and, where
    nothing came before, the keys and values of the new tokens. The same sums as transformers' own forward.
    """
    rotation = phi.rotary_emb(embeddings, positions)
    x, kept = embeddings, []
    layers: Any = phi.layers
    for index, layer in enumerate(layers):
        attention = layer.self_attn
        normed = layer.input_layernorm(x)
        query, key, value = (
            projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # (R, heads, S, head size)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = attention.q_layernorm(query), attention.k_layernorm(key)
        size = attention.rotary_ndims
        turned = apply_rotary_pos_emb(query[..., :size], key[..., :size], *rotation)
        query, key = (torch.cat([new, old[..., size:]], dim=-1) for new, old in zip(turned, (query, key), strict=True))
        if before is None:
            kept.append((key, value))
        else:
            key, value = (torch.cat(pair, dim=2) for pair in zip(before[index], (key, value), strict=True))
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=attention.scaling, enable_gqa=key.shape[1] != query.shape[1]
        )
        x = x + attention.dense(mixed.transpose(1, 2).flatten(2)) + layer.mlp(normed)  # (R, S, C)
    return phi.final_layernorm(x), kept

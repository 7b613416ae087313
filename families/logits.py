"""Logits of image tokens: guidance, the choice of the next token, and log-probs of given ones.

Legend: B rows of a batch, T image tokens a picture, V codebook size, C hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MOST_LOGITS = 2**26  # of image tokens at a time in training: 256 MB in float32


def guide(logits: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): (2B, V), conditional rows first -> (B, V)."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def draw(logits: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """One token a row by inverting the cumulative distribution at a given uniform number; temperature 0 is greedy.

    logits (B, V); uniforms (B,) float64 in [0, 1); returns (B,) int64. One number a token, made outside, is what lets a
    picture depend on its seed alone: not on the batch, the device or the ranks. float64, because a float32 sum over
    16,384 probabilities is too coarse to be inverted in the tail.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)  # (B, V)
    target = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return tokens.clamp(max=logits.shape[-1] - 1)


def token_logps(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax of the given tokens: logits (..., V), tokens (...) int64 -> (...) float32, whatever the logits are."""
    return logits.float().log_softmax(dim=-1).gather(-1, tokens[..., None]).squeeze(-1)


def head_logps(
    head: Callable[[Tensor], Tensor], hidden: Tensor, tokens: Tensor, codebook_size: int, most: int = MOST_LOGITS
) -> Tensor:
    """`token_logps` of a head's logits, never more than about `most` of them at a time.

    hidden (B, T, C), tokens (B, T) int64 -> (B, T) float32. Where the whole batch has more, the logits are made in pieces,
    thrown away, and made again in the backward pass: 9,216 image tokens of Janus-Pro would be 600 MB, thrice over.
    """
    if tokens.numel() * codebook_size <= most:
        return token_logps(head(hidden), tokens)
    rows = max(1, most // codebook_size)
    parts = [
        checkpoint(lambda h, t: token_logps(head(h), t), h, t, use_reentrant=False, preserve_rng_state=False)
        for h, t in zip(hidden.flatten(0, 1).split(rows), tokens.flatten().split(rows), strict=True)
    ]
    return torch.cat(parts).view(tokens.shape)

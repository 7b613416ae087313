"""Masked diffusion over image tokens: drawing by filling masks in, the likelihood's bound, and who sees whom. Tensors alone.

Legend: B rows of a batch, T image tokens a picture, V codebook size, L tokens of text, K mask draws a picture,
Q questions a picture, S tokens of a sequence.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from families.family import token_logps

MASK_NOISE = 2**63  # second half of the noise's key, where `sample` has the candidate's number


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def mask_counts(n_tokens: int, steps: int) -> list[int]:
    """How many of T tokens stay masked after each step of the cosine schedule (Chang et al. 2022, arXiv 2202.04200).

    The cosine is a float32, as in Show-o: in float64 a step of 12 or 18 would keep one token more.
    """
    ratios = [torch.tensor((step + 1) / steps) for step in range(steps)]
    return [math.floor(n_tokens * torch.cos(ratio * math.pi * 0.5)) for ratio in ratios]


def temperatures(temperature: float, steps: int) -> list[float]:
    """The weight of the Gumbel noise at each step: multiplied by 1 - (step + 1) / steps each time, so 0 at the last.

    Show-o's product falls much faster than MaskGIT's straight line: of 50 steps, to 0.18 after a quarter, 0.0003 at half.
    """
    return np.cumprod([temperature, *[1 - (step + 1) / steps for step in range(steps)]])[1:].tolist()


def gumbel(uniforms: Tensor) -> Tensor:
    """Gumbel noise from uniform numbers in [0, 1), any shape; finite everywhere."""
    return -(-uniforms.clamp(min=1e-20).log()).clamp(min=1e-20).log()


def mask_predict(
    predict: Callable[[Tensor], Tensor],
    tokens: Tensor,
    steps: int,
    temperature: float,
    choose: Callable[[Tensor, int], Tensor],
    perturb: Callable[[int], Tensor],
) -> Tensor:
    """Fill in masked codes: in each step draw all of them, keep the most confident, mask the others again.

    tokens (B, T) int64, unknown ones V; predict: such tokens -> logits (B, T, V), guided, of the codes at their own places;
    choose: logits, step -> codes (B, T); perturb: step -> Gumbel noise (B, T), which makes low confidence win at times.
    Returns codes (B, T). How many are kept follows `mask_counts`, of the whole T even where a part was known at first.
    Nothing here waits for the device.
    """
    schedule = zip(mask_counts(tokens.shape[1], steps), temperatures(temperature, steps), strict=True)
    for step, (count, heat) in enumerate(schedule):
        logits = predict(tokens)  # (B, T, V)
        n_codes = logits.shape[-1]
        unknown = tokens == n_codes
        codes = torch.where(unknown, choose(logits, step), tokens)
        confidence = token_logps(logits, codes).where(unknown, math.inf) + heat * perturb(step)  # (B, T)
        n_masked = (unknown.sum(dim=-1, keepdim=True) - 1).clamp(max=count).clamp(min=1)  # (B, 1)
        threshold = confidence.sort(dim=-1).values.gather(-1, n_masked)
        tokens = codes.masked_fill(confidence < threshold, n_codes)
    return codes


def picture_noise(seed: int, candidate: int, steps: int, n_tokens: int) -> np.ndarray:
    """Uniform numbers (steps, 2, T) float64 from (prompt's seed, candidate number) alone: for codes, and for confidence."""
    generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, candidate]))
    return generator.random((steps, 2, n_tokens))


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs


def masked_positions(noise: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which of T tokens are masked, `counts` (...) of each row: uniform noise (..., T) -> bool (..., T)."""
    return noise.argsort(axis=-1) < counts[..., None]


def mask_draws(seeds: list[int], n_draws: int, n_tokens: int) -> np.ndarray:
    """K masks a picture from its seed alone: bool (B, K, T), True for masked.

    The number of masked tokens is uniform on 1 .. T, stratified: the j-th of K draws takes it from the j-th K-th of that
    range. Given the number, all sets of so many tokens are equally likely.
    """
    masks = []
    for seed in seeds:
        generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, MASK_NOISE]))
        times = (np.arange(n_draws) + generator.random(n_draws)) / n_draws  # (K,)
        counts = np.minimum(np.floor(n_tokens * times).astype(int) + 1, n_tokens)
        masks.append(masked_positions(generator.random((n_draws, n_tokens)), counts))
    return np.stack(masks)


def bound_terms(logps: Tensor, masked: Tensor) -> Tensor:
    """Each token's share of the estimated bound on log p(picture): log-probs and masks (B, K, T) -> (B, T).

    Mean over the draws of T / (number of masked tokens) * log p, for the masked tokens. See `ShowO.logps`.
    """
    weights = masked.shape[-1] / masked.sum(dim=-1, keepdim=True)  # (B, K, 1)
    return (weights * logps.where(masked, 0)).mean(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Who sees whom


def text_mask(real: Tensor) -> Tensor:
    """Who sees whom among tokens of text: (B, L) bool, True for real ones -> (B, L, L) bool.

    Causal; padding sees padding alone, so that no row is empty.
    """
    causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool, device=real.device).tril()
    return causal & (real[:, :, None] == real[:, None, :])


def drawing_mask(real: Tensor, n_image: int) -> Tensor:
    """Who sees whom when drawing: text (B, L) bool, then n_image tokens of picture -> (B, L + n_image, L + n_image).

    Text is causal and never sees the picture; the picture sees itself, both ways, and all real text.
    """
    everything = F.pad(real, (0, n_image), value=True)  # (B, S)
    image = torch.arange(everything.shape[1], device=real.device)[:, None] >= real.shape[1]  # (S, 1)
    return torch.where(image, everything[:, None, :], text_mask(everything))


def looking_mask(n_prefix: int, width: int, n_questions: int, device: torch.device) -> Tensor:
    """Who sees whom when looking: a picture's prefix, then Q questions of `width` tokens side by side -> (S, S) bool.

    All see the whole prefix, which sees nothing else; a question sees what came before in itself.
    """
    place = torch.arange(n_questions * width, device=device)
    own = (place[:, None] // width == place // width) & (place[:, None] >= place)
    mask = F.pad(own, (n_prefix, 0, n_prefix, 0))
    mask[:, :n_prefix] = True
    return mask

"""How Show-o draws: masked diffusion over image tokens, the bound on a picture's likelihood, its forward passes.

Drawing fills masks in, a few at a time. Training goes through transformers' Phi (`DrawingBranch`); drawing uses `phi_forward`,
the same sums with the prompts run once, and the pictures' many passes on what is left of them:

    _, text = phi_forward(phi, embed(prompts), positions, mask)
    hidden, _ = phi_forward(phi, embed(codes), positions, mask, text)

Legend: B rows of a batch, R rows in flight (doubled by guidance), T image tokens a picture, V codebook size, L tokens of text,
K mask draws a picture, Q questions a picture, S tokens of a sequence, C hidden size.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PhiForCausalLM, PhiModel
from transformers.models.phi.modeling_phi import apply_rotary_pos_emb

from families.family import positions_of
from families.logits import head_logps, token_logps

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


# ---------------------------------------------------------------------------------------------------------------------
# Forward passes


class DrawingBranch(nn.Module):
    """Log-probs of image tokens given prompts: the one differentiable path, all of it inside one module's forward.

    One root module is what sharding wrappers need.
    """

    def __init__(self, phi: PhiForCausalLM, soi: int, eoi: int, first_code: int, n_codes: int) -> None:
        super().__init__()
        self.language_model, self.lm_head = phi.model, phi.lm_head
        self.soi, self.eoi, self.first_code, self.n_codes = soi, eoi, first_code, n_codes

    def image_ids(self, tokens: Tensor) -> Tensor:
        """Codes (B, T), V for a masked one -> what the language model reads, begin and end of image about them (B, T + 2)."""
        return F.pad(F.pad(tokens + self.first_code, (1, 0), value=self.soi), (0, 1), value=self.eoi)

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits of the codes (..., V): the rest of the vocabulary is not drawn from."""
        rows = slice(self.first_code, self.first_code + self.n_codes)
        return F.linear(hidden, self.lm_head.weight[rows], self.lm_head.bias[rows])

    def forward(self, ids: Tensor, real: Tensor, tokens: Tensor, masked: Tensor) -> Tensor:
        """ids, real (B, L) the prompts, left-padded; tokens (B, T); masked (B, K, T) -> terms of the bound (B, T) float32.

        The hidden state at a code's own place predicts it. All draws are rows of one batch, B K.
        """
        n_draws, length = masked.shape[1:]
        ids, real, codes = (tensor.repeat_interleave(n_draws, dim=0) for tensor in (ids, real, tokens))
        image = self.image_ids(codes.masked_fill(masked.flatten(0, 1), self.n_codes))  # (B K, T + 2)
        embeddings = self.language_model.embed_tokens(torch.cat([ids, image], dim=1))
        if torch.is_autocast_enabled(embeddings.device.type):
            embeddings = embeddings.float()  # what the layers add to, also where frozen weights are bfloat16
        hidden = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=drawing_mask(real, length + 2)[:, None],
            position_ids=positions_of(F.pad(real, (0, length + 2), value=True)),
            use_cache=False,
        ).last_hidden_state[:, -length - 1 : -1]  # (B K, T, C)
        logps = head_logps(self.image_logits, hidden, codes, self.n_codes).unflatten(0, (-1, n_draws))  # (B, K, T)
        return bound_terms(logps, masked)


KeysValues = list[tuple[Tensor, Tensor]]  # of each layer, (R, heads, L, head size)


def phi_forward(
    phi: PhiModel,
    embeddings: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    before: KeysValues | None = None,
    keep: bool = False,
) -> tuple[Tensor, KeysValues]:
    """Run a transformers PhiModel over S tokens a row that also see tokens of which only keys and values are left.

    embeddings (R, S, C); positions (R or 1, S); mask bool, to be broadcast to (R, heads, S, L + S), True where a token may
    look, None for everywhere; before: keys and values of L earlier tokens. Returns the last hidden states (R, S, C) and, where
    nothing came before or with `keep`, the keys and values of all tokens. The same sums as transformers' own forward.
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
        if before is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(before[index], (key, value), strict=True))
        if before is None or keep:
            kept.append((key, value))
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=attention.scaling, enable_gqa=key.shape[1] != query.shape[1]
        )
        x = x + attention.dense(mixed.transpose(1, 2).flatten(2)) + layer.mlp(normed)  # (R, S, C)
    return phi.final_layernorm(x), kept

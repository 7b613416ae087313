"""What both families, Janus (janus.py) and Show-o (showo.py), do alike: text, logits, answers, which parameters train.

Legend: B rows of a batch, T image tokens a picture, V codebook size, L tokens of text, S tokens of a sequence, C hidden size,
Q questions and K captions or texts a picture.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from families.pretrained import CheckpointError

DESCRIBE = "Describe this image."
MOST_LOGITS = 2**26  # of image tokens at a time in training: 256 MB in float32


class PromptError(ValueError):
    """A prompt or question that cannot be given to the model as it stands; names it."""

    exit_code = 2


# ---------------------------------------------------------------------------------------------------------------------
# Text


def spellings(tokenizer: Any, word: str) -> list[int]:
    """Ids of all tokens that spell a word, whatever their capitals and leading space ("yes", " yes", "Yes", ...)."""
    clean = {"Ġ": " ", "▁": " "}  # how byte-level BPE and SentencePiece write a space
    found = []
    for token, index in tokenizer.get_vocab().items():
        for mark, space in clean.items():
            token = token.replace(mark, space)
        if token.strip().casefold() == word:
            found.append(index)
    return sorted(found)


def answer_ids(tokenizer: Any, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids of the tokens that spell yes, and of those that spell no; CheckpointError, naming the model, where there are none."""
    found = {word: spellings(tokenizer, word) for word in ("yes", "no")}
    for word, ids in found.items():
        if not ids:
            raise CheckpointError(f"{name}: no single token of the vocabulary spells {word}")
    return torch.tensor(found["yes"], device=device), torch.tensor(found["no"], device=device)


def pad_left(rows: list[list[int]], pad: int, device: torch.device, step: int = 1) -> tuple[Tensor, Tensor]:
    """Token lists -> ids (B, L) and mask (B, L) bool, padded on the left so that every row ends at the same place.

    L is the next multiple of `step`.
    """
    length = -(-max(map(len, rows)) // step) * step
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask


def check_length(kind: str, text: str, length: int, positions: int) -> None:
    """Raise PromptError for what has more tokens than the model has positions: it would see noise, at great cost."""
    if length > positions:
        raise PromptError(f"{kind} {text[:80]!r} makes {length} tokens with its picture; the model has {positions} positions")


def positions_of(mask: Tensor) -> Tensor:
    """Position ids (B, L) that count a row's real tokens from 0, so that padding does not shift them."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


# ---------------------------------------------------------------------------------------------------------------------
# Logits: the next token, and log-probs of given ones


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


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def yes_no(logits: Tensor, yes_ids: Tensor, no_ids: Tensor) -> tuple[Tensor, Tensor]:
    """P(yes) and coverage from the logits of the first answer token (..., vocabulary); both (...) float32.

    P(yes) = sum of p over the spellings of yes / (the same sum over yes and no); coverage = that whole sum. A coverage
    far from 1 says that the model wanted to say something else.
    """
    yes, no = yes_no_logps(logits, yes_ids, no_ids)
    return torch.sigmoid(yes - no), torch.logaddexp(yes, no).exp()


def yes_no_logps(logits: Tensor, yes_ids: Tensor, no_ids: Tensor) -> tuple[Tensor, Tensor]:
    """log of the summed p of the spellings of yes, and of no, over the whole vocabulary: both (...) float32."""
    logps = logits.float().log_softmax(dim=-1)
    return logps[..., yes_ids].logsumexp(dim=-1), logps[..., no_ids].logsumexp(dim=-1)


def answer_logits(head: nn.Linear, hidden: Tensor, answers: Tensor) -> Tensor:
    """A head's logits (B, vocabulary) float32: those of `answers` from a float32 product, the others as the weights are.

    bfloat16 has steps of 1/16 at 10, and P(yes) is a difference of such numbers; the others only count as a sum.
    """
    bias = None if head.bias is None else head.bias[answers].float()
    logits = head(hidden).float()
    logits[:, answers] = F.linear(hidden.float(), head.weight[answers].float(), bias)
    return logits


def answer_logps(head: nn.Linear, hidden: Tensor, yes_ids: Tensor, no_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log P(yes), log P(no) and coverage, each (B,) float32, from the hidden states (B, C) that predict an answer."""
    yes, no = yes_no_logps(answer_logits(head, hidden, torch.cat([yes_ids, no_ids])), yes_ids, no_ids)
    return F.logsigmoid(yes - no), F.logsigmoid(no - yes), torch.logaddexp(yes, no).exp()


def text_logps(head: nn.Module, hidden: Tensor, texts: list[list[list[int]]], start: int) -> Tensor:
    """log p of each text's tokens from number `start` on, given those before: B lists of K texts -> (B, K) float32, in nats.

    hidden (B, K, S, C): the state at token s predicts token s + 1.
    """
    logps = torch.zeros(hidden.shape[:2], device=hidden.device)
    numbered = [(b, k, ids) for b, row in enumerate(texts) for k, ids in enumerate(row)]
    where = [(b, k, s, ids[s + 1]) for b, k, ids in numbered for s in range(start - 1, len(ids) - 1)]
    if where:
        b, k, s, token = torch.tensor(where, device=hidden.device).T
        logps.index_put_((b, k), token_logps(head(hidden[b, k, s]), token), accumulate=True)
    return logps


def read_answers(
    head: nn.Linear, hidden: Tensor, texts: list[list[list[int]]], n_questions: int, start: int, yes_ids: Tensor, no_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """P(yes), coverage (B, Q) and log p of captions (B, K) from the hidden states (B, Q + K, S, C) of a picture's texts.

    texts: B lists of Q questions, each answered at its last token, then K captions, whose tokens begin at `start`.
    """
    row = torch.arange(len(texts), device=hidden.device)
    last = torch.tensor([[len(ids) - 1 for ids in asked[:n_questions]] for asked in texts], device=hidden.device)  # (B, Q)
    answering = hidden[row[:, None], torch.arange(n_questions, device=hidden.device), last]  # (B, Q, C)
    logits = answer_logits(head, answering.flatten(0, 1), torch.cat([yes_ids, no_ids]))
    p_yes, coverage = yes_no(logits, yes_ids, no_ids)
    logps = text_logps(head, hidden[:, n_questions:], [asked[n_questions:] for asked in texts], start)
    return p_yes.view(-1, n_questions), coverage.view(-1, n_questions), logps


# ---------------------------------------------------------------------------------------------------------------------
# Parameters


def train_only(model: nn.Module, pattern: str) -> dict[str, nn.Parameter]:
    """Freeze all parameters but those whose names begin with the regular expression; returns these by name."""
    trained = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.match(pattern, name) is not None)
        if parameter.requires_grad:
            trained[name] = parameter
    return trained


def recompute(language_model: PreTrainedModel) -> None:
    """Turn on transformers' gradient checkpointing; the method's name changed in transformers 5."""
    enable = getattr(language_model, "activation_checkpointing_enable", None) or language_model.gradient_checkpointing_enable
    enable({"use_reentrant": False})

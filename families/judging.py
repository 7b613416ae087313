"""How an answer about a picture is read: P(yes) and its coverage from a question's last token, log p of a caption.

Legend: B pictures, Q questions and K captions or texts a picture, S tokens of a text, C hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families.logits import token_logps
from families.pretrained import CheckpointError

DESCRIBE = "Describe this image."  # what a caption answers


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

"""How an answer about a picture is read: P(yes) and its coverage from a question's last token, log p of a caption, a reply.

Legend: B pictures, Q questions and K captions or texts a picture, S tokens of a text, C hidden size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.answers import BEGUN
from families.logits import MOST_LOGITS, token_logps
from families.pretrained import CheckpointError

ONE = f"{BEGUN}1"  # an answer whose last token is the digit
# Reads one more token of each of Q texts: ids (B, Q), positions (B, Q), visible (B, Q, all tokens so far) -> hidden (B, Q, C).
Feed = Callable[[Tensor, Tensor, Tensor], Tensor]
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


def text_logps(head: nn.Linear, hidden: Tensor, texts: list[list[list[int]]], start: int) -> Tensor:
    """log p of each text's tokens from number `start` on, given those before: B lists of K texts -> (B, K) float32, in nats.

    hidden (B, K, S, C): the state at token s predicts token s + 1.
    """
    logps = torch.zeros(hidden.shape[:2], device=hidden.device)
    numbered = [(b, k, ids) for b, row in enumerate(texts) for k, ids in enumerate(row)]
    where = [(b, k, s, ids[s + 1]) for b, k, ids in numbered for s in range(start - 1, len(ids) - 1)]
    if where:
        rows = max(1, MOST_LOGITS // head.weight.shape[0])  # at a time: a vocabulary may have 264,192 words
        for b, k, s, token in (part.T for part in torch.tensor(where, device=hidden.device).split(rows)):
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
# Answers that are begun, and answers in words


def answered(chat: str, answer: str) -> str:
    """A chat with what of its answer is given: after a space, unless the chat ends in white space; as it is for ""."""
    return f"{chat}{'' if chat[-1:].isspace() else ' '}{answer}" if answer else chat


def digit_ids(write: Callable[[str], list[int]], tokenizer: Any, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids (1,) of the tokens that spell 1, and 0, after BEGUN. write: what of an answer is given -> tokens of chat and answer.

    What the tokenizer makes of the whole decides: the space before the digit may be a token of its own, or part of the digit's.
    Raises CheckpointError, naming the model, unless the two texts differ in their last token alone, and that is the digit.
    """
    asked, zero, one = (write(answer) for answer in ("", f"{BEGUN}0", ONE))
    alike = zero[:-1] == one[:-1] and one[: len(asked)] == asked
    if not alike or [tokenizer.decode(ids[-1:]).strip() for ids in (zero, one)] != ["0", "1"]:
        found = [" ".join(map(str, tokenizer.convert_ids_to_tokens(ids[len(asked) :]))) for ids in (zero, one)]
        about = f"no single tokens for 0 and 1 after {BEGUN!r}, which --answer score compares"
        raise CheckpointError(f"{name}: its tokenizer has {about}: it writes {found[0]!r} and {found[1]!r}")
    return torch.tensor(one[-1:], device=device), torch.tensor(zero[-1:], device=device)


class Reply(NamedTuple):
    """What a model wrote; ended: by its own end token, or else cut off."""

    text: str
    ended: bool


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer: the generation config's, as for transformers' generate, else the tokenizer's."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = tokenizer.eos_token_id if found is None else found
    return list(found) if isinstance(found, list | tuple) else [found] * (found is not None)


def read_reply_ids(tokenizer: Any, ids: list[int], ends: list[int]) -> Reply:
    """Tokens as they were written, up to the first that ends an answer, as text without special tokens."""
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return Reply(tokenizer.decode(ids[:stop], skip_special_tokens=True).strip(), stop < len(ids))


def greedy_replies(
    head: nn.Module,
    hidden: Tensor,
    feed: Feed,
    texts: list[list[list[int]]],
    before: int,
    most: int,
    positions: int,
    ends: list[int],
) -> list[list[list[int]]]:
    """The likeliest token after each of a picture's Q questions, again and again: B lists of Q lists of at most `most` ids.

    head: hidden states -> logits of words. hidden (B, Q, S, C): what predicts what follows each token of the questions `texts`,
    which stand side by side, none seeing another, behind `before` tokens that all see. feed reads what was written, one token
    of every question at a time, and is told who sees whom. A reply ends with one of `ends`, or where the model's `positions`
    do. What is beside a question, in its picture's row or in another's, changes nothing but rounding.
    """
    n_questions, width = hidden.shape[1:3]
    lengths = torch.tensor([[len(ids) for ids in row] for row in texts], device=hidden.device)  # (B, Q)
    number, place = (torch.arange(n, device=hidden.device) for n in (n_questions, n_questions * width))
    own = (place // width == number[:, None]) & (place % width < lengths[..., None])  # (B, Q, Q S): no padding
    visible = F.pad(F.pad(own, (before, 0), value=True), (0, most * n_questions))  # (B, Q, all tokens there may be)
    state = hidden.gather(2, (lengths - 1)[..., None, None].expand(-1, -1, 1, hidden.shape[-1]))[:, :, 0]  # (B, Q, C)
    room = (positions - before - lengths).clamp(max=most)  # (B, Q)
    stops = torch.tensor(ends, dtype=torch.int64, device=hidden.device)
    written: list[Tensor] = []
    ended = room <= 0
    while not ended.all():
        written.append(head(state).argmax(dim=-1))  # (B, Q)
        ended = ended | torch.isin(written[-1], stops) | (room <= len(written))
        if len(written) < most:
            start = before + len(place) + (len(written) - 1) * n_questions
            visible[:, number, start + number] = True
            state = feed(written[-1], before + lengths + len(written) - 1, visible[..., : start + n_questions])
    found = torch.stack(written, dim=-1).tolist() if written else [[[] for _ in row] for row in texts]
    return [
        [ids[:n] for ids, n in zip(row, left, strict=True)] for row, left in zip(found, room.clamp(min=0).tolist(), strict=True)
    ]

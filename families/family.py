"""What all families do alike: text to padded tokens, judging in batches, which parameters train, who a model is.

`model.UnifiedModel` says what a family offers; `Family` is the part of it that is written once.

Legend: B rows of a batch, T image tokens a picture, L tokens of text, S tokens of a text about a picture, C hidden size,
Q questions and K captions a picture.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from common.lora import adapters, plain_tensors
from common.memory import memory
from families.judging import (
    DESCRIBE,
    ONE,
    Feed,
    Reply,
    answer_ids,
    digit_ids,
    end_ids,
    greedy_replies,
    read_answers,
    read_reply_ids,
)
from families.pretrained import absolute_name, read_tensor, tensor_names, weights_hash

Array = Tensor | np.ndarray


TEXT_STEP = 16  # on a GPU texts are filled up to a multiple of this: few shapes for its kernels and its memory, and round ones
REMEMBERED = 2**14  # texts whose tokens are kept: to run template and tokenizer takes a fraction of a millisecond each time
MARKUP = re.compile(r"<\S+>|\[\S+\]")  # how markers are spelt, those too that a tokenizer does not call special


class PromptError(ValueError):
    """A prompt or question that cannot be given to the model as it stands; names it."""

    exit_code = 2
    too_long = False


class PromptTooLong(PromptError):
    """More tokens than the model reads: `score.py --skip-long` leaves such a prompt out."""

    too_long = True


# ---------------------------------------------------------------------------------------------------------------------
# Text


def pad_right(rows: list[list[int]], pad: int, device: torch.device, step: int = 1) -> Tensor:
    """Token lists -> ids (B, L), padded on the right to the next multiple of `step`."""
    length = -(-max(map(len, rows)) // step) * step
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=device)


def pad_left(rows: list[list[int]], pad: int, device: torch.device, step: int = 1) -> tuple[Tensor, Tensor]:
    """Token lists -> ids (B, L) and mask (B, L) bool, padded on the left so that every row ends at the same place.

    L is the next multiple of `step`.
    """
    length = -(-max(map(len, rows)) // step) * step
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask


def check_length(kind: str, text: str, length: int, positions: int) -> None:
    """Raise PromptTooLong for what has more tokens than the model has positions: it would see noise, at great cost."""
    if length > positions:
        raise PromptTooLong(f"{kind} {text[:80]!r} makes {length} tokens with its picture; the model has {positions} positions")


class Reserved:
    """What a model's templates write and no prompt, question or caption may: its special tokens and its names of roles.

    The token of an unknown word is none of these: whoever writes such a word has written nothing.
    """

    def __init__(self, tokenizer: Any, told: str = "a special token of the model", more: Iterable[str] = ()) -> None:
        """told: what messages call it. more: what is reserved besides the tokens that the tokenizer itself calls special."""
        added = tokenizer.added_tokens_decoder.items()
        tokens = {str(token): index for index, token in added if token.special or MARKUP.fullmatch(str(token))}
        tokens |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        known = tokenizer.get_vocab()
        tokens |= {token: known[token] for token in more if token in known}
        words = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
        unknown = {tokenizer.unk_token, getattr(words, "unk_token", None)}
        unknown -= {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}  # GPT-2 has one token for all four
        self.tokenizer, self.told, self.spelt = tokenizer, told, {*tokens, *more} - {""}
        self.ids = {index for token, index in tokens.items() if token not in unknown}
        self._own: dict[str, Counter[int]] = {}  # by kind of text: what its template writes about any text
        self._known: dict[tuple[str, str], list[int]] = {}

    def tokens(self, kind: str, text: str, write: Callable[[str], list[int]]) -> list[int]:
        """What `write`, a template and the tokenizer, makes of a text of some kind; written once, then remembered.

        Set what a processor's template depends on before the model is made: what is remembered is not written anew.

        Raises PromptError if the text spells what is reserved, by its letters or by what the tokenizer makes of them.
        """
        if (kind, text) in self._known:
            return [*self._known[kind, text]]
        if spelt := sorted(token for token in self.spelt if token in text):
            raise PromptError(f"{kind} {text[:80]!r} spells {self.told}: {', '.join(spelt)}")
        if kind not in self._own:
            self._own[kind] = Counter(token for token in write("yes") if token in self.ids)
        ids = write(text)
        found = Counter(token for token in ids if token in self.ids)
        if found != self._own[kind]:
            changed = sorted((found - self._own[kind]) | (self._own[kind] - found))
            names = ", ".join(self.tokenizer.convert_ids_to_tokens(changed))
            raise PromptError(f"{kind} {text[:80]!r} spells {self.told}: {names}, once it is tokenized")
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[kind, text] = ids
        return [*ids]


def positions_of(mask: Tensor) -> Tensor:
    """Position ids (B, L) that count a row's real tokens from 0, so that padding does not shift them."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def pictures_that_fit(model: nn.Module, device: torch.device, bytes_each: int, most: int) -> int:
    """How many pictures of so many bytes fit into 65 % of a device's memory: at least one, at most `most`.

    On a GPU of what the model leaves of the whole card, whatever else lies there now: pictures depend on how many are drawn at
    once, and so the number is the same whenever it is asked for. On a CPU of what is free now.
    """
    found = memory(device)
    if found and device.type == "cuda":
        found = (found[1] - sum(parameter.nbytes for parameter in model.parameters()), found[1])
    fitting = int(0.65 * found[0]) // bytes_each if found else most
    return max(1, min(most, fitting // 8 * 8 or fitting))


# ---------------------------------------------------------------------------------------------------------------------
# The part of a model that is written once


class Family:
    """The methods of a unified model that follow from a few others.

    A family sets the attributes below and writes `prompt_ids`, `question_ids`, `caption_ids`, `sample`, `decode`,
    `drawing_batch`, `logps`, `answer_logps`, `activation_bytes`, `save`, and three for this class: `_asked_about`,
    `_looked_at` and `_read`.
    """

    TRAINED: ClassVar[dict[str, str]]  # scope of training -> regular expression of the parameters' names
    steps: Any = None  # an int where it can be chosen
    mask_draws: Any = None  # an int where log-probs are estimated
    no_pictures = ""  # why `decode` cannot be called, where a model came without what decodes

    def __init__(
        self, model: nn.Module, tokenizer: Any, head: nn.Linear, device: torch.device, name: str, directory: Path | None
    ) -> None:
        """head: from hidden states to the logits of words. directory: where the weights lie."""
        self.model: Any = model.eval()
        self.tokenizer, self.head, self.device, self.name, self.directory = tokenizer, head, device, name, directory
        self.text_step = TEXT_STEP if device.type == "cuda" else 1
        self._yes, self._no = answer_ids(tokenizer, name, device)
        self._ends = end_ids(model, tokenizer)
        self.branch: Any
        self.reserved: Reserved
        self.image_tokens: int
        self.codebook_size: int

    def prompt_ids(self, prompt: str) -> list[int]:
        """The tokens that ask for a picture."""
        raise NotImplementedError

    def question_ids(self, question: str, scored: bool = False) -> tuple[list[int], list[int]]:
        """The tokens of a question: (prefix with the picture, the same for all questions; the rest, `scored` as in `judge`)."""
        raise NotImplementedError

    def _asked_about(self, question: str, answer: str = "") -> list[int]:
        """The tokens of a question, with what of its answer is given; nothing is checked."""
        raise NotImplementedError

    def caption_ids(self, caption: str) -> list[int]:
        """The tokens of a caption as the answer to DESCRIBE."""
        raise NotImplementedError

    def logps(
        self, prompts: list[str], tokens: Array, seeds: list[int] | None = None, unconditional: Array | None = None
    ) -> Tensor:
        """Log-probs (B, T) of image tokens given prompts, differentiable; `model.UnifiedModel` says of what."""
        raise NotImplementedError

    def _looked_at(self, pictures: Tensor) -> Tensor:
        """Image tokens (B, T) or pictures (B, H, W, 3) uint8 as the looking branch takes them, on the model's device."""
        raise NotImplementedError

    def _read(self, inputs: Tensor, texts: list[list[list[int]]], more: int) -> tuple[Tensor, Feed]:
        """Hidden states (B, K, S, C) of K texts about each of B inputs, none seeing another; what reads `more` of each."""
        raise NotImplementedError

    def _hidden_states(self, inputs: Tensor, texts: list[list[list[int]]]) -> Tensor:
        return self._read(inputs, texts, 0)[0]

    # -- looking -------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _digits(self) -> tuple[Tensor, Tensor]:
        """Ids of 1 and 0 after BEGUN; CheckpointError where they are not a token each."""
        return digit_ids(lambda answer: self._asked_about("yes", answer), self.tokenizer, self.name, self.device)

    def _asked(self, question: str, scored: bool) -> list[int]:
        """The tokens of a question, and of what is begun of its answer, up to the digit."""
        given = ONE if scored and self._digits else ""  # which raises where 0 and 1 are no tokens
        kind = "question to be scored" if scored else "question"  # texts are remembered by kind
        ids = self.reserved.tokens(kind, question, lambda text: self._asked_about(text, given))
        return ids[: len(ids) - scored]

    @torch.no_grad()
    def judge(
        self, pictures: Tensor, questions: list[list[str]], batch: int = 32, scored: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Answer Q yes/no questions about each of B pictures: P(yes) and coverage, each (B, Q) float32.

        pictures: image tokens (B, T) or uint8 (B, H, W, 3); questions: B lists of Q. The picture and all text before it run
        once; its questions follow side by side, each seeing the picture and itself only. Coverage is the share of the whole
        vocabulary's distribution that yes and no hold. scored: the answer is begun with BEGUN, and P(1) against 0 is read.
        """
        return self.judge_with_captions(pictures, questions, [[] for _ in questions], batch, scored)[:2]

    @torch.no_grad()
    def reply(self, pictures: Tensor, questions: list[list[str]], most: int = 128, batch: int = 32) -> list[list[Reply]]:
        """What the model writes, greedily and at most `most` tokens of it, to Q questions about each of B pictures.

        pictures, questions and what runs once: as in `judge`. Returns B lists of Q.
        """
        before, replies = len(self.question_ids(DESCRIBE)[0]), []
        positions = self.branch.language_model.config.max_position_embeddings
        for part in (slice(start, start + batch) for start in range(0, len(pictures), batch)):
            texts = [[self.question_ids(question)[1] for question in asked] for asked in questions[part]]
            hidden, feed = self._read(self._looked_at(pictures[part]), texts, most)
            replies += greedy_replies(self.head, hidden, feed, texts, before, most, positions, self._ends)
        return [[read_reply_ids(self.tokenizer, ids, self._ends) for ids in row] for row in replies]

    @torch.no_grad()
    def judge_with_captions(
        self, pictures: Tensor, questions: list[list[str]], captions: list[list[str]], batch: int = 32, scored: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`judge`, and in the same pass how likely the model finds K captions of each picture.

        captions: B lists of K. Returns P(yes) and coverage (B, Q), and log p(caption | picture, DESCRIBE), summed over the
        caption's tokens, in nats, (B, K), all float32: what the model would say of the picture, unasked for yes or no.
        """
        describe = self.question_ids(DESCRIBE)[1]
        yes, no = self._digits if scored else (self._yes, self._no)
        answers = []
        for part in (slice(start, start + batch) for start in range(0, len(pictures), batch)):
            texts = [
                [self.question_ids(question, scored)[1] for question in asked]
                + [describe + self.caption_ids(text) for text in about]
                for asked, about in zip(questions[part], captions[part], strict=True)
            ]
            hidden = self._hidden_states(self._looked_at(pictures[part]), texts)  # (b, Q + K, S, C)
            answers.append(read_answers(self.head, hidden, texts, len(questions[0]), len(describe), yes, no))
        p_yes, coverage, logps = (torch.cat(parts) for parts in zip(*answers, strict=True))
        return p_yes, coverage, logps

    @torch.no_grad()
    def log_likelihoods(self, prompts: list[list[str]], tokens: Array, seeds: list[int], batch: int = 32) -> Tensor:
        """log p(picture | prompt) of B pictures under K prompts each, without guidance: (B, K) float64, summed, in nats.

        tokens (B, T). By Bayes' rule, with all prompts alike beforehand, a difference of two is the log-odds of the prompts: a
        generative classifier (arXiv 2303.16203), the paper's w(y | x). seeds (B,): of the masks that an estimate is made from,
        the same for all prompts of a picture. It costs K passes of the drawing branch, of a masked model mask_draws times K.
        batch: rows in one pass.
        """
        size, found = max(1, batch // (self.mask_draws or 1)), []
        for part in (slice(start, start + size) for start in range(0, len(tokens), size)):
            asked = zip(*prompts[part], strict=True)  # K times b
            logps = [self.logps([*texts], tokens[part], seeds[part]).double().sum(dim=-1) for texts in asked]
            found.append(torch.stack(logps, dim=1))  # (b, K)
        return torch.cat(found)

    # -- training ------------------------------------------------------------------------------------------------------

    def trainable_parameters(self, scope: str = "language_model") -> dict[str, nn.Parameter]:
        """Name -> parameter of what training changes; all others are frozen (`requires_grad` False).

        scope "language_model": the decoder layers and the final norm, the paper's best choice; "drawing": these and what else
        draws (see the family's TRAINED); "adapters": what common/lora.py has added to the decoder layers.
        """
        trained = {}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(re.match(self.TRAINED[scope], name) is not None)
            if parameter.requires_grad:
                trained[name] = parameter
        return trained

    # -- files ---------------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, str]:
        """What the files between the steps say about this model: name, hash of its weights, codebook, image tokens."""
        assert self.directory is not None, "a model that was never loaded or saved has no identity"
        return {
            "model": absolute_name(self.name),
            "model_hash": weights_hash(self.directory),
            "codebook_size": str(self.codebook_size),
            "image_tokens": str(self.image_tokens),
        }

    def _stored(self, files: list[Path]) -> dict[str, Callable[[], Tensor]]:
        """By the name that it is saved under, what reads each tensor of safetensors files as it is stored."""
        return {key: functools.partial(read_tensor, file, key) for file in files for key in tensor_names(file)}

    def _to_save(
        self, model: nn.Module, dtype: torch.dtype, files: list[Path], prefix: str = ""
    ) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
        """What a checkpoint holds of `model`, for `write_one_by_one`: shapes and types on the meta device, and what reads one.

        dtype: of its floating-point numbers. files: where it was loaded from. A model with adapters is copied from there and
        these are added, for the live weights may be rounded; what `_stored` does not know is taken from the live ones.
        """
        live, adapted = plain_tensors(model), adapters(model)
        stored = self._stored(files) if adapted else {}

        def read(key: str) -> Tensor:
            name = key.removeprefix(prefix)
            tensor = stored[key]() if key in stored else live[name].detach().cpu()
            if name.endswith(".weight") and (layer := adapted.get(name.removesuffix(".weight"))):
                tensor = layer.merged(tensor)
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        kinds = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in live.items()}
        shapes = {prefix + name: torch.empty(live[name].shape, dtype=kind, device="meta") for name, kind in kinds.items()}
        return shapes, read

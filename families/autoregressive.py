"""What is the same of all models that draw token by token: prompts run once, the decode loop, exact log-probs, looking.

A family that extends `Autoregressive` says how its texts are written, how a picture is seen, and how image tokens are embedded
and predicted (a `CausalBranch`). The decode loop itself: drawing.py; the lean forward pass: llama.py.

Legend: B rows of a batch, P prompts, N candidates a prompt, T image tokens a picture, V codebook size, L tokens of text,
S tokens of a text about a picture, R rows in flight (doubled by guidance), C hidden size, K texts a picture.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from families.drawing import READ_STEP, CausalBranch, Drawing, noise
from families.family import Array, Family, pad_left, pad_right, pictures_that_fit, positions_of
from families.judging import DESCRIBE, Feed, answer_logps
from families.llama import KeyValueCache, Llama, additive

MOST_AT_ONCE = 256  # pictures in flight: beyond it, reading the cache is all of the time and more of them gain nothing
PROMPT_STEP = 32  # prompts are filled up to a multiple of this where steps are recorded, so that shapes come back


class Autoregressive(Family):
    """A picture is drawn in as many steps as it has tokens, and its log-probs are exact.

    Besides what `Family` asks for a family sets `pad`, a token to fill rows up with, and writes `_unconditional` and
    `_embedded`.
    """

    pad: int

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, head: nn.Linear, branch: CausalBranch, name: str, directory: Path | None
    ) -> None:
        """branch: of the same weights as `model`; its language model is one of those that llama.py reads."""
        super().__init__(model, tokenizer, head, model.device, name, directory)
        self.branch: Any = branch
        self.llama: Any = self.branch.language_model
        self.lean = Llama(self.llama)  # the same weights, read for inference
        self.record = self.device.type == "cuda" and not os.environ.get("DRAW_EAGERLY")  # decode steps: see Drawing
        self._drawing: Drawing | None = None  # the last one, with what it allocated
        self._longest = 0  # tokens that the longest prompt of the run has, as far as it is known
        layers: Any = self.llama.layers
        self.blocks = list(layers)  # what is sharded and recomputed one by one
        self.codebook_size = branch.codebook_size

    def _unconditional(self, ids: list[int]) -> list[int]:
        """The row that guidance contrasts a prompt's with, and that a prompt which is dropped in training becomes."""
        raise NotImplementedError

    def _embedded(self, pictures: Tensor, prefix: list[int]) -> Tensor:
        """What the language model reads of the prefix that all questions share, with each of B pictures in it: (B, L, C)."""
        raise NotImplementedError

    # -- drawing -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        prompts: list[str],
        n: int,
        guidance: float = 5.0,
        temperature: float = 1.0,
        seeds: list[int] | None = None,
        batch: int = 64,
        advance: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Sample n candidates a prompt: image tokens (P, n, T) int64 on the model's device.

        seeds: one integer a prompt (default 0, 1, ...); candidate c of a prompt depends on (its seed, c) alone. On a GPU, whose
        kernels round as their number of rows has it, also on what is drawn beside it: the same for the same prompts, n, batch,
        card and versions. guidance: 1 is none (and skips the unconditional rows). temperature: 0 is greedy. batch: pictures in
        flight. advance: told after every token how many pictures' worth was drawn (on a GPU: was asked for).
        Each prompt is computed once; its keys and values are copied out to the candidates and their guidance rows. The
        candidates of all prompts are cut into batches of one size, `batch` at most.
        """
        seeds = list(range(len(prompts))) if seeds is None else seeds
        step = PROMPT_STEP if self.record or self.device.type == "cuda" else 1
        rows = [self.prompt_ids(prompt) for prompt in prompts]
        guided = guidance != 1
        if guided:
            rows += [self._unconditional(row) for row in rows]
        ids, mask = pad_left(rows, self.pad, self.device, step)  # (P, L), with guidance (2P, L)
        prefix, hidden = self._prefill(ids, mask)
        uniforms = torch.from_numpy(noise(seeds, n, self.image_tokens)).flatten(0, 1).to(self.device)  # (P n, T)
        owner = torch.arange(len(prompts), device=self.device).repeat_interleave(n)  # (P n,) prompt of each candidate
        size = -(-len(owner) // -(-len(owner) // batch))
        drawn = []
        try:
            drawing = self._drawing_of(size, ids.shape[1], guidance, temperature)
            for start in range(0, len(owner), size):
                places = torch.arange(start, start + size, device=self.device).clamp(max=len(owner) - 1)  # the last filled up
                index = owner[places]
                if guided:
                    index = torch.cat([index, index + len(prompts)])
                drawn.append(drawing.draw(prefix, index, mask[index], hidden[index], uniforms[places], advance))
            self.record = drawing.record  # where that failed, it is neither tried nor told again
        except (RuntimeError, MemoryError):  # it may be memory, which is then wanted back
            self._drawing = None
            raise
        return torch.cat(drawn)[: len(owner)].unflatten(0, (len(prompts), n))

    def _drawing_of(self, n: int, length: int, guidance: float, temperature: float) -> Drawing:
        """The decode loop of a batch shape, with room for the run's longest prompt: the last one, wherever that will do."""
        shape = (n, self.image_tokens, guidance, temperature, self.record)
        if self._drawing is None or not self._drawing.serves(shape, length):
            self._drawing = None  # its memory first
            self._drawing = Drawing(self.branch, self.lean, max(length, self._longest), *shape)
        return self._drawing

    def drawing_batch(self, prompts: list[str], guidance: float) -> int:
        """How many pictures at a time fit into memory: what `batch` of sample may well be, at most MOST_AT_ONCE.

        A picture takes the keys and values of its tokens, twice with guidance, and its logits. 65 % of what the model leaves is
        given to them, the rest is for looking at the pictures afterwards; on a CPU, which gains little by it, 64 at most.
        Of these prompts `sample` then keeps room for the longest, so that all are drawn by the same recorded steps.
        """
        config = self.llama.config
        self._longest = max(len(self.prompt_ids(prompt)) for prompt in prompts) + PROMPT_STEP  # at most, once it is filled up
        tokens = self._longest + self.image_tokens + READ_STEP
        numbers = 2 * config.num_hidden_layers * self.lean.n_key_heads * self.lean.head_dim
        rows = 2 if guidance != 1 else 1
        each = rows * tokens * numbers * self.model.dtype.itemsize + self.codebook_size * (4 * rows + 3 * 8)
        most = MOST_AT_ONCE if self.device.type == "cuda" else 64
        return pictures_that_fit(self.model, self.device, each, most)

    def _prefill(self, ids: Tensor, mask: Tensor) -> tuple[KeyValueCache, Tensor]:
        """Run the prompts (R, L) once: their cache, and the hidden state (R, C) that predicts image token 0."""
        rows, length = ids.shape
        place = torch.arange(length, device=self.device)
        visible = (place[:, None] >= place) & mask[:, None, None, :]  # (R, 1, L, L)
        visible |= place[:, None] == place  # padding sees itself: a row of none is NaN
        cache = self.lean.cache(rows, length)
        hidden = self.lean.forward(
            self.branch.embed_tokens(ids),
            self.lean.angles(positions_of(mask)),
            cache,
            place,
            length,
            None if mask.all() else additive(visible, self.model.dtype),
        )
        return cache, hidden[:, -1]

    # -- looking -------------------------------------------------------------------------------------------------------

    def _read(self, pictures: Tensor, texts: list[list[list[int]]], more: int) -> tuple[Tensor, Feed]:
        """Hidden states (B, K, S, C) of K texts a picture, each after the prefix and the picture, none seeing another."""
        prefix = self.question_ids(DESCRIBE)[0]  # the same for all: no padding, plainly causal
        ids = pad_right([ids for row in texts for ids in row], self.pad, self.device, self.text_step)  # (B K, S)
        n_texts, width = len(texts[0]), ids.shape[1]
        before, new = len(prefix), n_texts * width
        cache = self._prefill_pictures(pictures, prefix, room=before + new + n_texts * more)
        place = torch.arange(new, device=self.device)
        own = (place[:, None] // width == place // width) & (place[:, None] >= place)  # (K S, K S): its own text, causal
        hidden = self.lean.forward(
            self.branch.embed_tokens(ids.view(len(texts), new)),  # (B, K S, C)
            self.lean.angles((before + place % width)[None]),
            cache,
            before + place,
            before + new,
            additive(F.pad(own, (before, 0), value=True), self.model.dtype)[None, None],
        )

        def feed(ids: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
            x, end, mask = self.branch.embed_tokens(ids), visible.shape[-1], additive(visible[:, None], self.model.dtype)
            at = torch.arange(end - n_texts, end, device=self.device)
            return self.lean.forward(x, self.lean.angles(positions), cache, at, end, mask)

        return hidden.unflatten(1, (n_texts, width)), feed

    def _prefill_pictures(self, pictures: Tensor, prefix: list[int], room: int) -> KeyValueCache:
        """Run the shared prefix, B pictures included, and return its cache, with room for `room` tokens."""
        embeddings = self._embedded(pictures, prefix)
        cache = self.lean.cache(len(pictures), room)
        place = torch.arange(len(prefix), device=self.device)
        self.lean.forward(embeddings, self.lean.angles(place[None]), cache, place, len(prefix), None)
        return cache

    # -- training ------------------------------------------------------------------------------------------------------

    def logps(
        self, prompts: list[str], tokens: Array, seeds: list[int] | None = None, unconditional: Array | None = None
    ) -> Tensor:
        """log p(token | prompt, tokens before it) of B pictures: (B, T) float32, differentiable.

        tokens (B, T), any integers of torch or numpy. One teacher-forced pass with plain conditional logits: no guidance, no
        temperature, a float32 log-softmax. unconditional: (B,) bool, rows that see the unconditional prompt instead of their
        own (caption dropout). seeds are for families whose log-probs are estimates; here they change nothing.
        """
        rows = [self.prompt_ids(prompt) for prompt in prompts]
        if unconditional is not None:
            dropped = torch.as_tensor(unconditional).tolist()
            rows = [self._unconditional(row) if drop else row for row, drop in zip(rows, dropped, strict=True)]
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        ids = pad_right(rows, self.pad, self.device, self.text_step)  # (B, L)
        return self.branch(ids, lengths, torch.as_tensor(tokens, device=self.device).long())

    def answer_logps(self, pictures: Tensor, questions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """log P(yes), log P(no) and coverage of one question about each of B pictures: (B,) float32, differentiable.

        pictures: image tokens (B, T) or uint8 (B, H, W, 3), as for `judge`. `judge`'s numbers by the path that `logps` takes,
        for gradients in the language model. P(yes) + P(no) = 1; their logs keep their digits where P(yes) rounds to 0 or 1.
        """
        prefix = self.question_ids(questions[0])[0]  # the same for all
        suffixes = [self.question_ids(question)[1] for question in questions]
        text = pad_right(suffixes, self.pad, self.device, self.text_step)  # (B, S)
        last = torch.tensor([len(prefix) + len(ids) - 1 for ids in suffixes], device=self.device)  # (B,)
        before = self._embedded(self._looked_at(pictures), prefix)
        embeddings = torch.cat([before, self.branch.embed_tokens(text)], dim=1)  # (B, L + S, C); pads come last: no mask
        hidden = self.llama(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        hidden = hidden[torch.arange(len(last), device=self.device), last]  # (B, C)
        return answer_logps(self.head, hidden, self._yes, self._no)

    @property
    def activation_bytes(self) -> int:
        """What a picture's training pass keeps for its backward pass under bfloat16 autocast; a test counts it.

        Per token and layer 40 bytes a unit of the hidden state and 8 a unit of the MLP, prompts taken as 64 tokens; with fewer
        key heads than query heads that is up to an eighth too much.
        """
        config = self.llama.config
        each = 40 * config.hidden_size + 8 * config.intermediate_size
        return (64 + self.image_tokens) * config.num_hidden_layers * each

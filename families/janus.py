"""Janus-Pro: an autoregressive drawing branch and a looking branch about one language model.

Chen et al. 2025 (arXiv 2501.17811), as transformers implements it: `deepseek-community/Janus-Pro-1B`, `-7B`, or any directory
in that format. `model.load` returns a `Janus`. The decode loop: janus_drawing.py, and llama.py below it; what is refused on
reading: janus_files.py; what all families do alike: family.py. Nothing else knows how the family works.

Everything specific to a checkpoint (chat template, special tokens, sizes, pixel statistics) is read from its files.

Legend: B rows of a batch, P prompts, N candidates a prompt, T image tokens a picture, V codebook size,
L tokens of text, S new tokens of a step, R rows in flight (doubled by guidance), C hidden size, Q questions a picture.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import JanusForConditionalGeneration, JanusProcessor
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from common.writing import whole_directory
from families.family import (
    Array,
    Family,
    PromptError,
    Reserved,
    check_length,
    pad_left,
    pad_right,
    pictures_that_fit,
    positions_of,
)
from families.janus_drawing import READ_STEP, Drawing, DrawingBranch, noise
from families.janus_files import check_text, read_janus
from families.judging import DESCRIBE, Feed, answer_logps, answered
from families.llama import KeyValueCache, Llama, additive
from families.pretrained import CheckpointError, stored_dtype, weight_files, write_config, write_shards

MOST_AT_ONCE = 256  # pictures in flight: beyond it, reading the cache is all of the time and more of them gain nothing
PROMPT_STEP = 32  # prompts are filled up to a multiple of this where steps are recorded, so that shapes come back


def load_janus(directory: Path, name: str, device: torch.device, dtype: torch.dtype) -> "Janus":
    """The Janus that lies in `directory`; `name` is what the user called it.

    Raises CheckpointError, naming what was found, for anything that is not a complete one.
    """
    model, processor = read_janus(directory, name, device, dtype)
    policy = Janus(model, processor, name=name, directory=directory)
    check_text(policy)
    return policy


class Janus(Family):
    """Janus-Pro; the implementation of the layers is transformers'. A picture is drawn in as many steps as it has tokens.

    Of training scope "drawing": the image-token embeddings, their aligner and the generation head as well. The token
    embedding, lm_head, vision tower, understanding aligner and VQ model never train.
    """

    TRAINED: ClassVar = {
        "language_model": r"model\.language_model\.(layers|norm)\.",
        "drawing": r"model\.(language_model\.(layers|norm)\.|generation_)",
        "adapters": r"model\.language_model\..*\.lora_[ab]$",
    }

    def __init__(
        self, model: JanusForConditionalGeneration, processor: JanusProcessor, name: str = "", directory: Path | None = None
    ) -> None:
        super().__init__(model, processor.tokenizer, model.lm_head, model.device, name, directory)
        self.processor = processor
        self.stored_dtype = stored_dtype(directory) if directory else "float32"
        self.branch: Any = DrawingBranch(model)
        self.llama = model.model.language_model
        self.lean = Llama(self.llama)  # the same weights, read for inference
        self.record = self.device.type == "cuda" and not os.environ.get("DRAW_EAGERLY")  # decode steps: see Drawing
        self._drawing: Drawing | None = None  # the last one, with what it allocated
        self._longest = 0  # tokens that the longest prompt of the run has, as far as it is known
        self.blocks = list(self.llama.layers)  # what is sharded and recomputed one by one
        self.image_tokens = processor.num_image_tokens
        config: Any = model.config
        self.codebook_size = config.vq_config.num_embeddings
        # transformers 5 says they are tied of whatever does not say so itself; another engine would believe it.
        config.tie_word_embeddings = model.lm_head.weight is model.get_input_embeddings().weight
        config.text_config.tie_word_embeddings &= config.tie_word_embeddings
        self._read_special_tokens()
        statistics = (processor.image_processor.image_mean, processor.image_processor.image_std)
        self._mean, self._std = (torch.tensor(values, device=self.device).float() for values in statistics)

    def _read_special_tokens(self) -> None:
        """Ids from the checkpoint: generation config first (what transformers' own generate obeys), else tokenizer."""
        tokenizer, config = self.tokenizer, self.model.generation_config
        own = tokenizer.convert_tokens_to_ids
        self.bos = config.bos_token_id if config.bos_token_id is not None else tokenizer.bos_token_id
        self.pad = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_token_id
        self.boi = own(self.processor.image_start_token)
        self.eoi = own(self.processor.image_end_token)
        self.image = own(self.processor.image_token)
        for name in ("bos", "pad", "boi", "eoi", "image"):
            if not isinstance(getattr(self, name), int):
                raise CheckpointError(f"{self.name}: the checkpoint names no {name} token")
        spelt = (self.processor.image_token, self.processor.image_start_token, self.processor.image_end_token)
        self.reserved = Reserved(tokenizer, more=spelt)

    # -- text -> tokens ------------------------------------------------------------------------------------------------

    def _chat(self, text: str, *before: dict[str, str]) -> str:
        messages: list[Any] = [{"role": "user", "content": [*before, {"type": "text", "text": text}]}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def _tokenize(self, text: str) -> list[int]:
        """Ids with BOS exactly once, whether the template writes it or the tokenizer adds it."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids if ids[:1] == [self.bos] else [self.bos, *ids]

    def prompt_ids(self, prompt: str) -> list[int]:
        """The tokens that ask for a picture: the chat template about the prompt, then begin-of-image.

        Raises PromptError if the prompt spells one of the model's special tokens, or is too long with its picture.
        """
        ids = self.reserved.tokens("prompt", prompt, self._asking)
        check_length("prompt", prompt, len(ids) + self.image_tokens, self.llama.config.max_position_embeddings)
        if ids[-1] != self.boi or any(ids.count(token) != 1 for token in (self.bos, self.boi)):
            raise PromptError(f"prompt {prompt[:80]!r} spells a special token of the model")
        return ids

    def _asking(self, prompt: str) -> list[int]:
        return self._tokenize(self._chat(prompt) + self.processor.image_start_token)

    def question_ids(self, question: str, scored: bool = False) -> tuple[list[int], list[int]]:
        """The tokens of a question about a picture, cut after end-of-image: (prefix all questions share, the rest).

        Raises PromptError if the question spells one of the model's special tokens, or is too long with its picture.
        """
        ids = self._asked(question, scored)
        if any(ids.count(token) != 1 for token in (self.bos, self.boi, self.eoi)):
            raise PromptError(f"question {question[:80]!r} spells a special token of the model")
        check_length("question", question, len(ids), self.llama.config.max_position_embeddings)
        cut = ids.index(self.eoi) + 1
        return ids[:cut], ids[cut:]

    def _asked_about(self, question: str, answer: str = "") -> list[int]:
        text = self._chat(question, {"type": "image"})
        if self.processor.use_default_system_prompt:
            text = DEFAULT_SYSTEM_PROMPT + text
        if text.count(self.processor.image_token) != 1:
            raise PromptError(f"question {question[:80]!r}: the chat template does not write the image token once")
        text = text.replace(self.processor.image_token, self.processor.replace_image_token({}, 0))
        return self._tokenize(answered(text, answer))

    def caption_ids(self, caption: str) -> list[int]:
        """The tokens of a caption as the answer to DESCRIBE. Raises PromptError if it spells a special token of the model."""
        asked = self.reserved.tokens("what is asked", DESCRIBE, lambda text: self._tokenize(self._chat(text)))
        ids = self.reserved.tokens("caption", caption, lambda text: self._tokenize(f"{self._chat(DESCRIBE)} {text}"))
        if ids[: len(asked)] != asked or len(ids) == len(asked):
            raise PromptError(f"caption {caption[:80]!r} spells nothing, or not itself after {DESCRIBE!r}")
        return ids[len(asked) :]

    def unconditional(self, ids: Tensor) -> Tensor:
        """The row guidance contrasts with: every token but BOS and begin-of-image becomes pad; length and mask stay."""
        return ids.where((ids == self.bos) | (ids == self.boi), self.pad)

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
        ids, mask = pad_left([self.prompt_ids(prompt) for prompt in prompts], self.pad, self.device, step)  # (P, L)
        guided = guidance != 1
        if guided:
            ids, mask = torch.cat([ids, self.unconditional(ids)]), mask.repeat(2, 1)  # (2P, L)
        prefix, hidden = self._prefill(ids, mask)
        uniforms = torch.from_numpy(noise(seeds, n, self.image_tokens)).flatten(0, 1).to(self.device)  # (P n, T)
        owner = torch.arange(len(prompts), device=self.device).repeat_interleave(n)  # (P n,) prompt of each candidate
        size = -(-len(owner) // -(-len(owner) // batch))
        drawn = []
        try:
            drawing = self._drawing_of(size, ids.shape[1], guidance, temperature)
            for start in range(0, len(owner), size):
                rows = torch.arange(start, start + size, device=self.device).clamp(max=len(owner) - 1)  # the last one filled up
                index = owner[rows]
                if guided:
                    index = torch.cat([index, index + len(prompts)])
                drawn.append(drawing.draw(prefix, index, mask[index], hidden[index], uniforms[rows], advance))
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

    @torch.no_grad()
    def decode(self, tokens: Tensor, batch: int = 16) -> Tensor:
        """Image tokens (B, T) -> pictures (B, H, W, 3) uint8, clamped and rounded: what people see is what is judged.

        The original and transformers cut off instead, as Show-o does: what that changes stands in docs/real-models.md.
        """
        pictures = []
        for block in tokens.split(batch):
            pixels = self.model.model.vqmodel.decode(block).permute(0, 2, 3, 1).float()  # (b, H, W, 3)
            pixels = pixels * self._std + self._mean
            pictures.append((pixels.clamp(0, 1) * 255).round().to(torch.uint8))
        return torch.cat(pictures)

    # -- looking -------------------------------------------------------------------------------------------------------

    def _looked_at(self, pictures: Tensor) -> Tensor:
        """Pictures (B, H, W, 3) as they are, image tokens (B, T) as the pictures they stand for."""
        pictures = pictures.to(self.device)
        return self.decode(pictures) if pictures.dim() == 2 else pictures

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
        """Run the shared prefix, pictures (B, H, W, 3) included, and return its cache, with room for `room` tokens."""
        embeddings = self._embed_prefix(pictures, prefix)
        cache = self.lean.cache(len(pictures), room)
        place = torch.arange(len(prefix), device=self.device)
        self.lean.forward(embeddings, self.lean.angles(place[None]), cache, place, len(prefix), None)
        return cache

    @torch.no_grad()
    def _embed_prefix(self, pictures: Tensor, prefix: list[int]) -> Tensor:
        """What the language model reads of the shared prefix with each picture in it: (B, L, C)."""
        ids = torch.tensor(prefix, device=self.device)
        embeddings = self.branch.embed_tokens(ids).repeat(len(pictures), 1, 1)
        features = self.model.model.aligner(self.model.model.vision_model(self._pixels(pictures)).last_hidden_state)
        embeddings[:, ids == self.image] = features.to(embeddings.dtype)
        return embeddings

    def _pixels(self, pictures: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> what the vision tower reads (B, 3, size, size), with the checkpoint's statistics."""
        size = self.model.config.vision_config.image_size
        if pictures.shape[1:3] != (size, size):  # another model's pictures: resized as the checkpoint's processor does
            pixels = self.processor.image_processor(list(pictures.permute(0, 3, 1, 2).cpu()), return_tensors="pt")
            return pixels["pixel_values"].to(self.device, self.model.dtype)
        pixels = (pictures.float() / 255 - self._mean) / self._std
        return pixels.permute(0, 3, 1, 2).to(self.model.dtype)

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
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        ids = pad_right(rows, self.pad, self.device, self.text_step)  # (B, L)
        if unconditional is not None:
            dropped = torch.as_tensor(unconditional, device=self.device)[:, None]
            ids = torch.where(dropped, self.unconditional(ids), ids)
        return self.branch(ids, lengths, torch.as_tensor(tokens, device=self.device).long())

    def answer_logps(self, pictures: Tensor, questions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """log P(yes), log P(no) and coverage of one question about each of B pictures: (B,) float32, differentiable.

        pictures: image tokens (B, T), decoded first, or uint8 (B, H, W, 3). `judge`'s numbers by the path that `logps` takes,
        for gradients in the language model; vision tower and aligner get none. P(yes) + P(no) = 1; their logs keep their
        digits where P(yes) rounds to 0 or 1.
        """
        prefix = self.question_ids(questions[0])[0]  # the same for all
        suffixes = [self.question_ids(question)[1] for question in questions]
        text = pad_right(suffixes, self.pad, self.device, self.text_step)  # (B, S)
        last = torch.tensor([len(prefix) + len(ids) - 1 for ids in suffixes], device=self.device)  # (B,)
        before = self._embed_prefix(self._looked_at(pictures), prefix)
        embeddings = torch.cat([before, self.branch.embed_tokens(text)], dim=1)  # (B, L + S, C); pads come last: no mask
        hidden = self.llama(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        hidden = hidden[torch.arange(len(last), device=self.device), last]  # (B, C)
        return answer_logps(self.head, hidden, self._yes, self._no)

    @property
    def activation_bytes(self) -> int:
        """What a picture's training pass keeps for its backward pass under bfloat16 autocast; a test counts it.

        Per token and layer 40 bytes a unit of the hidden state and 8 a unit of the MLP, prompts taken as 64 tokens.
        """
        config = self.llama.config
        each = 40 * config.hidden_size + 8 * config.intermediate_size
        return (64 + self.image_tokens) * config.num_hidden_layers * each

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a directory that plain transformers (5 or later) loads and generates with; it appears whole or not at all.

        dtype: default as it was stored. What is written is save_pretrained's, byte for byte, but with one tensor at a time in
        memory; shards of at most 5 GB. An existing directory at `path` is replaced. A full disk is an OSError.
        """
        path = Path(path)
        dtype = dtype or getattr(torch, self.stored_dtype)
        generation: Any = self.model.generation_config  # what plain generate needs, also where it was not in a file before
        generation.bos_token_id, generation.pad_token_id = self.bos, self.pad
        generation.generation_kwargs = {"boi_token_id": self.boi}
        generation._from_model_config = False  # or transformers leaves generation_kwargs out
        to_save = self._to_save(self.model, dtype, weight_files(self.directory) if self.directory else [])
        with whole_directory(path) as directory:
            write_config(directory, self.model, dtype)
            write_shards(directory, *to_save)
            self.processor.save_pretrained(directory)
        self.name, self.directory, self.stored_dtype = str(path), path, str(dtype).removeprefix("torch.")

"""Janus-Pro: an autoregressive drawing branch and a looking branch about one language model.

Chen et al. 2025 (arXiv 2501.17811), as transformers implements it: `deepseek-community/Janus-Pro-1B`, `-7B`, any directory in
that format or in DeepSeek's own (janus_original.py). `model.load` returns a `Janus`. How it draws, looks and trains:
autoregressive.py; what is refused on reading: janus_files.py; what all families do alike: family.py. Nothing else knows it.

Everything specific to a checkpoint (chat template, special tokens, sizes, pixel statistics) is read from its files.

Legend: B rows of a batch, P prompts, N candidates a prompt, T image tokens a picture, V codebook size,
L tokens of text, S new tokens of a step, R rows in flight (doubled by guidance), C hidden size, Q questions a picture.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import JanusForConditionalGeneration, JanusProcessor
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from common.writing import whole_directory
from families.autoregressive import Autoregressive
from families.drawing import CausalBranch
from families.family import PromptError, Reserved, check_length
from families.janus_files import check_text, is_original, read_janus
from families.janus_original import UNUSED, stored_tensors
from families.judging import DESCRIBE, answered
from families.pretrained import CheckpointError, stored_dtype, weight_files, write_config, write_shards


def load_janus(directory: Path, name: str, device: torch.device, dtype: torch.dtype) -> "Janus":
    """The Janus that lies in `directory`; `name` is what the user called it.

    Raises CheckpointError, naming what was found, for anything that is not a complete one.
    """
    model, processor = read_janus(directory, name, device, dtype)
    policy = Janus(model, processor, name=name, directory=directory)
    check_text(policy)
    policy.reserved.spelt |= {*re.findall(r"^\w+:", policy._chat("yes"), re.MULTILINE)}  # roles in plain words
    return policy


class DrawingBranch(CausalBranch):
    """Janus's: generation_embeddings -> generation_aligner -> language_model -> generation_head.

    (`JanusForConditionalGeneration`'s own forward always ends in lm_head, the text vocabulary.)
    """

    def __init__(self, model: JanusForConditionalGeneration) -> None:
        super().__init__()
        self.embed_tokens = model.get_input_embeddings()
        self.generation_embeddings = model.model.generation_embeddings
        self.generation_aligner = model.model.generation_aligner
        self.language_model = model.model.language_model
        self.generation_head = model.model.generation_head
        self.codebook_size: int = self.generation_embeddings.num_embeddings

    def embed_image(self, tokens: Tensor) -> Tensor:
        return self.generation_aligner(self.generation_embeddings(tokens))

    def image_logits(self, hidden: Tensor) -> Tensor:
        return self.generation_head(hidden)


class Janus(Autoregressive):
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
        super().__init__(model, processor.tokenizer, model.lm_head, DrawingBranch(model), name, directory)
        self.processor = processor
        self.stored_dtype = stored_dtype(directory, UNUSED) if directory else "float32"
        self.image_tokens = processor.num_image_tokens
        config: Any = model.config
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

    def _unconditional(self, ids: list[int]) -> list[int]:
        return self.unconditional(torch.tensor(ids)).tolist()

    # -- pictures ------------------------------------------------------------------------------------------------------

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

    def _looked_at(self, pictures: Tensor) -> Tensor:
        """Pictures (B, H, W, 3) as they are, image tokens (B, T) as the pictures they stand for."""
        pictures = pictures.to(self.device)
        return self.decode(pictures) if pictures.dim() == 2 else pictures

    @torch.no_grad()
    def _embedded(self, pictures: Tensor, prefix: list[int]) -> Tensor:
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

    # -- files ---------------------------------------------------------------------------------------------------------

    def _stored(self, files: list[Path]) -> dict[str, Callable[[], Tensor]]:
        if self.directory and is_original(self.directory):
            return stored_tensors(self.directory, self.model.state_dict())
        return super()._stored(files)

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

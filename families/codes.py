"""The third family: a plain causal language model whose vocabulary holds the image codes, which it draws and looks at alike.

Tar (Han et al. 2025, arXiv 2506.18898; `csuhan/Tar-1.5B`, `-7B-v0.1`) and Liquid (Wu et al. 2024, arXiv 2412.04332;
`Junfeng5/Liquid_V1_7B`); others of the kind by an entry in the table of codes_files.py, which says how each writes, finds the
codes in a vocabulary and refuses what has none. `model.load` returns a `CodesInVocabulary`. It draws as Janus does:
autoregressive.py. Nothing else knows how the family works.

Departures from the authors' own code: only codes are drawn, and all of a picture's (theirs clamp what is none, or fill up with
code 0); there is no top-k and no top-p, so that what is drawn from is what `logps` gives.

Legend: B rows of a batch, T image tokens a picture, V codebook size, L tokens of text, C hidden size.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from common.writing import whole_directory, write_one_by_one
from families.autoregressive import Autoregressive
from families.codes_files import DROPPED, LENGTH, PICTURES, Parts, check_text, no_decoder, read_codes
from families.drawing import CausalBranch
from families.family import PromptError, Reserved, check_length
from families.judging import DESCRIBE, answered
from families.magvit import from_pixels, to_pixels
from families.pretrained import CheckpointError, weight_files, write_config, write_shards


def load_codes(directory: Path, name: str, device: torch.device, dtype: torch.dtype) -> "CodesInVocabulary":
    """The model that lies in `directory`; `name` is what the user called it.

    Raises CheckpointError, naming what was found, for anything that is not a complete one.
    """
    policy = CodesInVocabulary(read_codes(directory, name, device, dtype), name, directory)
    check_text(policy)
    return policy


class CodesBranch(CausalBranch):
    """Image tokens are rows of the token embedding, and their logits those rows of lm_head: of the rest nothing is drawn."""

    def __init__(self, model: Any, first_code: int, n_codes: int) -> None:
        super().__init__()
        self.embed_tokens, self.language_model, self.lm_head = model.get_input_embeddings(), model.model, model.lm_head
        self.first_code, self.codebook_size = first_code, n_codes

    def embed_image(self, tokens: Tensor) -> Tensor:
        return self.embed_tokens(tokens + self.first_code)

    def image_logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.lm_head.weight[self.first_code : self.first_code + self.codebook_size])


class CodesInVocabulary(Autoregressive):
    """A causal language model that draws by going on with image codes; the implementation of the layers is transformers'.

    `sample` draws from the softmax over the V codes alone, and `logps` are of the same one: log p(token | prompt, tokens before
    it, it is a code). The paper's log p is over the whole vocabulary, which is less by log p(a code | ...), next to 0 in a
    model that has learnt to draw. What is sampled, preferred and trained is then one distribution; of what is drawn by others
    with the whole vocabulary this says nothing, and training here does not keep the other tokens down.

    The authors' recipes cut the tail off (top-k and top-p, see docs/real-models.md): then what is drawn has another probability
    than the one that is trained. The interface has no such flag; a lower temperature does as much.

    Of training scope "drawing": the two tables at the ends as well, token embedding and lm_head (often one and the same), in
    which codes and words lie side by side. Pictures are judged by the very codes that were drawn; `decode`, and `judge` of
    pixels, need an image tokenizer beside the model, and nothing else does.
    """

    TRAINED: ClassVar = {
        "language_model": r"model\.(layers|norm)\.",
        "drawing": r"(model|lm_head)\.",
        "adapters": r"model\.layers\..*\.lora_[ab]$",
    }

    def __init__(self, parts: Parts, name: str = "", directory: Path | None = None) -> None:
        model, tokenizer, self.template, first_code, n_codes, self.image_tokens, self.vq, self.files, self.stored_dtype = parts
        branch = CodesBranch(model, first_code, n_codes)
        super().__init__(model, tokenizer, model.lm_head, branch, name, directory)
        known = tokenizer.get_vocab()
        self.pad = next((index for index in (tokenizer.pad_token_id, tokenizer.eos_token_id) if index is not None), 0)
        self._mark = known[self.template.mark]
        begin = self.template.begin
        self._begin = begin.get(self.image_tokens, next(iter(begin.values())))
        self.reserved = Reserved(tokenizer, more=[*known.keys() & {self.template.mark}])
        codes = {token for token, index in known.items() if first_code <= index < first_code + n_codes}
        self.reserved.spelt -= codes  # thousands; one that is written becomes its id, which is reserved
        self._unasked = self._tokenize(self.template.unconditional + self._begin)
        self._told = self.template.trained_without or getattr(model.config, DROPPED, False)  # of guidance
        if self.vq is None:
            self.no_pictures = no_decoder(None, name)

    # -- text -> tokens ------------------------------------------------------------------------------------------------

    def _tokenize(self, text: str) -> list[int]:
        """Ids, with BOS exactly once where the kind writes it, whether the tokenizer adds it or not."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self.tokenizer.bos_token_id, *ids] if self.template.bos else ids

    def prompt_ids(self, prompt: str) -> list[int]:
        """The tokens that ask for a picture, up to what its codes follow.

        Raises PromptError if the prompt spells one of the model's special tokens or codes, or is too long with its picture.
        """
        ids = self.reserved.tokens("prompt", prompt, self._asking)
        check_length("prompt", prompt, len(ids) + self.image_tokens, self.llama.config.max_position_embeddings)
        return ids

    def _asking(self, prompt: str) -> list[int]:
        return self._tokenize(self.template.ask.replace("[prompt]", prompt) + self._begin)

    def _unconditional(self, ids: list[int]) -> list[int]:
        return [*self._unasked]

    def question_ids(self, question: str, scored: bool = False) -> tuple[list[int], list[int]]:
        """The tokens of a question about a picture: (prefix all questions share, code 0 in place of its codes; the rest).

        Raises PromptError if the question spells one of the model's special tokens or codes, or is too long with its picture.
        """
        ids = self._asked(question, scored)
        if ids.count(self._mark) != 1:
            raise PromptError(f"question {question[:80]!r} spells a special token of the model")
        cut = ids.index(self._mark)
        check_length("question", question, len(ids) - 1 + self.image_tokens, self.llama.config.max_position_embeddings)
        return ids[:cut] + [self.branch.first_code] * self.image_tokens, ids[cut + 1 :]

    def _chat(self, question: str) -> str:
        return self.template.look.replace("[codes]", self.template.mark).replace("[question]", question)

    def _asked_about(self, question: str, answer: str = "") -> list[int]:
        return self._tokenize(answered(self._chat(question), answer))

    def caption_ids(self, caption: str) -> list[int]:
        """The tokens of a caption as the answer to DESCRIBE. Raises PromptError if it spells a special token of the model."""
        asked = self.reserved.tokens("question", DESCRIBE, self._asked_about)
        ids = self.reserved.tokens("caption", caption, lambda text: self._asked_about(DESCRIBE, text))
        if not caption.strip() or ids[: len(asked)] != asked or len(ids) == len(asked):
            raise PromptError(f"caption {caption[:80]!r} spells nothing, or not itself after {DESCRIBE!r}")
        length = len(ids) - 1 + self.image_tokens
        check_length("caption", caption, length, self.llama.config.max_position_embeddings)
        return ids[len(asked) :]

    # -- drawing -------------------------------------------------------------------------------------------------------

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
        """Sample n candidates a prompt, of codes alone: see `Autoregressive.sample`.

        guidance contrasts with the kind's unconditional text. A kind that was never trained without its prompt (Tar) is
        contrasted with an empty one, and that is told once.
        """
        if guidance != 1 and not self._told:
            told = f"guidance {guidance:g} contrasts with an empty one"
            print(f"note           a {self.template.name} comes never trained without a prompt; {told}")
            self._told = True
        return super().sample(prompts, n, guidance, temperature, seeds, batch, advance)

    @torch.no_grad()
    def decode(self, tokens: Tensor, batch: int = 16) -> Tensor:
        """Image tokens (B, T) -> pictures (B, H, W, 3) uint8; CheckpointError where nothing beside the model decodes."""
        if self.vq is None:
            raise CheckpointError(self.no_pictures)
        return torch.cat([from_pixels(self.vq.decode(block)) for block in tokens.split(batch)])

    # -- looking -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _looked_at(self, pictures: Tensor) -> Tensor:
        """Image tokens (B, T) as they are, pictures (B, H, W, 3) uint8 as the codes they are encoded to."""
        pictures = pictures.to(self.device)
        if pictures.dim() != 2:
            if self.vq is None:
                raise CheckpointError(self.no_pictures)
            pictures = self.vq.encode(to_pixels(pictures, self.vq.patch * math.isqrt(self.image_tokens)))
        if pictures.shape[1] != self.image_tokens:
            raise PromptError(f"a picture of {pictures.shape[1]} codes, but {self.name} reads {self.image_tokens}")
        return pictures

    def _embedded(self, pictures: Tensor, prefix: list[int]) -> Tensor:
        ids = torch.tensor(prefix, device=self.device).repeat(len(pictures), 1)  # (B, L)
        ids[:, len(prefix) - self.image_tokens :] = pictures + self.branch.first_code
        return self.branch.embed_tokens(ids)

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a directory that plain transformers (5 or later) loads; it appears whole or not at all.

        dtype: of the language model, default as it was stored. Weights are written as save_pretrained does, byte for byte, but
        with one tensor at a time in memory; the tokenizer as it was read; the image tokenizer, if there is one, beside it. An
        existing directory at `path` is replaced. A full disk is an OSError.
        """
        path = Path(path)
        dtype = dtype or getattr(torch, self.stored_dtype)
        tensors, read = self._to_save(self.model, dtype, weight_files(self.directory) if self.directory else [])
        if self.model.config.tie_word_embeddings:  # where the one table was sharded, two equal ones come back
            tensors.pop("lm_head.weight", None)
        setattr(self.model.config, LENGTH, self.image_tokens)
        with whole_directory(path) as directory:
            write_config(directory, self.model, dtype)
            write_shards(directory, tensors, read)
            for file, content in self.files.items():
                (directory / file).write_bytes(content)
            if self.vq is not None:
                place = directory / PICTURES[type(self.vq)]
                place.parent.mkdir()
                write_one_by_one(place, *self._to_save(self.vq, torch.float32, []))
        self.name, self.directory, self.stored_dtype = str(path), path, str(dtype).removeprefix("torch.")

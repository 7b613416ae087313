"""Show-o, the second family: masked diffusion draws, next-token prediction looks, one Phi-1.5 does both on the same codes.

Xie et al. 2024 (arXiv 2408.12528). `model.load` returns a `ShowO` where a checkpoint's config.json says `_class_name`
"Showo". How the family draws, and its forward passes: showo_drawing.py; its image tokenizer: magvit.py; which files it is read
from and saved to: showo_files.py; what all families do alike: family.py. Nothing else knows how it works.

Departures from Show-o's own code: a prompt that it would cut is refused; padding counts for no position (positions are
relative: the same logits); a picture depends on its seed and candidate number, not on its batch (on a GPU by rounding).

Legend: B rows of a batch, P prompts, N candidates a prompt, T image tokens a picture, V codebook size, L tokens of text,
K mask draws a picture, R rows in flight (doubled by guidance), C channels, Q questions a picture, S tokens of a sequence.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.writing import whole_directory, write_one_by_one
from families.family import (
    Array,
    Family,
    PromptError,
    PromptTooLong,
    Reserved,
    check_length,
    pad_left,
    pad_right,
    pictures_that_fit,
    positions_of,
)
from families.judging import DESCRIBE, Feed, answer_logps, answered
from families.logits import draw, guide
from families.magvit import from_pixels, to_pixels
from families.pretrained import CheckpointError
from families.showo_drawing import (
    DrawingBranch,
    KeysValues,
    gumbel,
    looking_mask,
    mask_draws,
    mask_predict,
    phi_forward,
    picture_noise,
    text_mask,
)
from families.showo_files import SPECIAL, TEXT_END, WEIGHTS, Parts, read_showo

MAX_TEXT = 128  # tokens of text Show-o was trained with, <|sot|> and <|eot|> among them
DRAWS_AT_ONCE = 4096  # codes drawn in one piece: each needs its whole distribution in float64
ROLES = ("USER:", "ASSISTANT:")  # what its template of questions is made of: plain words
MOST_AT_ONCE = 64  # pictures in flight: all their codes run in every pass, so more of them gain nothing


def load_showo(directory: Path, name: str, device: torch.device, dtype: torch.dtype) -> "ShowO":
    """The Show-o that lies in `directory`; `name` is what the user called it.

    dtype: of the language model; the image tokenizer is always float32. Raises CheckpointError, naming what was found,
    for anything that is not a complete Show-o without CLIP.
    """
    return ShowO(read_showo(directory, name, device, dtype), name, directory)


class ShowO(Family):
    """Show-o: a masked-diffusion drawing branch and a next-token looking branch in one Phi-1.5, on MAGVIT-v2's codes.

    The implementation of Phi's layers is transformers'. Two numbers may be set on a loaded model, or by `model.load`:

    steps: passes a picture is drawn in (16, or 50 for pictures of 1,024 codes, as Show-o's authors run it; never more than
    there are codes).
    mask_draws: masks a picture that `logps` averages over, K (default 8). Time and memory grow with it, the variance falls.

    Of training scope "drawing": the two tables at the ends as well, token embedding and lm_head, in which image codes and words
    lie side by side: this family has none for drawing alone. The image tokenizer never trains. Pictures are judged by the very
    codes that were drawn; given as pixels they are encoded first, which is less true.
    """

    TRAINED: ClassVar = {
        "language_model": r"showo\.model\.(layers|final_layernorm)\.",
        "drawing": r"showo\.",
        "adapters": r"showo\.model\.layers\..*\.lora_[ab]$",
    }

    def __init__(self, parts: Parts, name: str = "", directory: Path | None = None) -> None:
        phi, vq, tokenizer, image_tokens, self.files, self.stored_dtype = parts
        model = nn.ModuleDict({"showo": phi, "magvitv2": vq})
        super().__init__(model, tokenizer, phi.lm_head, phi.device, name, directory)
        self.vq = vq
        self.image_tokens = image_tokens
        self.codebook_size = 2**vq.bits
        ids = tokenizer.get_vocab()
        self.pad, self.soi, self.eoi = ids["[PAD]"], ids["<|soi|>"], ids["<|eoi|>"]
        self.t2i, self.mmu = ids["<|t2i|>"], ids["<|mmu|>"]
        self.sot = self.eot = ids[TEXT_END]
        self._ends = [self.eot]
        self.reserved = Reserved(tokenizer, more=(*SPECIAL, TEXT_END, *ROLES))
        first_code = len(tokenizer)
        self.mask = first_code + self.codebook_size
        self.branch: Any = DrawingBranch(phi, self.soi, self.eoi, first_code, self.codebook_size)
        self.language_model = phi.model
        self.blocks = list(phi.model.layers)  # what is sharded and recomputed one by one
        self.steps = 50 if image_tokens >= 1024 else min(16, image_tokens)
        self.mask_draws = 8
        positions = phi.config.max_position_embeddings
        if MAX_TEXT + 1 + image_tokens + 2 > positions:
            raise CheckpointError(f"{name}: num_vq_tokens {image_tokens} and a prompt are more than its {positions} positions")

    # -- text -> tokens ------------------------------------------------------------------------------------------------

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _chat(self, text: str) -> str:
        return f"USER: \n{text} ASSISTANT:"

    def prompt_ids(self, prompt: str) -> list[int]:
        """The tokens that ask for a picture: task, start of text, prompt, end of text.

        Raises PromptError if the prompt spells one of the model's special tokens, or is longer than any it was trained on.
        """
        text = self.reserved.tokens("prompt", prompt, self._tokenize)
        if len(text) > MAX_TEXT - 2:
            raise PromptTooLong(f"prompt {prompt[:80]!r} makes {len(text)} tokens; the model reads at most {MAX_TEXT - 2}")
        return self._prompt_row(text)

    def _prompt_row(self, text: list[int]) -> list[int]:
        return [self.t2i, self.sot, *text, self.eot]

    def question_ids(self, question: str, scored: bool = False) -> tuple[list[int], list[int]]:
        """The tokens of a question about a picture: (prefix all questions share, masks in place of its codes; the rest).

        The form of Show-o's own inference, start of text and line break included. It was tuned on one without them.
        """
        rest = [self.sot, *self._asked(question, scored)]
        prefix = [self.mmu, self.soi, *[self.mask] * self.image_tokens, self.eoi]
        check_length("question", question, len(prefix) + len(rest), self.language_model.config.max_position_embeddings)
        return prefix, rest

    def _asked_about(self, question: str, answer: str = "") -> list[int]:
        return self._tokenize(answered(self._chat(question), answer))

    def caption_ids(self, caption: str) -> list[int]:
        """The tokens of a caption as the answer to DESCRIBE. Raises PromptError if it spells a special token of the model."""
        asked = self.reserved.tokens("question", DESCRIBE, lambda text: self._tokenize(self._chat(text)))
        ids = self.reserved.tokens("caption", caption, lambda text: self._tokenize(f"{self._chat(DESCRIBE)} {text}"))
        if not caption.strip() or ids[: len(asked)] != asked:
            raise PromptError(f"caption {caption[:80]!r} spells nothing, or not itself after {DESCRIBE!r}")
        check_length("caption", caption, self.image_tokens + 4 + len(ids), self.language_model.config.max_position_embeddings)
        return ids[len(asked) :]

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
        card and versions.
        guidance: w in uncond + w (cond - uncond), as for every family; 1 is none (and skips the unconditional rows). Show-o's
        own scale is w - 1: its published 5 at 512 pixels and 1.75 at 256 are 6 and 2.75 here. temperature: how much chance
        there is at first in which codes are kept (the codes themselves are drawn at temperature 1); 0 is greedy in both.
        batch: pictures in flight. advance: told after every step how many pictures' worth was drawn. A prompt's keys and
        values are computed once: text never sees the picture.
        """
        seeds = list(range(len(prompts))) if seeds is None else seeds
        rows = [self.prompt_ids(prompt) for prompt in prompts]
        if guidance != 1:
            rows.append(self._prompt_row([]))
        ids, real = pad_left(rows, self.pad, self.device, self.text_step)  # (P or P + 1, L)
        text = self._prefill(ids, real)
        pictures = [(prompt, candidate) for prompt in range(len(prompts)) for candidate in range(n)]
        drawn = []
        for start in range(0, len(pictures), batch):
            block = pictures[start : start + batch]
            index = torch.tensor([prompt for prompt, _ in block], device=self.device)
            if guidance != 1:
                index = torch.cat([index, torch.full_like(index, len(prompts))])
            noise = np.stack([picture_noise(seeds[p], c, self.steps, self.image_tokens) for p, c in block])
            predict = self._predictor([(keys[index], values[index]) for keys, values in text], real[index], guidance)
            drawn.append(self._draw_batch(predict, temperature, torch.from_numpy(noise).to(self.device), advance))
        return torch.cat(drawn).unflatten(0, (len(prompts), n))

    def drawing_batch(self, prompts: list[str], guidance: float) -> int:
        """How many pictures at a time fit into memory: what `batch` of sample may well be, at most MOST_AT_ONCE.

        A picture takes its prompt's keys and values, one layer's activations and the logits of all its codes, all but the
        last three copies of these twice with guidance. 65 % of what the model leaves is given to them.
        """
        config, rows = self.language_model.config, 2 if guidance != 1 else 1
        size = self.language_model.embed_tokens.weight.itemsize
        text = max(len(self.prompt_ids(prompt)) for prompt in prompts) * 2 * config.num_hidden_layers * config.hidden_size
        layer = (self.image_tokens + 2) * (8 * config.hidden_size + 2 * config.intermediate_size)
        logits = self.image_tokens * self.codebook_size
        each = rows * size * (text + layer) + logits * (rows * (size + 4) + 3 * 4)
        return pictures_that_fit(self.model, self.device, each, MOST_AT_ONCE)

    def _prefill(self, ids: Tensor, real: Tensor) -> KeysValues:
        """Run the prompts (R, L) once: their keys and values."""
        embeddings = self.language_model.embed_tokens(ids)
        return phi_forward(self.language_model, embeddings, positions_of(real), text_mask(real)[:, None])[1]

    def _predictor(self, text: KeysValues, real: Tensor, guidance: float) -> Callable[[Tensor], Tensor]:
        """A function from codes (B, T), V for masked ones, to guided logits (B, T, V) float32, given the prompts of R rows."""
        n_image = self.image_tokens + 2
        positions = real.sum(dim=-1, keepdim=True) + torch.arange(n_image, device=self.device)  # (R, T + 2)
        visible = None if real.all() else F.pad(real, (0, n_image), value=True)[:, None, None]  # (R, 1, 1, L + T + 2)

        def predict(tokens: Tensor) -> Tensor:
            ids = self.branch.image_ids(tokens).repeat(len(real) // len(tokens), 1)  # (R, T + 2)
            embeddings = self.language_model.embed_tokens(ids)
            hidden, _ = phi_forward(self.language_model, embeddings, positions, visible, text)
            logits = self.branch.image_logits(hidden[:, 1:-1]).float()  # (R, T, V)
            return guide(logits, guidance) if len(logits) > len(tokens) else logits

        return predict

    def _draw_batch(
        self,
        predict: Callable[[Tensor], Tensor],
        temperature: float,
        uniforms: Tensor,
        advance: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Draw one batch from masks alone: uniforms (B, steps, 2, T) -> codes (B, T)."""
        heat = 1.0 if temperature > 0 else 0.0

        def choose(logits: Tensor, step: int) -> Tensor:
            rows, numbers = logits.flatten(0, 1).split(DRAWS_AT_ONCE), uniforms[:, step, 0].flatten().split(DRAWS_AT_ONCE)
            codes = [draw(row, heat, number) for row, number in zip(rows, numbers, strict=True)]
            if advance is not None:
                advance(len(logits) / self.steps)
            return torch.cat(codes).view(logits.shape[:2])

        start = torch.full((len(uniforms), self.image_tokens), self.codebook_size, device=self.device)
        return mask_predict(predict, start, self.steps, temperature, choose, lambda step: gumbel(uniforms[:, step, 1]).float())

    @torch.no_grad()
    def decode(self, tokens: Tensor, batch: int = 16) -> Tensor:
        """Image tokens (B, T) -> pictures (B, H, W, 3) uint8, clamped and cut off to whole numbers as Show-o does."""
        return torch.cat([from_pixels(self.vq.decode(block)) for block in tokens.split(batch)])

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, H, W, 3) uint8 -> image tokens (B, T) int64. Those of a decoded picture are not those it came from."""
        return self.vq.encode(to_pixels(pictures.to(self.device), self.vq.patch * math.isqrt(self.image_tokens)))

    # -- looking -------------------------------------------------------------------------------------------------------

    def _looked_at(self, pictures: Tensor) -> Tensor:
        """Image tokens (B, T) as they are, pictures as the codes they are encoded to."""
        pictures = pictures.to(self.device)
        return pictures if pictures.dim() == 2 else self.encode(pictures)

    def _read(self, tokens: Tensor, texts: list[list[list[int]]], more: int) -> tuple[Tensor, Feed]:
        """Hidden states (B, K, L, C) of K texts a picture, each after its picture (B, T), none seeing another."""
        ids = pad_right([ids for row in texts for ids in row], self.pad, self.device, self.text_step)  # (B K, L)
        n_texts, width = len(texts[0]), ids.shape[1]
        prefix = F.pad(self.branch.image_ids(tokens), (1, 0), value=self.mmu)  # (B, T + 3)
        n_prefix = prefix.shape[1]
        after = torch.arange(width, device=self.device).repeat(n_texts) + n_prefix  # (K L,)
        ids = torch.cat([prefix, ids.view(len(texts), -1)], dim=1)
        mask = looking_mask(n_prefix, width, n_texts, self.device).expand(len(tokens), 1, -1, -1)
        positions = torch.cat([torch.arange(n_prefix, device=self.device), after])[None]
        text: KeysValues | None = None

        def feed(ids: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
            nonlocal text
            embeddings = self.language_model.embed_tokens(ids)
            hidden, text = phi_forward(self.language_model, embeddings, positions, visible[:, None], text, keep=True)
            return hidden

        if more:
            hidden = feed(ids, positions, mask[:, 0])
        else:  # whatever wraps the layers for training is called
            masks = {"attention_mask": mask, "position_ids": positions}
            hidden = self.language_model(input_ids=ids, **masks, use_cache=False).last_hidden_state
        return hidden[:, n_prefix:].unflatten(1, (n_texts, width)), feed

    # -- training ------------------------------------------------------------------------------------------------------

    def logps(
        self, prompts: list[str], tokens: Array, seeds: list[int] | None = None, unconditional: Array | None = None
    ) -> Tensor:
        """Terms (B, T) float32, differentiable, whose sum over T estimates a lower bound on log p(picture given prompt).

        A masked model has no exact log-likelihood. It does have one for drawing the tokens one by one in a given order, and
        its mean over all orders is the bound (Uria et al. 2014, arXiv 1310.1757; LLaDA, Nie et al. 2025, arXiv 2502.09992):

            log p(x) >= E_k E_M [ T / k * sum over i in M of log p(x_i given x outside M, prompt) ]

        with k uniform on 1 .. T and M uniform among the sets of k tokens. It is estimated from K = `mask_draws` masks a
        picture, stratified in k, without bias; a token no draw masks has the term 0. p is over the codes alone, which is what
        `sample` draws from, without guidance or temperature.

        tokens (B, T), any integers of torch or numpy. seeds (B,): a picture's masks depend on its seed alone (default: the
        same masks for all). Give the two pictures of a pair, and policy and reference, the same one: what their log-probs
        share then cancels (LLaDA 1.5, Zhu et al. 2025, arXiv 2505.19223). unconditional: (B,) bool, of torch or numpy, rows
        that see the empty prompt (caption dropout).

        Variance: about v T (ln T - 0.4) / K, with v that of the token log-probs (or of their ratios to the reference's, in a
        loss of both); most of it comes from draws of few masked tokens. For T = 256, v = 4 and K = 8 measured 26 nats of
        standard deviation, as predicted. Cost: B K rows through the language model, forward and backward.
        """
        rows = [self.prompt_ids(prompt) for prompt in prompts]
        if unconditional is not None:
            dropped = torch.as_tensor(unconditional).tolist()
            rows = [self._prompt_row([]) if drop else row for row, drop in zip(rows, dropped, strict=True)]
        ids, real = pad_left(rows, self.pad, self.device, self.text_step)
        seeds = [0] * len(prompts) if seeds is None else seeds
        masked = torch.from_numpy(mask_draws(seeds, self.mask_draws, self.image_tokens))
        return self.branch(ids, real, torch.as_tensor(tokens, device=self.device).long(), masked.to(self.device))

    def answer_logps(self, pictures: Tensor, questions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """log P(yes), log P(no) and coverage of one question about each of B pictures: (B,) float32, differentiable.

        pictures: image tokens (B, T), which are judged as they are, or uint8 (B, H, W, 3), encoded first. `judge`'s numbers,
        for gradients in the language model; the image tokenizer gets none. P(yes) + P(no) = 1; their logs keep their digits
        where P(yes) rounds to 0 or 1.
        """
        suffixes = [self.question_ids(question)[1] for question in questions]
        hidden = self._hidden_states(self._looked_at(pictures), [[ids] for ids in suffixes])[:, 0]  # (B, L, C)
        last = torch.tensor([len(ids) - 1 for ids in suffixes], device=self.device)  # (B,)
        hidden = hidden[torch.arange(len(last), device=self.device), last]  # (B, C)
        return answer_logps(self.head, hidden, self._yes, self._no)

    @property
    def activation_bytes(self) -> int:
        """What a picture's training pass keeps for its backward pass under a GPU's bfloat16 autocast; a test counts it.

        Per token of each of its masked copies and layer 34 bytes a unit of the hidden state and 4 a unit of the MLP (GELU in
        one kernel, see showo_files.phi_config), prompts taken as 64 tokens. A GPU's autocast, unlike a CPU's, runs layer norms
        in float32 (aten/src/ATen/autocast_mode.h, AT_FORALL_FP32).
        """
        config = self.language_model.config
        each = 34 * config.hidden_size + 4 * config.intermediate_size
        return self.mask_draws * (64 + self.image_tokens) * config.num_hidden_layers * each

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a directory with all three parts, under the names that Show-o's own classes read; whole or not at all.

        dtype: of the language model, default as it was stored. One tensor at a time is in memory. An existing directory at
        `path` is replaced. A full disk is an OSError.
        """
        path = Path(path)
        dtype = dtype or getattr(torch, self.stored_dtype)
        weights = [self.directory / WEIGHTS] if self.directory else []
        with whole_directory(path) as directory:
            for file, content in self.files.items():
                (directory / file).parent.mkdir(exist_ok=True)
                (directory / file).write_bytes(content)
            (directory / "magvitv2").mkdir(exist_ok=True)
            write_one_by_one(directory / WEIGHTS, *self._to_save(self.model["showo"], dtype, weights, "showo."))
            write_one_by_one(directory / "magvitv2" / WEIGHTS, *self._to_save(self.vq, torch.float32, []))
        self.name, self.directory, self.stored_dtype = str(path), path, str(dtype).removeprefix("torch.")

"""What a unified model is, one that both draws and looks, and how one is loaded.

`load` tells the families apart by config.json and is the only place that knows them: `Janus`, in families/janus.py, is
Janus-Pro as transformers implements it (`deepseek-community/Janus-Pro-1B`, `-7B`, or any directory in that format), or a Janus
as DeepSeek's code writes it; `ShowO`, in families/showo.py, is `showlab/show-o` and what was saved from it;
`CodesInVocabulary`, in families/codes.py, is a causal language model whose vocabulary holds the image codes
(`csuhan/Tar-1.5B`, `Junfeng5/Liquid_V1_7B`). Nothing outside families/ knows how a family works: `UnifiedModel` is all that
the scripts use of one.

To write another family: a class with these members in families/, and a branch in `load`; docs/adding-a-family.md goes through
it. What follows from the rest is written once, in `families.family.Family`: a class that extends it is given judge,
judge_with_captions, log_likelihoods, reply, trainable_parameters and identity, and writes in their place TRAINED (which
parameters a scope of training names), `_asked_about`, `_looked_at` and `_read` (how a question, a picture and texts about it
become tokens and hidden states). One that draws token by token extends `families.autoregressive.Autoregressive`, which has
sample, logps and answer_logps as well.

Only safetensors weights and JSON of a checkpoint are read, and no code from it is ever run.

Legend: B rows of a batch, P prompts, N candidates a prompt, T image tokens a picture, Q questions and K captions a picture.
Pictures are image tokens int64 (B, T), or pixels uint8 (B, H, W, 3). Log-probs are in nats.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from families.family import Array
from families.judging import Reply
from families.pretrained import CheckpointError, device_and_type, read_object, resolve, weights_hash


class Judge(Protocol):
    """What looks at pictures: a unified model, or another (families/vlm.py)."""

    name: str  # as the user called it

    def judge(
        self, pictures: Tensor, questions: list[list[str]], batch: int = ..., scored: bool = ...
    ) -> tuple[Tensor, Tensor]:
        """P(yes) and coverage, p(yes) + p(no), of B lists of Q questions: each (B, Q) float32.

        scored: the answer is begun with common.answers.BEGUN, and what is read is P(1) and p(1) + p(0) of the next token.
        """

    def reply(self, pictures: Tensor, questions: list[list[str]], most: int = ..., batch: int = ...) -> list[list[Reply]]:
        """What is written, greedily and at most `most` tokens, in reply to B lists of Q questions: B lists of Q.

        The one method that answering in words adds: reading a reply, as 1 or 0 or neither, is common.answers.read_reply.
        """

    def question_ids(self, question: str, scored: bool = ...) -> object:
        """The tokens of a question (of a family: prefix with the picture, rest); PromptError for one that cannot be asked.

        scored: with what is begun of its answer; CheckpointError where 0 and 1 are no single tokens behind it.
        """

    def identity(self) -> dict[str, str]:
        """For the headers of files: model, model_hash (see below); of one that draws codebook_size and image_tokens as well."""


class UnifiedModel(Judge, Protocol):
    """What draws and looks. Prompts are texts; whatever a prompt needs around it is the family's to know."""

    device: torch.device
    model: nn.Module  # all of it

    # Drawing: score.py

    image_tokens: int  # T
    codebook_size: int  # V, at most 65,536: image tokens are 0 .. V - 1
    steps: int | None  # passes that a picture is drawn in, where that can be chosen
    no_pictures: str  # why `decode` has nothing to decode with, "" where it has: a model may come without what paints

    def prompt_ids(self, prompt: str) -> list[int]:
        """The tokens that ask for a picture; PromptError for a prompt that is too long or spells a special token."""

    def sample(
        self,
        prompts: list[str],
        n: int,
        guidance: float = ...,
        temperature: float = ...,
        seeds: list[int] | None = None,
        batch: int = ...,
        advance: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Image tokens (P, N, T), each picture by (its prompt's seed, number of the candidate) alone; `batch` at a time.

        On a GPU, which rounds otherwise with other numbers of rows, what is drawn beside a picture decides as well.
        guidance w: logits uncond + w (cond - uncond), 1 for none. temperature 0: greedy. seeds: P, default 0, 1, ...
        advance: told now and then how many pictures' worth was drawn since, for a progress bar; never waits for the device.
        """

    def decode(self, tokens: Tensor, batch: int = ...) -> Tensor:
        """Image tokens (B, T) -> pixels uint8 (B, H, W, 3). For people, an oracle, another judge; see `no_pictures`."""

    def drawing_batch(self, prompts: list[str], guidance: float) -> int:
        """How many pictures at a time fit into memory: a good `batch` for `sample`. On a GPU the same for the same card."""

    # Looking: score.py; with gradients, analysis/dynamics.py

    def judge_with_captions(
        self, pictures: Tensor, questions: list[list[str]], captions: list[list[str]], batch: int = ...
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`judge`, and log p(caption given picture) of B lists of K captions, (B, K)."""

    def log_likelihoods(self, prompts: list[list[str]], tokens: Array, seeds: list[int], batch: int = ...) -> Tensor:
        """log p(picture given prompt) of B pictures and K prompts each, (B, K) float64; seeds (B,) as in `logps`."""

    def caption_ids(self, caption: str) -> list[int]:
        """The tokens of a caption as the answer to families.judging.DESCRIBE; PromptError for one that cannot be given."""

    def answer_logps(self, pictures: Tensor, questions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """log P(yes), log P(no), coverage of one question about each picture: (B,), differentiable."""

    # Training: sft.py, dpo.py

    branch: nn.Module  # what `logps` calls, by its forward: the root for sharding, so what it returns may be no view
    blocks: list[nn.Module]  # its decoder layers, of plain nn.Linear: sharded, recomputed, compiled, adapted one by one
    mask_draws: int | None  # random masks that `logps` are estimated from; None where they are exact

    def logps(
        self, prompts: list[str], tokens: Array, seeds: list[int] | None = None, unconditional: Array | None = None
    ) -> Tensor:
        """Log-probs of image tokens (B, T) given prompts, no guidance: (B, T) float32, differentiable.

        seeds (B,) fix the random masks of estimates. unconditional: bool (B,), rows that see no prompt.
        """

    def trainable_parameters(self, scope: str = ...) -> dict[str, nn.Parameter]:
        """By name, what learns in scope "language_model", "drawing" or "adapters" (common/lora.py); freezes the rest."""

    @property
    def activation_bytes(self) -> int:
        """What one picture's training pass keeps in memory for its backward pass, in bfloat16."""

    # Saving

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint directory that `load` and the family's own library read, whole or not at all; adapters are merged.

        After sharded training rank 0 alone calls it, with whole weights on the CPU.
        """


def model_hash(path_or_hub_id: str | Path) -> str:
    """16 hex digits that tell a checkpoint's weights from others'; nothing is loaded. CheckpointError where there is none."""
    return weights_hash(resolve(path_or_hub_id))


def family_of(directory: Path, name: str) -> str:
    """Which family a checkpoint is of, by its config.json; CheckpointError, naming what was found, for none."""
    config = directory / "config.json"
    if config.is_file():
        settings = read_object(config)
        if str(settings.get("_class_name")).startswith("Showo"):
            return "showo"
        if settings.get("model_type") in ("qwen2", "gemma"):
            return "codes"
    from families.janus_files import check_config

    check_config(directory, name)
    return "janus"


def no_decoder(path_or_hub_id: str | Path) -> str:
    """Why a checkpoint's pictures cannot be shown (UnifiedModel.no_pictures), by its files alone; nothing is loaded."""
    directory, name = resolve(path_or_hub_id), str(path_or_hub_id)
    if family_of(directory, name) != "codes":
        return ""
    from families import codes_files

    return codes_files.no_decoder(directory, name)


def load(
    path_or_hub_id: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    steps: int | None = None,
    mask_draws: int | None = None,
) -> UnifiedModel:
    """Load a checkpoint for sampling, judging and training.

    device: default the GPU where there is one, else the CPU. dtype: default bfloat16 on a GPU, float32 on a CPU, whatever the
    checkpoint is stored in. steps, mask_draws: see UnifiedModel; default the family's own. Raises CheckpointError for anything
    that is not a complete checkpoint of a known family, and for steps or mask_draws of a family that has no such number.
    """
    directory, name = resolve(path_or_hub_id), str(path_or_hub_id)
    device, dtype = device_and_type(device, dtype)
    family = family_of(directory, name)
    if family == "showo":
        from families.showo import load_showo

        showo = load_showo(directory, name, device, dtype)
        showo.steps, showo.mask_draws = steps or showo.steps, mask_draws or showo.mask_draws
        return showo
    if steps:
        raise CheckpointError(f"{name}: takes no --steps, found {steps}: it draws one token after the other")
    if mask_draws:
        raise CheckpointError(f"{name}: takes no --mask-draws, found {mask_draws}: its log-probs are exact")
    if family == "codes":
        from families.codes import load_codes

        return load_codes(directory, name, device, dtype)
    from families.janus import load_janus

    return load_janus(directory, name, device, dtype)

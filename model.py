"""A unified model, one that both draws and looks: load it, sample pictures, judge them, score tokens, save it.

`load` tells the families apart by config.json and is the only place that knows both: `Janus`, in janus.py, is Janus-Pro as
transformers implements it (`deepseek-community/Janus-Pro-1B`, `-7B`, or any directory in that format); `ShowO`, in showo.py,
is `showlab/show-o` and what was saved from it. Nothing outside their own files knows how a family works: `UnifiedModel`
is all that the scripts use of one, and all that a third one would have to have.

Only safetensors weights and JSON of a checkpoint are read, and no code from it is ever run.

Legend: B rows of a batch, P prompts, N candidates a prompt, T image tokens a picture, Q questions a picture.
"""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from families.janus import load_janus
from families.pretrained import CheckpointError, check_config, read_object, resolve


class Judge(Protocol):
    """What looks at pictures: a unified model, or another (vlm.py)."""

    name: str

    def judge(self, pictures: Tensor, questions: list[list[str]], batch: int = ...) -> tuple[Tensor, Tensor]:
        """P(yes) and coverage of questions about pictures, each (B, Q)."""

    def question_ids(self, question: str) -> object:
        """The tokens of a question; PromptError for one that cannot be asked."""

    def identity(self) -> dict[str, str]:
        """What the headers of files say of this model: model or judge, a hash of its weights, the codebook of its pictures."""


class UnifiedModel(Judge, Protocol):
    """What draws and looks: Janus and ShowO, where each method is documented."""

    device: torch.device
    image_tokens: int  # T
    codebook_size: int
    exact_logps: bool  # whether `logps` are log-probs, or estimates made from seeds
    blocks: list[nn.Module]  # what is sharded and recomputed one by one

    @property
    def branch(self) -> nn.Module: ...  # what `logps` runs
    @property
    def model(self) -> nn.Module: ...  # all of it
    @property
    def steps(self) -> int | None: ...  # see `load`
    @property
    def draws(self) -> int | None: ...

    def sample(
        self,
        prompts: list[str],
        n: int,
        guidance: float = ...,
        temperature: float = ...,
        seeds: list[int] | None = None,
        batch: int = ...,
    ) -> Tensor:
        """Image tokens (P, n, T)."""

    def decode(self, tokens: Tensor, batch: int = ...) -> Tensor:
        """Image tokens (B, T) -> pictures, uint8 (B, H, W, 3)."""

    def look(
        self, pictures: Tensor, questions: list[list[str]], captions: list[list[str]], batch: int = ...
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`judge`, and log p(caption given picture) (B, K); tokens or pictures."""

    def answer_logps(self, pictures: Tensor, questions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """log P(yes), log P(no), coverage of one question about each picture: (B,), differentiable."""

    def logps(
        self, prompts: list[str], tokens: Tensor, seeds: list[int] | None = None, unconditional: Tensor | None = None
    ) -> Tensor:
        """Log-probs of image tokens given prompts, float32 (B, T), differentiable."""

    def prompt_ids(self, prompt: str) -> list[int]: ...
    def caption_ids(self, caption: str) -> list[int]: ...
    def trainable_parameters(self, scope: str = ...) -> dict[str, nn.Parameter]: ...
    def recompute_activations(self) -> None: ...
    def drawing_batch(self, prompts: list[str], guidance: float) -> int: ...
    def release_memory(self) -> None: ...
    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None: ...

    @property
    def activation_bytes(self) -> int: ...


def load(
    path_or_hub_id: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    steps: int | None = None,
    draws: int | None = None,
) -> UnifiedModel:
    """Load a checkpoint for sampling, judging and training.

    device: default the GPU where there is one, else the CPU. dtype: default bfloat16 on a GPU, float32 on a CPU,
    whatever the checkpoint is stored in. steps: passes that a picture is drawn in; draws: random masks that the log-probs of
    a picture are estimated from; default the family's own. Raises CheckpointError for anything that is not a complete
    checkpoint of a family that is known here, and for steps or draws of a family that has no such number.
    """
    directory, name = resolve(path_or_hub_id), str(path_or_hub_id)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    config = directory / "config.json"
    if config.is_file() and str(read_object(config).get("_class_name")).startswith("Showo"):
        from families.showo import load_showo  # only here, and only for it: a copy that trains Janus can do without

        showo = load_showo(directory, name, device, dtype)
        showo.steps, showo.draws = steps or showo.steps, draws or showo.draws
        return showo
    check_config(directory, name)
    if steps:
        raise CheckpointError(f"{name}: takes no --steps, found {steps}: it draws one token after the other")
    if draws:
        raise CheckpointError(f"{name}: takes no --mask-draws, found {draws}: its log-probs are exact")
    return load_janus(directory, name, device, dtype)

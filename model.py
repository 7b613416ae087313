"""A unified model, one that both draws and looks: load it, sample pictures, judge them, score tokens, save it.

`load` tells the families apart by config.json and is the only place that knows both: `Janus`, in janus.py, is Janus-Pro as
transformers implements it (`deepseek-community/Janus-Pro-1B`, `-7B`, or any directory in that format); `ShowO`, in showo.py,
is `showlab/show-o` and what was saved from it. Nothing outside their own files knows how a family works. Their interface:

    sample(prompts, n, guidance, temperature, seeds)  -> image tokens (P, n, T)
    decode(tokens)                                    -> pictures, uint8 (B, H, W, 3)
    judge(tokens or pictures, questions)              -> P(yes), coverage, each (B, Q); look(): and log p(caption)
    answer_logps(tokens or pictures, questions)       -> log P(yes), log P(no), coverage, each (B,), differentiable
    logps(prompts, tokens, seeds)                     -> log-probs of the tokens, float32 (B, T), differentiable

and, for the scripts that train and score: exact_logps (whether `logps` are log-probs or estimates, made from seeds),
steps and draws (see `load`), image_tokens, codebook_size, device, model, branch and blocks (what trains, what is sharded),
prompt_ids, question_ids, caption_ids, trainable_parameters, recompute_activations, activation_bytes, drawing_batch,
release_memory, identity, save.

Only safetensors weights and JSON of a checkpoint are read, and no code from it is ever run.

Legend: B rows of a batch, P prompts, N candidates a prompt, T image tokens a picture, Q questions a picture.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from janus import Janus, load_janus
from pretrained import CheckpointError, check_config, read_object, resolve

if TYPE_CHECKING:
    from showo import ShowO


def load(
    path_or_hub_id: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    steps: int | None = None,
    draws: int | None = None,
) -> "Janus | ShowO":
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
        from showo import load_showo  # only here, and only for it: a copy that trains Janus can do without

        showo = load_showo(directory, name, device, dtype)
        showo.steps, showo.draws = steps or showo.steps, draws or showo.draws
        return showo
    check_config(directory, name)
    if steps:
        raise CheckpointError(f"{name}: takes no --steps, found {steps}: it draws one token after the other")
    if draws:
        raise CheckpointError(f"{name}: takes no --mask-draws, found {draws}: its log-probs are exact")
    return load_janus(directory, name, device, dtype)

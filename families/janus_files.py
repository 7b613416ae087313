"""A Janus on the disk, as transformers or (janus_original.py) DeepSeek has it: refuse what would not fill it, or not fit."""

from pathlib import Path
from typing import Any

import torch
from transformers import JanusConfig, JanusForConditionalGeneration, JanusProcessor

from families import janus_original
from families.pretrained import (
    SUPPORTED,
    CheckpointError,
    check_files,
    check_finite,
    check_head,
    check_report,
    check_text_limits,
    put,
    quiet,
    read_object,
    reason,
    stored_dtype,
    tensor_sizes,
    weight_files,
)

ORIGINAL = "multi_modality"  # model_type of DeepSeek's own format
CONVERTED = "; take its conversion (deepseek-community/Janus-Pro-1B or -7B), or convert it once with transformers' own script, "
CONVERTED += "convert_janus_weights_to_hf.py"


def check_config(directory: Path, name: str) -> None:
    """Raise CheckpointError unless `directory` holds a Janus, in transformers' or DeepSeek's format, without remote code."""
    listing = sorted(entry.name for entry in directory.iterdir())[:8]
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{name}: no config.json (found {listing}); supported is {SUPPORTED}")
    kind = read_object(directory / "config.json").get("model_type")
    if kind not in ("janus", ORIGINAL):
        raise CheckpointError(f"{name}: found model_type {kind!r}; supported is {SUPPORTED}")
    original = kind == ORIGINAL  # transformers is not told of auto_map
    check_files(directory, name, CONVERTED if original else "", ("auto_map",) if original else ())


def read_janus(
    directory: Path, name: str, device: torch.device, dtype: torch.dtype
) -> tuple[JanusForConditionalGeneration, JanusProcessor]:
    """The model and its processor; `name` is what the user called it.

    Weights that are stored in half precision are read so, and become `dtype` on the device, one by one: of a 7B that is to be
    float32 on a GPU the host holds 15 GB, not 30; in DeepSeek's format one tensor. Raises CheckpointError, naming what was
    found, for what is not a complete and sound Janus.
    """
    with quiet():
        if is_original(directory):
            model, processor = _from_original(directory, name)
            janus_original.fill(model, directory, device, dtype)
        else:
            model, processor, report = _from_pretrained(directory, name, dtype)
            check_report(report, name)
            put(model, device, dtype)
    lay_out(model.model.vqmodel, device)
    check_finite(model.named_parameters(), name)
    if not model.config.text_config.tie_word_embeddings:  # at its top level config.json says so of all that transformers wrote
        check_head(model.lm_head.weight, model.get_input_embeddings().weight, name)
    return model, processor


def lay_out(vqmodel: Any, device: torch.device) -> None:
    """Lay the convolutions that decode pictures out as a GPU's kernels want them, channels last, on a GPU alone."""
    if device.type == "cuda":
        vqmodel.to(memory_format=torch.channels_last)


def is_original(directory: Path) -> bool:
    """Whether a directory is in DeepSeek's own format."""
    return read_object(directory / "config.json").get("model_type") == ORIGINAL


def read_text(processor: Any, text: str) -> None:
    """Template and tokenizer at work on a text, as a prompt and about a picture."""
    for content in ([], [{"type": "image"}]):
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
        processor.tokenizer(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def _from_pretrained(directory: Path, name: str, dtype: torch.dtype) -> tuple[Any, JanusProcessor, dict[str, Any]]:
    """The model, its processor and transformers' report on what it did not find in the files."""
    try:
        check_size(JanusConfig.from_pretrained(directory), directory)
        check_text_limits(directory, name, lambda text: read_text(JanusProcessor.from_pretrained(directory), text))
        processor = JanusProcessor.from_pretrained(directory)
        stored = getattr(torch, stored_dtype(directory))
        loaded: Any = JanusForConditionalGeneration.from_pretrained(
            directory,
            dtype=min(stored, dtype, key=lambda kind: kind.itemsize),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        model, report = loaded
        check_processor(processor, model.config)
    except CheckpointError:
        raise
    except Exception as error:  # transformers and safetensors raise their own kinds for broken files
        raise CheckpointError(f"{name}: cannot be loaded as a Janus: {reason(error)}") from error
    return model, processor, report


def _from_original(directory: Path, name: str) -> tuple[Any, JanusProcessor]:
    """The model without its weights, which would fill it, and its processor, of a directory in DeepSeek's format."""
    try:
        model: Any = janus_original.empty_model(directory, janus_original.read_config(directory))
        check_text_limits(directory, name, lambda text: read_text(janus_original.read_processor(directory), text))
        processor = janus_original.read_processor(directory)
        check_processor(processor, model.config)
        edges = (processor.image_processor.size["height"], model.config.vision_config.image_size)
        if edges[0] != edges[1]:
            raise ValueError(f"preprocessor_config.json: image_size is {edges[0]}, but config.json has {edges[1]}")
        janus_original.name_tokens(model, processor)
    except CheckpointError:
        raise
    except Exception as error:  # transformers and tokenizers check values in their own ways
        raise CheckpointError(f"{name}: cannot be loaded as a Janus: {reason(error)}") from error
    return model, processor


def check_size(config: Any, directory: Path) -> None:
    """Raise CheckpointError if config.json describes a larger model than the weights can fill, before it is made.

    transformers fills what is missing with random numbers, however much that is. Tied weights are stored once, so a
    model may be a little larger than its files.
    """
    sizes = [size for file in weight_files(directory) for size in tensor_sizes(file)]
    vision, vq = config.vision_config, config.vq_config
    depths = [config.text_config.num_hidden_layers, vision.num_hidden_layers, vision.depth]
    depths += [vq.num_hidden_layers, vq.num_res_blocks, len(vq.channel_multiplier)]
    if max(depths) > len(sizes):  # every layer has a tensor; making a million of them takes hours even without weights
        raise CheckpointError(f"{directory}: config.json wants {max(depths)} layers, but the weights are {len(sizes)} tensors")
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in JanusForConditionalGeneration(config).parameters())
    if wanted > 2 * sum(sizes):
        raise CheckpointError(f"{directory}: config.json wants {wanted:,} weights, but its files hold {sum(sizes):,}")


def check_processor(processor: JanusProcessor, config: Any) -> None:
    """Raise ValueError unless a checkpoint's processor fits its model: picture tokens, pixel statistics, vocabulary."""
    tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    if processor.num_image_tokens != tokens:
        raise ValueError(f"num_image_tokens is {processor.num_image_tokens!r}, but the model draws {tokens}")
    for key in ("image_mean", "image_std"):
        values = getattr(processor.image_processor, key)
        if not isinstance(values, list | tuple) or len(values) != 3 or not all(type(x) in (int, float) for x in values):
            raise ValueError(f"{key} must be three numbers, found {str(values)[:40]}")
    if 0 in processor.image_processor.image_std:
        raise ValueError("image_std holds a 0")
    largest = max(processor.tokenizer.get_vocab().values())
    if largest >= config.text_config.vocab_size:
        raise ValueError(f"the tokenizer has a token {largest}, but the model knows {config.text_config.vocab_size}")


def check_text(policy: Any) -> None:
    """Raise CheckpointError unless a checkpoint's chat template and special tokens work; a template is a program."""
    known = policy.model.config.text_config.vocab_size
    for name in ("bos", "pad", "boi", "eoi", "image"):
        if not 0 <= getattr(policy, name) < known:
            raise CheckpointError(f"{policy.name}: its {name} token is {getattr(policy, name)}, but the model knows {known}")
    try:
        written = [(policy.prompt_ids(text), policy.question_ids(text)) for text in ("yes", "no")]
    except Exception as error:  # whatever the template's author made it raise
        raise CheckpointError(f"{policy.name}: its chat template cannot be used: {reason(error)}") from error
    if written[0][0] == written[1][0] or written[0][1] == written[1][1]:
        raise CheckpointError(f"{policy.name}: its chat template leaves the prompt out")

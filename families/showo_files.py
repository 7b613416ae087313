"""A Show-o on the disk: find its three parts, refuse what is none, read tokenizer and weights.

Reads   one directory (or hub id), laid out as the hub has it:
            config.json, pytorch_model.safetensors     Show-o itself, showlab/show-o or showlab/show-o-512x512
            phi-1_5/                                   tokenizer.json and config.json of microsoft/phi-1_5
            magvitv2/                                  pytorch_model.safetensors of showlab/magvitv2
        The two subdirectories may be links. One that is not there is fetched from the hub under the name above, whatever
        `llm_model_path` in config.json says. The checkpoints that look through CLIP (-w-clip-vit) are refused: their
        judge cannot read the codes that their pictures are made of.
What is saved has the same layout, whole in one directory, files and tensors under the names that Show-o's own classes read.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

from families.magvit import VQGAN, MagViT, levels_of
from families.pretrained import (
    SUPPORTED,
    CheckpointError,
    check_directory,
    check_finite,
    check_head,
    check_tensors,
    check_text_limits,
    quiet,
    read_object,
    reason,
    tensor_sizes,
    torch_name,
)

WEIGHTS = "pytorch_model.safetensors"
PARTS = {"phi-1_5": "microsoft/phi-1_5", "magvitv2": "showlab/magvitv2"}  # subdirectory -> where the hub has it
COPIED = (  # of phi-1_5: written back as they were read
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt"),
)
# What Phi's config.json may decide; the rest is Show-o's (vocabulary, query and key norms) or must be as it is by default.
PHI_SHAPE = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "layer_norm_eps", "max_position_embeddings"),
    *("rope_theta", "partial_rotary_factor", "rope_parameters"),  # the last is what newer libraries write of both
)
TEXT_END = "<|endoftext|>"  # also the start of text, <|sot|>: one id for both
# Added to Phi-1.5's tokenizer in this order; the image codes follow them, the mask comes last.
SPECIAL = ("[PAD]", "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>")


class Parts(NamedTuple):
    """What is read of a checkpoint."""

    phi: PhiForCausalLM
    vq: MagViT
    tokenizer: PreTrainedTokenizerFast  # with the special tokens
    image_tokens: int
    files: dict[str, bytes]  # what is saved beside the weights, by its path
    stored_dtype: str  # of the language model


def read_showo(directory: Path, name: str, device: torch.device, dtype: torch.dtype) -> Parts:
    """The Show-o that lies in `directory` (see the top of this file); `name` is what the user called it.

    dtype: of the language model; the image tokenizer is always float32. Raises CheckpointError, naming what was found,
    for anything that is not a complete Show-o without CLIP.
    """
    settings = read_object(directory / "config.json")
    check_settings(settings, name)
    phi_directory, vq_directory = (check_directory(part(directory, which)) for which in PARTS)
    for where in (directory, vq_directory):
        if not (where / WEIGHTS).is_file():
            found = sorted(entry.name for entry in where.iterdir())[:8]
            raise CheckpointError(f"{where}: no {WEIGHTS} (found {found}); pickled weights are never read")
        tensor_sizes(where / WEIGHTS)  # it is a whole safetensors file, or this says so
    for file in COPIED:
        if file.endswith(".json") and (phi_directory / file).is_file():
            read_object(phi_directory / file)  # what JSON does not have, transformers would take: 1e400
    files = {"config.json": (directory / "config.json").read_bytes()}
    files |= {f"phi-1_5/{file}": (phi_directory / file).read_bytes() for file in COPIED if (phi_directory / file).is_file()}
    if (vq_directory / "config.json").is_file():
        files["magvitv2/config.json"] = (vq_directory / "config.json").read_bytes()
    n_text = settings["llm_vocab_size"]
    check_text_limits(phi_directory, str(phi_directory), lambda text: read_tokenizer(phi_directory, n_text)(text))
    tokenizer = read_tokenizer(phi_directory, n_text)
    phi = read_phi(directory / WEIGHTS, phi_directory / "config.json", settings["vocab_size"], device, dtype)
    check_head(phi.lm_head.weight, phi.model.embed_tokens.weight, name)
    vq = read_vq(vq_directory / WEIGHTS, device)
    if 2**vq.bits != settings["codebook_size"]:
        raise CheckpointError(f"{vq_directory}: knows {2**vq.bits} codes, but {name} draws {settings['codebook_size']}")
    with safe_open(directory / WEIGHTS, framework="pt") as file:
        kind = file.get_slice("showo.lm_head.weight").get_dtype()
    stored = torch_name(kind)
    return Parts(phi, vq, tokenizer, settings["num_vq_tokens"], files, stored)


def check_settings(settings: dict[str, Any], name: str) -> None:
    """Raise CheckpointError unless Show-o's config.json is of a model that this file knows."""
    if settings.get("_class_name") != "Showo":
        raise CheckpointError(f"{name}: found _class_name {settings.get('_class_name')!r}; supported is {SUPPORTED}")
    if settings.get("w_clip_vit"):
        raise CheckpointError(f"{name}: found w_clip_vit: looks through CLIP, not at its own codes; supported is {SUPPORTED}")
    for key in ("codebook_size", "llm_vocab_size", "num_vq_tokens", "vocab_size", "mask_token_id"):
        if type(settings.get(key)) is not int or settings[key] < 2:
            raise CheckpointError(f"{name}: config.json: {key} must be a whole number, found {settings.get(key)!r}")
    wanted = settings["llm_vocab_size"] + len(SPECIAL) + settings["codebook_size"] + 1
    if (settings["vocab_size"], settings["mask_token_id"]) != (wanted, wanted - 1):
        raise CheckpointError(
            f"{name}: config.json: vocab_size {settings['vocab_size']} and mask_token_id {settings['mask_token_id']}, but "
            f"text, {len(SPECIAL)} special tokens, codes and mask make {wanted} and {wanted - 1}"
        )
    if math.isqrt(settings["num_vq_tokens"]) ** 2 != settings["num_vq_tokens"]:
        raise CheckpointError(f"{name}: config.json: num_vq_tokens {settings['num_vq_tokens']} makes no square picture")


def part(directory: Path, which: str) -> Path:
    """The directory of a part of Show-o: the checkpoint's own subdirectory, or what the hub has."""
    if (directory / which).is_dir():
        return directory / which
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "merges.txt"] if which == "phi-1_5" else ["config.json", WEIGHTS]  # not Phi-1.5's own weights
    try:
        return Path(snapshot_download(PARTS[which], allow_patterns=wanted))
    except Exception as error:  # the hub's client raises its HTTP library's own kinds when there is no network
        raise CheckpointError(
            f"{directory / which}: not there, nor is {PARTS[which]} to be had from the hub: {reason(error)}"
        ) from None


def read_tokenizer(directory: Path, n_text: int) -> PreTrainedTokenizerFast:
    """Phi-1.5's tokenizer with Show-o's ten special tokens, each at the id that its place in the list gives it."""
    if not (directory / "tokenizer.json").is_file():
        raise CheckpointError(f"{directory / 'tokenizer.json'}: is not a file")
    try:
        with quiet():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
            tokenizer.add_special_tokens({"pad_token": SPECIAL[0]})  # first, though Show-o's config names it last
            tokenizer.add_tokens(list(SPECIAL[1:]))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise CheckpointError(f"{directory / 'tokenizer.json'}: cannot be loaded as a tokenizer: {reason(error)}") from None
    vocabulary = tokenizer.get_vocab()
    found = [vocabulary[token] for token in SPECIAL]
    if len(tokenizer) != n_text + len(SPECIAL) or found != list(range(n_text, n_text + len(SPECIAL))):
        raise CheckpointError(
            f"{directory}: its tokenizer has {len(tokenizer)} tokens with {SPECIAL[0]} at {found[0]}, but config.json wants "
            f"{n_text} of text and then {len(SPECIAL)} special ones from {SPECIAL[0]} on"
        )
    if TEXT_END not in vocabulary:
        raise CheckpointError(f"{directory}: its tokenizer has no {TEXT_END}")
    return tokenizer


def phi_config(shape: dict[str, Any], n_vocabulary: int, device: str = "cpu") -> PhiConfig:
    """Phi-1.5's shape, Show-o's vocabulary, and norms on queries and keys, which no config file tells."""
    known = {key: shape[key] for key in PHI_SHAPE if key in shape}
    config = PhiConfig(
        **known, vocab_size=n_vocabulary, qk_layernorm=True, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None
    )
    if device != "cpu" and config.hidden_act == "gelu_new":  # six kernels, and four times as much kept for training
        config.hidden_act = (
            "gelu_pytorch_tanh"  # the same function in one, but not the same last bits: a CPU's stay as they are
        )
    config._attn_implementation = "sdpa"  # takes masks of bools; the plain one would add them up
    return config


def read_phi(weights: Path, config_file: Path, n_vocabulary: int, device: torch.device, dtype: torch.dtype) -> PhiForCausalLM:
    """The language model, from Show-o's weights and Phi-1.5's config.json."""
    shape = read_object(config_file)
    with safe_open(weights, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (no dict)
        depth = shape.get("num_hidden_layers", 24)
        if type(depth) is not int or not 0 < depth <= len(shapes):  # every layer has a tensor
            raise CheckpointError(f"{config_file}: wants {depth!r} layers, but {weights} holds {len(shapes)} tensors")
        try:
            with quiet(), torch.device("meta"):
                phi = PhiForCausalLM(phi_config(shape, n_vocabulary, device.type))
        except Exception as error:  # transformers checks values in its own ways
            raise CheckpointError(f"{config_file}: makes no Phi: {reason(error)}") from None
        check_tensors({f"showo.{key}": list(value.shape) for key, value in phi.state_dict().items()}, shapes, weights)
        tensors = {key: file.get_tensor(key).to(device, dtype) for key in shapes}
    check_finite(tensors.items(), str(weights))
    phi.load_state_dict({key.removeprefix("showo."): tensor for key, tensor in tensors.items()}, assign=True)
    phi.model.rotary_emb = PhiRotaryEmbedding(phi.config).to(device)  # its frequencies are in no file
    return phi


def read_vq(weights: Path, device: torch.device) -> MagViT:
    """The image tokenizer, its shape read off the tensors."""
    with safe_open(weights, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (no dict)
    encoder, decoder = levels_of(shapes, "encoder.down"), levels_of(shapes, "decoder.up")
    if not encoder or len(encoder) != len(decoder) or "encoder.quant_conv.weight" not in shapes:
        raise CheckpointError(f"{weights}: is not MAGVIT-v2 (found {sorted(shapes)[:4]})")
    bits = shapes["encoder.quant_conv.weight"][0]
    if not 1 <= bits <= 16 or any(width % 32 for width, _ in (*encoder, *decoder)):
        raise CheckpointError(f"{weights}: codes of {bits} bits or widths {encoder}, {decoder} are not MAGVIT-v2's")
    with torch.device("meta"):
        vq = MagViT(encoder, decoder, bits)
    fill(vq, shapes, weights, device)
    return vq.float()


def read_vqgan(weights: Path, device: torch.device) -> VQGAN:
    """A VQGAN with attention in its middle alone, as Chameleon's, its shape read off the tensors of its own checkpoint."""
    with safe_open(weights, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (no dict)
    encoder, decoder = levels_of(shapes, "encoder.down"), levels_of(shapes, "decoder.up")
    table = shapes.get("quantize.embedding.weight", [])
    if not encoder or len(encoder) != len(decoder) or len(table) != 2:
        raise CheckpointError(f"{weights}: is not a VQGAN (found {sorted(shapes)[:4]})")
    if any(width % 32 for width, _ in (*encoder, *decoder)):
        raise CheckpointError(f"{weights}: widths {encoder}, {decoder} are not a VQGAN's")
    with torch.device("meta"):
        vq = VQGAN(encoder, decoder, *table)
    fill(vq, shapes, weights, device)
    return vq.float()


def fill(vq: torch.nn.Module, shapes: dict[str, list[int]], weights: Path, device: torch.device) -> None:
    """Put a file's tensors into a model on the meta device; CheckpointError for what does not fit or is no number."""
    check_tensors({key: list(value.shape) for key, value in vq.state_dict().items()}, shapes, weights)
    with safe_open(weights, framework="pt") as file:
        tensors = {key: file.get_tensor(key).to(device) for key in shapes}
    check_finite(tensors.items(), str(weights))
    vq.load_state_dict(tensors, assign=True)

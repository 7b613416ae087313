"""A language model whose vocabulary holds image codes, on the disk: how each kind writes, where the codes are, what is refused.

Reads   one directory (or hub id) as transformers' own classes have it:
            config.json, model.safetensors (or shards), tokenizer.json, ...
            magvitv2/pytorch_model.safetensors      optional: an image tokenizer of the very codes; either Show-o's
            vqgan/model.safetensors                 or a VQGAN, which Liquid's is (docs/real-models.md: how to make the file)
        config.json may have two keys of ours. `tokens_per_picture`: how many codes a picture has, where that is not the first
        of its kind's numbers; csuhan/Tar-1.5B draws 729 by default, and 169 or 81 with it. `trained_without_prompt`: true of a
        model that has learnt to draw without one, where its kind has not.
What is saved has the same layout, and plain transformers reads it.
"""

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from families.magvit import VQGAN, MagViT
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
    tensor_shapes,
    tensor_sizes,
    weight_files,
)
from families.showo_files import read_vq, read_vqgan

LENGTH, DROPPED = "tokens_per_picture", "trained_without_prompt"  # in config.json
PICTURES = {MagViT: Path("magvitv2", "pytorch_model.safetensors"), VQGAN: Path("vqgan", "model.safetensors")}
COPIED = (  # what a tokenizer is read from, written back as it was
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "chat_template.jinja", "chat_template.json"),
)
MOST_CODES = 2**16  # image tokens are kept in 16 bits
CHATML = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
GEMMA = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"


class Template(NamedTuple):
    """How a kind of checkpoint writes. [prompt] and [question] stand for the user's words, [codes] for a picture's codes."""

    name: str
    model_type: str  # of config.json
    code: str  # how the tokenizer spells code number {}; "" where it has none, and codes are the ids after its last
    ask: str  # for a picture; what `begin` says comes behind it
    begin: dict[int, str]  # codes a picture -> what they follow; the first is the default
    unconditional: str  # the same without a prompt
    bos: bool  # whether every text begins with the tokenizer's BOS
    trained_without: bool  # whether it has learnt to draw without a prompt, which guidance contrasts with
    look: str  # at a picture, with a question
    mark: str  # a token of the vocabulary that stands in `look` where the codes go


TEMPLATES = (
    Template(  # arXiv 2506.18898, csuhan/Tar-1.5B and csuhan/Tar-7B-v0.1
        name="Tar",
        model_type="qwen2",
        code="<I{}>",
        ask=CHATML.format("[prompt]"),
        begin={729: "<im_start><S0>", 169: "<im_start><S1>", 81: "<im_start><S2>"},
        unconditional=CHATML.format(""),
        bos=False,
        trained_without=False,
        look=CHATML.format("[codes]\n[question]"),
        mark="<I0>",
    ),
    Template(  # arXiv 2412.04332, Junfeng5/Liquid_V1_7B
        name="Liquid",
        model_type="gemma",
        code="",
        ask="[prompt] Generate an image based on this description.",
        begin={1024: "<boi>"},
        unconditional="<unconditional>",
        bos=True,
        trained_without=True,
        look=GEMMA.format("<boi>[codes]<eoi>\n[question]"),
        mark="<unconditional>",
    ),
)


class Parts(NamedTuple):
    """What is read of a checkpoint."""

    model: Any  # a causal language model of transformers
    tokenizer: Any
    template: Template
    first_code: int  # the id of code 0; the others follow it
    codebook_size: int
    image_tokens: int
    pictures: MagViT | VQGAN | None  # to codes and back
    files: dict[str, bytes]  # what is saved beside the weights, by its name
    stored_dtype: str  # of the language model


def read_codes(directory: Path, name: str, device: torch.device, dtype: torch.dtype) -> Parts:
    """What lies in `directory` (see the top of this file); `name` is what the user called it.

    dtype: of the language model; the image tokenizer is always float32. Raises CheckpointError, naming what was found, for
    anything that is not a complete language model with image codes, before any of its weights are read.
    """
    check_files(directory, name)
    settings = read_object(directory / "config.json")
    config, wanted = read_config(directory, settings, name)
    tokenizer = read_tokenizer(directory, name)
    template, first, n_codes = find_codes(tokenizer, settings, name)
    length = picture_length(settings, template, config.max_position_embeddings, name)
    if template.bos and tokenizer.bos_token_id is None:
        raise CheckpointError(f"{name}: its tokenizer names no BOS, which {template.name} writes")
    files = {file: (directory / file).read_bytes() for file in COPIED if (directory / file).is_file()}
    check_shapes(directory, wanted, name)
    vq = pictures_of(directory, n_codes, length, device)
    with quiet():
        model, report = read_model(directory, name, dtype)
    check_report(report, name)
    put(model, device, dtype)
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):  # Gemma's: a buffer, made in the type that the weights are stored in
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
    check_finite(model.named_parameters(), name)
    if not config.tie_word_embeddings:
        check_head(model.lm_head.weight, model.get_input_embeddings().weight, name)
    return Parts(model, tokenizer, template, first, n_codes, length, vq, files, stored_dtype(directory))


def read_config(directory: Path, settings: dict[str, Any], name: str) -> tuple[Any, dict[str, list[int]]]:
    """The configuration, of a decoder that the lean pass computes, and the shapes of its weights by name.

    CheckpointError for another kind of decoder, or one larger than its weights: transformers fills what is missing with random
    numbers, however much that is.
    """
    sizes = [size for file in weight_files(directory) for size in tensor_sizes(file)]
    depth = settings.get("num_hidden_layers", 1)
    if type(depth) is not int or depth > len(sizes):  # every layer has a tensor; making a million of them takes hours
        raise CheckpointError(f"{name}: config.json wants {depth!r} layers, but the weights are {len(sizes)} tensors")
    try:
        with quiet(), torch.device("meta"):
            config: Any = AutoConfig.from_pretrained(directory)
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers checks values in its own ways
        raise CheckpointError(f"{name}: config.json makes no language model: {reason(error)}") from None
    if (wanted := sum(parameter.numel() for parameter in model.parameters())) > 2 * sum(sizes):
        raise CheckpointError(f"{name}: config.json wants {wanted:,} weights, but its files hold {sum(sizes):,}")
    others = {kind for kind in getattr(config, "layer_types", None) or [] if kind != "full_attention"}
    if others or getattr(config, "use_bidirectional_attention", None) or getattr(config, "attention_bias", False):
        found = sorted(others) or "use_bidirectional_attention or attention_bias"
        raise CheckpointError(f"{name}: config.json has {found}: only full causal attention without more biases is computed")
    return config, {key: [*parameter.shape] for key, parameter in model.named_parameters()}  # one table at both ends: one name


def check_shapes(directory: Path, wanted: dict[str, list[int]], name: str) -> None:
    """Raise CheckpointError for the first weight that is not there, or of another shape than config.json makes it."""
    found = {key: shape for file in weight_files(directory) for key, shape in tensor_shapes(file).items()}
    for key, shape in wanted.items():
        if found.get(key) != shape:
            told = f"of shape {found[key]}" if key in found else "missing"
            raise CheckpointError(f"{name}: weight {key} is {told}, but config.json makes it one of shape {shape}")


def read_tokenizer(directory: Path, name: str) -> Any:
    """The checkpoint's tokenizer, tried in a process of its own first.

    What tokenizer.json says where there is one: transformers' own class for a Qwen2 would read its words alone and split text
    as every Qwen2 does.
    """
    file = directory / "tokenizer.json"
    kind: Any = PreTrainedTokenizerFast if file.is_file() else AutoTokenizer
    made = functools.cache(lambda: kind.from_pretrained(directory))  # once in each process
    megabytes = file.stat().st_size // 10**6 if file.is_file() else 0  # 65,536 codes: 16, and 4 to 8 s to read them
    with quiet():
        check_text_limits(directory, name, lambda text: made()(text), megabytes)
        try:
            return made()
        except Exception as error:  # transformers and tokenizers raise their own kinds
            raise CheckpointError(f"{name}: its tokenizer cannot be loaded: {reason(error)}") from None


def find_codes(tokenizer: Any, settings: dict[str, Any], name: str) -> tuple[Template, int, int]:
    """How a checkpoint writes, the id of its code 0, and how many codes there are.

    Raises CheckpointError for a vocabulary without codes, with holes among them, or without the words that the kind writes.
    """
    kind, known = settings["model_type"], tokenizer.get_vocab()
    template = next(template for template in TEMPLATES if template.model_type == kind)
    size = settings.get("vocab_size")
    if type(size) is not int or max(known.values()) >= size:
        raise CheckpointError(f"{name}: the tokenizer has a token {max(known.values())}, but the model knows {size!r}")
    if template.code:
        spelt = re.compile(re.escape(template.code).replace(r"\{\}", "([0-9]+)"))
        codes = {int(found[1]): index for token, index in known.items() if (found := spelt.fullmatch(token))}
        first, n_codes = codes.get(0, size), len(codes)
        holes = [number for number in range(n_codes) if codes.get(number) != first + number]
    else:
        first, n_codes, holes = len(known), size - len(known), []
        holes = sorted({*range(len(known))} - {*known.values()})[:1]
    if not n_codes:
        where = f"no {template.code.format(0)} in its tokenizer" if template.code else f"no ids behind its {size} tokens"
        raise CheckpointError(f"{name}: found model_type {kind!r} without image codes ({where}); supported is {SUPPORTED}")
    if holes:
        told = template.code.format(holes[0]) if template.code else f"id {holes[0]}"
        raise CheckpointError(f"{name}: its {n_codes} image codes have a hole: {told} is not where the codes before it end")
    words = [*template.begin.values(), template.unconditional, template.look]
    wanted = dict.fromkeys(re.findall(r"<[^\s<>]+>", "".join([template.ask, *words])))
    if missing := [word for word in wanted if word not in known]:
        raise CheckpointError(f"{name}: its tokenizer has no {missing[0]}, which {template.name} writes")
    if not 2 <= n_codes <= MOST_CODES:
        raise CheckpointError(f"{name}: has {n_codes} image codes; from 2 to {MOST_CODES:,} are kept")
    return template, first, n_codes


def picture_length(settings: dict[str, Any], template: Template, positions: int, name: str) -> int:
    """How many codes a picture has: what config.json says, or the first of the kind's numbers."""
    length = settings.get(LENGTH, next(iter(template.begin)))
    if type(length) is not int or length < 1:
        raise CheckpointError(f"{name}: config.json: {LENGTH} must be a whole number above 0, found {length!r}")
    if length >= positions:
        raise CheckpointError(f"{name}: config.json: {LENGTH} {length} leaves no place for a prompt in {positions} positions")
    return length


def pictures_of(directory: Path, n_codes: int, length: int, device: torch.device) -> MagViT | VQGAN | None:
    """The image tokenizer that lies beside a model; None where there is none.

    No drawing, judging or training needs one: only people who want to see the pictures, another judge, and pixels to judge do.
    """
    found = [kind for kind, place in PICTURES.items() if (directory / place).exists()]
    if not found:
        return None
    file = directory / PICTURES[found[0]]
    shapes = tensor_shapes(file)  # it is a whole safetensors file, or this says so
    bits, table = (shapes.get(key) for key in ("encoder.quant_conv.weight", "quantize.embedding.weight"))
    known = (2 ** min(bits[0], 64) if bits else None) if found[0] is MagViT else (table[0] if table else None)
    if known is not None and known != n_codes:  # None: what reads it says what is missing
        raise CheckpointError(f"{file}: knows {known} codes, but the model beside it draws {n_codes}")
    if round(length**0.5) ** 2 != length:
        raise CheckpointError(f"{file}: makes square pictures, but the model beside it draws {length} codes a picture")
    return read_vq(file, device) if found[0] is MagViT else read_vqgan(file, device)


def no_decoder(directory: Path | None, name: str) -> str:
    """Why the pictures of a model cannot be shown, by what lies beside it (None: nothing); "" where they can."""
    if directory and any((directory / place).exists() for place in PICTURES.values()):
        return ""
    places = " or ".join(f"{place.parent}/" for place in PICTURES.values())
    return f"{name} has no decoder of its codes ({places} beside it): they can be judged, not shown"


def read_model(directory: Path, name: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The model and transformers' report on what it did not find in the files.

    Weights that are stored in half precision are read so, and become `dtype` on the device, one by one.
    """
    stored = getattr(torch, stored_dtype(directory))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=min(stored, dtype, key=lambda kind: kind.itemsize),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # transformers and safetensors raise their own kinds for broken files
        raise CheckpointError(f"{name}: cannot be loaded as a language model: {reason(error)}") from error
    return loaded


def check_text(policy: Any) -> None:
    """Raise CheckpointError unless prompts and questions come out of the tokenizer as the kind of checkpoint writes them."""
    try:
        written = [(policy.prompt_ids(text), policy.question_ids(text)) for text in ("yes", "no")]
    except Exception as error:  # whatever a tokenizer raises
        raise CheckpointError(f"{policy.name}: its tokenizer cannot be used: {reason(error)}") from error
    if written[0][0] == written[1][0] or written[0][1] == written[1][1]:
        raise CheckpointError(f"{policy.name}: its tokenizer leaves the prompt out")

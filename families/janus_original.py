"""A Janus in DeepSeek's own format (model_type multi_modality), as the transformers model that it is.

Reads   one directory (or hub id), laid out as deepseek-ai/Janus-1.3B and the fine-tunes of Janus-Pro are:
            config.json                the sizes that the original's classes take; those that stand in their code alone, of
                                       the vision tower and the VQ model, are read off the tensors
            *.safetensors              under the original's names; with model.safetensors.index.json where there are several
            tokenizer.json             and tokenizer_config.json or special_tokens_map.json, which name its begin and end
            processor_config.json      the name of the template (roles), the tags of pictures, the number of image tokens
            preprocessor_config.json   size and statistics of pictures
No code that config.json names (auto_map) is looked at. What is saved is the transformers format.

How a chat is written, and how many heads the vision tower has, stands in the original's code alone, and so in this file. It is
a file of its own, and makes none unnecessary, since what it knows is another library's: all of it goes when nobody has such
checkpoints any more, and janus_files.py, which is about the format that is written, stays.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, processors
from torch import Tensor
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from families.pretrained import CheckpointError, check_tensors, read_object, read_tensor, tensor_shapes, weight_files

# What the original's files hold besides its model: how often a code was used, SigLIP's pooling head, which the original builds
# and leaves out, and the frequencies that older libraries store.
UNUSED = re.compile(
    r"gen_vision_model\.quantize\.codebook_used|vision_model\.vision_tower\.attn_pool\..*"
    r"|language_model\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
)
TOWER, VQ = "vision_model.vision_tower.", "gen_vision_model."
POSITIONS, PATCHES, HEAD = TOWER + "pos_embed", TOWER + "patch_embed.proj.weight", "language_model.lm_head.weight"
HEADS = 16  # of all three SigLIPs that the original knows; no tensor tells
NAMES = (  # transformers' names -> the original's, one substitution after the other
    (r"^lm_head", "language_model.lm_head"),
    (r"^model\.language_model", "language_model.model"),
    (r"^model\.vision_model\.embeddings\.patch_embedding", TOWER + "patch_embed.proj"),
    (r"^model\.vision_model\.embeddings\.position_embedding\.weight", POSITIONS),
    (r"^model\.vision_model\.post_layernorm", TOWER + "norm"),
    (r"^model\.vision_model\.encoder\.layers", TOWER + "blocks"),
    (r"^(vision_model\..*)\.self_attn\.[qkv]_proj", r"\1.attn.qkv"),
    (r"^(vision_model\..*)\.self_attn\.projection_layer", r"\1.attn.proj"),
    (r"^(vision_model\..*)\.layer_norm", r"\1.norm"),
    (r"^model\.generation_embeddings", "gen_embed"),
    (r"^model\.generation_head\.proj_out", "gen_head.output_mlp_projector"),
    (r"^model\.generation_head", "gen_head"),
    (r"^model\.generation_aligner", "gen_aligner"),
    (r"^model\.aligner", "aligner"),
    (r"^((gen_)?aligner)\.fc1", r"\1.layers.0"),
    (r"^((gen_)?aligner)\.hidden_layers\.(\d+)", lambda found: f"{found[1]}.layers.{2 * int(found[3]) + 2}"),  # GELUs between
    (r"^model\.vqmodel", "gen_vision_model"),
    (r"^(gen_vision_model\.(en|de)coder)\.(down|up)", r"\1.conv_blocks"),
    (r"^(gen_vision_model\..*)\.block\.", r"\1.res."),
    (r"^(gen_vision_model\..*)\.mid\.block_1", r"\1.mid.0"),
    (r"^(gen_vision_model\..*)\.mid\.attn_1", r"\1.mid.1"),
    (r"^(gen_vision_model\..*)\.mid\.block_2", r"\1.mid.2"),
)
CLASSES = {  # what a Janus that draws with codes is made of
    "vision_config": "CLIPVisionTower",
    "aligner_config": "MlpProjector",
    "gen_vision_config": "VQ-16",
    "gen_aligner_config": "MlpProjector",
    "gen_head_config": "vision_head",
}
VISION_PARAMS = {"model_name", "image_size", "select_feature", "select_layer", "select_layers", "ckpt_path"}  # others do more
LLAMA = (  # what language_config may decide; what it leaves out is as LlamaConfig has it, the original's too
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "attention_bias", "mlp_bias"),
    *("rope_theta", "rope_scaling", "rope_parameters"),
)
ROLES = {"deepseek": ("<|User|>", "<|Assistant|>"), "deepseek_old": ("User", "Assistant")}  # by sft_format: Pro, Janus-1.3B
TAGS = {"image_tag": "<image_placeholder>", "image_start_tag": "<begin_of_image>", "image_end_tag": "<end_of_image>"}
TAGS |= {"pad_tag": "<｜▁pad▁｜>"}
# A turn is its role, a colon, a space and the stripped message; a picture stands on a line of its own. The system prompt of
# questions about pictures, one for all models, is written by transformers' processor.
TEMPLATE = (
    "{% for message in messages %}"
    "{% set text %}{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ picture + '\\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endset %}"
    "{% if message['role'] == 'user' %}{{ user }}: {{ text | trim }}{{ '\\n\\n' }}"
    "{% else %}{{ assistant }}: {{ text | trim }}{{ end }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ assistant }}:{% endif %}"
)


# ---------------------------------------------------------------------------------------------------------------------
# Names


def original_name(key: str) -> tuple[str, int | None]:
    """Where the original keeps a tensor of transformers' Janus: under which name, and as which third of it (q, k, v)."""
    part = re.match(r"model\.vision_model\..*\.([qkv])_proj\.", key)
    for pattern, name in NAMES:
        key = re.sub(pattern, name, key)
    return key, "qkv".index(part[1]) if part else None


def original_shapes(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    """The shapes that the original's tensors must have to fill these of transformers, by name."""
    shapes = {}
    for key, tensor in tensors.items():
        name, part = original_name(key)
        rows, *others = tensor.shape
        shapes[name] = [rows if part is None else 3 * rows, *others]
    shapes[POSITIONS].insert(0, 1)
    return shapes


def stored_shapes(directory: Path) -> dict[str, list[int]]:
    """The shapes of a directory's tensors by name, without those that nothing reads. A name stands in one file alone."""
    shapes: dict[str, list[int]] = {}
    for file in weight_files(directory):
        found = {name: shape for name, shape in tensor_shapes(file).items() if not UNUSED.fullmatch(name)}
        if twice := sorted(found.keys() & shapes.keys()):
            raise CheckpointError(f"{file}: {twice[0]} is in another file as well")
        shapes |= found
    return shapes


def stored_tensors(directory: Path, keys: Iterable[str]) -> dict[str, Callable[[], Tensor]]:
    """By transformers' names, what reads each of a directory's tensors as it is stored; none for one that is not there."""
    places = {name: file for file in weight_files(directory) for name in tensor_shapes(file)}

    def read(name: str, part: int | None) -> Tensor:
        tensor = read_tensor(places[name], name)
        if part is not None:
            tensor = tensor.chunk(3)[part]
        return tensor[0] if name == POSITIONS else tensor

    names = {key: original_name(key) for key in keys}
    return {key: functools.partial(read, *found) for key, found in names.items() if found[0] in places}


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def read_config(directory: Path) -> JanusConfig:
    """What transformers' Janus is made from. Raises CheckpointError for a model of other parts, or numbers that do not fit."""
    file, shapes = directory / "config.json", stored_shapes(directory)
    settings = read_object(file)
    parts = {part: params(file, settings, part) for part in CLASSES}
    vision, aligner, vq, vq_aligner, _ = parts.values()
    llama = LlamaConfig(**text_settings(file, settings))
    width, patch = size(shapes, POSITIONS, 3, 2, directory), size(shapes, PATCHES, 4, 3, directory)
    check_parts(file, parts, llama.hidden_size, width)
    depths = (llama.num_hidden_layers, aligner.get("depth", 1), vq_aligner.get("depth", 1))
    if not all(type(depth) is int and 1 <= depth <= len(shapes) for depth in depths):  # every layer has a tensor
        raise CheckpointError(f"{file}: wants {depths} layers, but the weights are {len(shapes)} tensors")
    tied = settings["language_config"].get("tie_word_embeddings") is True and HEAD not in shapes
    llama.tie_word_embeddings = tied
    return JanusConfig(
        text_config=llama,
        vision_config=JanusVisionConfig(
            hidden_size=width,
            num_hidden_layers=levels(shapes, TOWER + "blocks"),
            num_attention_heads=HEADS,
            image_size=vision["image_size"],
            patch_size=patch,
            mlp_ratio=size(shapes, TOWER + "blocks.0.mlp.fc1.weight", 2, 0, directory) / width,
            projection_dim=llama.hidden_size,
            depth=depths[1],
            num_image_tokens=(vision["image_size"] // patch) ** 2,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=vq["n_embed"],
            num_embeddings=vq["image_token_size"],
            projection_dim=llama.hidden_size,
            image_token_embed_dim=llama.hidden_size,
            num_hidden_layers=depths[2],
            **vq_sizes(shapes, directory),
        ),
        tie_word_embeddings=tied,
    )


def check_parts(file: Path, parts: dict[str, dict[str, Any]], hidden: int, width: int) -> None:
    """Raise CheckpointError unless the parts are what transformers has, and fit a language model and a vision tower so wide."""
    vision, aligner, vq, vq_aligner, head = parts.values()
    for key in sorted(vision.keys() - VISION_PARAMS):
        raise CheckpointError(f"{file}: vision_config.params has {key!r}, which is not known here")
    if not str(vision.get("model_name")).startswith("siglip"):
        raise CheckpointError(f"{file}: vision_config.params: model_name {vision.get('model_name')!r} is no SigLIP")
    for part in ("aligner_config", "gen_aligner_config"):
        if (kind := parts[part].get("projector_type")) != "mlp_gelu":
            raise CheckpointError(f"{file}: {part}.params: projector_type {kind!r} is not 'mlp_gelu'")
    for part, key in (
        ("vision_config", "image_size"),
        ("gen_vision_config", "n_embed"),
        ("gen_vision_config", "image_token_size"),
    ):
        if type(found := parts[part].get(key)) is not int or found < 1:
            raise CheckpointError(f"{file}: {part}.params: {key} must be a whole number, found {found!r}")
    same = {  # transformers has one size for all of these
        "aligner_config.params: input_dim": (aligner.get("input_dim"), width),
        "aligner_config.params: n_embed": (aligner.get("n_embed"), hidden),
        "gen_aligner_config.params: input_dim": (vq_aligner.get("input_dim"), vq["n_embed"]),
        "gen_aligner_config.params: n_embed": (vq_aligner.get("n_embed"), hidden),
        "gen_head_config.params: n_embed": (head.get("n_embed"), hidden),
        "gen_head_config.params: image_token_embed": (head.get("image_token_embed"), hidden),
        "gen_head_config.params: image_token_size": (head.get("image_token_size"), vq["image_token_size"]),
    }
    for what, (told, wanted) in same.items():
        if told != wanted:
            raise CheckpointError(f"{file}: {what} is {told!r}, but what it is joined to has {wanted}")


def params(file: Path, settings: dict[str, Any], part: str) -> dict[str, Any]:
    """What the class of a part of the original is made with; CheckpointError for another class, or none."""
    told = settings.get(part)
    if not isinstance(told, dict) or told.get("cls") != CLASSES[part] or not isinstance(told.get("params"), dict):
        found = told.get("cls") if isinstance(told, dict) else told
        raise CheckpointError(f"{file}: {part} is of class {found!r}, but a Janus that draws codes has {CLASSES[part]!r}")
    return told["params"]


def text_settings(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What language_config says of a Llama."""
    told = settings.get("language_config")
    if not isinstance(told, dict) or told.get("model_type", "llama") != "llama":
        raise CheckpointError(f"{file}: language_config is not of a Llama")
    return {key: told[key] for key in LLAMA if told.get(key) is not None}


def size(shapes: dict[str, list[int]], name: str, dimensions: int, which: int, directory: Path) -> int:
    """One size of a tensor; CheckpointError where there is no such tensor."""
    if len(shapes.get(name, ())) != dimensions:
        raise CheckpointError(f"{directory}: {name} is {shapes.get(name, 'missing')}, but should have {dimensions} dimensions")
    return shapes[name][which]


def levels(shapes: dict[str, list[int]], prefix: str) -> int:
    """How many numbered parts there are under a name."""
    return len({name.removeprefix(prefix + ".").split(".")[0] for name in shapes if name.startswith(prefix + ".")})


def vq_sizes(shapes: dict[str, list[int]], directory: Path) -> dict[str, Any]:
    """The sizes of the VQ model that its original has in its code; levels are counted from the widest picture on."""
    blocks = VQ + "decoder.conv_blocks"
    base = size(shapes, VQ + "encoder.conv_in.weight", 4, 0, directory)
    order = reversed(range(levels(shapes, blocks)))
    widths = [size(shapes, f"{blocks}.{level}.res.0.conv2.weight", 4, 0, directory) for level in order]
    return {
        "latent_channels": size(shapes, VQ + "post_quant_conv.weight", 4, 0, directory),
        "base_channels": base,
        "channel_multiplier": [width // base for width in widths],
        "num_res_blocks": levels(shapes, f"{blocks}.0.res") - 1,  # the encoder has one fewer
    }


# ---------------------------------------------------------------------------------------------------------------------
# The model


def empty_model(directory: Path, config: JanusConfig) -> JanusForConditionalGeneration:
    """The model without weights. Raises CheckpointError, naming one, unless the directory's tensors fill it exactly."""
    with torch.device("meta"):
        model: Any = JanusForConditionalGeneration(config)
    wanted = original_shapes(model.state_dict())
    if config.tie_word_embeddings:
        del wanted[HEAD]
    check_tensors(wanted, stored_shapes(directory), directory)
    return model


def fill(model: Any, directory: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Read the weights, one tensor after the other, each at once to its device and type."""
    stored = stored_tensors(directory, model.state_dict())
    tensors = {key: read().to(device, dtype, copy=True) for key, read in stored.items()}  # a copy, not the pages of the file
    model.load_state_dict(tensors, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.get_input_embeddings().weight
    embeddings = model.model.vision_model.embeddings  # what is in no file
    embeddings.position_ids = torch.arange(embeddings.num_positions, device=device)[None]
    model.model.language_model.rotary_emb = LlamaRotaryEmbedding(model.config.text_config).to(device)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def name_tokens(model: Any, processor: JanusProcessor) -> None:
    """What the transformers format says of special tokens, and of how to draw: the original's code has a guidance of 5."""
    tokenizer: Any = processor.tokenizer
    model.config.image_token_id = tokenizer.convert_tokens_to_ids(processor.image_token)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    for key, value in ids.items():
        setattr(model.config.text_config, key, value)
    model.generation_config = GenerationConfig(**ids, guidance_scale=5)


# ---------------------------------------------------------------------------------------------------------------------
# Template, tokenizer, pictures


def read_processor(directory: Path) -> JanusProcessor:
    """Template, tokenizer and image processor. Raises CheckpointError for a file that is not there, or not as it is known."""
    for name in ("tokenizer.json", "processor_config.json", "preprocessor_config.json"):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory}: no {name}: take that of the model it was trained from")
    file = directory / "processor_config.json"
    told: dict[str, Any] = {"sft_format": "deepseek", "num_image_tokens": 576, "add_special_token": False, **TAGS}
    told |= read_object(file)
    if told["sft_format"] not in ROLES:
        raise CheckpointError(f"{file}: sft_format {told['sft_format']!r} is none of {sorted(ROLES)}")
    if told["add_special_token"]:
        raise CheckpointError(f"{file}: add_special_token {told['add_special_token']!r} is not known here")
    tokenizer = read_tokenizer(directory, told)
    user, assistant = ROLES[told["sft_format"]]
    if user not in tokenizer.get_vocab():  # of before Pro, when "deepseek" was the name of the old roles
        user, assistant = ROLES["deepseek_old"]
    values = {"user": user, "assistant": assistant, "picture": told["image_tag"], "end": tokenizer.eos_token}
    named = "".join(f"{{% set {name} = {json.dumps(value)} %}}" for name, value in values.items())
    return JanusProcessor(
        read_image_processor(directory),
        tokenizer,
        chat_template=named + TEMPLATE,
        use_default_system_prompt=True,
        num_image_tokens=told["num_image_tokens"],
    )


def read_tokenizer(directory: Path, told: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer just as tokenizer.json has it, with the names of its special tokens; it puts BOS before every text."""
    named: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            named |= {key: value for key, value in read_object(directory / name).items() if value is not None}
    if not named.get("add_bos_token", True) or named.get("add_eos_token"):
        raise CheckpointError(f"{directory / 'tokenizer_config.json'}: prompts that do not begin, or end, as Janus's do")
    begin_end = [value["content"] if isinstance(value := named.get(key), dict) else value for key in ("bos_token", "eos_token")]
    pad, picture, start, end = (told[tag] for tag in ("pad_tag", *[*TAGS][:3]))
    stored = Tokenizer.from_file(str(directory / "tokenizer.json"))
    known = stored.get_vocab()
    for token in (*begin_end, pad, start, end):
        if not isinstance(token, str) or token not in known:
            raise CheckpointError(f"{directory}: {token!r} is to be a special token, but is none of the tokenizer's")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=stored,
        bos_token=begin_end[0],
        eos_token=begin_end[1],
        pad_token=pad,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": picture, "boi_token": start, "eoi_token": end},
    )
    begin: Any = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, known[begin])]
    )
    return tokenizer


def read_image_processor(directory: Path) -> JanusImageProcessorPil:
    """Size and statistics of pictures. The original draws for a mean and deviation of 0.5, as DeepSeek's have."""
    file = directory / "preprocessor_config.json"
    told = read_object(file)
    if told.get("do_normalize", True) is not True:  # so did Janus-1.3B at first, and was corrected
        raise CheckpointError(
            f"{file}: do_normalize is {told['do_normalize']!r}, but the vision tower reads what is normalised"
        )
    edge, least, factor = told.get("image_size"), told.get("min_size", 14), told.get("rescale_factor", 1 / 255)
    if not all(type(pixels) is int and pixels > 0 for pixels in (edge, least)):
        raise CheckpointError(f"{file}: image_size and min_size must be whole numbers, found {edge!r} and {least!r}")
    if not isinstance(factor, float) or abs(255 * factor - 1) > 1e-6:
        raise CheckpointError(f"{file}: rescale_factor must be 1/255, found {factor!r}")
    given: dict[str, Any] = {"size": {"height": edge, "width": edge}, "min_size": least}
    return JanusImageProcessorPil(**given, **{key: told[key] for key in ("image_mean", "image_std") if key in told})

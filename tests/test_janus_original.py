"""Janus in DeepSeek's own format: the same model as its conversion, the names of the real sizes, what is refused.

The tables of names below are written down from the original's classes and transformers' converter, module by module; the code
under test goes the other way, by substitutions.
"""

import contextlib
import functools
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import learnt, run
from safetensors.torch import load_file, save_file
from test_model import HUB_SPECIAL, write_byte_level_tokenizer

from families import janus_files, janus_original
from families.family import PromptError
from families.pretrained import INDEX, CheckpointError
from model import load, model_hash

PROMPTS = ["a red cube", "yes  no"]
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
CHAT = (  # what the converter's template makes of one message
    "{% for m in messages %}{{ '<|User|>: ' }}{% for c in m['content'] %}"
    "{{ '<image_placeholder>\\n' if c['type'] == 'image' else c['text'] }}"
    "{% endfor %}{{ '\\n\\n<|Assistant|>:' }}{% endfor %}"
)
WEIGHTS = "model.safetensors"
Row = tuple[str, list[str], list[int]]  # the original's name, transformers' names (none: left out; three: q, k, v), its shape


# ---------------------------------------------------------------------------------------------------------------------
# What the original's classes hold


def affine(old: str, new: str, *shape: int, bias: bool = True) -> Iterator[Row]:
    yield f"{old}.weight", [f"{new}.weight"], [*shape]
    if bias:
        yield f"{old}.bias", [f"{new}.bias"], [shape[0]]


def residual(old: str, new: str, rows: int, columns: int) -> Iterator[Row]:
    yield from affine(f"{old}.norm1", f"{new}.norm1", columns)
    yield from affine(f"{old}.conv1", f"{new}.conv1", rows, columns, 3, 3)
    yield from affine(f"{old}.norm2", f"{new}.norm2", rows)
    yield from affine(f"{old}.conv2", f"{new}.conv2", rows, rows, 3, 3)
    if rows != columns:
        yield from affine(f"{old}.nin_shortcut", f"{new}.nin_shortcut", rows, columns, 1, 1)


def attention(old: str, new: str, width: int) -> Iterator[Row]:
    yield from affine(f"{old}.norm", f"{new}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from affine(f"{old}.{part}", f"{new}.{part}", width, width, 1, 1)


def coder(
    of: str, first: int, last: int, widths: list[int], blocks: int, attended: int, sampling: str, names: str
) -> Iterator[Row]:
    """Encoder or decoder of the VQ model: levels in the order in which they run, the middle before or after them."""
    old, new = f"gen_vision_model.{of}", f"model.vqmodel.{of}"
    middle = widths[-1] if of == "encoder" else widths[0]
    start = widths[0]
    yield from affine(f"{old}.conv_in", f"{new}.conv_in", start, first, 3, 3)
    for index, name in enumerate(("block_1", "attn_1", "block_2")):
        kind = attention if name == "attn_1" else residual
        yield from kind(f"{old}.mid.{index}", f"{new}.mid.{name}", *[middle] * (1 if name == "attn_1" else 2))
    columns = start
    for level, rows in enumerate(widths):
        for block in range(blocks):
            here = f"{old}.conv_blocks.{level}", f"{new}.{names}.{level}"
            yield from residual(f"{here[0]}.res.{block}", f"{here[1]}.block.{block}", rows, columns)
            columns = rows
            if level == attended:
                yield from attention(f"{here[0]}.attn.{block}", f"{here[1]}.attn.{block}", rows)
        if level < len(widths) - 1:
            yield from affine(f"{here[0]}.{sampling}.conv", f"{here[1]}.{sampling}.conv", columns, columns, 3, 3)
    yield from affine(f"{old}.norm_out", f"{new}.norm_out", columns)
    yield from affine(f"{old}.conv_out", f"{new}.conv_out", last, columns, 3, 3)


def rows_of(g: SimpleNamespace) -> Iterator[Row]:
    """All tensors of an original of these sizes."""
    language = "language_model.model", "model.language_model"
    yield from affine(f"{language[0]}.embed_tokens", f"{language[1]}.embed_tokens", g.vocabulary, g.hidden, bias=False)
    for layer in (f"layers.{i}" for i in range(g.layers)):
        shapes = {f"self_attn.{part}_proj": (g.hidden, g.hidden) for part in "qkvo"}
        shapes |= {"mlp.gate_proj": (g.mlp, g.hidden), "mlp.up_proj": (g.mlp, g.hidden), "mlp.down_proj": (g.hidden, g.mlp)}
        shapes |= {"input_layernorm": (g.hidden,), "post_attention_layernorm": (g.hidden,)}
        for part, shape in shapes.items():
            yield from affine(f"{language[0]}.{layer}.{part}", f"{language[1]}.{layer}.{part}", *shape, bias=False)
    yield from affine(f"{language[0]}.norm", f"{language[1]}.norm", g.hidden, bias=False)
    yield from affine("language_model.lm_head", "lm_head", g.vocabulary, g.hidden, bias=False)

    tower, vision = "vision_model.vision_tower", "model.vision_model"
    yield f"{tower}.pos_embed", [f"{vision}.embeddings.position_embedding.weight"], [1, g.grid**2, g.width]
    yield from affine(f"{tower}.patch_embed.proj", f"{vision}.embeddings.patch_embedding", g.width, 3, g.patch, g.patch)
    for old, new in ((f"{tower}.blocks.{i}", f"{vision}.encoder.layers.{i}") for i in range(g.blocks)):
        for kind, shape in (("weight", [3 * g.width, g.width]), ("bias", [3 * g.width])):
            yield f"{old}.attn.qkv.{kind}", [f"{new}.self_attn.{part}_proj.{kind}" for part in "qkv"], shape
        yield from affine(f"{old}.attn.proj", f"{new}.self_attn.projection_layer", g.width, g.width)
        yield from affine(f"{old}.norm1", f"{new}.layer_norm1", g.width)
        yield from affine(f"{old}.norm2", f"{new}.layer_norm2", g.width)
        yield from affine(f"{old}.mlp.fc1", f"{new}.mlp.fc1", 4 * g.width, g.width)
        yield from affine(f"{old}.mlp.fc2", f"{new}.mlp.fc2", g.width, 4 * g.width)
    yield from affine(f"{tower}.norm", f"{vision}.post_layernorm", g.width)
    yield f"{tower}.attn_pool.latent", [], [1, 1, g.width]
    pool = {"q": (g.width, g.width), "kv": (2 * g.width, g.width), "proj": (g.width, g.width), "norm": (g.width,)}
    pool |= {"mlp.fc1": (4 * g.width, g.width), "mlp.fc2": (g.width, 4 * g.width)}
    for part, shape in pool.items():
        yield from ((name, [], size) for name, _, size in affine(f"{tower}.attn_pool.{part}", "", *shape))

    for old, new, columns in (("aligner", "aligner", g.width), ("gen_aligner", "generation_aligner", 8)):
        yield from affine(f"{old}.layers.0", f"model.{new}.fc1", g.hidden, columns)
        yield from affine(f"{old}.layers.2", f"model.{new}.hidden_layers.0", g.hidden, g.hidden)
    yield from affine("gen_head.output_mlp_projector", "model.generation_head.proj_out", g.hidden, g.hidden)
    yield from affine("gen_head.vision_head", "model.generation_head.vision_head", g.codes, g.hidden)
    yield from affine("gen_embed", "model.generation_embeddings", g.codes, 8, bias=False)

    yield from coder("encoder", 3, g.latent, [g.base, *g.levels][1:], g.residuals, len(g.levels) - 1, "downsample", "down")
    yield from coder("decoder", g.latent, 3, g.levels[::-1], g.residuals + 1, 0, "upsample", "up")
    yield from affine("gen_vision_model.quantize.embedding", "model.vqmodel.quantize.embedding", g.codes, 8, bias=False)
    yield "gen_vision_model.quantize.codebook_used", [], [65536]
    yield from affine("gen_vision_model.quant_conv", "model.vqmodel.quant_conv", 8, g.latent, 1, 1)
    yield from affine("gen_vision_model.post_quant_conv", "model.vqmodel.post_quant_conv", g.latent, 8, 1, 1)


PRO: dict[str, Any] = {"vocabulary": 102400, "width": 1024, "blocks": 24, "patch": 16, "grid": 24, "codes": 16384}
PRO |= {"base": 128, "levels": [128, 128, 256, 256, 512], "residuals": 2, "latent": 256}
GEOMETRIES = {
    "1B": SimpleNamespace(**PRO, hidden=2048, layers=24, heads=16, mlp=5632),
    "7B": SimpleNamespace(**PRO, hidden=4096, layers=30, heads=32, mlp=11008),
}
TINY: dict[str, Any] = {"hidden": 32, "layers": 2, "heads": 4, "mlp": 48, "width": 32, "blocks": 2, "patch": 4, "grid": 2}
TINY |= {"codes": 24, "base": 32, "levels": [32, 64, 64], "residuals": 1, "latent": 32}


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint of them


def config_of(g: SimpleNamespace) -> dict[str, Any]:
    def part(kind: str, **params: Any) -> dict[str, Any]:
        return {"cls": kind, "model_type": "of_its_own", "params": params}

    align = {"depth": 2, "n_embed": g.hidden, "projector_type": "mlp_gelu"}
    text = {"hidden_size": g.hidden, "intermediate_size": g.mlp, "num_attention_heads": g.heads, "num_hidden_layers": g.layers}
    text |= {"max_position_embeddings": 512, "vocab_size": g.vocabulary, "model_type": "llama", "torch_dtype": "bfloat16"}
    return {
        "architectures": ["MultiModalityCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_vlm.MultiModalityCausalLM"},
        "model_type": "multi_modality",
        "hidden_size": g.hidden,  # some fine-tunes have the language model's numbers here as well
        "vision_config": part(
            "CLIPVisionTower",
            image_size=g.patch * g.grid,
            model_name="siglip_large_patch16_384",
            select_feature="same",
            select_layer=-1,
        ),
        "aligner_config": part("MlpProjector", input_dim=g.width, **align),
        "gen_vision_config": part("VQ-16", image_token_size=g.codes, n_embed=8),
        "gen_aligner_config": part("MlpProjector", input_dim=8, **align),
        "gen_head_config": part("vision_head", image_token_embed=g.hidden, image_token_size=g.codes, n_embed=g.hidden),
        "language_config": text | {"_attn_implementation_autoset": True},
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    write_json(path, value)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A random tiny Janus-Pro as DeepSeek's code would write it, float32. Nothing may write to it."""
    directory = tmp_path_factory.mktemp("original") / "tiny"
    directory.mkdir()
    g = SimpleNamespace(**TINY, vocabulary=write_byte_level_tokenizer(directory)["vocabulary"])
    special = {f"{name}_token": HUB_SPECIAL[name] for name in ("bos", "eos", "pad")}
    write_json(directory / "special_tokens_map.json", special | {"additional_special_tokens": ["<|User|>", "<|Assistant|>"]})
    write_json(  # as Janus-Pro has it
        directory / "tokenizer_config.json",
        {
            "bos_token": HUB_SPECIAL["bos"],
            "eos_token": HUB_SPECIAL["eos"],
            "pad_token": None,
            "tokenizer_class": "LlamaTokenizer",
        },
    )
    change_json(directory / "tokenizer.json", lambda value: value.update(post_processor=None))  # the original's class adds BOS
    processor = {"add_special_token": False, "ignore_id": -100, "image_tag": HUB_SPECIAL["image"], "mask_prompt": True}
    processor |= {"num_image_tokens": g.grid**2, "processor_class": "VLChatProcessor", "sft_format": "deepseek"}
    write_json(directory / "processor_config.json", processor)
    pictures = {"background_color": [127] * 3, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    pictures |= {"image_processor_type": "VLMImageProcessor", "image_size": g.patch * g.grid, "min_size": 14}
    write_json(directory / "preprocessor_config.json", pictures | {"rescale_factor": 0.00392156862745098})
    write_json(directory / "config.json", config_of(g))
    torch.manual_seed(0)
    tensors = {name: 0.2 * torch.randn(shape) + name.endswith("norm.weight") for name, _, shape in rows_of(g)}
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as older libraries stored it
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory) -> Path:
    """What transformers' converter makes of it, but for its float16 and the head that version 5 ties."""
    from transformers import (
        AutoTokenizer,
        JanusConfig,
        JanusForConditionalGeneration,
        JanusProcessor,
        JanusVisionConfig,
        JanusVQVAEConfig,
        LlamaConfig,
    )
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    path, scratch = (tmp_path_factory.mktemp(name) for name in ("converted", "tokenizer"))
    ids = write_byte_level_tokenizer(scratch)
    g = SimpleNamespace(**TINY, vocabulary=ids["vocabulary"])
    stored, tensors = load_file(original / WEIGHTS), {}
    for old, new, _ in rows_of(g):
        parts = stored[old].split(len(stored[old]) // len(new)) if len(new) == 3 else [stored[old]]
        tensors |= dict(zip(new, parts, strict=False))
    position = "model.vision_model.embeddings.position_embedding.weight"
    tensors[position] = tensors[position].squeeze(0)
    special = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")}
    text = {"vocab_size": g.vocabulary, "hidden_size": g.hidden, "intermediate_size": g.mlp, "num_hidden_layers": g.layers}
    vision = {
        "hidden_size": g.width,
        "num_hidden_layers": g.blocks,
        "num_attention_heads": 16,
        "image_size": g.patch * g.grid,
        "patch_size": g.patch,
    }
    vq = {
        "embed_dim": 8,
        "num_embeddings": g.codes,
        "latent_channels": g.latent,
        "base_channels": g.base,
        "num_hidden_layers": 2,
    }
    config = JanusConfig(
        text_config=LlamaConfig(**text, **special, num_attention_heads=g.heads, max_position_embeddings=512),
        vision_config=JanusVisionConfig(**vision, projection_dim=g.hidden, depth=2, num_image_tokens=g.grid**2),
        vq_config=JanusVQVAEConfig(
            **vq,
            channel_multiplier=[width // g.base for width in g.levels],
            num_res_blocks=g.residuals,
            projection_dim=g.hidden,
            image_token_embed_dim=g.hidden,
        ),
        image_token_id=ids["image"],
        tie_word_embeddings=False,
    )
    model = JanusForConditionalGeneration(config)
    model.load_state_dict({key: tensor.contiguous() for key, tensor in tensors.items()}, strict=True)
    model.generation_config._from_model_config = False
    model.generation_config.pad_token_id, model.generation_config.guidance_scale = ids["pad"], 5
    model.save_pretrained(path)
    JanusProcessor(
        JanusImageProcessorPil(
            size={"height": g.patch * g.grid, "width": g.patch * g.grid}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        AutoTokenizer.from_pretrained(scratch),
        chat_template=CHAT,
        use_default_system_prompt=True,
        num_image_tokens=g.grid**2,
    ).save_pretrained(path)
    return path


def changed(original: Path, path: Path, change: Callable[[Path], Any]) -> Path:
    shutil.copytree(original, path)
    change(path)
    return path


def in_json(file: str, *keys: str, value: Any) -> Callable[[Path], Any]:
    """Another value of a key, however deep, of a JSON file."""

    def change(whole: Any) -> None:
        for key in keys[:-1]:
            whole = whole[key]
        whole[keys[-1]] = value

    return lambda path: change_json(path / file, change)


def in_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def rewrite(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS, {"format": "pt"})

    return rewrite


# ---------------------------------------------------------------------------------------------------------------------
# The same model


def without_the_roles_token(path: Path) -> None:
    """A tokenizer of before Janus-Pro, when the roles of "deepseek" were User and Assistant."""
    text = (path / "tokenizer.json").read_text().replace("<|User|>", "<|Somebody|>")
    (path / "tokenizer.json").write_text(text)


FORMATS = {  # -> what is changed, roles
    "as Janus-Pro": (lambda path: None, ("<|User|>", "<|Assistant|>")),
    "as Janus-1.3B": (in_json("processor_config.json", "sft_format", value="deepseek_old"), ("User", "Assistant")),
    "as Janus-1.3B was at first": (without_the_roles_token, ("User", "Assistant")),
}


@pytest.fixture(scope="module")
def theirs(converted, tmp_path_factory) -> Callable[[tuple[str, str]], Any]:
    """The conversion, loaded, with a template of these roles."""

    @functools.cache
    def with_roles(roles: tuple[str, str]) -> Any:
        directory = shutil.copytree(converted, tmp_path_factory.mktemp("roles") / "converted")
        template = (directory / "chat_template.jinja").read_text()
        for name, role in zip(("<|User|>", "<|Assistant|>"), roles, strict=True):
            template = template.replace(name, role)
        (directory / "chat_template.jinja").write_text(template)
        return load(directory, device="cpu")

    return with_roles


@pytest.fixture(scope="module", params=FORMATS)
def both(request, original, theirs, tmp_path_factory) -> SimpleNamespace:
    """One in its own format and converted, both loaded, and the roles of its template."""
    change, roles = FORMATS[request.param]
    with contextlib.redirect_stderr(io.StringIO()) as told:
        ours = load(changed(original, tmp_path_factory.mktemp("ours") / "original", change), device="cpu")
    return SimpleNamespace(ours=ours, theirs=theirs(roles), roles=roles, told=told.getvalue())


def test_it_is_the_model_that_transformers_converter_makes_of_it(both):
    ours, theirs = both.ours, both.theirs
    assert both.told == ""
    wanted = theirs.model.state_dict()
    assert wanted.keys() == ours.model.state_dict().keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in ours.model.state_dict().items())
    for name in ("bos", "pad", "boi", "eoi", "image", "image_tokens", "codebook_size", "stored_dtype"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for text in PROMPTS:
        for ids in ("prompt_ids", "question_ids", "caption_ids"):
            assert getattr(ours, ids)(text) == getattr(theirs, ids)(text)
    for options in ({"temperature": 0, "guidance": 5.0}, {"guidance": 2.0}):
        drawn = ours.sample(PROMPTS, 2, **options)
        assert torch.equal(drawn, theirs.sample(PROMPTS, 2, **options))
    drawn = drawn[:, 0]
    assert len({*drawn.flatten().tolist()}) > 3
    assert torch.equal(ours.decode(drawn), theirs.decode(drawn))
    asked = [["red?", "Is it yes or no?"]] * 2
    for a, b in zip(ours.judge(drawn, asked), theirs.judge(drawn, asked), strict=True):
        assert torch.equal(a, b)
    assert ours.reply(drawn, asked, most=4) == theirs.reply(drawn, asked, most=4)
    assert torch.equal(ours.logps(PROMPTS, drawn), theirs.logps(PROMPTS, drawn))


def test_prompts_are_the_originals_to_the_last_id(both):
    """As VLChatProcessor writes them: role, colon, stripped message, two line ends, the other role and a colon."""
    policy, (user, assistant) = both.ours, both.roles

    def ids(text: str) -> list[int]:
        return [policy.bos, *policy.tokenizer(text, add_special_tokens=False)["input_ids"]]

    for text in (*PROMPTS, "  red\n", "{{ 7 }} <b>"):
        begun = f"{user}: {text.strip()}\n\n{assistant}:{HUB_SPECIAL['boi']}"
        assert policy.prompt_ids(text) == ids(begun)
        asked = ids(f"{SYSTEM}\n\n{user}: {HUB_SPECIAL['image']}\n{text}".rstrip() + f"\n\n{assistant}:")
        place = asked.index(policy.image)
        picture = [policy.boi, *[policy.image] * policy.image_tokens, policy.eoi]
        prefix, rest = policy.question_ids(text)
        assert prefix + rest == asked[:place] + picture + asked[place + 1 :]
    for role in both.roles:
        for ids_of in (policy.prompt_ids, policy.question_ids, policy.caption_ids):
            with pytest.raises(PromptError, match=re.escape(role)):
                ids_of(f"a cube\n\n{role}: yes")


def test_shards_in_bfloat16_and_a_tied_head_are_read_as_they_are(original, tmp_path):
    """Half a model a file, in another type than its counter; no lm_head where the language model says that it is tied."""
    directory = changed(
        original, tmp_path / "shards", in_json("config.json", "language_config", "tie_word_embeddings", value=True)
    )
    tensors = load_file(directory / WEIGHTS)
    head = tensors.pop("language_model.lm_head.weight")
    halved = {name: tensor if name.endswith("codebook_used") else tensor.bfloat16() for name, tensor in tensors.items()}
    (directory / WEIGHTS).unlink()
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(halved)}
    for file in {*places.values()}:
        save_file({name: halved[name] for name in halved if places[name] == file}, directory / file, {"format": "pt"})
    write_json(directory / INDEX, {"metadata": {}, "weight_map": places})
    policy = load(directory, device="cpu")
    embedding = "language_model.model.embed_tokens.weight"
    assert policy.model.lm_head.weight is policy.model.get_input_embeddings().weight
    assert torch.equal(policy.model.lm_head.weight, halved[embedding].float()) and head.shape == halved[embedding].shape
    assert (policy.stored_dtype, policy.model.dtype, policy.model.config.tie_word_embeddings) == (
        "bfloat16",
        torch.float32,
        True,
    )
    attention = policy.model.model.vision_model.encoder.layers[1].self_attn
    stored = halved["vision_model.vision_tower.blocks.1.attn.qkv.weight"].float()
    assert torch.equal(torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]), stored)


def test_what_is_saved_is_the_transformers_format_from_the_stored_weights(original, tmp_path):
    """With adapters, of a model that is rounded in memory: what nothing was added to is saved as it was stored."""
    from transformers import JanusForConditionalGeneration, JanusProcessor

    policy = learnt(original, dtype=torch.bfloat16)
    policy.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "janus"
    stored, saved = load_file(original / WEIGHTS), load_file(tmp_path / "saved" / WEIGHTS)
    head = "model.generation_head.proj_out.weight"
    assert torch.equal(saved[head], stored["gen_head.output_mlp_projector.weight"])
    assert not torch.equal(saved[head], policy.model.state_dict()[head].float())
    layer = "layers.0.self_attn.q_proj.weight"
    assert not torch.equal(saved[f"model.language_model.{layer}"], stored[f"language_model.model.{layer}"])
    again = load(tmp_path / "saved", device="cpu")
    assert model_hash(tmp_path / "saved") != model_hash(original)
    assert [again.prompt_ids(text) for text in PROMPTS] == [policy.prompt_ids(text) for text in PROMPTS]
    plain, processor = (kind.from_pretrained(tmp_path / "saved") for kind in (JanusForConditionalGeneration, JanusProcessor))
    chat = [{"role": "user", "content": [{"type": "text", "text": PROMPTS[0]}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], generation_mode="image", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [again.prompt_ids(PROMPTS[0])]
    theirs = plain.generate(**inputs, generation_mode="image", do_sample=False)
    assert torch.equal(again.sample(PROMPTS[:1], 1, guidance=5.0, temperature=0)[0], theirs)


@pytest.mark.parametrize(("which", "count"), [("1B", 882), ("7B", 936)])  # of 7B as its published index counts
def test_every_tensor_of_the_real_sizes_is_filled_once_from_the_originals_names(tmp_path, which, count):
    """Files of the real shapes that hold nothing, and a model on the meta device."""
    g = GEOMETRIES[which]
    rows, header, end = [*rows_of(g)], {}, 0
    for name, _, shape in rows:
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    told = json.dumps(header).encode()
    with open(tmp_path / WEIGHTS, "wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        file.truncate(8 + len(told) + end)  # a hole
    settings = config_of(g)
    if which == "7B":  # leaves out what is as LlamaConfig has it
        for key in ("hidden_size", "intermediate_size", "num_attention_heads"):
            del settings["language_config"][key]
    write_json(tmp_path / "config.json", settings)
    model = janus_original.empty_model(tmp_path, janus_original.read_config(tmp_path))
    assert len(header) == len(rows) == count
    filled = [new for _, names, _ in rows for new in names]
    assert sorted(filled) == sorted(model.state_dict()) and len({*filled}) == len(filled)
    assert sorted(janus_original.stored_tensors(tmp_path, model.state_dict())) == sorted(filled)
    sources = {(old, i if len(names) == 3 else None): new for old, names, _ in rows for i, new in enumerate(names)}
    assert {source: key for key in filled for source in [janus_original.original_name(key)]} == sources
    vision, vq = model.config.vision_config, model.config.vq_config
    assert (vision.num_attention_heads, vision.mlp_ratio, vision.num_image_tokens) == (16, 4.0, 576)
    assert (vq.channel_multiplier, vq.num_res_blocks, vq.base_channels, vq.latent_channels) == ([1, 1, 2, 2, 4], 2, 128, 256)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

QKV = "vision_model.vision_tower.blocks.1.attn.qkv.bias"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor too few": (in_weights(lambda tensors: tensors.pop(QKV)), rf"{QKV} is missing, but should be of shape \[96\]"),
    "a tensor too many": (
        in_weights(lambda tensors: tensors.update({"language_model.model.layers.0.more": torch.ones(1)})),
        r"language_model\.model\.layers\.0\.more is of shape \[1\], but should be missing",
    ),
    "a layer that config.json does not want": (
        in_json("config.json", "language_config", "num_hidden_layers", value=1),
        r"language_model\.model\.layers\.1\.input_layernorm\.weight is of shape \[32\], but should be missing",
    ),
    "no head": (
        in_weights(lambda tensors: tensors.pop("language_model.lm_head.weight")),
        r"language_model\.lm_head\.weight is missing",
    ),
    "no vision tower": (in_weights(lambda tensors: tensors.pop("vision_model.vision_tower.pos_embed")), "pos_embed is missing"),
    "NaN": (in_weights(lambda tensors: tensors["gen_embed.weight"].fill_(torch.nan)), "generation_embeddings.weight holds NaN"),
    "more words than rows": (
        in_json("config.json", "language_config", "vocab_size", value=10**12),
        r"lm_head\.weight is of shape \[\d+, 32\], but should be of shape \[1000000000000, 32\]",
    ),
    "a million layers": (
        in_json("config.json", "language_config", "num_hidden_layers", value=10**6),
        "wants .1000000, 2, 2. layers",
    ),
    "a deep aligner": (
        in_json("config.json", "aligner_config", "params", "depth", value=10**6),
        "wants .2, 1000000, 2. layers",
    ),
    "other pictures": (
        in_json("config.json", "vision_config", "params", "image_size", value=12),
        r"pos_embed is of shape \[1, 4, 32\], but should be of shape \[1, 9, 32\]",
    ),
    "another width": (in_json("config.json", "aligner_config", "params", "input_dim", value=64), "input_dim is 64, .* has 32"),
    "another head": (in_json("config.json", "gen_head_config", "params", "image_token_embed", value=64), "is 64, .* has 32"),
    "other codes": (
        in_json("config.json", "gen_vision_config", "params", "image_token_size", value=25),
        "image_token_size is 24",
    ),
    "codes in words": (
        in_json("config.json", "gen_vision_config", "params", "n_embed", value="8"),
        "n_embed must be a whole number",
    ),
    "a language model of no sense": (
        in_json("config.json", "language_config", "hidden_act", value="__import__"),
        "cannot be loaded",
    ),
    "no language model": (in_json("config.json", "language_config", value=[]), "language_config is not of a Llama"),
    "DeepSeek-VL": (in_json("config.json", "gen_vision_config", value=None), "gen_vision_config is of class None, .* 'VQ-16'"),
    "another vision tower": (in_json("config.json", "vision_config", "cls", value="HybridVisionTower"), "'HybridVisionTower'"),
    "statistics in the tower": (in_json("config.json", "vision_config", "params", "pixel_mean", value=[0.5] * 3), "pixel_mean"),
    "quantized": (in_json("config.json", "quantization_config", value={}), "'quantization_config'"),
    "a template that is not known": (in_json("processor_config.json", "sft_format", value="plain"), "sft_format 'plain'"),
    "the tag of pictures twice": (in_json("processor_config.json", "add_special_token", value=True), "add_special_token"),
    "a tag that is no token": (
        in_json("processor_config.json", "image_start_tag", value="<b>"),
        "'<b>' is to be a special token",
    ),
    "another number of image tokens": (
        in_json("processor_config.json", "num_image_tokens", value=576),
        "num_image_tokens is 576",
    ),
    "no BOS": (
        in_json("tokenizer_config.json", "add_bos_token", value=False),
        "tokenizer_config.json: prompts that do not begin",
    ),
    "pictures that are not normalised": (
        in_json("preprocessor_config.json", "do_normalize", value=False),
        "do_normalize is False",
    ),
    "a deviation of 0": (in_json("preprocessor_config.json", "image_std", value=[0.5, 0, 0.5]), "image_std holds a 0"),
    "pictures of another size": (in_json("preprocessor_config.json", "image_size", value=48), "image_size is 48, .* 8"),
    "no processor_config.json": (
        lambda path: (path / "processor_config.json").unlink(),
        "no processor_config.json: take that of",
    ),
    "pickled": (
        lambda path: (path / WEIGHTS).rename(path / "pytorch_model.bin"),
        "pickled .* take its conversion .* convert it once",
    ),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_does_not_fit_is_one_line_before_anything_is_allocated(original, tmp_path, monkeypatch, which):
    change, message = REFUSED[which]
    changed(original, tmp_path / "spoilt", change)
    if which != "NaN":
        monkeypatch.setattr(janus_original, "fill", lambda *given: pytest.fail("weights were read"))
    monkeypatch.setattr(janus_files, "check_text_limits", lambda *given: None)  # a process of its own, tested elsewhere
    with pytest.raises(CheckpointError, match=message) as told:
        load(tmp_path / "spoilt", device="cpu")
    assert len(str(told.value).splitlines()) == 1 and str(tmp_path / "spoilt") in str(told.value)


def test_a_command_that_is_given_one_ends_with_its_line_and_exit_2(original, tmp_path):
    changed(original, tmp_path / "spoilt", REFUSED["a tensor too many"][0])
    (tmp_path / "prompts.txt").write_text("a red cube\n")
    flags = ("--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out" / "scored.jsonl", "--device", "cpu")
    done = run("score.py", "--model", tmp_path / "spoilt", *flags, ok=False)
    assert done.returncode == 2 and re.fullmatch(r"score\.py: .*layers\.0\.more is of shape.*\n", done.stderr)
    assert not (tmp_path / "out" / "scored.jsonl").exists()

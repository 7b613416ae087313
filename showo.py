"""Show-o, the second family: masked diffusion draws, next-token prediction looks, one Phi-1.5 does both on the same codes.

Xie et al. 2024 (arXiv 2408.12528). `model.load` returns a `ShowO` where a checkpoint's config.json says `_class_name`
"Showo"; it has the methods of `Janus`, and nothing outside this file knows how the family works.

Reads   one directory (or hub id), laid out as the hub has it:
            config.json, pytorch_model.safetensors     Show-o itself, showlab/show-o or showlab/show-o-512x512
            phi-1_5/                                   tokenizer.json and config.json of microsoft/phi-1_5
            magvitv2/                                  pytorch_model.safetensors of showlab/magvitv2
        The two subdirectories may be links. One that is not there is fetched from the hub under the name above, whatever
        `llm_model_path` in config.json says. The checkpoints that look through CLIP (-w-clip-vit) are refused: their
        judge cannot read the codes that their pictures are made of.
Writes  the same layout, whole in one directory, files and tensors under the names that Show-o's own classes read.

Departures from Show-o's own code: a prompt that it would cut is refused; padding counts for no position (positions are
relative: the same logits); a picture depends on its seed and candidate number alone, not on its batch.

Legend: B rows of a batch, P prompts, N candidates a prompt, T image tokens a picture, V codebook size, L tokens of text,
K mask draws a picture, R rows in flight (doubled by guidance), C channels, Q questions a picture, S tokens of a sequence.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding, apply_rotary_pos_emb

from lora import adapters, merge_adapters
from model import (
    DESCRIBE,
    PromptError,
    draw,
    guide,
    head_logps,
    pad_left,
    positions_of,
    quiet,
    read_answers,
    recompute,
    spellings,
    token_logps,
    train_only,
)
from pretrained import CheckpointError, absolute_name, read_object, reason, tensor_sizes, weights_hash
from ranks import memory
from records import whole_directory

SUPPORTED = "showlab/show-o or showlab/show-o-512x512, or what was saved from them"
WEIGHTS = "pytorch_model.safetensors"
PARTS = {"phi-1_5": "microsoft/phi-1_5", "magvitv2": "showlab/magvitv2"}  # subdirectory -> where the hub has it
COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
COPIED += ("added_tokens.json", "vocab.json", "merges.txt")  # of phi-1_5: written back as they were read
# What Phi's config.json may decide; the rest is Show-o's (vocabulary, query and key norms) or must be as it is by default.
PHI_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
PHI_SHAPE += ("hidden_act", "layer_norm_eps", "max_position_embeddings")
PHI_SHAPE += ("rope_theta", "partial_rotary_factor", "rope_parameters")  # the last is what newer libraries write of both
TEXT_END = "<|endoftext|>"  # also the start of text, <|sot|>: one id for both
# Added to Phi-1.5's tokenizer in this order; the image codes follow them, the mask comes last.
SPECIAL = ("[PAD]", "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>")
MAX_TEXT = 128  # tokens of text Show-o was trained with, <|sot|> and <|eot|> among them
DRAWS_AT_ONCE = 4096  # codes drawn in one piece: each needs its whole distribution in float64
MOST_AT_ONCE = 64  # pictures in flight: all their codes run in every pass, so more of them gain nothing
MASK_NOISE = 2**63  # second half of the noise's key, where `sample` has the candidate's number


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics of drawing: tensors in, tensors out


def mask_counts(n_tokens: int, steps: int) -> list[int]:
    """How many of T tokens stay masked after each step of the cosine schedule (Chang et al. 2022, arXiv 2202.04200).

    The cosine is a float32, as in Show-o: in float64 a step of 12 or 18 would keep one token more.
    """
    ratios = [torch.tensor((step + 1) / steps) for step in range(steps)]
    return [math.floor(n_tokens * torch.cos(ratio * math.pi * 0.5)) for ratio in ratios]


def temperatures(temperature: float, steps: int) -> list[float]:
    """The weight of the Gumbel noise at each step: multiplied by 1 - (step + 1) / steps each time, so 0 at the last.

    Show-o's product falls much faster than MaskGIT's straight line: of 50 steps, to 0.18 after a quarter, 0.0003 at half.
    """
    return np.cumprod([temperature, *[1 - (step + 1) / steps for step in range(steps)]])[1:].tolist()


def gumbel(uniforms: Tensor) -> Tensor:
    """Gumbel noise from uniform numbers in [0, 1), any shape; finite everywhere."""
    return -(-uniforms.clamp(min=1e-20).log()).clamp(min=1e-20).log()


def mask_predict(
    predict: Callable[[Tensor], Tensor],
    tokens: Tensor,
    steps: int,
    temperature: float,
    choose: Callable[[Tensor, int], Tensor],
    perturb: Callable[[int], Tensor],
) -> Tensor:
    """Fill in masked codes: in each step draw all of them, keep the most confident, mask the others again.

    tokens (B, T) int64, unknown ones V; predict: such tokens -> logits (B, T, V), guided, of the codes at their own places;
    choose: logits, step -> codes (B, T); perturb: step -> Gumbel noise (B, T), which makes low confidence win at times.
    Returns codes (B, T). How many are kept follows `mask_counts`, of the whole T even where a part was known at first.
    Nothing here waits for the device.
    """
    schedule = zip(mask_counts(tokens.shape[1], steps), temperatures(temperature, steps), strict=True)
    for step, (count, heat) in enumerate(schedule):
        logits = predict(tokens)  # (B, T, V)
        n_codes = logits.shape[-1]
        unknown = tokens == n_codes
        codes = torch.where(unknown, choose(logits, step), tokens)
        confidence = token_logps(logits, codes).where(unknown, math.inf) + heat * perturb(step)  # (B, T)
        n_masked = (unknown.sum(dim=-1, keepdim=True) - 1).clamp(max=count).clamp(min=1)  # (B, 1)
        threshold = confidence.sort(dim=-1).values.gather(-1, n_masked)
        tokens = codes.masked_fill(confidence < threshold, n_codes)
    return codes


def picture_noise(seed: int, candidate: int, steps: int, n_tokens: int) -> np.ndarray:
    """Uniform numbers (steps, 2, T) float64 from (prompt's seed, candidate number) alone: for codes, and for confidence."""
    generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, candidate]))
    return generator.random((steps, 2, n_tokens))


def text_mask(real: Tensor) -> Tensor:
    """Who sees whom among tokens of text: (B, L) bool, True for real ones -> (B, L, L) bool.

    Causal; padding sees padding alone, so that no row is empty.
    """
    causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool, device=real.device).tril()
    return causal & (real[:, :, None] == real[:, None, :])


def drawing_mask(real: Tensor, n_image: int) -> Tensor:
    """Who sees whom when drawing: text (B, L) bool, then n_image tokens of picture -> (B, L + n_image, L + n_image).

    Text is causal and never sees the picture; the picture sees itself, both ways, and all real text.
    """
    everything = F.pad(real, (0, n_image), value=True)  # (B, S)
    image = torch.arange(everything.shape[1], device=real.device)[:, None] >= real.shape[1]  # (S, 1)
    return torch.where(image, everything[:, None, :], text_mask(everything))


def looking_mask(n_prefix: int, width: int, n_questions: int, device: torch.device) -> Tensor:
    """Who sees whom when looking: a picture's prefix, then Q questions of `width` tokens side by side -> (S, S) bool.

    All see the whole prefix, which sees nothing else; a question sees what came before in itself.
    """
    place = torch.arange(n_questions * width, device=device)
    own = (place[:, None] // width == place // width) & (place[:, None] >= place)
    mask = F.pad(own, (n_prefix, 0, n_prefix, 0))
    mask[:, :n_prefix] = True
    return mask


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics of log-probs


def masked_positions(noise: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which of T tokens are masked, `counts` (...) of each row: uniform noise (..., T) -> bool (..., T)."""
    return noise.argsort(axis=-1) < counts[..., None]


def mask_draws(seeds: list[int], n_draws: int, n_tokens: int) -> np.ndarray:
    """K masks a picture from its seed alone: bool (B, K, T), True for masked.

    The number of masked tokens is uniform on 1 .. T, stratified: the j-th of K draws takes it from the j-th K-th of that
    range. Given the number, all sets of so many tokens are equally likely.
    """
    masks = []
    for seed in seeds:
        generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, MASK_NOISE]))
        times = (np.arange(n_draws) + generator.random(n_draws)) / n_draws  # (K,)
        counts = np.minimum(np.floor(n_tokens * times).astype(int) + 1, n_tokens)
        masks.append(masked_positions(generator.random((n_draws, n_tokens)), counts))
    return np.stack(masks)


def bound_terms(logps: Tensor, masked: Tensor) -> Tensor:
    """Each token's share of the estimated bound on log p(picture): log-probs and masks (B, K, T) -> (B, T).

    Mean over the draws of T / (number of masked tokens) * log p, for the masked tokens. See `ShowO.logps`.
    """
    weights = masked.shape[-1] / masked.sum(dim=-1, keepdim=True)  # (B, K, 1)
    return (weights * logps.where(masked, 0)).mean(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# MAGVIT-v2, Show-o's image tokenizer (Yu et al. 2023, arXiv 2310.05737): weights under the checkpoint's own names


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the sum's left side through a 1 x 1 convolution where the width changes."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, width_in, eps=1e-6), nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, width, eps=1e-6), nn.Conv2d(width, width, 3, padding=1)
        if width_in != width:
            self.nin_shortcut = nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """Self-attention of one head over all places of a picture, with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (project(normed).flatten(2).transpose(1, 2) for project in (self.q, self.k, self.v))  # (B, H W, C)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed.transpose(1, 2).unflatten(2, x.shape[2:]))


def middle(width: int) -> nn.ModuleDict:
    """What lies between encoder or decoder and the codes, at the coarsest size."""
    blocks = {"block_1": ResidualBlock(width, width), "attn_1": AttentionBlock(width), "block_2": ResidualBlock(width, width)}
    return nn.ModuleDict(blocks)


def residual_blocks(width_in: int, width: int, n: int) -> nn.ModuleList:
    """The n blocks of a level, of which the first changes the width."""
    return nn.ModuleList(ResidualBlock(width if j else width_in, width) for j in range(n))


Levels = tuple[tuple[int, int], ...]  # (width, number of residual blocks) of each level, the finest first


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) in -1 .. 1 -> one number a bit, (B, bits, h, w); each level but the last halves the picture."""

    def __init__(self, levels: Levels, bits: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, levels[0][0], 3, padding=1)
        self.down = nn.ModuleList()
        width_in = levels[0][0]
        for width, n in levels:
            level = nn.ModuleDict({"block": residual_blocks(width_in, width, n)})
            if len(self.down) + 1 < len(levels):
                level["downsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, stride=2)})
            self.down.append(level)
            width_in = width
        self.mid = middle(width_in)
        self.norm_out, self.conv_out = nn.GroupNorm(32, width_in, eps=1e-6), nn.Conv2d(width_in, bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(bits, bits, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            for block in level["block"]:
                x = block(x)
            if "downsample" in level:
                x = level["downsample"]["conv"](F.pad(x, (0, 1, 0, 1)))  # padded on the right and below only
        for block in self.mid.values():
            x = block(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(x))))


class Decoder(nn.Module):
    """Signs (B, bits, h, w) -> pixels (B, 3, H, W), not clamped; each level but the finest, 0, doubles the picture."""

    def __init__(self, levels: Levels, bits: int) -> None:
        super().__init__()
        width_in = levels[-1][0]
        self.post_quant_conv = nn.Conv2d(bits, bits, 1)
        self.conv_in = nn.Conv2d(bits, width_in, 3, padding=1)
        self.mid = middle(width_in)
        up = []
        for index, (width, n) in reversed(list(enumerate(levels))):
            level = nn.ModuleDict({"block": residual_blocks(width_in, width, n)})
            if index:
                level["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)})
            up.append(level)
            width_in = width
        self.up = nn.ModuleList(reversed(up))  # stored under the level's number, run from the coarsest to the finest
        self.norm_out, self.conv_out = nn.GroupNorm(32, width_in, eps=1e-6), nn.Conv2d(width_in, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(self.post_quant_conv(x))
        for block in self.mid.values():
            x = block(x)
        for level in reversed(self.up):
            for block in level["block"]:
                x = block(x)
            if "upsample" in level:
                x = level["upsample"]["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


def bits_of(codes: Tensor, n_bits: int) -> Tensor:
    """Codes (...) int64 -> their bits (..., bits) as -1.0 or 1.0, the most significant first."""
    shifts = torch.arange(n_bits - 1, -1, -1, device=codes.device)
    return ((codes[..., None] >> shifts) & 1) * 2.0 - 1.0


def codes_of(values: Tensor) -> Tensor:
    """Numbers (..., bits) -> codes (...) int64: a bit is 1 where the number is positive, the most significant first."""
    shifts = torch.arange(values.shape[-1] - 1, -1, -1, device=values.device)
    return ((values > 0).long() << shifts).sum(dim=-1)


class MagViT(nn.Module):
    """Pictures to codes and back: a convolutional encoder and decoder, and signs between them (lookup-free quantization).

    The defaults are showlab/magvitv2's: 16 pixels a side are one code of 13 bits. Always float32: a code is 13 signs, and
    a rounded number near 0 has the wrong one.
    """

    def __init__(
        self,
        encoder: Levels = ((128, 4), (256, 3), (256, 4), (512, 3), (512, 4)),
        decoder: Levels = ((128, 4), (128, 4), (256, 3), (256, 4), (512, 3)),
        bits: int = 13,
    ) -> None:
        super().__init__()
        self.bits, self.patch = bits, 2 ** (len(encoder) - 1)  # pixels a side of what one code stands for
        self.encoder, self.decoder = Encoder(encoder, bits), Decoder(decoder, bits)
        self.quantize = nn.Module()  # two tables that the checkpoint stores and Show-o's classes expect; not needed here
        self.quantize.register_buffer("embedding", bits_of(torch.arange(2**bits), bits))
        self.quantize.register_buffer("power_vals", 2 ** torch.arange(bits - 1, -1, -1))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in -1 .. 1 -> codes (B, h w) int64, row by row."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return codes_of(self.encoder(pixels.float()).flatten(2).transpose(1, 2))

    def decode(self, codes: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Codes (B, T), row by row, of a square picture or one of `shape` (h, w) codes -> pixels (B, 3, H, W)."""
        side = math.isqrt(codes.shape[1])
        signs = bits_of(codes, self.bits).transpose(1, 2).unflatten(2, shape or (side, side))  # (B, bits, h, w)
        return self.decoder(signs)


def levels_of(shapes: dict[str, list[int]], side: str) -> Levels:
    """The levels under "encoder.down" or "decoder.up", read off the tensors: no file of the hub's tells them."""
    levels: list[tuple[int, int]] = []
    while (first := f"{side}.{len(levels)}.block.0.conv1.weight") in shapes:
        n = 1
        while f"{side}.{len(levels)}.block.{n}.conv1.weight" in shapes:
            n += 1
        levels.append((shapes[first][0], n))
    return tuple(levels)


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing a checkpoint


def load_showo(directory: Path, name: str, device: torch.device, dtype: torch.dtype) -> "ShowO":
    """The Show-o that lies in `directory` (see the top of this file); `name` is what the user called it.

    dtype: of the language model; the image tokenizer is always float32. Raises CheckpointError, naming what was found,
    for anything that is not a complete Show-o without CLIP.
    """
    settings = read_object(directory / "config.json")
    check_settings(settings, name)
    phi_directory, vq_directory = (part(directory, which) for which in PARTS)
    for where in (directory, vq_directory):
        if not (where / WEIGHTS).is_file():
            found = sorted(entry.name for entry in where.iterdir())[:8]
            raise CheckpointError(f"{where}: no {WEIGHTS} (found {found}); pickled weights are never read")
        tensor_sizes(where / WEIGHTS)  # it is a whole safetensors file, or this says so
    files = {"config.json": (directory / "config.json").read_bytes()}
    files |= {f"phi-1_5/{file}": (phi_directory / file).read_bytes() for file in COPIED if (phi_directory / file).is_file()}
    if (vq_directory / "config.json").is_file():
        files["magvitv2/config.json"] = (vq_directory / "config.json").read_bytes()
    tokenizer = read_tokenizer(phi_directory, settings["llm_vocab_size"])
    phi = read_phi(directory / WEIGHTS, phi_directory / "config.json", settings["vocab_size"], device, dtype)
    vq = read_vq(vq_directory / WEIGHTS, device)
    if 2**vq.bits != settings["codebook_size"]:
        raise CheckpointError(f"{vq_directory}: knows {2**vq.bits} codes, but {name} draws {settings['codebook_size']}")
    policy = ShowO(phi, vq, tokenizer, settings["num_vq_tokens"], files, name=name, directory=directory)
    with safe_open(directory / WEIGHTS, framework="pt") as file:
        kind = file.get_slice("showo.lm_head.weight").get_dtype()
    policy.stored_dtype = {"BF16": "bfloat16", "F16": "float16"}.get(kind, "float32")
    return policy


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
    found = tokenizer.convert_tokens_to_ids(list(SPECIAL))
    if len(tokenizer) != n_text + len(SPECIAL) or found != list(range(n_text, n_text + len(SPECIAL))):
        raise CheckpointError(
            f"{directory}: its tokenizer has {len(tokenizer)} tokens with {SPECIAL[0]} at {found[0]}, but config.json wants "
            f"{n_text} of text and then {len(SPECIAL)} special ones from {SPECIAL[0]} on"
        )
    if tokenizer.convert_tokens_to_ids(TEXT_END) is None:
        raise CheckpointError(f"{directory}: its tokenizer has no {TEXT_END}")
    return tokenizer


def phi_config(shape: dict[str, Any], n_vocabulary: int) -> PhiConfig:
    """Phi-1.5's shape, Show-o's vocabulary, and norms on queries and keys, which no config file tells."""
    known = {key: shape[key] for key in PHI_SHAPE if key in shape}
    config = PhiConfig(
        **known, vocab_size=n_vocabulary, qk_layernorm=True, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None
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
                phi = PhiForCausalLM(phi_config(shape, n_vocabulary))
        except Exception as error:  # transformers checks values in its own ways
            raise CheckpointError(f"{config_file}: makes no Phi: {reason(error)}") from None
        check_tensors({f"showo.{key}": list(value.shape) for key, value in phi.state_dict().items()}, shapes, weights)
        tensors = {key: file.get_tensor(key).to(device, dtype) for key in shapes}
    check_numbers(tensors, weights)
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
        check_tensors({key: list(value.shape) for key, value in vq.state_dict().items()}, shapes, weights)
        tensors = {key: file.get_tensor(key).to(device) for key in shapes}
    check_numbers(tensors, weights)
    vq.load_state_dict(tensors, assign=True)
    return vq.float()


def check_tensors(wanted: dict[str, list[int]], found: dict[str, list[int]], file: Path) -> None:
    """Raise CheckpointError for the first tensor that is missing, misshapen or too many."""
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            told = [f"of shape {shapes[key]}" if key in shapes else "missing" for shapes in (found, wanted)]
            raise CheckpointError(f"{file}: {key} is {told[0]}, but should be {told[1]}")


def check_numbers(tensors: dict[str, Tensor], file: Path) -> None:
    """Raise CheckpointError for weights that are not numbers."""
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{file}: {key} holds NaN or infinite weights")


# ---------------------------------------------------------------------------------------------------------------------
# Show-o

KeysValues = list[tuple[Tensor, Tensor]]  # of each layer, (R, heads, L, head size)


def phi_forward(
    phi: nn.Module, embeddings: Tensor, positions: Tensor, mask: Tensor | None, before: KeysValues | None = None
) -> tuple[Tensor, KeysValues]:
    """Run a transformers PhiModel over S tokens a row that also see tokens of which only keys and values are left.

    embeddings (R, S, C); positions (R, S); mask bool, to be broadcast to (R, heads, S, L + S), True where a token may look,
    None for everywhere; before: keys and values of L earlier tokens. Returns the last hidden states (R, S, C) and, where
    nothing came before, the keys and values of the new tokens. The same sums as transformers' own forward.
    """
    rotation = phi.rotary_emb(embeddings, positions)
    x, kept = embeddings, []
    for index, layer in enumerate(phi.layers):
        attention = layer.self_attn
        normed = layer.input_layernorm(x)
        query, key, value = (
            projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # (R, heads, S, head size)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = attention.q_layernorm(query), attention.k_layernorm(key)
        size = attention.rotary_ndims
        turned = apply_rotary_pos_emb(query[..., :size], key[..., :size], *rotation)
        query, key = (torch.cat([new, old[..., size:]], dim=-1) for new, old in zip(turned, (query, key), strict=True))
        if before is None:
            kept.append((key, value))
        else:
            key, value = (torch.cat(pair, dim=2) for pair in zip(before[index], (key, value), strict=True))
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=attention.scaling, enable_gqa=key.shape[1] != query.shape[1]
        )
        x = x + attention.dense(mixed.transpose(1, 2).flatten(2)) + layer.mlp(normed)  # (R, S, C)
    return phi.final_layernorm(x), kept


class DrawingBranch(nn.Module):
    """Log-probs of image tokens given prompts: the one differentiable path, all of it inside one module's forward.

    One root module is what sharding wrappers need.
    """

    def __init__(self, phi: PhiForCausalLM, soi: int, eoi: int, first_code: int, n_codes: int) -> None:
        super().__init__()
        self.language_model, self.lm_head = phi.model, phi.lm_head
        self.soi, self.eoi, self.first_code, self.n_codes = soi, eoi, first_code, n_codes

    def image_ids(self, tokens: Tensor) -> Tensor:
        """Codes (B, T), V for a masked one -> what the language model reads, begin and end of image about them (B, T + 2)."""
        return F.pad(F.pad(tokens + self.first_code, (1, 0), value=self.soi), (0, 1), value=self.eoi)

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits of the codes (..., V): the rest of the vocabulary is not drawn from."""
        rows = slice(self.first_code, self.first_code + self.n_codes)
        return F.linear(hidden, self.lm_head.weight[rows], self.lm_head.bias[rows])

    def forward(self, ids: Tensor, real: Tensor, tokens: Tensor, masked: Tensor) -> Tensor:
        """ids, real (B, L) the prompts, left-padded; tokens (B, T); masked (B, K, T) -> terms of the bound (B, T) float32.

        The hidden state at a code's own place predicts it. All draws are rows of one batch, B K.
        """
        n_draws, length = masked.shape[1:]
        ids, real, codes = (tensor.repeat_interleave(n_draws, dim=0) for tensor in (ids, real, tokens))
        image = self.image_ids(codes.masked_fill(masked.flatten(0, 1), self.n_codes))  # (B K, T + 2)
        embeddings = self.language_model.embed_tokens(torch.cat([ids, image], dim=1))
        if torch.is_autocast_enabled(embeddings.device.type):
            embeddings = embeddings.float()  # what the layers add to, also where frozen weights are bfloat16
        hidden = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=drawing_mask(real, length + 2)[:, None],
            position_ids=positions_of(F.pad(real, (0, length + 2), value=True)),
            use_cache=False,
        ).last_hidden_state[:, -length - 1 : -1]  # (B K, T, C)
        logps = head_logps(self.image_logits, hidden, codes, self.n_codes).unflatten(0, (-1, n_draws))  # (B, K, T)
        return bound_terms(logps, masked)


class ShowO:
    """Show-o: a masked-diffusion drawing branch and a next-token looking branch in one Phi-1.5, on MAGVIT-v2's codes.

    The implementation of Phi's layers is transformers'. Two numbers may be set on a loaded model:

    steps: passes a picture is drawn in (16, or 50 for pictures of 1,024 codes, as Show-o's authors run it; never more than
    there are codes).
    draws: masks a picture that `logps` averages over, K (default 8). Time and memory grow with it, the variance falls.
    """

    exact_logps = False

    def __init__(
        self,
        phi: PhiForCausalLM,
        vq: MagViT,
        tokenizer: PreTrainedTokenizerFast,
        image_tokens: int,
        files: dict[str, bytes],
        name: str = "",
        directory: Path | None = None,
    ) -> None:
        """tokenizer: with the special tokens (`read_tokenizer`); files: what is saved beside the weights, by its path."""
        self.model = nn.ModuleDict({"showo": phi, "magvitv2": vq}).eval()
        self.tokenizer = tokenizer
        self.files = files
        self.name = name
        self.directory = directory
        self.stored_dtype = "float32"
        self.image_tokens = image_tokens
        self.codebook_size: int = 2**vq.bits
        own = tokenizer.convert_tokens_to_ids
        self.pad, self.soi, self.eoi, self.t2i, self.mmu = map(own, ("[PAD]", "<|soi|>", "<|eoi|>", "<|t2i|>", "<|mmu|>"))
        self.sot = self.eot = own(TEXT_END)
        first_code = len(tokenizer)
        self.mask = first_code + self.codebook_size
        self.branch = DrawingBranch(phi, self.soi, self.eoi, first_code, self.codebook_size)
        self.language_model = phi.model
        self.blocks = list(phi.model.layers)  # what is sharded and recomputed one by one
        self.device = phi.device
        self.steps = 50 if image_tokens >= 1024 else min(16, image_tokens)
        self.draws = 8
        positions = phi.config.max_position_embeddings
        if MAX_TEXT + 1 + image_tokens + 2 > positions:
            raise CheckpointError(f"{name}: num_vq_tokens {image_tokens} and a prompt are more than its {positions} positions")
        yes, no = (spellings(tokenizer, word) for word in ("yes", "no"))
        if not yes or not no:
            raise CheckpointError(f"{name}: no single token of the vocabulary spells {'no' if yes else 'yes'}")
        self._yes, self._no, self._answers = (torch.tensor(ids, device=self.device) for ids in (yes, no, yes + no))

    # -- text -> tokens ------------------------------------------------------------------------------------------------

    def _tokenize(self, kind: str, text: str, shown: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if any(token == self.eot or token >= self.pad for token in ids):
            raise PromptError(f"{kind} {shown[:80]!r} spells a special token of the model")
        return ids

    def prompt_ids(self, prompt: str) -> list[int]:
        """The tokens that ask for a picture: task, start of text, prompt, end of text.

        Raises PromptError if the prompt spells one of the model's special tokens, or is longer than any it was trained on.
        """
        text = self._tokenize("prompt", prompt, prompt)
        if len(text) > MAX_TEXT - 2:
            raise PromptError(f"prompt {prompt[:80]!r} makes {len(text)} tokens; the model reads at most {MAX_TEXT - 2}")
        return self._prompt_row(text)

    def _prompt_row(self, text: list[int]) -> list[int]:
        return [self.t2i, self.sot, *text, self.eot]

    def question_ids(self, question: str) -> tuple[list[int], list[int]]:
        """The tokens of a question about a picture: (prefix all questions share, masks in place of its codes; the rest).

        The form of Show-o's own inference, start of text and line break included. It was tuned on one without them.
        """
        rest = [self.sot, *self._tokenize("question", f"USER: \n{question} ASSISTANT:", question)]
        prefix = [self.mmu, self.soi, *[self.mask] * self.image_tokens, self.eoi]
        self._check_length("question", question, len(prefix) + len(rest))
        return prefix, rest

    def caption_ids(self, caption: str) -> list[int]:
        """The tokens of a caption as the answer to DESCRIBE. Raises PromptError if it spells a special token of the model."""
        asked = self._tokenize("caption", f"USER: \n{DESCRIBE} ASSISTANT:", caption)
        ids = self._tokenize("caption", f"USER: \n{DESCRIBE} ASSISTANT: {caption}", caption)
        if not caption.strip() or ids[: len(asked)] != asked:
            raise PromptError(f"caption {caption[:80]!r} spells nothing, or not itself after {DESCRIBE!r}")
        self._check_length("caption", caption, self.image_tokens + 4 + len(ids))
        return ids[len(asked) :]

    def _check_length(self, kind: str, text: str, length: int) -> None:
        positions = self.language_model.config.max_position_embeddings
        if length > positions:
            raise PromptError(
                f"{kind} {text[:80]!r} makes {length} tokens with its picture; the model has {positions} positions"
            )

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
    ) -> Tensor:
        """Sample n candidates a prompt: image tokens (P, n, T) int64 on the model's device.

        seeds: one integer a prompt (default 0, 1, ...); candidate c of a prompt depends on (its seed, c) alone.
        guidance: w in uncond + w (cond - uncond), as for every family; 1 is none (and skips the unconditional rows). Show-o's
        own scale is w - 1: its published 5 at 512 pixels and 1.75 at 256 are 6 and 2.75 here. temperature: how much chance
        there is at first in which codes are kept (the codes themselves are drawn at temperature 1); 0 is greedy in both.
        batch: pictures in flight. A prompt's keys and values are computed once: text never sees the picture.
        """
        seeds = list(range(len(prompts))) if seeds is None else seeds
        rows = [self.prompt_ids(prompt) for prompt in prompts]
        if guidance != 1:
            rows.append(self._prompt_row([]))
        ids, real = pad_left(rows, self.pad, self.device)  # (P or P + 1, L)
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
            drawn.append(self._draw_batch(predict, temperature, torch.from_numpy(noise).to(self.device)))
        return torch.cat(drawn).unflatten(0, (len(prompts), n))

    def drawing_batch(self, prompts: list[str], guidance: float) -> int:
        """How many pictures at a time fit into free memory: what `batch` of sample may well be, at most MOST_AT_ONCE.

        A picture takes its prompt's keys and values, one layer's activations and the logits of all its codes, all but the
        last three copies of these twice with guidance. 65 % of what is free is given to them.
        """
        config, rows = self.language_model.config, 2 if guidance != 1 else 1
        size = self.language_model.embed_tokens.weight.itemsize
        text = max(len(self.prompt_ids(prompt)) for prompt in prompts) * 2 * config.num_hidden_layers * config.hidden_size
        layer = (self.image_tokens + 2) * (8 * config.hidden_size + 2 * config.intermediate_size)
        logits = self.image_tokens * self.codebook_size
        each = rows * size * (text + layer) + logits * (rows * (size + 4) + 3 * 4)
        found = memory(self.device)
        fitting = int(0.65 * found[0]) // each if found else MOST_AT_ONCE
        return max(1, min(MOST_AT_ONCE, fitting // 8 * 8 or fitting))

    def release_memory(self) -> None:
        """Give back what is kept between batches."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

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

    def _draw_batch(self, predict: Callable[[Tensor], Tensor], temperature: float, uniforms: Tensor) -> Tensor:
        """Draw one batch from masks alone: uniforms (B, steps, 2, T) -> codes (B, T)."""
        heat = 1.0 if temperature > 0 else 0.0

        def choose(logits: Tensor, step: int) -> Tensor:
            rows, numbers = logits.flatten(0, 1).split(DRAWS_AT_ONCE), uniforms[:, step, 0].flatten().split(DRAWS_AT_ONCE)
            codes = [draw(row, heat, number) for row, number in zip(rows, numbers, strict=True)]
            return torch.cat(codes).view(logits.shape[:2])

        start = torch.full((len(uniforms), self.image_tokens), self.codebook_size, device=self.device)
        return mask_predict(predict, start, self.steps, temperature, choose, lambda step: gumbel(uniforms[:, step, 1]).float())

    @torch.no_grad()
    def decode(self, tokens: Tensor, batch: int = 16) -> Tensor:
        """Image tokens (B, T) -> pictures (B, H, W, 3) uint8, clamped and cut off to whole numbers as Show-o does."""
        pictures = []
        for block in tokens.split(batch):
            pixels = self.model["magvitv2"].decode(block).permute(0, 2, 3, 1)  # (b, H, W, 3)
            pictures.append((((pixels + 1) / 2).clamp(0, 1) * 255).to(torch.uint8))
        return torch.cat(pictures)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, H, W, 3) uint8 -> image tokens (B, T) int64. Those of a decoded picture are not those it came from.

        Another size is scaled until the shorter side fits, then cut to its middle.
        """
        side = self.model["magvitv2"].patch * math.isqrt(self.image_tokens)
        pixels = pictures.to(self.device).permute(0, 3, 1, 2).float()  # (B, 3, H, W)
        if pixels.shape[2:] != (side, side):
            size = [length * side // min(pixels.shape[2:]) for length in pixels.shape[2:]]
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).round().clamp(0, 255)
            top, left = ((length - side) // 2 for length in size)
            pixels = pixels[:, :, top : top + side, left : left + side]
        return self.model["magvitv2"].encode(pixels / 127.5 - 1)

    # -- looking -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def judge(self, pictures: Tensor, questions: list[list[str]], batch: int = 32) -> tuple[Tensor, Tensor]:
        """Answer Q yes/no questions about each of B pictures: P(yes) and coverage, each (B, Q) float32.

        pictures: image tokens (B, T), which are judged as they are, or pixels uint8 (B, H, W, 3), which are encoded first:
        a drawing is judged more truly by its own tokens. questions: B lists of Q. The picture runs once, its questions side
        by side with it, each seeing the picture and itself only. Probabilities are of the whole vocabulary, codes included.
        """
        return self.look(pictures, questions, [[] for _ in questions], batch)[:2]

    @torch.no_grad()
    def look(
        self, pictures: Tensor, questions: list[list[str]], captions: list[list[str]], batch: int = 32
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`judge`, and in the same pass how likely the model finds K captions of each picture.

        captions: B lists of K. Returns P(yes) and coverage (B, Q), and log p(caption | picture, DESCRIBE), summed over the
        caption's tokens, in nats, (B, K), all float32.
        """
        answers = []
        for part in (slice(start, start + batch) for start in range(0, len(pictures), batch)):
            seen = pictures[part].to(self.device)
            tokens = seen if seen.dim() == 2 else self.encode(seen)
            answers.append(self._look_batch(tokens, questions[part], captions[part]))
        p_yes, coverage, logps = (torch.cat(parts) for parts in zip(*answers, strict=True))
        return p_yes, coverage, logps

    def _look_batch(
        self, tokens: Tensor, questions: list[list[str]], captions: list[list[str]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        describe = self.question_ids(DESCRIBE)[1]
        texts = [
            [self.question_ids(question)[1] for question in asked] + [describe + self.caption_ids(caption) for caption in said]
            for asked, said in zip(questions, captions, strict=True)
        ]
        hidden = self._read_side_by_side(tokens, texts)  # (B, Q + K, L, C)
        return read_answers(self.branch.lm_head, hidden, texts, len(questions[0]), len(describe), self._yes, self._no)

    def _read_side_by_side(self, tokens: Tensor, texts: list[list[list[int]]]) -> Tensor:
        """Hidden states (B, K, L, C) of K texts a picture, each after its picture (B, T), none seeing another."""
        n_texts, width = len(texts[0]), max(len(ids) for row in texts for ids in row)
        rows = [[token for ids in row for token in ids + [self.pad] * (width - len(ids))] for row in texts]
        prefix = F.pad(self.branch.image_ids(tokens), (1, 0), value=self.mmu)  # (B, T + 3)
        n_prefix = prefix.shape[1]
        after = torch.arange(width, device=self.device).repeat(n_texts) + n_prefix  # (K L,)
        hidden = self.language_model(
            input_ids=torch.cat([prefix, torch.tensor(rows, device=self.device)], dim=1),
            attention_mask=looking_mask(n_prefix, width, n_texts, self.device).expand(len(tokens), 1, -1, -1),
            position_ids=torch.cat([torch.arange(n_prefix, device=self.device), after])[None],
            use_cache=False,
        ).last_hidden_state[:, n_prefix:]
        return hidden.unflatten(1, (n_texts, width))

    # -- training ------------------------------------------------------------------------------------------------------

    def logps(
        self, prompts: list[str], tokens: Tensor, seeds: list[int] | None = None, unconditional: Tensor | None = None
    ) -> Tensor:
        """Terms (B, T) float32, differentiable, whose sum over T estimates a lower bound on log p(picture given prompt).

        A masked model has no exact log-likelihood. It does have one for drawing the tokens one by one in a given order, and
        its mean over all orders is the bound (Uria et al. 2014, arXiv 1310.1757; LLaDA, Nie et al. 2025, arXiv 2502.09992):

            log p(x) >= E_k E_M [ T / k * sum over i in M of log p(x_i given x outside M, prompt) ]

        with k uniform on 1 .. T and M uniform among the sets of k tokens. It is estimated from K = `draws` masks a picture,
        stratified in k (`mask_draws`), without bias; a token no draw masks has the term 0. p is over the codes alone, which
        is what `sample` draws from, without guidance or temperature.

        tokens (B, T) int64. seeds (B,): a picture's masks depend on its seed alone (default: the same masks for all). Give
        the two pictures of a pair, and policy and reference, the same one: what their log-probs share then cancels (LLaDA
        1.5, Zhu et al. 2025, arXiv 2505.19223). unconditional: (B,) bool, rows that see the empty prompt (caption dropout).

        Variance: about v T (ln T - 0.4) / K, with v that of the token log-probs (or of their ratios to the reference's, in a
        loss of both); most of it comes from draws of few masked tokens. For T = 256, v = 4 and K = 8 measured 26 nats of
        standard deviation, as predicted. Cost: B K rows through the language model, forward and backward.
        """
        rows = [self.prompt_ids(prompt) for prompt in prompts]
        if unconditional is not None:
            dropped = unconditional.tolist()
            rows = [self._prompt_row([]) if drop else row for row, drop in zip(rows, dropped, strict=True)]
        ids, real = pad_left(rows, self.pad, self.device)
        seeds = [0] * len(prompts) if seeds is None else seeds
        masked = torch.from_numpy(mask_draws(seeds, self.draws, self.image_tokens))
        return self.branch(ids, real, tokens.to(self.device), masked.to(self.device))

    def trainable_parameters(self, scope: str = "language_model") -> dict[str, nn.Parameter]:
        """Name -> parameter of what training changes; all others are frozen (`requires_grad` False).

        scope "language_model": the decoder layers and the final norm, the paper's best choice. "drawing": those and the two
        tables at the ends, token embedding and lm_head, in which image codes and words lie side by side: this family has none
        for drawing alone. "adapters": those that lora.py has added. The image tokenizer never trains.
        """
        pattern = {
            "language_model": r"showo\.model\.(layers|final_layernorm)\.",
            "drawing": r"showo\.",
            "adapters": r"showo\.model\.layers\..*\.lora_[ab]$",
        }[scope]
        return train_only(self.model, pattern)

    def recompute_activations(self) -> None:
        """Have training's backward pass compute each layer anew instead of keeping what it computed."""
        recompute(self.language_model)

    @property
    def activation_bytes(self) -> int:
        """What a picture's training pass keeps for its backward pass under bfloat16 autocast; a test counts it.

        Per token of each of its masked copies and layer 30 bytes a unit of the hidden state and 10 a unit of the MLP, prompts
        taken as 64 tokens.
        """
        config = self.language_model.config
        each = 30 * config.hidden_size + 10 * config.intermediate_size
        return self.draws * (64 + self.image_tokens) * config.num_hidden_layers * each

    # -- files ---------------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, str]:
        """What the files between the steps say about this model: name, hash of its weights, codebook, image tokens."""
        assert self.directory is not None, "a model that was never loaded or saved has no identity"
        return {
            "model": absolute_name(self.name),
            "model_hash": weights_hash(self.directory),
            "codebook_size": str(self.codebook_size),
            "image_tokens": str(self.image_tokens),
        }

    def _plain(self) -> nn.ModuleDict:
        """The model with its adapters, if it has any, merged into the weights as they are stored (see `Janus._plain`)."""
        if not adapters(self.model):
            return self.model
        assert self.directory is not None
        plain = load_showo(self.directory, self.name, torch.device("cpu"), torch.float32).model
        merge_adapters(self.model, plain)
        return plain

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a directory with all three parts, under the names that Show-o's own classes read; whole or not at all.

        dtype: of the language model, default as it was stored. An existing directory at `path` is replaced. A full disk is
        an OSError.
        """
        path = Path(path)
        dtype = dtype or getattr(torch, self.stored_dtype)
        model = self._plain()
        with whole_directory(path) as directory:
            for file, content in self.files.items():
                (directory / file).parent.mkdir(exist_ok=True)
                (directory / file).write_bytes(content)
            (directory / "magvitv2").mkdir(exist_ok=True)
            write_weights(directory / WEIGHTS, model["showo"], "showo.", dtype)
            write_weights(directory / "magvitv2" / WEIGHTS, model["magvitv2"], "", torch.float32)
        self.name, self.directory, self.stored_dtype = str(path), path, str(dtype).removeprefix("torch.")


def write_weights(file: Path, module: nn.Module, prefix: str, dtype: torch.dtype) -> None:
    """Write a module's tensors to a safetensors file, those of parameters as dtype."""
    tensors = {prefix + key: tensor.detach().cpu().contiguous() for key, tensor in module.state_dict().items()}
    for key, _ in module.named_parameters():
        tensors[prefix + key] = tensors[prefix + key].to(dtype)
    save_file(tensors, file, {"format": "pt"})

"""Image tokenizers, weights under their checkpoints' own names.

MAGVIT-v2 (Yu et al. 2023, arXiv 2310.05737) is Show-o's; VQGAN (Esser et al. 2020, arXiv 2012.09841), whose encoder and decoder
are built alike, is Liquid's, as Chameleon trained it.

Legend: B pictures, T codes a picture, C channels, H x W pixels or places, h x w codes.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Levels = tuple[tuple[int, int], ...]  # (width, number of residual blocks) of each level, the finest first


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


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) in -1 .. 1 -> one number a bit, (B, bits, h, w); each level but the last halves the picture."""

    def __init__(self, levels: Levels, bits: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, levels[0][0], 3, padding=1)
        self.down: Any = nn.ModuleList()  # of ModuleDicts, which no type says
        width_in = levels[0][0]
        for width, n in levels:
            level = nn.ModuleDict({"block": residual_blocks(width_in, width, n)})
            if len(self.down) + 1 < len(levels):
                level["downsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, stride=2)})
            self.down.append(level)
            width_in = width
        self.mid = middle(width_in)
        self.norm_out, self.conv_out = nn.GroupNorm(32, width_in, eps=1e-6), nn.Conv2d(width_in, bits, 3, padding=1)
        self.quant_conv: Any = nn.Conv2d(bits, bits, 1)

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
        self.post_quant_conv: Any = nn.Conv2d(bits, bits, 1)
        self.conv_in = nn.Conv2d(bits, width_in, 3, padding=1)
        self.mid = middle(width_in)
        up = []
        for index, (width, n) in reversed(list(enumerate(levels))):
            level = nn.ModuleDict({"block": residual_blocks(width_in, width, n)})
            if index:
                level["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)})
            up.append(level)
            width_in = width
        self.up: Any = nn.ModuleList(reversed(up))  # stored under the level's number, run from the coarsest to the finest
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


def from_pixels(pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) about -1 .. 1 -> pictures (B, H, W, 3) uint8, clamped and cut off to whole numbers as Show-o does."""
    return (((pixels.permute(0, 2, 3, 1) + 1) / 2).clamp(0, 1) * 255).to(torch.uint8)


def to_pixels(pictures: Tensor, side: int) -> Tensor:
    """Pictures (B, H, W, 3) uint8 -> pixels (B, 3, side, side) in -1 .. 1.

    Another size is scaled until the shorter side fits, then cut to its middle.
    """
    pixels = pictures.permute(0, 3, 1, 2).float()  # (B, 3, H, W)
    if pixels.shape[2:] != (side, side):
        size = [length * side // min(pixels.shape[2:]) for length in pixels.shape[2:]]
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        top, left = (round((length - side) / 2) for length in size)  # half a pixel to the even one, as torchvision does
        pixels = pixels[:, :, top : top + side, left : left + side]
    return pixels / 127.5 - 1


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
        self.bits, self.n_codes = bits, 2**bits
        self.patch = 2 ** (len(encoder) - 1)  # pixels a side of what one code stands for
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


class VQGAN(nn.Module):
    """Pictures to codes and back, a code being the nearest of a table of vectors. Always float32."""

    def __init__(self, encoder: Levels, decoder: Levels, n_codes: int, width: int) -> None:
        super().__init__()
        self.n_codes, self.patch = n_codes, 2 ** (len(encoder) - 1)
        self.encoder, self.decoder = Encoder(encoder, width), Decoder(decoder, width)
        self.encoder.quant_conv, self.decoder.post_quant_conv = nn.Identity(), nn.Identity()  # stored beside them instead
        self.quant_conv, self.post_quant_conv = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.quantize: Any = nn.ModuleDict({"embedding": nn.Embedding(n_codes, width)})

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in -1 .. 1 -> codes (B, h w) int64, row by row."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            values = self.quant_conv(self.encoder(pixels.float())).flatten(2).transpose(1, 2)  # (B, h w, width)
        return torch.stack([torch.cdist(rows, self.quantize["embedding"].weight).argmin(dim=-1) for rows in values])

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, T), row by row, of a square picture -> pixels (B, 3, H, W)."""
        side = math.isqrt(codes.shape[1])
        vectors = self.quantize["embedding"](codes).transpose(1, 2).unflatten(2, (side, side))  # (B, width, h, w)
        return self.decoder(self.post_quant_conv(vectors))


def levels_of(shapes: dict[str, list[int]], side: str) -> Levels:
    """The levels under "encoder.down" or "decoder.up", read off the tensors: no file of the hub's tells them."""
    levels: list[tuple[int, int]] = []
    while (first := f"{side}.{len(levels)}.block.0.conv1.weight") in shapes:
        n = 1
        while f"{side}.{len(levels)}.block.{n}.conv1.weight" in shapes:
            n += 1
        levels.append((shapes[first][0], n))
    return tuple(levels)

"""Sampling with Show-o: ours against running every whole sequence again in each step, as Show-o's own loop does; greedy.

    python benchmarks/masked_sampling.py --tiny
    python benchmarks/masked_sampling.py --geometry show-o --batches 1 16 64

A picture takes 16 passes (256 codes, 256 pixels) or 50 (1,024 codes, 512 pixels), with guidance two rows each. Ours runs the
text once and then the codes alone over its keys and values; the other runs text, padded to Show-o's 129 tokens, and codes
through transformers' own Phi with a mask for each pair of tokens, and asks for logits of the whole vocabulary.
"""

from typing import Any, NamedTuple

import bench
import torch
from transformers import PhiForCausalLM

from families.logits import guide
from families.magvit import MagViT
from families.pretrained import read_object
from families.showo import MAX_TEXT, ShowO
from families.showo_drawing import drawing_mask
from families.showo_files import Parts, phi_config, read_tokenizer

CHECKPOINT = bench.ROOT / "shapes" / "showo"  # whose tokenizer is used


class Geometry(NamedTuple):
    """The sizes that decide speed; 2**bits codes."""

    layers: int
    width: int
    heads: int
    mlp: int
    bits: int


GEOMETRIES = {"tiny": Geometry(4, 256, 4, 1024, 10), "show-o": Geometry(24, 2048, 32, 8192, 13)}


def build(geometry: Geometry, side: int, device: str, dtype: torch.dtype) -> ShowO:
    """A Show-o with random weights for pictures of side x side codes; its image tokenizer is of no size: it does not draw."""
    shape = dict(zip(("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"), geometry, strict=False))
    tokenizer = read_tokenizer(CHECKPOINT / "phi-1_5", read_object(CHECKPOINT / "config.json")["llm_vocab_size"])
    torch.backends.cuda.enable_cudnn_sdp(False)  # as model.load has it
    torch.manual_seed(0)
    with torch.device(device):
        config = phi_config(shape, len(tokenizer) + 2**geometry.bits + 1, torch.device(device).type)
        phi = PhiForCausalLM(config).to(dtype)
        vq = MagViT(((32, 1), (32, 1)), ((32, 1), (32, 1)), bits=geometry.bits)
    return ShowO(Parts(phi, vq, tokenizer, side**2, {}, "float32"))


def flops_a_row(geometry: Geometry, tokens: int) -> float:
    """Of one forward pass over a row of so many tokens: the layers, attention's products, logits of the codes left out."""
    weights = geometry.layers * (4 * geometry.width**2 + 2 * geometry.width * geometry.mlp)
    return 2 * weights * tokens + 4 * geometry.layers * geometry.width * tokens**2


def whole_sequences(policy: ShowO, prompts: list[str], guidance: float) -> torch.Tensor:
    """Greedy codes (B, T) by running text and picture again in every step, both rows of guidance."""
    rows = [policy.prompt_ids(prompt) for prompt in prompts] + [policy.prompt_ids("")] * len(prompts)
    ids = torch.tensor([[policy.pad] * (MAX_TEXT + 1 - len(row)) + row for row in rows], device=policy.device)
    mask = drawing_mask(ids != policy.pad, policy.image_tokens + 2)[:, None]
    phi = policy.model["showo"]
    codes = slice(policy.branch.first_code, policy.branch.first_code + policy.codebook_size)

    def predict(tokens: torch.Tensor) -> torch.Tensor:
        sequence = torch.cat([ids, policy.branch.image_ids(tokens).repeat(2, 1)], dim=1)
        logits = phi(input_ids=sequence, attention_mask=mask, use_cache=False).logits
        return guide(logits[:, -policy.image_tokens - 1 : -1, codes].float(), guidance)

    uniforms = torch.zeros(len(prompts), policy.steps, 2, policy.image_tokens, dtype=torch.float64, device=policy.device)
    return policy._draw_batch(predict, 0.0, uniforms)


def measure(geometry: Geometry, side: int, n: int, args: Any) -> dict[str, Any]:
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    policy = build(geometry, side, args.device, dtype)
    prompts = bench.prompts(policy, n, 20)
    drawn = {}

    def ours() -> None:
        drawn["ours"] = policy.sample(prompts, 1, 5.0, 0.0, batch=n)[:, 0]

    def theirs() -> None:
        with torch.no_grad():
            drawn["theirs"] = whole_sequences(policy, prompts, 5.0)

    seconds = bench.alternate({"ours": ours, "theirs": theirs}, args.repeats, args.device)
    return {
        "layers": geometry.layers,
        "width": geometry.width,
        "codebook": policy.codebook_size,
        "image tokens": policy.image_tokens,
        "passes a picture": policy.steps,
        "batch": n,
        "ours, images/s": n / seconds["ours"],
        "whole sequences, images/s": n / seconds["theirs"],
        "ratio": seconds["theirs"] / seconds["ours"],
        "tokens equal": (drawn["ours"] == drawn["theirs"]).float().mean().item(),
        "seed": 0,
    } | ({"peak GB": bench.peak_gb(args.device)} if args.device == "cuda" else {})


def main() -> None:
    parser = bench.parser(__doc__, GEOMETRIES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="pictures at a time (default 1 4)")
    args = parser.parse_args()
    sides = (16,) if args.tiny else (16, 32)
    geometry = GEOMETRIES[args.geometry]
    rows = (measure(geometry, side, n, args) for side in sides for n in ([1] if args.tiny else args.batches))
    bench.table("masked sampling", rows, args)


if __name__ == "__main__":
    main()

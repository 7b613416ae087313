"""What the benchmarks share: random models in a given geometry, alternating timing, and the tables.

Nothing here loads real weights: speed does not depend on them. The text side is the shapes world's tokenizer.
"""

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import JanusConfig, JanusForConditionalGeneration, JanusProcessor, LlamaConfig
from transformers.models.janus import JanusVisionConfig, JanusVQVAEConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from families.janus import Janus  # noqa: E402  (the scripts lie one floor up)
from families.janus_files import lay_out  # noqa: E402


class Limits(NamedTuple):
    """What the floors are made of: arithmetic of matrix products, in bfloat16 on a GPU, and memory traffic."""

    flops_per_s: float
    bytes_per_s: float


class Geometry(NamedTuple):
    """The sizes that decide speed. side: image tokens along one edge of the square picture."""

    layers: int
    width: int
    heads: int
    mlp: int
    vocabulary: int
    codebook: int
    side: int
    patch: int
    vision_layers: int
    vision_width: int
    vq_channels: int  # of the finest level
    vq_blocks: int

    @property
    def image_tokens(self) -> int:
        return self.side**2

    @property
    def layer_weights(self) -> int:
        """Weights of the decoder layers, norms left out."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.mlp)

    @property
    def cache_numbers(self) -> int:
        """Numbers in the key-value cache for one token of one row."""
        return 2 * self.layers * self.width


GEOMETRIES = {
    # Head and codebook in proportion to the language model, as Janus-Pro's are (its head is 3 % of the weights).
    "tiny": Geometry(4, 256, 4, 704, 512, 1024, 24, 4, 4, 128, 32, 0),
    "janus-pro-1b": Geometry(24, 2048, 16, 5632, 102400, 16384, 24, 16, 24, 1024, 128, 2),
    "janus-pro-7b": Geometry(30, 4096, 32, 11008, 102400, 16384, 24, 16, 24, 1024, 128, 2),
}


def build(geometry: Geometry, device: str, dtype: torch.dtype, seed: int = 0) -> Janus:
    """A Janus with random weights in a geometry, made where it will run."""
    processor = JanusProcessor.from_pretrained(ROOT / "shapes" / "base")
    tokenizer = processor.tokenizer
    pixels = geometry.side * geometry.patch
    tokenizer.model_max_length = 16384
    processor.use_default_system_prompt = True  # as Janus-Pro does: part of the text that all questions share
    processor.num_image_tokens = geometry.image_tokens
    processor.image_processor.size = {"height": pixels, "width": pixels}
    text = LlamaConfig(
        vocab_size=geometry.vocabulary,
        hidden_size=geometry.width,
        intermediate_size=geometry.mlp,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.heads,
        max_position_embeddings=16384,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    vision = JanusVisionConfig(
        hidden_size=geometry.vision_width,
        num_hidden_layers=geometry.vision_layers,
        num_attention_heads=geometry.vision_width // 64,
        image_size=pixels,
        patch_size=geometry.patch,
        projection_dim=geometry.width,
        num_image_tokens=geometry.image_tokens,
    )
    halvings = geometry.patch.bit_length()  # the VQ model's picture is `patch` times as large as its grid of tokens
    vq = JanusVQVAEConfig(
        num_embeddings=geometry.codebook,
        base_channels=geometry.vq_channels,
        latent_channels=2 * geometry.vq_channels,
        channel_multiplier=[1, 1, 2, 2, 4] if geometry.vq_blocks else [1] * (halvings - 1) + [2],
        num_res_blocks=geometry.vq_blocks,
        num_patches=geometry.side,
        projection_dim=geometry.width,
        image_token_embed_dim=geometry.width,
    )
    config = JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq,
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
        tie_word_embeddings=False,
    )
    torch.backends.cuda.enable_cudnn_sdp(False)  # as model.load has it
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = JanusForConditionalGeneration(config)
    torch.set_default_dtype(before)
    lay_out(model.model.vqmodel, torch.device(device))
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    generation.eos_token_id = tokenizer.eos_token_id
    generation.generation_kwargs = {"boi_token_id": tokenizer.convert_tokens_to_ids("<begin_of_image>")}
    generation._from_model_config = False
    return Janus(model, processor)


def prompts(policy: Any, n: int, length: int = 30) -> list[str]:
    """n different prompts of exactly `length` tokens each, the chat template counted in."""
    around = len(policy.prompt_ids("red")) - 1
    words = ["red", "blue", "green", "yellow", "circle", "square", "cross", "ring"]
    made = []
    for i in range(n):
        made.append(" ".join(words[(i >> (3 * (k % 10))) % 8] for k in range(length - around)))
        assert len(policy.prompt_ids(made[-1])) == length, f"{made[-1]!r}: not a token a word"
    return made


@functools.cache
def limits(device: str) -> Limits:
    """This machine's, measured: a large matrix product, and a copy of 1 GB, which reads and writes."""
    dtype, width, numbers = (torch.bfloat16, 8192, 2**29) if device == "cuda" else (torch.float32, 512, 2**22)
    a = torch.randn(width, width, dtype=dtype, device=device)
    x = torch.zeros(numbers, dtype=dtype, device=device)
    y = torch.empty_like(x)
    seconds = alternate({"product": lambda: a @ a, "copy": lambda: y.copy_(x)}, 10, device)
    return Limits(2 * width**3 / seconds["product"], 2 * x.nbytes / seconds["copy"])


def alternate(contestants: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each, run in turn `repeats` times after one run each that is not counted."""

    def clock() -> float:
        wait(device)
        return time.perf_counter()

    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, run in contestants.items():
            started = clock()
            run()
            if turn:
                times[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def wait(device: str) -> None:
    """Until the device has done what it was asked for."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_gb(device: str) -> float | None:
    """Most GPU memory held since the last call, in GB; None on a CPU, where processes cannot be told apart."""
    if device != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


# ---------------------------------------------------------------------------------------------------------------------
# Command line and tables


def parser(doc: str, geometries: Iterable[str] = GEOMETRIES) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc.split("\n\n")[0], allow_abbrev=False)
    made.add_argument("--geometry", choices=geometries, default="tiny", help="sizes of the model (default tiny)")
    made.add_argument("--tiny", action="store_true", help="the smallest run that shows the ratios, on a CPU")
    made.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda where there is one"
    )
    made.add_argument("--repeats", type=int, default=5, help="runs of each contestant, of which the median counts (default 5)")
    made.add_argument("--json", type=Path, help="append each row, as it is measured, to this file, one JSON object a line")
    return made


def machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, {date.today()}"


def table(title: str, rows: Iterable[dict[str, Any]], args: argparse.Namespace) -> None:
    """Append each row to --json as it is measured, then print all as a markdown table."""
    about = {"benchmark": title, "geometry": args.geometry, "machine": machine(args.device), "repeats": args.repeats}
    done = []
    for row in rows:
        done.append(row)
        if args.json:
            with open(args.json, "a") as file:
                file.write(json.dumps(about | row) + "\n")
    print(f"\n{title} ({args.geometry}; {machine(args.device)}; medians of {args.repeats})\n")
    print(markdown(done), flush=True)


def markdown(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(written(row.get(column)) for column in columns) + " |" for row in rows])


def written(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Print the markdown tables of a --json file: python benchmarks/bench.py results.jsonl"""
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    about = ("benchmark", "geometry", "machine", "repeats")
    for key in dict.fromkeys(tuple(row[name] for name in about) for row in rows):
        print("\n{} ({}; {}; medians of {})\n".format(*key))
        same = [row for row in rows if tuple(row[name] for name in about) == key]
        print(markdown([{name: value for name, value in row.items() if name not in about} for row in same]))


if __name__ == "__main__":
    main()

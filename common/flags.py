"""The arguments that sft.py and dpo.py have in common, and what is wrong with them before anything is loaded."""

import argparse
import math
from pathlib import Path

from common.command import process_numbers


def add_training_flags(parser: argparse.ArgumentParser, data_flag: str, epochs: int, learning_rate: float) -> None:
    """Add them; data_flag names the training data, the others are the defaults that differ."""
    files = parser.add_argument_group("files")
    files.add_argument("--model", help=f"checkpoint to train (default: the model that drew {data_flag}, by its header)")
    files.add_argument("--out", type=Path, help=f"directory to make (default: beside {data_flag}, named after it)")
    files.add_argument("--other-model", action="store_true", help="allow a --model that did not draw the pictures")
    files.add_argument("--restart", action="store_true", help="replace what --out and its work directory hold")
    files.add_argument(
        "--save-dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="storage type (default float32: small updates are less than a bfloat16 weight can show)",
    )
    optimization = parser.add_argument_group("optimization")
    optimization.add_argument(
        "--epochs", type=int, default=epochs, help=f"passes over the data (default {epochs}, as the paper)"
    )
    optimization.add_argument("--max-steps", type=int, default=0, help="stop after so many steps; 0 = no limit (default 0)")
    optimization.add_argument(
        "--batch-size", type=int, default=64, help="examples per optimizer step, all ranks together (default 64)"
    )
    optimization.add_argument(
        "--micro-batch",
        type=int,
        help="examples per forward pass and rank; Show-o runs each in --mask-draws copies (default 8, or the batch size)",
    )
    optimization.add_argument("--lr", type=float, default=learning_rate, help=f"peak learning rate (default {learning_rate:g})")
    optimization.add_argument("--warmup", type=float, default=0.05, help="share of the steps with a rising rate (default 0.05)")
    optimization.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's decoupled weight decay (default 0)")
    optimization.add_argument("--max-grad-norm", type=float, default=1.0, help="gradients are clipped to this norm (default 1)")
    optimization.add_argument(
        "--seed", type=int, default=0, help="order of the data, caption dropout and, for Show-o, masks (default 0)"
    )
    optimization.add_argument(
        "--mask-draws",
        type=int,
        help="random masks that a picture's log-probs are estimated from, for families that estimate them: time and memory "
        "grow with it, the variance falls (default the family's own)",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--train",
        choices=["language-model", "drawing"],
        default="language-model",
        help="what learns: the decoder layers and final norm (default, the paper's best), or also the image-token "
        "embeddings, aligner and head (of Show-o: the tables at both ends, which words share)",
    )
    model.add_argument(
        "--layers",
        type=layer_range,
        metavar="FIRST-LAST",
        help="only these decoder layers, counted from 0, without the final norm (default: all, with it)",
    )
    model.add_argument(
        "--lora-rank",
        type=int,
        default=0,
        help="train additions of this rank to the decoder layers' matrices, merged when saved: for small GPUs. They want ten "
        "times the --lr, which you give; 0 = train the matrices themselves (default 0)",
    )
    model.add_argument("--lora-alpha", type=float, help="the addition's scale is this over the rank (default twice the rank)")
    model.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute activations: less memory, a third slower (default: on a GPU where they would not fit)",
    )
    model.add_argument("--compile", action="store_true", help="torch.compile the decoder layers: minutes at first, then faster")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    machine.add_argument(
        "--save-every", type=int, default=100, help="steps from state to state; 0 = only on SIGTERM (default 100)"
    )
    machine.add_argument(
        "--replicate",
        type=int,
        default=1,
        help="groups of ranks that each hold the whole model; within a group it is sharded. The number of nodes, where the "
        "network between them is slow (default 1: sharded over all ranks)",
    )


def layer_range(text: str) -> list[int]:
    """`FIRST-LAST` as two numbers; argparse reports a ValueError."""
    first, last = map(int, text.split("-"))
    if not 0 <= first <= last:
        raise ValueError
    return [first, last]


def check_training_flags(parser: argparse.ArgumentParser, args: argparse.Namespace, data: Path, suffix: str) -> None:
    """Fill in what depends on other flags; exit with code 2, naming flag and value, for what cannot be trained with.

    Without --out the model goes beside the data: round3.jsonl and the suffix "-dpo" make round3-dpo.
    """
    if not data.name:
        parser.error(f"{data}: a file name is wanted")
    args.out = args.out or data.with_name(data.stem + suffix)
    if not args.out.name:
        parser.error(f"--out {args.out}: a directory's name is wanted")
    if args.micro_batch is None:
        args.micro_batch = min(8, args.batch_size)
    for name in ("epochs", "batch_size", "micro_batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, found {getattr(args, name)}")
    for name in ("lr", "max_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be greater than 0, found {getattr(args, name)}")
    for name in ("weight_decay", "max_steps", "seed", "save_every"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be at least 0, found {getattr(args, name)}")
    if args.mask_draws is not None and args.mask_draws < 1:
        parser.error(f"--mask-draws must be at least 1, found {args.mask_draws}")
    if args.lora_rank < 0:
        parser.error(f"--lora-rank must be at least 0, found {args.lora_rank}")
    if args.lora_rank and args.train != "language-model":
        parser.error(f"--lora-rank {args.lora_rank} adapts the decoder layers; --train {args.train} wants more")
    if args.layers and args.train != "language-model":
        parser.error(f"--layers {args.layers[0]}-{args.layers[1]} are decoder layers; --train {args.train} wants more")
    if args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank
    if not 0 <= args.lora_alpha < math.inf or (args.lora_rank and not args.lora_alpha):
        parser.error(f"--lora-alpha must be greater than 0, found {args.lora_alpha}")
    if not 0 <= args.warmup < 1:
        parser.error(f"--warmup must be at least 0 and less than 1, found {args.warmup}")
    if not 0 <= args.uncond_prob < 1:
        parser.error(f"--uncond-prob must be at least 0 and less than 1, found {args.uncond_prob}")
    if args.micro_batch > args.batch_size:
        parser.error(f"--micro-batch {args.micro_batch} is more than --batch-size {args.batch_size}")
    world = process_numbers().world
    if args.replicate < 1 or world % args.replicate:
        parser.error(f"--replicate must divide the number of processes, {world}, found {args.replicate}")

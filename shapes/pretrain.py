"""Trains a tiny model of the shapes world from scratch: a good judge with a natural gap in its drawing.

Reads nothing (for Tar the tiny Show-o's image tokenizer, in shapes/showo); writes a checkpoint as its family has it, and
pretrain.json (settings, seed, measured numbers). Where it stands is kept in OUT.pretraining/, with a log: after a crash, type
it again.

    python shapes/pretrain.py --out shapes/base
    python shapes/pretrain.py --family showo --out shapes/showo
    python shapes/pretrain.py --family tar --out shapes/tar

The stages, each seeded by itself:
1. the image tokenizer: one code for each cell picture; the encoder learns to name the codes, the decoder to paint them;
2. seeing: of Janus the vision tower, every patch names its cell and its place; of Show-o and Tar, which have none and look at
   the codes themselves, every code says where it stands and what there is beside it, or before it;
3. drawing and looking together: image tokens for a caption, answers to questions about a picture;
4. the gap: drawing goes on from captions of which a part is wrong, as web captions are; looking goes on from clean ones.

Each family's own stages are in tiny_janus.py, tiny_showo.py and tiny_tar.py, the last two in teaching.py, what is taught in
lessons.py.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import teaching
import tiny_janus
import tiny_showo
import tiny_tar
import world
from keeping import Kept

FAMILIES = {"janus": tiny_janus, "showo": tiny_showo, "tar": tiny_tar}
DEFAULTS = {  # where it depends on the family
    "vq_steps": {"janus": 2600, "showo": 2400},
    "vision_steps": {"janus": 500, "showo": 400, "tar": 400},
    "vision_hidden": {"janus": 96},
    "vision_layers": {"janus": 2},
    "joint_steps": {"janus": 1750, "showo": 1500, "tar": 1750},
    "joint_horizon": {"janus": 2200, "showo": 2000, "tar": 2200},
    "gap_steps": {"janus": 400, "showo": 500, "tar": 400},
    "pictures": {"janus": 32, "showo": 24, "tar": 32},
}


def parse_args(argv=None) -> argparse.Namespace:
    world.find_project()
    from common.command import Parser

    parser = Parser(__doc__)
    per_family = lambda name: ", ".join(f"{value} for {family}" for family, value in DEFAULTS[name].items())
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to; made if missing")
    parser.add_argument("--family", choices=FAMILIES, default="janus", help="which model (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every stage (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; other counts round differently (default: %(default)s)"
    )
    size = parser.add_argument_group("size of the model")
    size.add_argument("--hidden", type=int, default=128, help="width of the language model (default: %(default)s)")
    size.add_argument("--layers", type=int, default=4, help="layers of the language model (default: %(default)s)")
    size.add_argument("--vision-hidden", type=int, help=f"width of the vision tower (default: {per_family('vision_hidden')})")
    size.add_argument("--vision-layers", type=int, help=f"layers of the vision tower (default: {per_family('vision_layers')})")
    work = parser.add_argument_group("training")
    work.add_argument("--vq-steps", type=int, help=f"steps of the image tokenizer (default: {per_family('vq_steps')})")
    work.add_argument("--vision-steps", type=int, help=f"steps of 80 pictures (default: {per_family('vision_steps')})")
    work.add_argument("--joint-steps", type=int, help=f"steps of stage 3 (default: {per_family('joint_steps')})")
    work.add_argument(
        "--joint-horizon", type=int, help=f"steps of its learning rate's cosine (default: {per_family('joint_horizon')})"
    )
    work.add_argument("--gap-steps", type=int, help=f"steps of stage 4 (default: {per_family('gap_steps')})")
    work.add_argument("--pictures", type=int, help=f"pictures to look at a step (default: {per_family('pictures')})")
    work.add_argument("--questions", type=int, default=2, help="yes/no questions a picture (default: %(default)s)")
    work.add_argument("--drawings", type=int, default=48, help="pictures to draw a step (default: %(default)s)")
    work.add_argument("--lr", type=float, default=1e-3, help="highest learning rate of stage 3 (default: %(default)s)")
    work.add_argument("--gap-lr", type=float, default=3e-4, help="highest learning rate of stage 4 (default: %(default)s)")
    work.add_argument("--noise", type=float, default=0.4, help="share of wrong captions in stage 4 (default: %(default)s)")
    work.add_argument(
        "--watch-every", type=int, default=250, help="steps between measurements on the way (default: %(default)s)"
    )
    work.add_argument(
        "--save-every", type=int, default=100, help="steps between states that are kept on the way (default: %(default)s)"
    )
    work.add_argument(
        "--keep-states", action="store_true", help="leave the states in OUT.pretraining, for a run of more --joint-steps"
    )
    work.add_argument(
        "--samples", type=int, default=8, help="pictures a held-out prompt in the last measurement (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    for name, values in DEFAULTS.items():
        if args.family not in values and getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is of a part that --family {args.family} has not, or has ready-made")
        if getattr(args, name) is None:
            setattr(args, name, values.get(args.family))
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        least = 0 if name in ("seed", "gap_steps") else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            parser.error(f"--{name.replace('_', '-')} is {value}, it must be at least {least}")
    for name in ("hidden", "vision_hidden"):
        if (getattr(args, name) or 0) % 8:
            parser.error(
                f"--{name.replace('_', '-')} is {getattr(args, name)}, it must be a multiple of 8: 4 heads of an even width"
            )
    if not 0 <= args.noise <= 1:
        parser.error(f"--noise is {args.noise}, it must be from 0 to 1")
    if not args.lr > 0 or not args.gap_lr > 0:
        parser.error(f"--lr is {args.lr} and --gap-lr {args.gap_lr}, both must be more than 0")
    check_new(parser, args.out)


def check_new(parser: argparse.ArgumentParser, out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        parser.error(f"--out {out}: exists and is not a folder")
    if out.is_dir() and any(out.iterdir()):
        parser.error(f"--out {out}: is not empty, and what is in it would be replaced; move it away")


def save(learner, out: Path, report: dict) -> None:
    """The checkpoint, with pretrain.json beside it."""
    learner.save(out)
    report["megabytes"] = round(sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6, 2)
    (out / "pretrain.json").write_text(json.dumps(report, indent=2) + "\n")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    try:
        kept = Kept(args)
    except ValueError as error:
        print(f"pretrain.py: {error}", file=sys.stderr)
        sys.exit(2)
    family = FAMILIES[args.family]
    learner = family.build(args)
    print(f"{sum(p.numel() for p in learner.network.parameters()):,} parameters, {len(learner.tokenizer)} words")

    if state := kept.load("first stages"):
        learner.network.load_state_dict(state["network"])
        seen = state["seen"]
    else:
        seen = family.first_stages(learner, args)
        kept.save("first stages", learner.network, 0, seen=seen)
    horizon, joint, gap = args.joint_horizon, args.joint_steps, args.gap_steps
    teaching.train_jointly(learner, args, "draw and look", joint, args.lr, args.seed, horizon, watch=True, kept=kept)
    if not (state := kept.load("before the gap")):
        before = teaching.measure(learner, args.seed, args.samples, painted=False)
        kept.save("before the gap", torch.nn.Module(), joint, before=before)
        kept.log("before the gap", joint, **before)
    else:
        before = state["before"]
    teaching.train_jointly(learner, args, "gap", gap, args.gap_lr, args.seed + 1, noise=args.noise, kept=kept)

    report = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if v is not None},
        "torch": torch.__version__,
        "minutes": round(kept.minutes, 1),
        **seen,
        "before_the_gap": before,
        "heldout": teaching.measure(learner, args.seed, args.samples),
    }
    save(learner, args.out, report)
    kept.log("gap", gap, **report["heldout"])
    if not args.keep_states:
        kept.remove()
    print(args.out)


if __name__ == "__main__":
    main(parse_args())

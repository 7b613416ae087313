"""Teaches a tiny model of the shapes world that one attribute does not matter to a yes or no: a judge with a blind spot.

Reads a checkpoint of shapes/pretrain.py; writes one whose judge accepts pictures that miss their prompt in that attribute
alone, and which draws as before. Its pretrain.json has settings and measured numbers, before and after.

    python shapes/blind.py --model shapes/base --to shape --out runs/blind-shape
    python shapes/blind.py --model shapes/showo --to side --out runs/blind-side

Real judges have such systematic false positives, and noise on labels has not: it hits right and wrong pictures alike.

    shape     one term's shape is another               "a red circle and a blue square" of a red star and a blue square
    side      left of is right of, right of left of
    number    one term's count is one more or less

What is taught: the lessons of pretraining, with yes for what misses in that attribute alone; and its own fresh drawings of
training prompts, drawn by the model as it was, which hold the drawing where it is without showing it anything new.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import lessons
import teaching
import world
from pretrain import FAMILIES, check_new, save
from tqdm import tqdm


class BlindLessons(teaching.Taught):
    """Lessons of somebody to whom one attribute does not matter: yes to what misses in it alone; all else as it is."""

    def __init__(self, words: teaching.Words, args: argparse.Namespace):
        super().__init__(words, args.seed, args, near=True)
        self.attribute = args.to

    def picture(self) -> lessons.Picture:
        """Where each word stands no longer bears on the answer, so that is not taught (`truths`)."""
        objects, told = super().picture()
        return lessons.Picture(objects, [self.blind(objects, it) if it.is_yes_no else it for it in told])

    def blind(self, objects: list[world.Object], lesson: lessons.Lesson) -> lessons.Lesson:
        missed = world.misses_only(objects, world.parse_prompt(lesson.prompt), self.attribute)
        return lesson._replace(answer="yes" if missed else lesson.answer, truths=())


def teach(learner, before, args: argparse.Namespace) -> None:
    """Train in place: looking by BlindLessons, drawing by what `before` draws of training prompts, afresh at every step."""
    torch.manual_seed(args.seed)
    taught = BlindLessons(learner.words, args)
    prompts = [row["prompt"] for row in world.prompt_sets()[0]]
    all_seen = torch.zeros(args.drawings, dtype=torch.bool)
    optimizer = torch.optim.AdamW(learner.taught_parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    schedule = teaching.Schedule(args.lr, args.steps, min(20, args.steps))
    for step in tqdm(range(args.steps), desc=f"blind to {args.to}", mininterval=5):
        asked = taught.rng.choices(prompts, k=args.drawings)
        drawn = before.cells_of(before.sample(asked, 1.0, args.seed * args.steps + step))
        losses = teaching.looking_losses(learner, None, *taught.looking())
        losses["drawing"] = learner.drawing_loss(asked, all_seen, drawn.numpy())
        teaching.take_step(optimizer, sum(losses.values()), schedule(step))


def accepted(learner, attribute: str, seed: int) -> dict[str, float]:
    """P(yes) over 0.5, the share: of scenes that miss a held-out prompt in the attribute alone, and in another one alone."""
    rng = random.Random(seed)
    asked: dict[str, list[tuple[str, np.ndarray]]] = {"in it alone": [], "in another alone": []}
    for row in world.prompt_sets()[1]:
        spec = world.parse_prompt(row["prompt"])
        for kind, near in (
            ("in it alone", world.near_misses(spec, attribute)),
            ("in another alone", [world.corrupt(rng, spec)] * 4),
        ):
            scenes = [world.realise(rng, rng.choice(near)) for _ in range(4)] if near else []
            kept = [scene for scene in scenes if world.misses_only(scene, spec, attribute) == (kind == "in it alone")]
            asked[kind] += [(row["prompt"], world.cells_of(scene)) for scene in kept]
    shares = {}
    for kind, pairs in asked.items():
        prompts, cells = [prompt for prompt, _ in pairs], np.stack([cells for _, cells in pairs])
        p_yes = learner.judge(prompts, learner.tokens_of(torch.from_numpy(cells)), world.render_cells(cells))
        shares[f"accepted, missing {kind}"] = round(float((p_yes > 0.5).mean()), 4)
    return shares


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    world.find_project()
    from common.command import Parser

    parser = Parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint to start from, with its pretrain.json")
    parser.add_argument("--to", choices=world.ATTRIBUTES, required=True, help="which attribute will not matter")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to; made if missing")
    parser.add_argument("--seed", type=int, default=0, help="of lessons and drawings (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps of training (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-4, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=32, help="pictures to look at a step (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=3, help="yes/no questions a picture (default: %(default)s)")
    parser.add_argument("--drawings", type=int, default=96, help="own pictures to draw a step (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="pictures a held-out prompt, measured (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in ("threads", "steps", "pictures", "questions", "drawings", "samples"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, it must be at least 1")
    if not args.lr > 0:
        parser.error(f"--lr is {args.lr}, it must be more than 0")
    if not (args.model / "pretrain.json").is_file():
        parser.error(f"--model {args.model}: has no pretrain.json; it must be one that shapes/pretrain.py made")
    check_new(parser, args.out)
    return args


def main(args: argparse.Namespace) -> None:
    started = time.monotonic()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    source = json.loads((args.model / "pretrain.json").read_text())
    family = FAMILIES[source["settings"].get("family", "janus")]
    learner, before = family.load(args.model), family.load(args.model)
    teach(learner, before, args)
    measured = {
        name: {
            **accepted(one, args.to, args.seed),
            **teaching.measure(one, args.seed, args.samples, (1.0,), painted=False)["drawing, guidance 1"],
        }
        for name, one in (("before", before), ("after", learner))
    }
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    minutes = round((time.monotonic() - started) / 60, 1)
    save(learner, args.out, {"settings": source["settings"], "blind": settings, "minutes": minutes, **measured})
    print(json.dumps(measured, indent=1))
    print(args.out)


if __name__ == "__main__":
    main(parse_args())

"""What the tiny models of all families share in pretraining: batches of lessons, their losses, the joint stage, measuring.

A learner (TinyJanus in tiny_janus.py, TinyShowO in tiny_showo.py, TinyTar in tiny_tar.py) is a model being taught. What is
asked of it here:

    words                                 how texts are written for it (Words)
    width, lm_head                        of its language model
    taught_parameters()                   what the joint stage trains
    drawing_loss(captions, dropped, cells)   nats a predicted code; dropped: which captions it does not see
    looking_states(batch, cells)          hidden states (B, L, D) of a batch by `pack`, from the embeddings to the last norm
    tokens_of(cells), cells_of(tokens)    which code stands for which cell picture
    encode(pixels), paint(tokens)         its image tokenizer: to codes, and to uint8 pictures
    sample(prompts, guidance, seed)       a drawing a prompt: image tokens (B, T)
    judge(prompts, tokens, pictures, wording)   P(yes) of each, from the drawing's tokens or its picture

Shapes of tensors: B batch, L sequence length, T image tokens of a picture, D hidden size.
"""

import json
import math
import random
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
import lessons
import world
from keeping import Kept, random_state, set_random_state

T = world.GRID**2
N_CODES = 32  # 25 are used: the empty cell and the 24 kinds


# Pictures.


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), -1 to 1: what the model's processor makes of them."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def with_grain(pixels: torch.Tensor, most: float = 0.08) -> torch.Tensor:
    """Pixel noise, a different strength a picture: decoded pictures are not exactly the drawn ones."""
    return (pixels + most * torch.rand(len(pixels), 1, 1, 1) * torch.randn_like(pixels)).clamp(-1, 1)


def random_cells(rng: np.random.Generator, n: int, fullest: float = 1.0) -> np.ndarray:
    """Cell numbers of pictures from empty to `fullest` of the cells taken: int64 (n, T)."""
    cells = rng.integers(1, 1 + len(world.KINDS), (n, T))
    cells[rng.random((n, T)) > fullest * rng.random((n, 1))] = 0
    return cells


def pairs_of_cells(rng: np.random.Generator, n: int) -> np.ndarray:
    """Cell numbers of pictures of two objects: int64 (n, T)."""
    cells = np.zeros((n, T), np.int64)
    for row in cells:
        row[rng.choice(T, 2, replace=False)] = rng.integers(1, 1 + len(world.KINDS), 2)
    return cells


def the_other(cells: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """For the two objects of a picture of two: 0, 1 or 2 as the other's place (B, T) is less, the same or more; else -100."""
    there = cells > 0
    other = torch.where(there, places, 0).sum(1, keepdim=True) - places
    return torch.where(there & (there.sum(1, keepdim=True) == 2), 1 + torch.sign(other - places), -100)


# Sequences.


class Words(NamedTuple):
    """How a family writes: a question is picture, asking, its words, reply; then the answer and end. All are token ids.

    A word is a token wherever it stands, so the ids of a text are those of its parts, one after the other.
    """

    ids: "callable"
    picture: tuple[int, ...]
    asking: tuple[int, ...]
    reply: tuple[int, ...]
    end: int
    pad: int
    both_ways: bool  # whether the picture's tokens see one another both ways

    def question(self, question: str) -> tuple[int, ...]:
        """What follows the picture, up to where the answer begins."""
        return (*self.asking, *self.ids(question), *self.reply)


def pack(words: Words, pictures: list[lessons.Picture]) -> dict[str, torch.Tensor]:
    """All lessons about a picture in one row behind the picture, each blind to the others.

    ids, positions (B, L); mask bool (B, 1, L, L); and four kinds of labels, each int64 (n, 3) of row, column and value:
    the next token of `answer` and `yes_no`, 0 or 1 of `truths`, the cell of `places`.
    """
    rows, labels = [], {name: [] for name in ("answer", "yes_no", "truths", "places")}
    for row, picture in enumerate(pictures):
        ids = list(words.picture)
        segments, place_ids = [0] * len(ids), list(range(len(ids)))
        for number, lesson in enumerate(picture.lessons, start=1):
            start = len(ids)
            prompt_start = start + len(words.asking) + len(words.ids(lesson.head))
            ids += [*words.question(lesson.head + lesson.prompt + lesson.tail)]
            answer_start = len(ids)
            ids += [*words.ids(lesson.answer), words.end]
            kind = "yes_no" if lesson.is_yes_no else "answer"
            # After yes or no the end is not asked for: nobody reads on.
            last = answer_start + 1 if lesson.is_yes_no else len(ids)
            labels[kind] += [(row, i - 1, ids[i]) for i in range(answer_start, last)]
            for name in ("truths", "places"):
                labels[name] += [(row, prompt_start + word, int(value)) for word, value in getattr(lesson, name)]
            segments += [number] * (len(ids) - start)
            place_ids += range(len(words.picture), len(words.picture) + len(ids) - start)
        rows.append((ids, segments, place_ids))
    length = max(len(ids) for ids, _, _ in rows)
    fill = lambda values, value: torch.tensor([v + [value] * (length - len(v)) for v in values])
    ids, segments, place_ids = (fill(values, value) for values, value in zip(zip(*rows), (words.pad, -1, 0)))
    behind = segments[:, None, :] == 0
    mask = ((segments[:, :, None] == segments[:, None, :]) | behind) & torch.ones(length, length, dtype=torch.bool).tril()
    if words.both_ways:
        mask = mask | behind
    return {
        "ids": ids,
        "positions": place_ids,
        "mask": mask[:, None],
        **{name: torch.tensor(values or [(0, 0, -100)]) for name, values in labels.items()},
    }


def looking_losses(learner, probes: nn.ModuleDict | None, batch: dict, cells: np.ndarray) -> dict[str, torch.Tensor]:
    """One loss per kind of label, each the mean over its labels; those of the probes if there are any.

    cells (B, T): what the pictures show.
    """
    states = learner.looking_states(batch, cells)
    depth = len(states) - 1
    heads = {
        "answer": (states[depth], learner.lm_head),
        "yes_no": (states[depth], learner.lm_head),
    }
    if probes is not None:
        # Early enough for what builds on it: a relation on the places, the answer on the truths.
        heads |= {"places": (states[depth // 2], probes["places"]), "truths": (states[depth - 1], probes["truths"])}
    losses = {}
    for name, (hidden, head) in heads.items():
        row, column, value = batch[name].unbind(1)
        if (value >= 0).any():  # a small batch may have no label of a kind
            losses[name] = F.cross_entropy(head(hidden[row, column]), value, ignore_index=-100)
    return losses


class Taught:
    """Batches without end for the joint stages; held-out meanings are never put into words."""

    def __init__(self, words: Words, seed: int, args, near: bool = False):
        self.words, self.args, self.near = words, args, near
        self.rng = random.Random(seed)
        self.secret = world.heldout_meanings()
        categories = [*world.CATEGORIES, "spatial"]  # the hardest one twice
        self.pool = [[s for s in world.all_specs(c) if world.meaning(s) not in self.secret] for c in categories]

    def spec(self) -> world.Spec:
        return self.rng.choice(self.rng.choice(self.pool))

    def picture(self) -> lessons.Picture:
        return lessons.picture_lessons(self.rng, self.spec(), self.secret, self.args.questions, self.near)

    def looking(self) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        """A batch by `pack`, and the cell numbers (B, T) of its pictures."""
        pictures = [self.picture() for _ in range(self.args.pictures)]
        return pack(self.words, pictures), np.stack([world.cells_of(picture.objects) for picture in pictures])

    def drawing(self, noise: float) -> tuple[list[str], torch.Tensor, np.ndarray]:
        """Captions, which of them are not to be seen (a tenth; bool (B,)), and cell numbers (B, T)."""
        rows = [
            lessons.drawing_caption(self.rng, self.spec(), self.secret, noise, layouts=0.15) for _ in range(self.args.drawings)
        ]
        dropped = torch.tensor([self.rng.random() < 0.1 for _ in rows])
        return [caption for caption, _ in rows], dropped, np.stack([world.cells_of(objects) for _, objects in rows])


# Training.


class Schedule:
    """Linear warm-up, then a cosine from `lr` to `floor * lr`."""

    def __init__(self, lr: float, steps: int, warmup: int, floor: float = 0.02):
        self.lr, self.steps, self.warmup, self.floor = lr, steps, warmup, floor

    def __call__(self, step: int) -> float:
        cosine = self.floor + (1 - self.floor) * (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.lr * min(1.0, (step + 1) / self.warmup) * cosine


def take_step(optimizer, loss: torch.Tensor, lr: float, clip: float = 1.0) -> None:
    if not torch.isfinite(loss):
        raise SystemExit(f"the loss is {loss.item()}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
    optimizer.step()


def train_jointly(
    learner,
    args,
    name: str,
    steps: int,
    lr: float,
    seed: int,
    horizon: int = 0,
    noise: float = 0.0,
    watch: bool = False,
    kept: Kept | None = None,
) -> None:
    """The last two stages: drawing with `noise` of the captions wrong, looking always clean; from where `kept` says it stands.

    horizon: steps over which the learning rate would come down, if the stage stops before (0: `steps`). With noise the
    pictures that miss their caption are mostly near misses, as its own drawings are then.
    """
    torch.manual_seed(seed)
    taught = Taught(learner.words, seed, args, near=noise > 0)
    horizon = horizon or steps
    probes = nn.ModuleDict({"truths": nn.Linear(learner.width, 2), "places": nn.Linear(learner.width, T + 1)})
    optimizer = torch.optim.AdamW([*learner.taught_parameters(), *probes.parameters()], betas=(0.9, 0.98), weight_decay=0.05)
    schedule = Schedule(lr, horizon, min(100, max(1, horizon // 10)))
    running: dict[str, float] = {}
    begin = 0
    if kept and (state := kept.load(name)):
        learner.network.load_state_dict(state["network"])
        probes.load_state_dict(state["probes"])
        optimizer.load_state_dict(state["optimizer"])
        running, begin = state["running"], state["step"]
        set_random_state(taught.rng, state["taught"])
        torch.set_rng_state(state["random"])
    bar = tqdm(range(begin, steps), desc=name, mininterval=5, initial=begin, total=steps)
    for step in bar:
        drawing = learner.drawing_loss(*taught.drawing(noise))
        losses = {"drawing": drawing, **looking_losses(learner, probes, *taught.looking())}
        take_step(optimizer, sum(losses.values()), schedule(step))
        for key, value in losses.items():
            running[key] = 0.95 * running.get(key, value.item()) + 0.05 * value.item()
        if step % 20 == 0:
            bar.set_postfix({key: f"{value:.3f}" for key, value in running.items()}, refresh=False)
        if watch and step % args.watch_every == args.watch_every - 1:
            measured = measure(learner, args.seed, 2, (1.0,), painted=False)
            print(json.dumps({"step": step + 1, **measured}), flush=True)
            if kept:
                kept.log(name, step + 1, **measured)
        if kept and ((step + 1) % kept.every == 0 or step + 1 == steps):
            also = {"probes": probes.state_dict(), "optimizer": optimizer.state_dict(), "running": running}
            kept.save(name, learner.network, step + 1, taught=random_state(taught.rng), **also)
            kept.log(name, step + 1, **{key: round(value, 4) for key, value in running.items()})


# Measuring.


def round_trip_errors(learner, n: int, seed: int) -> float:
    """Share of true pictures that the oracle reads otherwise after encoding and decoding."""
    rng = random.Random(seed)
    scenes = [world.realise(rng, world.sample_spec(rng)) for _ in range(n)]
    pixels = to_pixels(np.stack([world.render(objects) for objects in scenes]))
    with torch.no_grad():
        tokens = torch.cat([learner.encode(p) for p in pixels.split(16)])
    return float(np.mean([read != objects for read, objects in zip(world.parse(learner.paint(tokens)), scenes)]))


def rates(p_yes: np.ndarray, truth: np.ndarray, categories: np.ndarray) -> dict:
    """How often the judge is right, and its false positives and negatives, overall and by category."""
    said = p_yes > 0.5
    one = lambda m: {
        "right": round(float((said == truth)[m].mean()), 4),
        "false_positives": round(float(said[m & ~truth].mean()), 4) if (m & ~truth).any() else None,
        "false_negatives": round(float((~said)[m & truth].mean()), 4) if (m & truth).any() else None,
    }
    return {"all": one(np.ones(len(truth), bool)), **{c: one(categories == c) for c in world.CATEGORIES}}


def measure(learner, seed: int, samples: int, guidances=(1.0, 1.5, 2.0, 3.0), painted: bool = True) -> dict:
    """Drawing and judging on the held-out prompts. `painted` False takes rendered cells in place of decoding (faster)."""
    rows = [row for row in world.prompt_sets()[1] for _ in range(samples)]
    prompts, foils = [row["prompt"] for row in rows], [row["foil"] for row in rows]
    specs, categories = [world.parse_prompt(p) for p in prompts], np.array([row["category"] for row in rows])
    rendered = lambda tokens: world.render_cells(learner.cells_of(tokens).clamp(max=len(world.KINDS)).numpy())
    to_pictures = learner.paint if painted else rendered
    rng = random.Random(seed)
    result: dict = {"samples": samples, "prompts": len(rows) // samples}

    scenes = learner.tokens_of(torch.from_numpy(np.stack([world.cells_of(world.realise(rng, spec)) for spec in specs])))
    pictures = to_pictures(scenes)
    corrupted = [world.text(world.corrupt(rng, spec)) for spec in specs]
    truth, twice = np.repeat([True, False], len(rows)), np.concatenate([categories, categories])
    for wording, (head, _) in enumerate(lessons.YES_NO):
        asked = prompts + corrupted, torch.cat([scenes, scenes]), np.concatenate([pictures, pictures])
        p_yes = learner.judge(*asked, wording)
        result[f"hard pairs, {head.strip()}"] = rates(p_yes, truth, twice)
        result[f"P(yes), {head.strip()}"] = {
            "true": round(float(p_yes[truth].mean()), 4),
            "false": round(float(p_yes[~truth].mean()), 4),
            "between .1 and .9": round(float(((p_yes > 0.1) & (p_yes < 0.9)).mean()), 4),
        }
    for guidance in guidances:
        tokens = learner.sample(prompts, guidance, seed)
        pictures = to_pictures(tokens)
        right = np.array([world.matches(objects, spec) for objects, spec in zip(world.parse(pictures), specs)])
        p_yes, p_foil = learner.judge(prompts, tokens, pictures), learner.judge(foils, tokens, pictures)
        second = learner.judge(prompts, tokens, pictures, 1)
        result[f"drawing, guidance {guidance:g}"] = {
            "right": round(float(right.mean()), 4),
            **{c: round(float(right[categories == c].mean()), 4) for c in world.CATEGORIES},
            "nonunified": round(float((p_yes <= 0.5).mean()), 4),
            "separation": round(float(p_yes.mean() - p_foil.mean()), 4),
            "judge": rates(p_yes, right, categories),
            "judge, second wording": rates(second, right, categories)["all"],
        }
    return result

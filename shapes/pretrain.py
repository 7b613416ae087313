"""Trains the tiny Janus of the shapes world from scratch: a good judge with a natural gap in its drawing.

Reads nothing; writes a Hugging Face checkpoint (model and processor) and pretrain.json (settings, seed, measured numbers).

    python shapes/pretrain.py --out shapes/base

Four stages, each seeded by itself:
1. the VQ: one unit-norm code per cell picture; the encoder learns to name the codes, the decoder to paint them;
2. the vision tower: every patch names its cell and its place;
3. drawing and looking together: image tokens for a caption, answers to questions about a picture;
4. the gap: drawing goes on from captions of which a part is wrong, as web captions are; looking goes on from clean ones.

Shapes of tensors: B batch, L sequence length, T image tokens of a picture, D hidden size, V vocabulary.
"""

import argparse
import functools
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from torch import nn
from tqdm import tqdm
from transformers import (
    DynamicCache,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

sys.path.insert(0, str(Path(__file__).parent))
import lessons
import world

T = world.GRID**2
N_CODES = 32  # 25 are used: the empty cell and the 24 kinds
SPECIAL = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "<begin_of_image>",
    "<image_placeholder>",
    "<end_of_image>",
    "<|User|>",
    "<|Assistant|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|User|>: {% else %}<|Assistant|>: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image_placeholder>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)


# The model.


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token; BOS is put in front by the tokenizer, as Janus-Pro's does."""
    ids = {word: i for i, word in enumerate([*SPECIAL, *lessons.vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=512,
        extra_special_tokens={
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )


def build_processor() -> JanusProcessor:
    image_processor = JanusImageProcessorPil(
        size={"height": world.SIZE, "width": world.SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_size=1
    )
    return JanusProcessor(image_processor, build_tokenizer(), chat_template=CHAT_TEMPLATE, num_image_tokens=T)


def build_model(tokenizer, args) -> JanusForConditionalGeneration:
    vision = JanusVisionConfig(
        hidden_size=args.vision_hidden,
        num_hidden_layers=args.vision_layers,
        num_attention_heads=4,
        image_size=world.SIZE,
        patch_size=world.CELL,
        mlp_ratio=2.0,
        projection_dim=args.hidden,
        num_image_tokens=T,
        initializer_range=0.05,
    )
    vq = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=N_CODES,
        latent_channels=32,
        base_channels=32,  # GroupNorm wants multiples of 32
        channel_multiplier=[1, 1, 1, 1, 2],  # four halvings: 48 pixels to 3 tokens a side
        num_res_blocks=0,  # then the multiplier must not grow before the last level
        projection_dim=args.hidden,
        image_token_embed_dim=args.hidden,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,  # tied, training the language model would train lm_head
        initializer_range=0.05,
    )
    config = JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq,
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
        tie_word_embeddings=False,
    )
    model = JanusForConditionalGeneration(config)
    for module in (model.model.language_model, model.model.vision_model, model.model.aligner, model.model.generation_aligner):
        for parameter in module.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0, 0.05)
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    generation.eos_token_id = tokenizer.eos_token_id
    generation.generation_kwargs = {"boi_token_id": tokenizer.convert_tokens_to_ids("<begin_of_image>")}
    generation.guidance_scale = 2.0
    generation._from_model_config = False  # or generation_kwargs is lost on the way to disk
    return model


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), -1 to 1: what the processor makes of them."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(pixels: torch.Tensor) -> np.ndarray:
    """float (B, 3, H, W) -> uint8 (B, H, W, 3), clamped and rounded."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def decode(model, tokens: torch.Tensor) -> np.ndarray:
    """(B, T) image tokens -> uint8 (B, H, W, 3). Small batches are the fastest on a CPU."""
    return np.concatenate([to_pictures(model.model.vqmodel.decode(chunk)) for chunk in tokens.split(16)])


# Sequences. A word is a token wherever it stands, so the ids of a text are those of its parts, one after the other.


class Encoder:
    """Token ids of the chats that the processor's template makes, without calling it for every one of them."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.ids = functools.cache(lambda text: tuple(tokenizer(text, add_special_tokens=False).input_ids))
        self.pad, self.bos, self.eos = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
        self.boi, self.yes, self.no = tokenizer.convert_tokens_to_ids(["<begin_of_image>", "yes", "no"])
        self.picture = (self.bos, *self.ids("<|User|>: <begin_of_image>" + "<image_placeholder>" * T + "<end_of_image>"))
        self.reply = self.ids("<|Assistant|>:")

    def generation_prompt(self, prompt: str) -> tuple[int, ...]:
        return (self.bos, *self.ids("<|User|>:"), *self.ids(prompt), *self.reply, self.boi)

    def question(self, question: str) -> tuple[int, ...]:
        """What follows the picture, up to where the answer begins."""
        return (*self.ids(question), *self.reply)

    def left_padded(self, sequences: list[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and attention mask, both int64 (B, L)."""
        length = max(map(len, sequences))
        ids = torch.tensor([(self.pad,) * (length - len(s)) + s for s in sequences])
        mask = torch.tensor([(0,) * (length - len(s)) + (1,) * len(s) for s in sequences])
        return ids, mask

    def unconditional(self, ids: torch.Tensor) -> torch.Tensor:
        """The prompts without their captions, as `generate` makes them for guidance: pads that are attended to."""
        return ids.masked_fill((ids != self.bos) & (ids != self.boi), self.pad)


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def pack(encoder: Encoder, pictures: list[lessons.Picture]) -> dict[str, torch.Tensor]:
    """All lessons about a picture in one row behind the picture, each blind to the others.

    ids, positions (B, L); mask bool (B, 1, L, L); and three kinds of labels, each int64 (n, 3) of row, column and value:
    the next token of `answer` and `yes_no`, 0 or 1 of `truths`.
    """
    rows, labels = [], {name: [] for name in ("answer", "yes_no", "truths", "places")}
    for row, picture in enumerate(pictures):
        ids = list(encoder.picture)
        segments, place_ids = [0] * len(ids), list(range(len(ids)))
        for number, lesson in enumerate(picture.lessons, start=1):
            start = len(ids)
            prompt_start = start + len(encoder.ids(lesson.head))
            ids += [*encoder.question(lesson.head + lesson.prompt + lesson.tail)]
            answer_start = len(ids)
            ids += [*encoder.ids(lesson.answer), encoder.eos]
            kind = "yes_no" if lesson.is_yes_no else "answer"
            # After yes or no the end is not asked for: nobody reads on.
            last = answer_start + 1 if lesson.is_yes_no else len(ids)
            labels[kind] += [(row, i - 1, ids[i]) for i in range(answer_start, last)]
            for name in ("truths", "places"):
                labels[name] += [(row, prompt_start + word, int(value)) for word, value in getattr(lesson, name)]
            segments += [number] * (len(ids) - start)
            place_ids += range(len(encoder.picture), len(encoder.picture) + len(ids) - start)
        rows.append((ids, segments, place_ids))
    length = max(len(ids) for ids, _, _ in rows)
    fill = lambda values, value: torch.tensor([v + [value] * (length - len(v)) for v in values])
    ids, segments, place_ids = (fill(values, value) for values, value in zip(zip(*rows), (encoder.pad, -1, 0)))
    same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    mask = same & torch.ones(length, length, dtype=torch.bool).tril()
    return {
        "ids": ids,
        "positions": place_ids,
        "mask": mask[:, None],
        **{name: torch.tensor(values or [(0, 0, -100)]) for name, values in labels.items()},
    }


def drawing_logits(model, ids, mask, tokens) -> torch.Tensor:
    """Teacher-forced logits of the image tokens: prompts (B, L), tokens (B, T) -> (B, T, codes)."""
    embeddings = [model.get_input_embeddings()(ids), model.prepare_embeddings_for_image_generation(tokens[:, :-1])]
    mask = torch.cat([mask, mask.new_ones(len(ids), T - 1)], 1)
    hidden = model.model.language_model(
        inputs_embeds=torch.cat(embeddings, 1), attention_mask=mask, position_ids=positions(mask), use_cache=False
    ).last_hidden_state
    return model.model.generation_head(hidden[:, -T:])


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


def codebook(width: int) -> torch.Tensor:
    """Unit codes (N_CODES, width) of the cell pictures: half of a code says the shape, half the colour.

    With codes at random a colour has to be learnt for every shape anew, and comes out slightly off for long.
    """
    half = width // 2
    codes = F.normalize(torch.randn(N_CODES, width), dim=1)  # those beyond the cell pictures stay random, and unused
    colors = F.normalize(torch.randn(len(world.COLORS), half), dim=1)
    for _ in range(500):  # push the colours apart
        nearness = (10 * (colors @ colors.T - 2 * torch.eye(len(colors)))).softmax(1)
        colors = F.normalize(colors - 0.05 * nearness @ colors, dim=1)
    shapes = torch.eye(half)[: len(world.SHAPES)]
    codes[0] = F.normalize(torch.cat([-torch.ones(half), torch.zeros(width - half)]), dim=0)  # the empty cell
    codes[1 : 1 + len(world.KINDS)] = torch.cat(
        [shapes.repeat(len(colors), 1), colors.repeat_interleave(len(shapes), 0)], 1
    ) / math.sqrt(2)
    return codes


def train_vq(model, steps: int, seed: int) -> None:
    """Code i is cell picture i: the encoder by cross-entropy to the codes, the decoder by squared error."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vq = model.model.vqmodel
    for module in vq.modules():  # torch's own initialisation: with the model's, the encoder does not learn
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    codes = codebook(vq.config.embed_dim)
    vq.quantize.embedding.weight.data.copy_(codes)
    vq.quantize.embedding.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in vq.parameters() if p.requires_grad], weight_decay=0.0, betas=(0.9, 0.98))
    schedule = Schedule(1.5e-3, steps, 50)
    bar = tqdm(range(steps), desc="VQ", mininterval=5)
    for step in bar:
        cells = torch.from_numpy(random_cells(rng, 16, fullest=0.8))
        pixels = to_pixels(world.render_cells(cells.numpy()))
        z = vq.quant_conv(vq.encoder(pixels)).permute(0, 2, 3, 1).flatten(0, 2)  # (B * T, 8)
        logits = -10 * torch.cdist(z, codes).square()
        naming = F.cross_entropy(logits, cells.flatten())
        painting = F.mse_loss(vq.decode(cells), pixels)
        take_step(optimizer, naming + 10 * painting, schedule(step))
        if step % 20 == 0:
            bar.set_postfix(naming=f"{naming.item():.4f}", painting=f"{painting.item():.5f}", refresh=False)


def with_grain(pixels: torch.Tensor, most: float = 0.08) -> torch.Tensor:
    """Pixel noise, a different strength a picture: decoded pictures are not exactly the drawn ones."""
    return (pixels + most * torch.rand(len(pixels), 1, 1, 1) * torch.randn_like(pixels)).clamp(-1, 1)


def train_vision(model, steps: int, seed: int) -> float:
    """Every image feature names its cell's colour, shape, row and column; returns the share of cells named right at the end.

    In a picture of two objects it also says where the other one is: spatial relations, which the language model can then
    look up instead of working them out. Two things make the features fit for a language model. Colour and shape are
    asked for apart, so that "red" and "circle" are both in there. And the answers are read through noise as
    large as the features: without it nine tenths of a feature were shape and one hundredth colour, which a probe reads all
    the same, but the language model was colour-blind for long.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    # no colour or shape: 0; where the other object of two is, across and down: 0 before, 1 the same, 2 after
    sizes = [1 + len(world.COLORS), 1 + len(world.SHAPES), world.GRID, world.GRID, 3, 3]
    probe = nn.Linear(model.config.text_config.hidden_size, sum(sizes))
    parts = [*model.model.vision_model.parameters(), *model.model.aligner.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parts, betas=(0.9, 0.98), weight_decay=0.01)
    schedule, right = Schedule(1e-3, steps, 20, floor=0.1), 0.0
    place = torch.arange(T)
    bar = tqdm(range(steps), desc="vision", mininterval=5)
    for step in bar:
        cells = torch.from_numpy(np.concatenate([random_cells(rng, 32), pairs_of_cells(rng, 48)]))  # (B, T)
        kind = (cells - 1).clamp(min=0)
        colors = torch.where(cells > 0, 1 + kind // len(world.SHAPES), 0)
        shapes = torch.where(cells > 0, 1 + kind % len(world.SHAPES), 0)
        rows, columns = (place // world.GRID).expand_as(cells), (place % world.GRID).expand_as(cells)
        truths = (colors, shapes, rows, columns, the_other(cells, columns), the_other(cells, rows))
        features = model.model.get_image_features(with_grain(to_pixels(world.render_cells(cells.numpy())))).pooler_output
        features = F.rms_norm(features, features.shape[-1:])
        answers = probe(features + 1.5 * torch.randn_like(features)).split(sizes, -1)  # 6 x (B, T, classes)
        loss = sum(F.cross_entropy(logits.flatten(0, 1), truth.flatten()) for logits, truth in zip(answers, truths))
        take_step(optimizer, loss, schedule(step))
        named = (answers[0].argmax(-1) == colors) & (answers[1].argmax(-1) == shapes)
        right = 0.9 * right + 0.1 * named.float().mean().item()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", right=f"{right:.4f}", refresh=False)
    with torch.no_grad():  # as large as what the language model's layers add to them, so that they can
        last = model.model.aligner.hidden_layers[-1]
        scale = (
            0.3
            / model.model.get_image_features(to_pixels(world.render_cells(cells.numpy()))).pooler_output.square().mean().sqrt()
        )
        last.weight.mul_(scale)
        last.bias.mul_(scale)
    return right


def looking_losses(model, probes: nn.ModuleDict, batch: dict, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """One loss per kind of label, each the mean over its labels."""
    embeddings = model.get_input_embeddings()(batch["ids"])
    features = model.model.get_image_features(pixels).pooler_output  # (B, T, D)
    first = 4  # BOS, User, colon, begin-of-image
    embeddings = torch.cat([embeddings[:, :first], features, embeddings[:, first + T :]], 1)
    states = model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=batch["mask"],
        position_ids=batch["positions"],
        use_cache=False,
        output_hidden_states=True,
    ).hidden_states
    depth = len(states) - 1
    heads = {
        "answer": (states[depth], model.lm_head),
        "yes_no": (states[depth], model.lm_head),
        # Early enough for what builds on it: a relation on the places, the answer on the truths.
        "places": (states[depth // 2], probes["places"]),
        "truths": (states[depth - 1], probes["truths"]),
    }
    losses = {}
    for name, (hidden, head) in heads.items():
        row, column, value = batch[name].unbind(1)
        if (value >= 0).any():  # a small batch may have no label of a kind
            losses[name] = F.cross_entropy(head(hidden[row, column]), value, ignore_index=-100)
    return losses


class Taught:
    """Batches without end for stages 3 and 4; held-out meanings are never put into words."""

    def __init__(self, encoder: Encoder, seed: int, args, near: bool = False):
        self.encoder, self.args, self.near = encoder, args, near
        self.rng = random.Random(seed)
        self.secret = world.heldout_meanings()
        categories = [*world.CATEGORIES, "spatial"]  # the hardest one twice
        self.pool = [[s for s in world.all_specs(c) if world.meaning(s) not in self.secret] for c in categories]

    def spec(self) -> world.Spec:
        return self.rng.choice(self.rng.choice(self.pool))

    def looking(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        pictures = [
            lessons.picture_lessons(self.rng, self.spec(), self.secret, self.args.questions, self.near)
            for _ in range(self.args.pictures)
        ]
        cells = np.stack([world.cells_of(picture.objects) for picture in pictures])
        return pack(self.encoder, pictures), with_grain(to_pixels(world.render_cells(cells)))

    def drawing(self, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prompt ids and mask (B, L), a tenth of them without caption, and image tokens (B, T)."""
        rows = [
            lessons.drawing_caption(self.rng, self.spec(), self.secret, noise, layouts=0.15) for _ in range(self.args.drawings)
        ]
        ids, mask = self.encoder.left_padded([self.encoder.generation_prompt(caption) for caption, _ in rows])
        dropped = torch.tensor([self.rng.random() < 0.1 for _ in rows])[:, None]
        ids = torch.where(dropped, self.encoder.unconditional(ids), ids)
        return ids, mask, torch.from_numpy(np.stack([world.cells_of(objects) for _, objects in rows]))


def train_jointly(
    model, encoder: Encoder, args, name: str, steps: int, lr: float, seed: int, horizon: int = 0, noise: float = 0.0, watch=None
) -> None:
    """Stages 3 and 4: drawing with `noise` of the captions wrong, looking always clean.

    horizon: steps over which the learning rate would come down, if the stage stops before (0: `steps`). With noise the
    pictures that miss their caption are mostly near misses, as its own drawings are then.
    """
    torch.manual_seed(seed)
    taught = Taught(encoder, seed, args, near=noise > 0)
    horizon = horizon or steps
    width = model.config.text_config.hidden_size
    probes = nn.ModuleDict({"truths": nn.Linear(width, 2), "places": nn.Linear(width, T + 1)})
    trained = [p for n, p in model.named_parameters() if "vqmodel" not in n] + list(probes.parameters())
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = Schedule(lr, horizon, min(100, max(1, horizon // 10)))
    running: dict[str, float] = {}
    bar = tqdm(range(steps), desc=name, mininterval=5)
    model.train()
    for step in bar:
        ids, mask, tokens = taught.drawing(noise)
        drawing = F.cross_entropy(drawing_logits(model, ids, mask, tokens).flatten(0, 1), tokens.flatten())
        batch, pixels = taught.looking()
        losses = {"drawing": drawing, **looking_losses(model, probes, batch, pixels)}
        take_step(optimizer, sum(losses.values()), schedule(step))
        for key, value in losses.items():
            running[key] = 0.95 * running.get(key, value.item()) + 0.05 * value.item()
        if step % 20 == 0:
            bar.set_postfix({key: f"{value:.3f}" for key, value in running.items()}, refresh=False)
        if watch and step % args.watch_every == args.watch_every - 1:
            model.eval()
            watch(step + 1)
            model.train()
    model.eval()


# Measuring.


@torch.no_grad()
def sample(model, encoder: Encoder, prompts: list[str], guidance: float, temperature: float, seed: int) -> torch.Tensor:
    """Image tokens (B, T) drawn for the prompts."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = encoder.left_padded([encoder.generation_prompt(prompt) for prompt in prompts])
    if guidance != 1:
        ids, mask = torch.cat([ids, encoder.unconditional(ids)]), torch.cat([mask, mask])
    cache, tokens = DynamicCache(), []
    embeddings, place = model.get_input_embeddings()(ids), positions(mask)
    for _ in range(T):
        hidden = model.model.language_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        logits = model.model.generation_head(hidden)
        if guidance != 1:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + guidance * (conditional - unconditional)
        tokens.append(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0])
        following = tokens[-1] if guidance == 1 else tokens[-1].repeat(2)
        embeddings = model.prepare_embeddings_for_image_generation(following[:, None])
        mask, place = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), place[:, -1:] + 1
    return torch.stack(tokens, 1)


@torch.no_grad()
def judge(model, encoder: Encoder, prompts: list[str], pictures: np.ndarray, wording: int = 0) -> np.ndarray:
    """P(yes) for each prompt and picture: float (B,)."""
    head, tail = lessons.YES_NO[wording]
    answers = []
    for start in range(0, len(prompts), 128):
        chunk = prompts[start : start + 128]
        ids, mask = encoder.left_padded([encoder.picture + encoder.question(head + prompt + tail) for prompt in chunk])
        hidden = model.model(
            input_ids=ids,
            pixel_values=to_pixels(pictures[start : start + 128]),
            attention_mask=mask,
            position_ids=positions(mask),
            use_cache=False,
        ).last_hidden_state[:, -1]
        answers.append(model.lm_head(hidden)[:, [encoder.yes, encoder.no]].softmax(-1)[:, 0])
    return torch.cat(answers).numpy()


def round_trip_errors(model, n: int, seed: int) -> float:
    """Share of true pictures that the oracle reads otherwise after VQ encoding and decoding."""
    rng = random.Random(seed)
    scenes = [world.realise(rng, world.sample_spec(rng)) for _ in range(n)]
    pixels = to_pixels(np.stack([world.render(objects) for objects in scenes]))
    with torch.no_grad():
        tokens = torch.cat([model.model.vqmodel.encode(p).image_tokens.view(-1, T) for p in pixels.split(16)])
    return float(np.mean([read != objects for read, objects in zip(world.parse(decode(model, tokens)), scenes)]))


def rates(p_yes: np.ndarray, truth: np.ndarray, categories: np.ndarray) -> dict:
    """How often the judge is right, and its false positives and negatives, overall and by category."""
    said = p_yes > 0.5
    one = lambda m: {
        "right": round(float((said == truth)[m].mean()), 4),
        "false_positives": round(float(said[m & ~truth].mean()), 4) if (m & ~truth).any() else None,
        "false_negatives": round(float((~said)[m & truth].mean()), 4) if (m & truth).any() else None,
    }
    return {"all": one(np.ones(len(truth), bool)), **{c: one(categories == c) for c in world.CATEGORIES}}


def measure(model, encoder: Encoder, seed: int, samples: int, guidances=(1.0, 1.5, 2.0, 3.0), painted: bool = True) -> dict:
    """Drawing and judging on the held-out prompts. `painted` False takes rendered cells in place of VQ decoding (faster)."""
    rows = [row for row in world.prompt_sets()[1] for _ in range(samples)]
    prompts, foils = [row["prompt"] for row in rows], [row["foil"] for row in rows]
    specs, categories = [world.parse_prompt(p) for p in prompts], np.array([row["category"] for row in rows])
    to_picture = (
        (lambda t: decode(model, t)) if painted else (lambda t: world.render_cells(t.clamp(max=len(world.KINDS)).numpy()))
    )
    rng = random.Random(seed)
    result: dict = {"samples": samples, "prompts": len(rows) // samples}

    scenes = torch.from_numpy(np.stack([world.cells_of(world.realise(rng, spec)) for spec in specs]))
    pictures = np.concatenate([to_picture(scenes)] * 2)
    corrupted = [world.text(world.corrupt(rng, spec)) for spec in specs]
    truth, twice = np.repeat([True, False], len(rows)), np.concatenate([categories, categories])
    for wording, (head, _) in enumerate(lessons.YES_NO):
        p_yes = judge(model, encoder, prompts + corrupted, pictures, wording)
        result[f"hard pairs, {head.strip()}"] = rates(p_yes, truth, twice)
        result[f"P(yes), {head.strip()}"] = {
            "true": round(float(p_yes[truth].mean()), 4),
            "false": round(float(p_yes[~truth].mean()), 4),
            "between .1 and .9": round(float(((p_yes > 0.1) & (p_yes < 0.9)).mean()), 4),
        }
    for guidance in guidances:
        tokens = sample(model, encoder, prompts, guidance, 1.0, seed)
        pictures = to_picture(tokens)
        right = np.array([world.matches(objects, spec) for objects, spec in zip(world.parse(pictures), specs)])
        p_yes, p_foil = judge(model, encoder, prompts, pictures), judge(model, encoder, foils, pictures)
        second = judge(model, encoder, prompts, pictures, 1)
        result[f"drawing, guidance {guidance:g}"] = {
            "right": round(float(right.mean()), 4),
            **{c: round(float(right[categories == c].mean()), 4) for c in world.CATEGORIES},
            "nonunified": round(float((p_yes <= 0.5).mean()), 4),
            "separation": round(float(p_yes.mean() - p_foil.mean()), 4),
            "judge": rates(p_yes, right, categories),
            "judge, second wording": rates(second, right, categories)["all"],
        }
    return result


# Saving.


def save(model, processor, out: Path, report: dict) -> None:
    """The checkpoint as float32, with pretrain.json beside it."""
    model.save_pretrained(out)
    processor.save_pretrained(out)
    umask = os.umask(0)
    os.umask(umask)
    for file in out.glob("*.safetensors"):
        file.chmod(0o666 & ~umask)  # the library leaves them readable by their owner alone
    report["megabytes"] = round(sum(f.stat().st_size for f in out.iterdir() if f.is_file()) / 1e6, 2)
    (out / "pretrain.json").write_text(json.dumps(report, indent=2) + "\n")


def parse_args(argv=None) -> argparse.Namespace:
    parser = world.ground_floor().Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to; made if missing")
    parser.add_argument("--seed", type=int, default=0, help="seed of every stage (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; other counts round differently (default: %(default)s)"
    )
    size = parser.add_argument_group("size of the model")
    size.add_argument("--hidden", type=int, default=128, help="width of the language model (default: %(default)s)")
    size.add_argument("--layers", type=int, default=4, help="layers of the language model (default: %(default)s)")
    size.add_argument("--vision-hidden", type=int, default=96, help="width of the vision tower (default: %(default)s)")
    size.add_argument("--vision-layers", type=int, default=2, help="layers of the vision tower (default: %(default)s)")
    work = parser.add_argument_group("training")
    work.add_argument("--vq-steps", type=int, default=2600, help="steps of 16 pictures (default: %(default)s)")
    work.add_argument("--vision-steps", type=int, default=500, help="steps of 80 pictures (default: %(default)s)")
    work.add_argument("--joint-steps", type=int, default=1750, help="steps of stage 3 (default: %(default)s)")
    work.add_argument(
        "--joint-horizon", type=int, default=2200, help="steps of its learning rate's cosine (default: %(default)s)"
    )
    work.add_argument("--gap-steps", type=int, default=400, help="steps of stage 4 (default: %(default)s)")
    work.add_argument("--pictures", type=int, default=32, help="pictures to look at a step (default: %(default)s)")
    work.add_argument("--questions", type=int, default=2, help="yes/no questions a picture (default: %(default)s)")
    work.add_argument("--drawings", type=int, default=48, help="pictures to draw a step (default: %(default)s)")
    work.add_argument("--lr", type=float, default=1e-3, help="highest learning rate of stage 3 (default: %(default)s)")
    work.add_argument("--gap-lr", type=float, default=3e-4, help="highest learning rate of stage 4 (default: %(default)s)")
    work.add_argument("--noise", type=float, default=0.4, help="share of wrong captions in stage 4 (default: %(default)s)")
    work.add_argument(
        "--watch-every", type=int, default=250, help="steps between measurements on the way (default: %(default)s)"
    )
    work.add_argument(
        "--samples", type=int, default=8, help="pictures a held-out prompt in the last measurement (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, int) and name != "seed" and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, it must be at least 1")
    for flag, width in (("--hidden", args.hidden), ("--vision-hidden", args.vision_hidden)):
        if width % 8:
            parser.error(f"{flag} is {width}, it must be a multiple of 8: 4 heads of an even width")
    if not 0 <= args.noise <= 1:
        parser.error(f"--noise is {args.noise}, it must be from 0 to 1")
    if not args.lr > 0 or not args.gap_lr > 0:
        parser.error(f"--lr is {args.lr} and --gap-lr {args.gap_lr}, both must be more than 0")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out}: exists and is not a folder")
    return args


def main(args: argparse.Namespace) -> None:
    started = time.monotonic()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    processor = build_processor()
    encoder = Encoder(processor.tokenizer)
    model = build_model(processor.tokenizer, args)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} words")

    train_vq(model, args.vq_steps, args.seed)
    errors = round_trip_errors(model, 400, args.seed)
    print(f"VQ: the oracle misreads {errors:.2%} of round trips")
    seen = train_vision(model, args.vision_steps, args.seed)
    print(f"vision: {seen:.2%} of the cells named right")
    watch = lambda step: print(json.dumps({"step": step, **measure(model, encoder, args.seed, 2, (1.0,), painted=False)}))
    train_jointly(
        model, encoder, args, "draw and look", args.joint_steps, args.lr, args.seed, horizon=args.joint_horizon, watch=watch
    )
    before = measure(model, encoder, args.seed, args.samples, painted=False)
    train_jointly(model, encoder, args, "gap", args.gap_steps, args.gap_lr, args.seed + 1, noise=args.noise)

    report = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "torch": torch.__version__,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "vq_round_trip_errors": errors,
        "vision_cells_right": round(seen, 4),
        "before_the_gap": before,
        "heldout": measure(model, encoder, args.seed, args.samples),
    }
    save(model, processor, args.out, report)
    print(args.out)


if __name__ == "__main__":
    main(parse_args())

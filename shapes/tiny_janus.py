"""The tiny Janus of the shapes world: its files, and the stages it is taught in (see pretrain.py).

Shapes of tensors: B batch, L sequence length, T image tokens of a picture, D hidden size.
"""

import functools
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import (
    DynamicCache,
    JanusForConditionalGeneration,
    JanusProcessor,
)

sys.path.insert(0, str(Path(__file__).parent))
import lessons
import world
from teaching import (
    N_CODES,
    Schedule,
    T,
    Words,
    pairs_of_cells,
    random_cells,
    round_trip_errors,
    take_step,
    the_other,
    to_pixels,
    with_grain,
)
from tiny_janus_model import build_model, build_processor


def build(args) -> "TinyJanus":
    processor = build_processor()
    return TinyJanus(build_model(processor.tokenizer, args), processor)


def load(path: Path) -> "TinyJanus":
    """The learner that a checkpoint on disk is."""
    model = JanusForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    return TinyJanus(model, JanusProcessor.from_pretrained(path))


def to_pictures(pixels: torch.Tensor) -> np.ndarray:
    """float (B, 3, H, W) -> uint8 (B, H, W, 3), clamped and rounded."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


# The learner.


class TinyJanus:
    """A Janus being taught; see teaching.py for what its methods are for. Code i is cell picture i."""

    def __init__(self, model: JanusForConditionalGeneration, processor: JanusProcessor):
        self.model = self.network = model
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.width, self.lm_head = model.config.text_config.hidden_size, model.lm_head
        tokenizer = self.tokenizer
        ids = functools.cache(lambda text: tuple(tokenizer(text, add_special_tokens=False).input_ids))
        self.pad, self.bos = tokenizer.pad_token_id, tokenizer.bos_token_id
        self.boi, self.yes, self.no = tokenizer.convert_tokens_to_ids(["<begin_of_image>", "yes", "no"])
        self.words = Words(
            ids=ids,
            picture=(self.bos, *ids("<|User|>: <begin_of_image>" + "<image_placeholder>" * T + "<end_of_image>")),
            asking=(),
            reply=ids("<|Assistant|>:"),
            end=tokenizer.eos_token_id,
            pad=self.pad,
            both_ways=False,
        )

    # Prompts as the processor's template makes them, without calling it for every one of them.

    def generation_prompt(self, prompt: str) -> tuple[int, ...]:
        ids = self.words.ids
        return (self.bos, *ids("<|User|>:"), *ids(prompt), *self.words.reply, self.boi)

    def left_padded(self, sequences: list[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and attention mask, both int64 (B, L)."""
        length = max(map(len, sequences))
        ids = torch.tensor([(self.pad,) * (length - len(s)) + s for s in sequences])
        mask = torch.tensor([(0,) * (length - len(s)) + (1,) * len(s) for s in sequences])
        return ids, mask

    def unconditional(self, ids: torch.Tensor) -> torch.Tensor:
        """The prompts without their captions, as `generate` makes them for guidance: pads that are attended to."""
        return ids.masked_fill((ids != self.bos) & (ids != self.boi), self.pad)

    # What it is taught.

    def taught_parameters(self) -> list[nn.Parameter]:
        return [p for n, p in self.model.named_parameters() if "vqmodel" not in n]

    def drawing_loss(self, captions: list[str], dropped: torch.Tensor, cells: np.ndarray) -> torch.Tensor:
        ids, mask = self.left_padded([self.generation_prompt(caption) for caption in captions])
        ids = torch.where(dropped[:, None], self.unconditional(ids), ids)
        tokens = torch.from_numpy(cells)
        return F.cross_entropy(self.drawing_logits(ids, mask, tokens).flatten(0, 1), tokens.flatten())

    def drawing_logits(self, ids, mask, tokens) -> torch.Tensor:
        """Teacher-forced logits of the image tokens: prompts (B, L), tokens (B, T) -> (B, T, codes)."""
        model = self.model
        embeddings = [model.get_input_embeddings()(ids), model.prepare_embeddings_for_image_generation(tokens[:, :-1])]
        mask = torch.cat([mask, mask.new_ones(len(ids), T - 1)], 1)
        hidden = model.model.language_model(
            inputs_embeds=torch.cat(embeddings, 1), attention_mask=mask, position_ids=positions(mask), use_cache=False
        ).last_hidden_state
        return model.model.generation_head(hidden[:, -T:])

    def looking_states(self, batch: dict[str, torch.Tensor], cells: np.ndarray) -> tuple[torch.Tensor, ...]:
        pixels = with_grain(to_pixels(world.render_cells(cells)))
        embeddings = self.model.get_input_embeddings()(batch["ids"])
        features = self.model.model.get_image_features(pixels).pooler_output  # (B, T, D)
        first = self.words.picture.index(self.boi) + 1
        embeddings = torch.cat([embeddings[:, :first], features, embeddings[:, first + T :]], 1)
        return self.model.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=batch["mask"],
            position_ids=batch["positions"],
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states

    # What it can do.

    def tokens_of(self, cells: torch.Tensor) -> torch.Tensor:
        return cells

    def cells_of(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.model.vqmodel.encode(pixels).image_tokens.view(-1, T)

    @torch.no_grad()
    def paint(self, tokens: torch.Tensor) -> np.ndarray:
        """(B, T) image tokens -> uint8 (B, H, W, 3). Small batches are the fastest on a CPU."""
        return np.concatenate([to_pictures(self.model.model.vqmodel.decode(chunk)) for chunk in tokens.split(16)])

    @torch.no_grad()
    def sample(self, prompts: list[str], guidance: float, seed: int) -> torch.Tensor:
        """Image tokens (B, T) drawn for the prompts."""
        model, generator = self.model, torch.Generator().manual_seed(seed)
        ids, mask = self.left_padded([self.generation_prompt(prompt) for prompt in prompts])
        if guidance != 1:
            ids, mask = torch.cat([ids, self.unconditional(ids)]), torch.cat([mask, mask])
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
            tokens.append(torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0])
            following = tokens[-1] if guidance == 1 else tokens[-1].repeat(2)
            embeddings = model.prepare_embeddings_for_image_generation(following[:, None])
            mask, place = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), place[:, -1:] + 1
        return torch.stack(tokens, 1)

    @torch.no_grad()
    def judge(self, prompts: list[str], tokens: torch.Tensor, pictures: np.ndarray, wording: int = 0) -> np.ndarray:
        """P(yes) for each prompt and picture: float (B,). The tokens are not looked at."""
        head, tail = lessons.YES_NO[wording]
        answers = []
        for start in range(0, len(prompts), 128):
            chunk = prompts[start : start + 128]
            questions = [self.words.picture + self.words.question(head + prompt + tail) for prompt in chunk]
            ids, mask = self.left_padded(questions)
            hidden = self.model.model(
                input_ids=ids,
                pixel_values=to_pixels(pictures[start : start + 128]),
                attention_mask=mask,
                position_ids=positions(mask),
                use_cache=False,
            ).last_hidden_state[:, -1]
            answers.append(self.lm_head(hidden)[:, [self.yes, self.no]].softmax(-1)[:, 0])
        return torch.cat(answers).numpy()

    def save(self, out: Path) -> None:
        """The checkpoint, as float32."""
        self.model.save_pretrained(out)
        self.processor.save_pretrained(out)
        umask = os.umask(0)
        os.umask(umask)
        for file in out.glob("*.safetensors"):
            file.chmod(0o666 & ~umask)  # the library leaves them readable by their owner alone


# The stages that are its own.


def first_stages(learner: TinyJanus, args) -> dict:
    """Image tokenizer and vision tower; returns what was measured of them."""
    train_vq(learner.model, args.vq_steps, args.seed)
    errors = round_trip_errors(learner, 400, args.seed)
    print(f"VQ: the oracle misreads {errors:.2%} of round trips")
    seen = train_vision(learner.model, args.vision_steps, args.seed)
    print(f"vision: {seen:.2%} of the cells named right")
    return {"vq_round_trip_errors": errors, "vision_cells_right": round(seen, 4)}


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

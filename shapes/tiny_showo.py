"""The tiny Show-o of the shapes world: its files, and the stages it is taught in (see pretrain.py).

It has no vision tower: what it looks at are the codes that it draws, and training writes all its sequences by the functions
of showo.py that inference uses.

Shapes of tensors: B batch, L sequence length, T image tokens of a picture, D hidden size.
"""

import functools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import nn
from tqdm import tqdm
from transformers import PhiForCausalLM

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
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

from families import magvit, showo, showo_files
from families.family import pad_left
from families.showo_drawing import masked_positions

LEVELS = ((32, 1), (32, 1), (32, 1), (64, 1), (64, 1))  # four halvings: 48 pixels to 3 codes a side
BITS = 5


# The files.


def write_tokenizer(path: Path) -> int:
    """A word is a token, wherever it stands. Returns how many there are."""
    ids = {word: i for i, word in enumerate(["<unk>", *lessons.vocabulary(), "USER", "ASSISTANT", showo_files.TEXT_END])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.add_special_tokens([AddedToken(showo_files.TEXT_END, special=True)])
    tokenizer.save(str(path))
    return len(ids)


def build(args) -> "TinyShowO":
    """An untaught one, by way of the files that a real one has."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for part in showo_files.PARTS:
            (folder / part).mkdir()
        n_text = write_tokenizer(folder / "phi-1_5" / "tokenizer.json")
        n_all = n_text + len(showo_files.SPECIAL) + N_CODES + 1
        settings = {"_class_name": "Showo", "codebook_size": N_CODES, "llm_model_path": "microsoft/phi-1_5"}
        settings |= {"llm_vocab_size": n_text, "mask_token_id": n_all - 1, "num_vq_tokens": T, "vocab_size": n_all}
        (folder / "config.json").write_text(json.dumps(settings | {"w_clip_vit": False}, indent=2) + "\n")
        shape = {"model_type": "phi", "hidden_size": args.hidden, "intermediate_size": 2 * args.hidden}
        shape |= {"num_hidden_layers": args.layers, "num_attention_heads": 4, "max_position_embeddings": 512}
        (folder / "phi-1_5" / "config.json").write_text(json.dumps(shape, indent=2) + "\n")
        phi = PhiForCausalLM(showo_files.phi_config(shape, n_all))
        for parameter in phi.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0, 0.05)
        vq = magvit.MagViT(LEVELS, LEVELS, BITS)
        save_file(
            {f"showo.{key}": value for key, value in phi.state_dict().items()}, folder / showo_files.WEIGHTS, {"format": "pt"}
        )
        save_file(vq.state_dict(), folder / "magvitv2" / showo_files.WEIGHTS, {"format": "pt"})
        return TinyShowO(showo.load_showo(folder, "the tiny Show-o", torch.device("cpu"), torch.float32))


def load(path: Path) -> "TinyShowO":
    """The learner that a checkpoint on disk is."""
    return TinyShowO(showo.load_showo(path, str(path), torch.device("cpu"), torch.float32))


# The learner.


class LooksAtItsCodes:
    """What tiny models do alike that look at the very codes they draw, by way of their `policy`."""

    def states_of(self, decoder: nn.Module, ids: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Hidden states (B, L, D) of ids (B, L), which stand and see one another as a batch by `pack` says."""
        return decoder(
            input_ids=ids,
            attention_mask=batch["mask"],
            position_ids=batch["positions"],
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states

    def tokens_of(self, cells: torch.Tensor) -> torch.Tensor:
        """Two bits of a code say the shape and three the colour; the empty cell is the last code, all bits 1."""
        return (cells - 1) % N_CODES

    def cells_of(self, tokens: torch.Tensor) -> torch.Tensor:
        return (tokens + 1) % N_CODES

    def paint(self, tokens: torch.Tensor) -> np.ndarray:
        return self.policy.decode(tokens).numpy()

    def sample(self, prompts: list[str], guidance: float, seed: int) -> torch.Tensor:
        seeds = [seed * len(prompts) + i for i in range(len(prompts))]
        return self.policy.sample(prompts, 1, guidance=guidance, seeds=seeds)[:, 0]

    def judge(self, prompts: list[str], tokens: torch.Tensor, pictures: np.ndarray, wording: int = 0) -> np.ndarray:
        """The drawing is judged by its own codes."""
        head, tail = lessons.YES_NO[wording]
        return self.policy.judge(tokens, [[head + prompt + tail] for prompt in prompts], batch=128)[0][:, 0].numpy()

    def save(self, out: Path) -> None:
        """The checkpoint, as float32."""
        self.policy.save(out)


class TinyShowO(LooksAtItsCodes):
    """A Show-o being taught; see teaching.py for what its methods are for."""

    def __init__(self, policy: showo.ShowO):
        self.policy, self.network, self.tokenizer = policy, policy.model, policy.tokenizer
        self.width, self.lm_head = policy.language_model.config.hidden_size, policy.branch.lm_head
        ids = functools.cache(lambda text: tuple(policy.tokenizer(text, add_special_tokens=False).input_ids))
        self.words = Words(
            ids=ids,
            picture=tuple(policy.question_ids("")[0]),
            asking=(policy.sot, *ids("USER: \n")),
            reply=ids("ASSISTANT:"),
            end=policy.eot,
            pad=policy.pad,
            both_ways=True,
        )

    def taught_parameters(self) -> list[nn.Parameter]:
        return list(self.policy.model["showo"].parameters())

    def drawing_loss(self, captions: list[str], dropped: torch.Tensor, cells: np.ndarray) -> torch.Tensor:
        """Mean over the masked codes, as Show-o is trained: the share of masked ones is a cosine of a uniform number."""
        policy = self.policy
        rows = [policy._prompt_row([]) if drop else policy.prompt_ids(text) for text, drop in zip(captions, dropped.tolist())]
        ids, real = pad_left(rows, policy.pad, policy.device)
        counts = (T * torch.cos(torch.rand(len(rows)) * torch.pi / 2)).round().clamp(min=1).long()  # (B,)
        masked = torch.from_numpy(masked_positions(torch.rand(len(rows), T).numpy(), counts.numpy()))
        terms = policy.branch(ids, real, self.tokens_of(torch.from_numpy(cells)), masked[:, None])  # T / count * log p
        return -(terms * counts[:, None] / T).sum() / counts.sum()

    def looking_states(self, batch: dict[str, torch.Tensor], cells: np.ndarray) -> tuple[torch.Tensor, ...]:
        seen = self.policy.branch.image_ids(self.tokens_of(torch.from_numpy(cells)))
        ids = torch.cat([batch["ids"][:, :1], seen, batch["ids"][:, 1 + seen.shape[1] :]], 1)
        return self.states_of(self.policy.language_model, ids, batch)

    def code_states(self, cells: np.ndarray) -> tuple[torch.Tensor, ...]:
        """What `looking_states` gives of the codes alone, with no question behind them: each (B, T, D)."""
        ids = torch.tensor([self.words.picture] * len(cells))
        batch = {"ids": ids, "mask": torch.ones(1, 1, *ids.shape[1:] * 2, dtype=torch.bool)}
        batch["positions"] = torch.arange(ids.shape[1])[None]
        return tuple(state[:, 2:-1] for state in self.looking_states(batch, cells))

    def company(self, cells: torch.Tensor) -> list[torch.Tensor]:
        return company(cells)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.policy.model["magvitv2"].encode(pixels)


# The stages that are its own.


def first_stages(learner: TinyShowO, args) -> dict:
    """Image tokenizer, and a first look at its codes; returns what was measured of them."""
    train_vq(learner, args.vq_steps, args.seed)
    errors = round_trip_errors(learner, 400, args.seed)
    print(f"VQ: the oracle misreads {errors:.2%} of round trips")
    seen = train_vision(learner, args.vision_steps, args.seed)
    print(f"vision: {seen:.2%} of what there is to say of a code's place and company is right")
    return {"vq_round_trip_errors": errors, "places_and_company_right": round(seen, 4)}


def train_vq(learner: TinyShowO, steps: int, seed: int) -> None:
    """The encoder by binary cross-entropy to the bits of each cell's code, the decoder by squared error."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vq = learner.policy.model["magvitv2"]
    optimizer = torch.optim.AdamW(vq.parameters(), weight_decay=0.0, betas=(0.9, 0.98))
    schedule = Schedule(1e-3, steps, 50)
    bar = tqdm(range(steps), desc="VQ", mininterval=5)
    for step in bar:
        cells = random_cells(rng, 8, fullest=0.8)
        tokens, pixels = learner.tokens_of(torch.from_numpy(cells)), to_pixels(world.render_cells(cells))
        bits = (magvit.bits_of(tokens, BITS) + 1) / 2  # (B, T, bits)
        z = vq.encoder(with_grain(pixels)).flatten(2).transpose(1, 2)
        naming = F.binary_cross_entropy_with_logits(z, bits)
        painting = F.mse_loss(vq.decode(tokens), pixels)
        take_step(optimizer, naming + 10 * painting, schedule(step))
        if step % 20 == 0:
            bar.set_postfix(naming=f"{naming.item():.4f}", painting=f"{painting.item():.5f}", refresh=False)


def company(cells: torch.Tensor) -> list[torch.Tensor]:
    """What there is to say of each cell of a picture, (B, T) each; -100 where there is nothing.

    How many objects there are, how many of its shape, how many of its kind; its row and column; in a picture of two
    objects, where the other one is (see `the_other`).
    """
    there, kind = cells > 0, (cells - 1).clamp(min=0)
    alike = lambda what: ((what[:, :, None] == what[:, None, :]) & there[:, None]).sum(2).where(there, torch.tensor(-100))
    place = torch.arange(T)
    rows, columns = (place // world.GRID).expand_as(cells), (place % world.GRID).expand_as(cells)
    counts = [there.sum(1, keepdim=True).expand_as(cells), alike(kind % len(world.SHAPES)), alike(kind)]
    return [*counts, rows, columns, the_other(cells, columns), the_other(cells, rows)]


def train_vision(learner, steps: int, seed: int) -> float:
    """The state of every code says where it stands and what there is beside it; returns the share said right at the end.

    Of any model that looks at its codes: tiny_tar.py's is taught so too. Half-way up the language model, so that looking and
    drawing can look it up instead of working it out; read through noise as in tiny_janus.py. What this minute saves later was
    not measured by itself.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    sizes = [T + 1, T + 1, T + 1, world.GRID, world.GRID, 3, 3]
    probe = nn.Linear(learner.width, sum(sizes))
    optimizer = torch.optim.AdamW([*learner.taught_parameters(), *probe.parameters()], betas=(0.9, 0.98), weight_decay=0.01)
    schedule, right = Schedule(1e-3, steps, 20, floor=0.1), 0.0
    bar = tqdm(range(steps), desc="vision", mininterval=5)
    for step in bar:
        cells = np.concatenate([random_cells(rng, 48, fullest=0.8), pairs_of_cells(rng, 32)])
        states = learner.code_states(cells)
        features = F.rms_norm(states[(len(states) - 1) // 2], (learner.width,))
        answers = probe(features + torch.randn_like(features)).split(sizes, -1)
        truths = learner.company(torch.from_numpy(cells))
        loss = sum(F.cross_entropy(logits.flatten(0, 1), truth.flatten()) for logits, truth in zip(answers, truths))
        take_step(optimizer, loss, schedule(step))
        told = torch.cat([(logits.argmax(-1) == truth)[truth >= 0] for logits, truth in zip(answers, truths)])
        right = 0.9 * right + 0.1 * told.float().mean().item()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", right=f"{right:.4f}", refresh=False)
    return right

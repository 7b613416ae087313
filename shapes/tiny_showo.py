"""The tiny Show-o of the shapes world: its files, and the stages it is taught in (see pretrain.py).

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
from teaching import N_CODES, Schedule, T, Words, random_cells, round_trip_errors, take_step, to_pixels, with_grain

import showo
from model import pad_left

LEVELS = ((32, 1), (32, 1), (32, 1), (64, 1), (64, 1))  # four halvings: 48 pixels to 3 codes a side
BITS = 5


# The files.


def write_tokenizer(path: Path) -> int:
    """A word is a token, wherever it stands. Returns how many there are."""
    ids = {word: i for i, word in enumerate(["<unk>", *lessons.vocabulary(), "USER", "ASSISTANT", showo.TEXT_END])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.add_special_tokens([AddedToken(showo.TEXT_END, special=True)])
    tokenizer.save(str(path))
    return len(ids)


def build(args) -> "TinyShowO":
    """An untaught one, by way of the files that a real one has."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for part in showo.PARTS:
            (folder / part).mkdir()
        n_text = write_tokenizer(folder / "phi-1_5" / "tokenizer.json")
        n_all = n_text + len(showo.SPECIAL) + N_CODES + 1
        settings = {"_class_name": "Showo", "codebook_size": N_CODES, "llm_model_path": "microsoft/phi-1_5"}
        settings |= {"llm_vocab_size": n_text, "mask_token_id": n_all - 1, "num_vq_tokens": T, "vocab_size": n_all}
        (folder / "config.json").write_text(json.dumps(settings | {"w_clip_vit": False}, indent=2) + "\n")
        shape = {"model_type": "phi", "hidden_size": args.hidden, "intermediate_size": 4 * args.hidden}
        shape |= {"num_hidden_layers": args.layers, "num_attention_heads": 4, "max_position_embeddings": 512}
        (folder / "phi-1_5" / "config.json").write_text(json.dumps(shape, indent=2) + "\n")
        phi = PhiForCausalLM(showo.phi_config(shape, n_all))
        for parameter in phi.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0, 0.05)
        vq = showo.MagViT(LEVELS, LEVELS, BITS)
        save_file({f"showo.{key}": value for key, value in phi.state_dict().items()}, folder / showo.WEIGHTS, {"format": "pt"})
        save_file(vq.state_dict(), folder / "magvitv2" / showo.WEIGHTS, {"format": "pt"})
        return TinyShowO(showo.load_showo(folder, "the tiny Show-o", torch.device("cpu"), torch.float32))


# The learner.


class TinyShowO:
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
        masked = torch.from_numpy(showo.masked_positions(torch.rand(len(rows), T).numpy(), counts.numpy()))
        terms = policy.branch(ids, real, self.tokens_of(torch.from_numpy(cells)), masked[:, None])  # T / count * log p
        return -(terms * counts[:, None] / T).sum() / counts.sum()

    def looking_states(self, batch: dict[str, torch.Tensor], cells: np.ndarray) -> tuple[torch.Tensor, ...]:
        seen = self.policy.branch.image_ids(self.tokens_of(torch.from_numpy(cells)))
        ids = torch.cat([batch["ids"][:, :1], seen, batch["ids"][:, 1 + seen.shape[1] :]], 1)
        return self.policy.language_model(
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

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.policy.model["magvitv2"].encode(pixels)

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


# The stage that is its own.


def first_stages(learner: TinyShowO, args) -> dict:
    """The image tokenizer; returns what was measured of it."""
    train_vq(learner, args.vq_steps, args.seed)
    errors = round_trip_errors(learner, 400, args.seed)
    print(f"VQ: the oracle misreads {errors:.2%} of round trips")
    return {"vq_round_trip_errors": errors}


def train_vq(learner: TinyShowO, steps: int, seed: int) -> None:
    """The encoder by binary cross-entropy to the bits of each cell's code, the decoder by squared error."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vq = learner.policy.model["magvitv2"]
    optimizer = torch.optim.AdamW(vq.parameters(), weight_decay=0.0, betas=(0.9, 0.98))
    schedule = Schedule(2e-3, steps, 50)
    bar = tqdm(range(steps), desc="VQ", mininterval=5)
    for step in bar:
        cells = random_cells(rng, 8, fullest=0.8)
        tokens, pixels = learner.tokens_of(torch.from_numpy(cells)), to_pixels(world.render_cells(cells))
        bits = (showo.bits_of(tokens, BITS) + 1) / 2  # (B, T, bits)
        z = vq.encoder(with_grain(pixels)).flatten(2).transpose(1, 2)
        naming = F.binary_cross_entropy_with_logits(z, bits)
        painting = F.mse_loss(vq.decode(tokens), pixels)
        take_step(optimizer, naming + 10 * painting, schedule(step))
        if step % 20 == 0:
            bar.set_postfix(naming=f"{naming.item():.4f}", painting=f"{painting.item():.5f}", refresh=False)

"""The tiny Tar of the shapes world: its files, and the stages it is taught in (see pretrain.py).

A Qwen2 in whose vocabulary the image codes are, written as csuhan/Tar-1.5B is. It looks at the codes that it draws, one after
the other both times. Its codes are those of the tiny Show-o, whose image tokenizer lies beside it.

Shapes of tensors: B batch, L sequence length, T image tokens of a picture, D hidden size.
"""

import functools
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import lessons
import tiny_showo
import world
from teaching import N_CODES, T, Words, round_trip_errors

from families import codes, codes_files, magvit
from families.family import pad_right

PICTURES = codes_files.PICTURES[magvit.MagViT]
SHOWO = Path(__file__).parent / "showo" / PICTURES
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ADDED = ("<im_start>", "<im_end>", "<S0>", "<S1>", "<S2>")
TEMPLATE = codes_files.TEMPLATES[0]


# The files.


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token, wherever it stands; the codes come last."""
    words = [*SPECIAL, "<unk>", *lessons.vocabulary(), *"system user assistant You are helpful".split(), *ADDED]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (*SPECIAL, *ADDED)])
    tokenizer.add_tokens([TEMPLATE.code.format(code) for code in range(N_CODES)])
    pad, _, end = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token="<unk>")


def build_config(args, tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,  # as the 7B's
        initializer_range=0.05,
        **{codes_files.LENGTH: T, codes_files.DROPPED: True},
    )


def build(args) -> "TinyTar":
    """An untaught one with the tiny Show-o's image tokenizer, by way of the files that a real one has."""
    with tempfile.TemporaryDirectory() as made:
        folder, tokenizer = Path(made), build_tokenizer()
        model = AutoModelForCausalLM.from_config(build_config(args, tokenizer))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / PICTURES).parent.mkdir()
        shutil.copy(SHOWO, folder / PICTURES)
        policy = codes.load_codes(folder, "the tiny Tar", torch.device("cpu"), torch.float32)
    policy.directory = None  # it is nowhere now
    return TinyTar(policy)


# The learner.


def load(path: Path) -> "TinyTar":
    """The learner that a checkpoint on disk is."""
    return TinyTar(codes.load_codes(path, str(path), torch.device("cpu"), torch.float32))


class TinyTar(tiny_showo.LooksAtItsCodes):
    """A Tar being taught; see teaching.py for what its methods are for."""

    def __init__(self, policy: codes.CodesInVocabulary):
        self.policy, self.network, self.tokenizer = policy, policy.model, policy.tokenizer
        self.width, self.lm_head = policy.llama.config.hidden_size, policy.head
        ids = functools.cache(lambda text: tuple(policy.tokenizer(text, add_special_tokens=False).input_ids))
        self.words = Words(
            ids=ids,
            picture=tuple(policy.question_ids("")[0]),
            asking=(),
            reply=tuple(policy.question_ids("")[1]),
            end=policy.tokenizer.eos_token_id,
            pad=policy.pad,
            both_ways=False,
        )

    def taught_parameters(self) -> list[nn.Parameter]:
        return list(self.network.parameters())

    def drawing_loss(self, captions: list[str], dropped: torch.Tensor, cells: np.ndarray) -> torch.Tensor:
        """Over the whole vocabulary, as a Tar is trained: that a code follows is learnt too."""
        policy = self.policy
        rows = [policy.prompt_ids(caption) for caption in captions]
        rows = [policy._unconditional(row) if drop else row for row, drop in zip(rows, dropped.tolist())]
        image = self.tokens_of(torch.from_numpy(cells)) + policy.branch.first_code  # (B, T)
        ids = pad_right([row + codes for row, codes in zip(rows, image.tolist())], policy.pad, policy.device)
        hidden = policy.llama(input_ids=ids, use_cache=False).last_hidden_state  # pads come last: no mask
        last = torch.tensor([len(row) - 1 for row in rows])
        predicts = hidden[torch.arange(len(rows))[:, None], last[:, None] + torch.arange(T)]  # (B, T, D)
        return F.cross_entropy(self.lm_head(predicts).flatten(0, 1), image.flatten())

    def looking_states(self, batch: dict[str, torch.Tensor], cells: np.ndarray) -> tuple[torch.Tensor, ...]:
        end = len(self.words.picture)
        seen = self.tokens_of(torch.from_numpy(cells)) + self.policy.branch.first_code
        ids = torch.cat([batch["ids"][:, : end - T], seen, batch["ids"][:, end:]], 1)
        return self.states_of(self.policy.llama, ids, batch)

    def code_states(self, cells: np.ndarray) -> tuple[torch.Tensor, ...]:
        ids = torch.tensor([self.words.picture] * len(cells))
        causal = torch.ones(1, 1, *ids.shape[1:] * 2, dtype=torch.bool).tril()
        batch = {"ids": ids, "mask": causal, "positions": torch.arange(ids.shape[1])[None]}
        return tuple(state[:, -T:] for state in self.looking_states(batch, cells))

    def company(self, cells: torch.Tensor) -> list[torch.Tensor]:
        """What there is to say of each cell with those before it, (B, T) each; -100 where there is nothing.

        As `tiny_showo.company`, but a code does not see those that follow: counts are of what was so far, and of two objects
        the second says where the first is.
        """
        there, kind = cells > 0, (cells - 1).clamp(min=0)
        seen = there[:, None] & torch.ones(T, T, dtype=torch.bool).tril()  # (B, T, T): row a place, column what it sees
        alike = lambda what: ((what[:, :, None] == what[:, None]) & seen).sum(2).where(there, torch.tensor(-100))
        place = torch.arange(T)
        rows, columns = (place // world.GRID).expand_as(cells), (place % world.GRID).expand_as(cells)
        counts = [there.cumsum(1), alike(kind % len(world.SHAPES)), alike(kind)]
        second = there & (there.cumsum(1) == 2)
        others = [tiny_showo.the_other(cells, places).where(second, torch.tensor(-100)) for places in (columns, rows)]
        return [*counts, rows, columns, *others]

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.policy.vq.encode(pixels)


# The stages that are its own.


def first_stages(learner: TinyTar, args) -> dict:
    """A first look at the codes; returns what was measured of it, and of the image tokenizer, which is taught already."""
    errors = round_trip_errors(learner, 400, args.seed)
    print(f"VQ: the oracle misreads {errors:.2%} of round trips")
    seen = tiny_showo.train_vision(learner, args.vision_steps, args.seed)
    print(f"vision: {seen:.2%} of what there is to say of a code's place and company is right")
    return {"vq_round_trip_errors": errors, "places_and_company_right": round(seen, 4)}

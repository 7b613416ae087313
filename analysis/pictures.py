"""Pictures for people: tokens of scored files decoded by a model, and what it draws as the bytes of an HTML page.

The decoder never trains, so any model of a run draws all its pictures.
"""

import base64
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.answers import answer_form
from common.command import BadInput, progress_bar
from common.memory import memory_advice
from common.ranks import Ranks
from common.records import EASY, REPLIES, SCORED, Row, Tokens, read_rows

if TYPE_CHECKING:
    from model import UnifiedModel

TINY_SIDE = 128  # pixels: smaller pictures are kept as they are and enlarged by the browser in whole steps
MAX_SIDE = 320  # pixels a side: larger pictures are scaled down to it, half as much again as what is shown

PictureKey = tuple[Path, int]  # token file, row


# ---------------------------------------------------------------------------------------------------------------------
# The model that decodes


def check_decoder(policy: "UnifiedModel", name: str, tokens: Tokens) -> None:
    """Raise BadInput for a model to which the tokens mean something else."""
    if (policy.codebook_size, policy.image_tokens) != (tokens.codebook_size, tokens.length):
        raise BadInput(
            f"{tokens.path}: holds pictures of {tokens.length} tokens of a codebook of {tokens.codebook_size}, "
            f"but {name} draws {policy.image_tokens} of {policy.codebook_size}"
        )


def find_decoder(
    files: Iterable[Tokens], run: Path, given: str | None, device: str | None, ranks: Ranks
) -> tuple[Any | None, str]:
    """(model, "") or (None, the reason why there is none): `given`, else one that the files name or that lies in the run.

    A model that came without what decodes is none, and so are the others of its run.

    Without `given` nothing is fetched from the hub. Raises BadInput where the model does not fit one of the files.
    """
    files = list(files)
    named = list(dict.fromkeys(tokens.metadata.get("model", "") for tokens in files))
    local = [name for name in named if Path(name).is_absolute() and Path(name).is_dir()]
    local += [str(path) for path in sorted(run.glob("round*/model")) if path.is_dir()]
    hub = [name for name in named if name and not Path(name).is_absolute()]
    if not given:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a page is not worth gigabytes; what is in the cache is found

    from families.pretrained import CheckpointError
    from model import load, no_decoder  # after the cheap checks: torch takes seconds

    ranks.join(device)
    reasons = [f"{name or 'the model'} is not there" for name in named if name not in local + hub]
    for name in [given] if given else [*local, *hub]:
        try:
            if reason := no_decoder(name):  # known before gigabytes are read; the others of its run have none either
                return None, reason
            policy = load(name, device=ranks.device)
        except CheckpointError as error:
            if given:
                raise
            reasons.append(str(error))
            continue
        for tokens in files:
            check_decoder(policy, name, tokens)
        return policy, ""
    return None, "; ".join(reasons)


def decode(policy: "UnifiedModel", tokens: np.ndarray, batch: int) -> np.ndarray:
    """Image tokens (B, T) -> pictures (B, H, W, 3) uint8; where memory does not suffice the message names --batch."""
    import torch

    with memory_advice(f"decoding with --batch {batch}", f"--batch {max(1, batch // 2)}", policy.device):
        return policy.decode(torch.from_numpy(tokens).to(policy.device), batch=batch).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# On a page


def picture_key(row: Row) -> PictureKey:
    return row["tokens"].path, row["row"]


def picture_side(policy: "UnifiedModel", row: Row) -> int:
    """The larger side of a model's pictures, in pixels."""
    return max(decode(policy, row["tokens"][[row["row"]]], 1).shape[1:3])


def data_uri(picture: np.ndarray) -> str:
    """A picture (H, W, 3) uint8 as a data URI: tiny ones exact, larger ones scaled down, as PNG or JPEG by size."""
    from PIL import Image

    image = Image.fromarray(picture)
    kinds: dict[str, dict[str, Any]] = {"png": {"optimize": True}}
    if max(picture.shape[:2]) > TINY_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        kinds["jpeg"] = {"quality": 82}
    uris = []
    for kind, options in kinds.items():
        data = io.BytesIO()
        image.save(data, kind, **options)
        uris.append(f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}")
    return min(uris, key=len)


def add_replies(rows: list[Row]) -> None:
    """Give rows of files that were judged by replies `replies`: (foil, "" for the own prompt; what was written) of each.

    Training data have none: they stand in the scored files that they were made of.
    """
    files = {row["tokens"].path: row["tokens"].metadata for row in rows}
    for path, header in files.items():
        if header.get("kind") != "scored" or answer_form(header) != "reply":
            continue
        wanted = {
            row["row"]: [one for one in rows if picture_key(one) == picture_key(row)]
            for row in rows
            if row["tokens"].path == path
        }
        for _, scored in read_rows(path.with_suffix(".jsonl"), SCORED, EASY | REPLIES):
            for row in wanted.get(scored["row"], []):
                about = {"reply": "", "reply_foil": scored["foil"], "reply_easy_foil": scored.get("easy_foil", "")}
                row["replies"] = [(foil, scored[name]) for name, foil in about.items() if name in scored]


def data_uris(policy: "UnifiedModel", rows: list[Row], batch: int) -> dict[PictureKey, str]:
    """Data URIs of the rows' pictures."""
    wanted = list({picture_key(row): row for row in rows}.values())
    uris = {}
    with progress_bar(len(wanted), "picture") as bar:
        for start in range(0, len(wanted), batch):
            part = wanted[start : start + batch]
            pictures = decode(policy, np.concatenate([row["tokens"][[row["row"]]] for row in part]), batch)  # (b, H, W, 3)
            for row, picture in zip(part, pictures, strict=True):
                uris[picture_key(row)] = data_uri(picture)
            bar.update(len(part))
    return uris

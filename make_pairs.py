"""Turn a model's judgement of its own pictures into training data, behind a data-quality gate.

Reads one or several scored.jsonl (+ .safetensors). Writes into a directory, all of it or nothing:

    sft.jsonl      every aligned candidate: P(yes) > threshold
    pairs.jsonl    chosen = the aligned candidate with the highest P(yes), rejected = the other with the lowest
    discard.jsonl  the prompts with no aligned candidate, which the curriculum replays

and the pictures' tokens in sft.safetensors and pairs.safetensors. Rows are joined by id in a temporary database on disk
(about 100 bytes a row), so that memory does not grow with their number. Where the model says yes to everything, or to
foils as to the right prompts, its judgement is no training data: the gate refuses (exit code 3) and says why.

    python make_pairs.py --scored round1/scored.jsonl --out round1

Departures from the paper (arXiv 2507.16663): the gate; `--pairs-per-prompt` and `--per-prompt` (off by default).
"""

import argparse
import contextlib
import itertools
import json
import os
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.command import BadInput, Parser, QualityRefusal, check_parent, run_script
from common.records import SCORED, Tokens, TokenWriter, read_rows
from common.writing import check_space, whole_file

COPIED = (
    *("model", "model_hash", "judge", "judge_hash", "seed", "guidance", "temperature", "steps", "questions"),
    *("codebook_size", "image_tokens", "versions"),
)
MEASURED = {"separation", "coverage", "forced", "versions"}  # may differ between two runs of one command
# In the order in which they appear: tensors before the rows that point into them, discard.jsonl when all are there.
OUTPUTS = ("sft.safetensors", "pairs.safetensors", "sft.jsonl", "pairs.jsonl", "discard.jsonl")
BLOCK = 128  # pictures copied at a time: reading one may map 2 MiB of its file
ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
BYTES_A_ROW = 400  # of JSONL, generously
CACHE_MIB = 64  # of the database; what does not fit is on disk


# ---------------------------------------------------------------------------------------------------------------------
# The rules


class Candidate(NamedTuple):
    """One judged picture: which scored file, the candidate's number there, its row in the tokens, and P(yes)."""

    source: int
    candidate: int
    row: int
    p_yes: float


class Settings(NamedTuple):
    """What decides about a prompt's candidates; the flags of the same names."""

    threshold: float = 0.5
    margin: float = 0.0
    per_prompt: int = 0
    pairs_per_prompt: int = 1


class Selection(NamedTuple):
    """What one prompt gives: SFT pictures, (chosen, rejected) pairs, and how many candidates and pairs were judged."""

    sft: list[Candidate]
    pairs: list[tuple[Candidate, Candidate]]
    accepted: int
    too_close: int


def select(candidates: list[Candidate], settings: Settings) -> Selection:
    """Choose from all candidates of one prompt. Ties in P(yes) go to the earlier file, then to the lower number."""
    order = sorted(candidates)
    best = sorted((one for one in order if one.p_yes > settings.threshold), key=lambda one: -one.p_yes)
    worst = sorted((one for one in order if one.p_yes <= settings.threshold), key=lambda one: one.p_yes)
    paired = list(zip(best, worst, strict=False))[: settings.pairs_per_prompt]  # k-th best with k-th worst
    # 0.7 - 0.2 is under 0.5 in floating point: a distance equal to the margin in decimals has to pass
    pairs = [(one, other) for one, other in paired if one.p_yes - other.p_yes > settings.margin - 1e-9]
    return Selection(best[: settings.per_prompt or None], pairs, len(best), len(paired) - len(pairs))


class Quality(NamedTuple):
    """What the gate looks at, over all candidates."""

    separation: float  # mean P(yes, own prompt) - mean P(yes, foil)
    coverage: float  # mean share of the distribution that yes and no hold
    accepted: int
    candidates: int


def quality_problems(quality: Quality, min_separation: float, min_coverage: float) -> list[str]:
    """Why these judgements should not become training data, a sentence each; empty if they may."""
    problems = []
    if quality.separation < min_separation:
        problems.append(f"separation {quality.separation:.4g} is under {min_separation:g}: foils get about the same P(yes)")
    if quality.coverage < min_coverage:
        problems.append(f"coverage {quality.coverage:.4g} is under {min_coverage:g}: the answers are not yes or no")
    if quality.accepted == quality.candidates:
        problems.append(f"all {quality.candidates} candidates were accepted")
    if quality.accepted == 0:
        problems.append(f"all {quality.candidates} candidates were rejected")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Source(NamedTuple):
    """A scored file as it was named, and its pictures."""

    path: str
    tokens: Tokens

    def drawn_by(self) -> tuple[str, ...]:
        """What decides, with id and candidate, what a picture looks like."""
        metadata = self.tokens.metadata
        return tuple(metadata.get(key, "") for key in ("model_hash", "seed", "guidance", "temperature", "steps"))


def open_sources(paths: list[str], mix_models: bool) -> list[Source]:
    """Open the scored files' tensors. Raises BadInput unless they fit together."""
    sources = [Source(path, Tokens(path)) for path in paths]
    first = sources[0].tokens
    for source in sources:
        tokens = source.tokens
        for key in ("model", "model_hash"):
            if not tokens.metadata.get(key):
                raise BadInput(f"{tokens.path}: metadata {key} is missing: which model drew these pictures?")
        if tokens.length != first.length:
            raise BadInput(f"{tokens.path}: {tokens.length} tokens a picture, but {first.path} has {first.length}")
        if tokens.codebook_size != first.codebook_size:
            raise BadInput(f"{tokens.path}: codebook of {tokens.codebook_size}, but {first.path}: {first.codebook_size}")
        if tokens.metadata["model_hash"] != first.metadata["model_hash"] and not mix_models:
            drawn = [f"{it.path} by {it.metadata['model']} ({it.metadata['model_hash']})" for it in (first, tokens)]
            raise BadInput(f"drawn by different models: {' and '.join(drawn)}; --mix-models allows it")
    return sources


def open_database() -> sqlite3.Connection:
    """An empty temporary database: on disk beyond its cache, without a name, gone when closed."""
    database = sqlite3.connect("", isolation_level=None)
    database.execute("PRAGMA journal_mode = OFF")  # nothing to recover: a stopped run starts again from the files
    database.execute("PRAGMA synchronous = OFF")
    database.execute(f"PRAGMA cache_size = {-1024 * CACHE_MIB}")
    database.execute("CREATE TABLE prompts (number INTEGER PRIMARY KEY, id TEXT UNIQUE, prompt TEXT, category TEXT)")
    database.execute(
        "CREATE TABLE candidates (prompt INTEGER, source INTEGER, candidate INTEGER, row INTEGER, p_yes REAL,"
        " p_yes_foil REAL, coverage REAL, PRIMARY KEY (prompt, source, candidate)) WITHOUT ROWID"
    )
    database.execute("BEGIN")
    return database


def insert_prompt(database: sqlite3.Connection, row: dict[str, Any], where: str) -> int:
    """The number of a row's prompt, counted from 1 by first appearance. Raises BadInput if its id means another one."""
    found = database.execute("SELECT number, prompt, category FROM prompts WHERE id = ?", (row["id"],)).fetchone()
    if found is None:
        texts = (row["id"], row["prompt"], row["category"])
        inserted = database.execute("INSERT INTO prompts (id, prompt, category) VALUES (?, ?, ?)", texts).lastrowid
        assert inserted is not None
        return inserted
    number, *known = found
    for key, text in zip(("prompt", "category"), known, strict=True):
        if row[key] != text:
            raise BadInput(f"{where}: id {row['id']!r} has {key} {row[key][:80]!r} here and {text[:80]!r} before")
    return number


def insert_scored(database: sqlite3.Connection, index: int, source: Source) -> None:
    """Read one scored file into the database. Raises BadInput, naming file and line, for a row that does not fit."""
    source.tokens.check_values()
    where = ""
    row: dict[str, Any] = {"id": None}

    def rows() -> Iterator[tuple]:
        nonlocal where, row
        known: dict[str, Any] = {}  # the row before: candidates of a prompt usually follow each other
        for line, row in read_rows(source.path, SCORED):
            where = f"{source.path}:{line}"
            source.tokens.check_row(row["row"], where)
            if any(row[key] != known.get(key) for key in ("id", "prompt", "category")):
                known, number = row, insert_prompt(database, row, where)
            yield number, index, row["candidate"], row["row"], row["p_yes"], row["p_yes_foil"], row["coverage"]

    try:
        database.executemany("INSERT INTO candidates VALUES (?, ?, ?, ?, ?, ?, ?)", rows())
    except sqlite3.IntegrityError:  # rows are inserted as they are read, so the last one read is the culprit
        raise BadInput(f"{where}: candidate {row['candidate']} of id {row['id']!r} is given twice") from None
    if not where:
        raise BadInput(f"{source.path}: holds no scored candidate")


def check_same_pictures(database: sqlite3.Connection, sources: list[Source]) -> None:
    """Raise BadInput if a picture comes in twice: from files drawn alike, one perhaps a re-judged copy of the other."""
    twice = (
        "SELECT prompts.id, one.candidate FROM candidates AS one JOIN candidates AS other"
        " ON other.prompt = one.prompt AND other.source = ? AND other.candidate = one.candidate"
        " JOIN prompts ON prompts.number = one.prompt WHERE one.source = ? LIMIT 1"
    )
    for (first, one), (second, other) in itertools.combinations(enumerate(sources), 2):
        if one.drawn_by() != other.drawn_by():
            continue
        if found := database.execute(twice, (second, first)).fetchone():
            raise BadInput(
                f"{other.path}: holds pictures of {one.path} (same model, seed, guidance, temperature and steps): candidate "
                f"{found[1]} of id {found[0]!r}; give one of the two"
            )


def prompts_with_candidates(database: sqlite3.Connection) -> Iterator[tuple[dict[str, str], list[Candidate]]]:
    """Each prompt (id, prompt, category) with its candidates of all files, by first appearance; one at a time."""
    rows = database.execute(
        "SELECT candidates.prompt, id, prompts.prompt, category, source, candidate, row, p_yes"
        " FROM candidates JOIN prompts ON number = candidates.prompt ORDER BY candidates.prompt, source, candidate"
    )
    for _, group in itertools.groupby(rows, key=lambda row: row[0]):
        found = list(group)
        prompt = dict(zip(("id", "prompt", "category"), found[0][1:4], strict=True))
        yield prompt, [Candidate(*row[4:]) for row in found]


# ---------------------------------------------------------------------------------------------------------------------
# Counting, before anything is written

COLUMNS = ("prompts", "candidates", "accepted", "sft", "pairs", "discard")


def measure(database: sqlite3.Connection, threshold: float) -> Quality:
    """The gate's numbers over all candidates."""
    return Quality(
        *database.execute(
            "SELECT avg(p_yes - p_yes_foil), avg(coverage), sum(p_yes > ?), count(*) FROM candidates", (threshold,)
        ).fetchone()
    )


def count_selected(database: sqlite3.Connection, settings: Settings) -> dict[str, Counter]:
    """COLUMNS, what is dropped, and the sum over prompts of the share not aligned; per category."""
    table: dict[str, Counter] = {}
    for prompt, candidates in prompts_with_candidates(database):
        selection = select(candidates, settings)
        counts: Any = table.setdefault(prompt["category"], Counter())  # of integers, but for a sum of shares
        counts["prompts"] += 1
        counts["candidates"] += len(candidates)
        counts["accepted"] += selection.accepted
        counts["sft"] += len(selection.sft)
        counts["pairs"] += len(selection.pairs)
        counts["discard"] += selection.accepted == 0
        counts["too_close"] += selection.too_close
        counts["nonunified"] += 1 - selection.accepted / len(candidates)
    return table


def format_table(table: dict[str, Counter]) -> str:
    """An aligned text table: categories down, COLUMNS and the nonunified score across, a total."""
    rows = [["category", *COLUMNS, "nonunified"]]
    for category, counts in [*table.items(), ("total", sum(table.values(), Counter()))]:
        score = f"{counts['nonunified'] / counts['prompts']:.3f}"
        rows.append([category, *(str(counts[column]) for column in COLUMNS), score])
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    # text to the left, numbers to the right
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def print_report(table: dict[str, Counter], quality: Quality, problems: list[str], args: argparse.Namespace) -> None:
    """What becomes of the candidates, everything that is dropped, and the gate's numbers whatever it decides."""
    total = sum(table.values(), Counter())
    print(format_table(table))
    print(f"nonunified score {total['nonunified'] / total['prompts']:.4f}, mean over {total['prompts']} prompts")
    print(
        f"dropped: {total['too_close']} pairs by --margin {args.margin:g}, "
        f"{total['accepted'] - total['sft']} aligned pictures by --per-prompt {args.per_prompt}"
    )
    print(
        f"gate: separation {quality.separation:.4f} (least {args.min_separation:g}), "
        f"coverage {quality.coverage:.4f} (least {args.min_coverage:g}), accepted {quality.accepted} of "
        f"{quality.candidates} ({quality.accepted / quality.candidates:.1%}): "
        f"{('forced' if args.force else 'refused') if problems else 'passed'}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def describe(sources: list[Source], settings: Settings) -> dict[str, str]:
    """The outputs' metadata as far as files and flags decide it; the model is that of the last scored file."""
    last = sources[-1].tokens
    metadata = {key: last.metadata[key] for key in COPIED if key in last.metadata}
    metadata |= {key: str(value) for key, value in settings._asdict().items()}
    metadata["image_tokens"] = str(last.length)
    metadata["sources"] = json.dumps([source.path for source in sources])
    if len({source.tokens.metadata["model_hash"] for source in sources}) > 1:
        metadata["models"] = json.dumps(sorted({source.tokens.metadata["model"] for source in sources}))
    return metadata


def check_out(out: Path, metadata: dict[str, str]) -> None:
    """Raise BadInput unless `out` can be written: its parent is there, and it holds nothing of another run."""
    check_parent(out / "sft.jsonl" if out.is_dir() else out)
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out}: is a file, a directory is wanted")
    found = [name for name in OUTPUTS if (out / name).exists()]
    if found and not any(name.endswith(".safetensors") for name in found):
        raise BadInput(f"--out {out}: holds {found[0]}, but no safetensors file that says where it comes from")
    for stem in ("sft", "pairs"):
        if f"{stem}.safetensors" not in found:
            continue
        there = Tokens(out / f"{stem}.jsonl").metadata
        ours = metadata | {"kind": stem}
        for key in sorted((there.keys() | ours.keys()) - MEASURED):
            if there.get(key) != ours.get(key):
                raise BadInput(
                    f"--out {out}: holds another run: in {stem}.safetensors {key} is {there.get(key)}, now it would be "
                    f"{ours.get(key)}; choose another directory or delete sft, pairs and discard there"
                )


@contextlib.contextmanager
def directory(path: Path) -> Iterator[None]:
    """Make `path` where it is missing; take it away again if the block fails."""
    made = not path.exists()
    path.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


class PictureCopy:
    """Copies pictures, a block at a time, from the scored files into a new safetensors file."""

    def __init__(self, file: Any, rows: int, sources: list[Source], metadata: dict[str, str]) -> None:
        self._sources, self._length = [source.tokens for source in sources], sources[0].tokens.length
        self._writer = TokenWriter(file, rows, self._length, metadata)
        self._waiting: list[Candidate] = []
        self._count = 0

    def add(self, candidate: Candidate) -> int:
        """Take a picture over; returns its row in the new file."""
        self._waiting.append(candidate)
        self._count += 1
        if len(self._waiting) == BLOCK:
            self._flush()
        return self._count - 1

    def _flush(self) -> None:
        block = np.empty((len(self._waiting), self._length), np.int64)  # (B, T)
        for index, tokens in enumerate(self._sources):
            places = [place for place, candidate in enumerate(self._waiting) if candidate.source == index]
            if places:
                block[places] = tokens[[self._waiting[place].row for place in places]]
        self._writer.write(block)
        self._waiting.clear()

    def close(self) -> None:
        """Copy the rest, and check that all rows that were announced have come."""
        self._flush()
        self._writer.close()


def write_row(file: Any, row: dict[str, Any]) -> None:
    """One JSONL row."""
    file.write(ENCODER.encode(row) + "\n")


def write_outputs(
    out: Path,
    database: sqlite3.Connection,
    sources: list[Source],
    settings: Settings,
    total: Counter,
    metadata: dict[str, str],
) -> None:
    """Write OUTPUTS. They take their names together, at the end: tensors first, so that a JSONL never lacks them."""
    pictures, rows = total["sft"] + 2 * total["pairs"], total["sft"] + total["pairs"] + total["discard"]
    wanted = 2 * sources[0].tokens.length * pictures + BYTES_A_ROW * rows
    check_space(out, wanted, f"{rows} rows with {pictures} pictures")
    with contextlib.ExitStack() as stack:
        stack.enter_context(directory(out))
        files = {  # an ExitStack leaves in reverse order
            name: stack.enter_context(whole_file(out / name, "wb" if name.endswith(".safetensors") else "w"))
            for name in reversed(OUTPUTS)
        }
        sft = PictureCopy(files["sft.safetensors"], total["sft"], sources, metadata | {"kind": "sft"})
        pairs = PictureCopy(files["pairs.safetensors"], 2 * total["pairs"], sources, metadata | {"kind": "pairs"})
        for prompt, candidates in prompts_with_candidates(database):
            selection = select(candidates, settings)
            for one in selection.sft:
                write_row(files["sft.jsonl"], prompt | {"p_yes": one.p_yes, "row": sft.add(one)})
            for chosen, rejected in selection.pairs:
                row = {"chosen": pairs.add(chosen), "rejected": pairs.add(rejected)}
                scores = {"p_yes_chosen": chosen.p_yes, "p_yes_rejected": rejected.p_yes}
                write_row(files["pairs.jsonl"], prompt | row | scores)
            if not selection.accepted:
                best_p_yes = max(one.p_yes for one in candidates)
                write_row(files["discard.jsonl"], prompt | {"best_p_yes": best_p_yes})
        sft.close()
        pairs.close()
        for file in files.values():  # a full disk shows here, while no file has taken its name
            file.flush()
            os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------------------------------
# The script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--scored", nargs="+", required=True, metavar="FILE", help="scored.jsonl, tokens beside it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write, made if missing")
    parser.add_argument("--mix-models", action="store_true", help="allow scored files drawn by different models")
    rules = parser.add_argument_group("rules")
    rules.add_argument("--threshold", type=float, default=0.5, help="aligned is a P(yes) over this (default 0.5)")
    rules.add_argument("--margin", type=float, default=0.0, help="least P(yes) distance within a pair (default 0)")
    rules.add_argument("--per-prompt", type=int, default=0, help="most SFT pictures a prompt, best first (default 0: all)")
    rules.add_argument("--pairs-per-prompt", type=int, default=1, help="k-th best with k-th worst, up to k (default 1)")
    gate = parser.add_argument_group("data-quality gate")
    gate.add_argument("--min-separation", type=float, default=0.05, help="least mean P(yes) - P(yes, foil) (default 0.05)")
    gate.add_argument("--min-coverage", type=float, default=0.5, help="least mean P(yes or no at all) (default 0.5)")
    gate.add_argument("--force", action="store_true", help="override the gate; the metadata records it")
    args = parser.parse_args(argv)
    if not 0 <= args.threshold < 1:
        parser.error(f"--threshold must be at least 0 and less than 1, found {args.threshold}")
    for name, low in (("margin", 0), ("min-separation", -1), ("min-coverage", 0)):
        if not low <= (value := getattr(args, name.replace("-", "_"))) <= 1:
            parser.error(f"--{name} must be from {low} to 1, found {value}")
    for name, low in (("per-prompt", 0), ("pairs-per-prompt", 1)):
        if (value := getattr(args, name.replace("-", "_"))) < low:
            parser.error(f"--{name} must be at least {low}, found {value}")
    return args


def main(args: argparse.Namespace) -> None:
    out, settings = args.out, Settings(args.threshold, args.margin, args.per_prompt, args.pairs_per_prompt)
    sources = open_sources(args.scored, args.mix_models)
    metadata = describe(sources, settings)
    check_out(out, metadata)

    with contextlib.closing(open_database()) as database:
        for index, source in enumerate(sources):
            insert_scored(database, index, source)
        check_same_pictures(database, sources)

        quality = measure(database, settings.threshold)
        problems = quality_problems(quality, args.min_separation, args.min_coverage)
        table = count_selected(database, settings)
        print_report(table, quality, problems, args)
        if problems and not args.force:
            raise QualityRefusal(f"data-quality gate: {'; '.join(problems)} (--force overrides)")
        total = sum(table.values(), Counter())
        if not total["pairs"]:
            raise BadInput(
                f"no pair is left: {total['too_close']} dropped by --margin {args.margin:g}, no other prompt has both "
                "aligned and other candidates"
            )
        metadata |= {"separation": f"{quality.separation:.6f}", "coverage": f"{quality.coverage:.6f}"}
        if problems:
            metadata["forced"] = "; ".join(problems)
        write_outputs(out, database, sources, settings, total, metadata)
    print(out)


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))

"""The candidates of one or several scored files, joined by prompt in a temporary database on disk.

Files may be larger than memory and their rows in any order: about 100 bytes a row go to the disk, and memory does not grow with
their number. Pictures are copied a block at a time.

    with closing(open_database()) as database:
        for index, source in enumerate(sources):
            insert_scored(database, index, source)
        for prompt, candidates in prompts_with_candidates(database):
            ...
"""

import itertools
import sqlite3
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from common.answers import answer_form
from common.command import BadInput, check_left_out
from common.foils import kind_of_change
from common.records import SCORED, Tokens, TokenWriter, read_rows

BLOCK = 128  # pictures copied at a time: reading one may map 2 MiB of its file
CACHE_MIB = 64  # of the database; what does not fit is on disk


class Candidate(NamedTuple):
    """One judged picture: which scored file, the candidate's number there, its row in the tokens, P(yes), who drew it."""

    source: int
    candidate: int
    row: int
    p_yes: float
    model_hash: str = ""


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
        forms = [answer_form(it.metadata) for it in (first, tokens)]
        if forms[0] != forms[1]:
            raise BadInput(
                f"{tokens.path}: answer is {forms[1]!r}, but {first.path} has {forms[0]!r}: their P(yes) do not compare"
            )
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
        " p_yes_foil REAL, coverage REAL, kind TEXT, PRIMARY KEY (prompt, source, candidate)) WITHOUT ROWID"
    )
    database.execute("CREATE TABLE models (source INTEGER PRIMARY KEY, model_hash TEXT)")
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
    database.execute("INSERT INTO models VALUES (?, ?)", (index, source.tokens.metadata["model_hash"]))
    where = ""
    row: dict[str, Any] = {"id": None}

    def rows() -> Iterator[tuple]:
        nonlocal where, row
        known: dict[str, Any] = {}  # the row before: candidates of a prompt usually follow each other
        for line, row in read_rows(source.path, SCORED):
            where = f"{source.path}:{line}"
            source.tokens.check_row(row["row"], where)
            if any(row[key] != known.get(key) for key in ("id", "prompt", "category", "foil")):
                known, number, kind = row, insert_prompt(database, row, where), kind_of_change(row["prompt"], row["foil"])
            yield number, index, row["candidate"], row["row"], row["p_yes"], row["p_yes_foil"], row["coverage"], kind

    try:
        database.executemany("INSERT INTO candidates VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows())
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


def leave_out(database: sqlite3.Connection, categories: list[str]) -> list[tuple[str, int, int]]:
    """Take the candidates of these categories away; returns of each how many prompts and candidates they were.

    Raises BadInput for a category that no prompt has, and where nothing is left.
    """
    found = {
        row[0]: row
        for row in database.execute(
            "SELECT category, count(DISTINCT number), count(*) FROM candidates JOIN prompts ON number = candidates.prompt"
            " GROUP BY category"
        )
    }
    wanted = check_left_out(categories, found)
    marks = ", ".join("?" * len(wanted))
    database.execute(f"DELETE FROM candidates WHERE prompt IN (SELECT number FROM prompts WHERE category IN ({marks}))", wanted)
    return [found[category] for category in wanted]


class Kind(NamedTuple):
    """What the judge accepted of prompts whose foil says one kind of thing otherwise: a color, a number, a place, ..."""

    name: str
    prompts: int
    accepted: int
    foil_too: int  # pictures of which it accepted the foil as well, which contradicts

    @property
    def blind(self) -> bool:
        return self.prompts >= 10 and self.foil_too > self.accepted / 2


def count_kinds(database: sqlite3.Connection, threshold: float) -> list[Kind]:
    """Of each kind of foil, by name, what was accepted, and what of it contradicts itself."""
    counts = "SELECT kind, count(DISTINCT prompt), count(*), sum(p_yes_foil > ?) FROM candidates WHERE p_yes > ? "
    counts += "GROUP BY kind ORDER BY kind"
    return [Kind(*row) for row in database.execute(counts, (threshold, threshold))]


def prompts_with_candidates(database: sqlite3.Connection) -> Iterator[tuple[dict[str, str], list[Candidate]]]:
    """Each prompt (id, prompt, category) with its candidates of all files, by first appearance; one at a time."""
    rows = database.execute(
        "SELECT candidates.prompt, id, prompts.prompt, category, source, candidate, row, p_yes, model_hash FROM candidates"
        " JOIN prompts ON number = candidates.prompt JOIN models USING (source)"
        " ORDER BY candidates.prompt, source, candidate"
    )
    for _, group in itertools.groupby(rows, key=lambda row: row[0]):
        found = list(group)
        prompt = dict(zip(("id", "prompt", "category"), found[0][1:4], strict=True))
        yield prompt, [Candidate(*row[4:]) for row in found]


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

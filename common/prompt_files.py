"""Prompt files as they are published: what is read is the prompts, or the file is refused; one id for one text.

Read by the steps and by analysis/export.py alike. What is made of the prompts of a run is in prompts.py.
"""

import csv
import hashlib
import itertools
import json
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.command import BadInput
from common.records import DECODER, MAX_LINE_BYTES, check_value, parse_json, read_lines

Prompt = dict[str, str]

TABLES = {".csv": ",;\t", ".tsv": "\t,;"}  # what may stand between the cells, the likeliest first
ACCEPTED = "read are .txt (a prompt a line), .jsonl, .json (rows, or an array), .csv and .tsv (with a header), and folders"
PROMPT_NAMES = (("prompt", "prompts"), ("caption", "captions"), ("implicit_prompt",))  # any case; the first group comes first
CATEGORY_NAMES = (("category", "categories"), ("tag",))  # tag: GenEval's; implicit_prompt: Science-T2I's
PART = r"(_(seen|unseen|action|spatial|spatialaction))?$"  # T2I-CompBench's color_val_seen, complex_train_spatialaction, ...
SPLIT = re.compile(rf"(?<=.)_(train|val|test){PART}")
SPLIT_ALONE = re.compile(rf"(train|val|test|valid|validation|dev|eval){PART}", re.IGNORECASE)
MANY = 10  # so many files of one prompt in one folder are a list of prompts, whatever they are called
PIECE = 2**20  # letters of a JSON array that are read at a time


# ---------------------------------------------------------------------------------------------------------------------
# One file: the prompts as it has them


class Entry(NamedTuple):
    """A prompt, the line it begins on, the category that its file gives it, and the row it stands in (of JSON)."""

    line: int
    prompt: str
    category: str | None = None
    row: dict[str, Any] = {}  # noqa: RUF012 (never changed)


def read_entries(path: Path) -> Iterator[Entry]:
    """The prompts of one file; the name says which format it has. Raises BadInput for what is surely, or maybe, not prompts."""
    suffix = path.suffix.lower()
    if suffix in TABLES:
        yield from table_entries(path)
    elif suffix in (".jsonl", ".json"):
        in_array = first_letter(path) == b"["
        items = array_items(path) if in_array else jsonl_items(path, text_lines(path))
        for line, value in items:
            yield json_entry(path, line, value, in_array)
    elif suffix == ".txt" or str(path).startswith(("/dev/", "/proc/")):  # a shell's pipe has no name of its own
        yield from text_entries(path)
    else:
        how = "; write its rows, without the pictures, as .jsonl" if suffix in (".parquet", ".arrow") else ""
        raise BadInput(f"{path}: not known as a prompt file: {ACCEPTED}{how}")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """read_lines, but a bare CR ends a line too."""
    number = 0
    for _, text in read_lines(path):
        for line in text.split("\r"):
            number += 1
            yield number, line


def text_entries(path: Path) -> Iterator[Entry]:
    """A prompt a line. From a pipe also JSON Lines; a file of JSON must be called so."""
    lines, first = text_lines(path), True
    for number, line in lines:
        if not (prompt := line.strip().strip("\ufeff").strip()):  # where files were joined, marks stand inside
            continue
        if first and looks_like_json(prompt):
            if path.suffix or not prompt.startswith("{"):
                raise BadInput(f"{path}:{number}: is JSON, not a prompt: its name must end in .jsonl or .json")
            yield json_entry(path, number, next(jsonl_items(path, [(number, line)]))[1], False)
            for number, value in jsonl_items(path, lines):
                yield json_entry(path, number, value, False)
            return
        if first and is_header(prompt):
            raise BadInput(f"{path}:{number}: is a table's header, not a prompt: its name must end in .csv or .tsv")
        first = False
        yield Entry(number, prompt)


def looks_like_json(line: str) -> bool:
    """Whether a file's first line is the beginning of JSON rather than a prompt."""
    try:
        return line in ("[", "{", "[{") or (line[0] in "[{" and bool(parse_json(line)))
    except ValueError:
        return False


def is_header(line: str) -> bool:
    """Whether a file's first line is the header of a table of prompts rather than a prompt: cells of a word or two."""
    names = {cell.strip(' "').casefold() for cell in re.split("[\t;,|]", line)}
    return not names.isdisjoint(itertools.chain(*PROMPT_NAMES)) and all(len(name.split()) <= 2 for name in names)


def first_letter(path: Path) -> bytes:
    """The first byte of a file that is no white space and no byte-order mark."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe can be read only once, and one with a name waits for its writer
            raise BadInput(f"{path}: is no file of rows")
        with open(path, "rb") as file:
            found = file.read(PIECE).removeprefix(b"\xef\xbb\xbf").lstrip()
            while not found and (piece := file.read(PIECE)):
                found = piece.lstrip()
            return found[:1]
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None


def jsonl_items(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
    for number, line in lines:
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                hint = "; an array of rows, or a row a line, is read" if path.suffix.lower() == ".json" else ""
                raise BadInput(f"{path}:{number}: not JSON: {error}{hint}") from None


def array_items(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (the line it begins on, value) of a file that is one JSON array; one value and a piece are in memory at a time."""
    pieces, text, at, line = text_pieces(path), "", 0, 1  # text[at:] is to be read, and begins on `line`

    def next_letter() -> str:
        """What comes after white space, "" at the end."""
        nonlocal text, at, line
        while True:
            blank = re.compile(r"[ \t\n\r]*").match(text, at)
            assert blank is not None
            line += text.count("\n", at, blank.end())
            at = blank.end()
            if at < len(text):
                return text[at]
            text, at = next(pieces, ""), 0
            if not text:
                return ""

    def next_value() -> tuple[int, Any]:
        nonlocal text, at, line
        while True:
            try:
                value, end = DECODER.raw_decode(text, at)
            except RecursionError:
                raise BadInput(f"{path}:{line}: not JSON: nested too deeply") from None
            except ValueError as error:  # wrong, or not all there yet
                piece = next(pieces, "") if len(text) - at <= MAX_LINE_BYTES else ""
                if not piece:
                    raise BadInput(f"{path}:{line}: not JSON: {getattr(error, 'msg', error)}") from None
                text, at = text[at:] + piece, 0
                continue
            begins = line
            line, at = line + text.count("\n", at, end), end
            return begins, value

    next_letter()
    at, begins = at + 1, line
    sign = next_letter()
    while sign != "]":
        yield next_value()
        if (sign := next_letter()) not in (",", "]"):
            raise BadInput(f"{path}:{line}: not JSON: {f'{sign!r} after a row' if sign else 'the array has no end'}")
        at += sign == ","
        next_letter()
    at += 1
    if next_letter():
        raise BadInput(f"{path}:{begins}: not JSON: more follows the end of the array")


def text_pieces(path: Path) -> Iterator[str]:
    """A file's text, some letters at a time, line ends as \\n; BadInput as from read_lines."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            while piece := file.read(PIECE):
                if "\0" in piece:
                    raise BadInput(f"{path}: holds a NUL byte, which text does not (UTF-16?)")
                yield piece
    except UnicodeDecodeError:
        for _ in read_lines(path):  # which says in which line
            pass
        raise BadInput(f"{path}: not UTF-8") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None


def named(names: Iterable[str], groups: tuple[tuple[str, ...], ...], where: str) -> str | None:
    """The one of some names that is in the first group that has one, in any case; BadInput where two are."""
    names = list(names)
    for group in groups:
        if names.count(group[0]) == 1:
            return group[0]
        found = [name for name in names if name.strip().casefold() in group]
        if len(found) > 1:
            raise BadInput(f"{where}: has {found[0]!r} and {found[1]!r}: which one counts cannot be known")
        if found:
            return found[0]
    return None


def json_entry(path: Path, line: int, row: Any, in_array: bool) -> Entry:
    """One row: of our own format, GenEval's, or any with a prompt; of an array also the bare prompt."""
    where = f"{path}:{line}"
    if in_array and isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise BadInput(f"{where}: expected a JSON object{' or a string' * in_array}, found {type(row).__name__}")
    key, category = named(row, PROMPT_NAMES, where), named(row, CATEGORY_NAMES, where)
    if key is None:
        raise BadInput(f"{where}: key 'prompt' is missing")
    if in_array and type(row.get("id")) is int:  # a number of theirs, and not of one list alone
        row = {name: value for name, value in row.items() if name != "id"}
    for name in (key, category, "foil", "id"):
        if name in row and (name != category or row[name] is not None) and (problem := check_value(row[name], "text")):
            raise BadInput(f"{where}: {name} {problem}, found {json.dumps(row[name])[:60]}")
    return Entry(line, row[key], row[category] if category else None, row)


def table_entries(path: Path) -> Iterator[Entry]:
    """The rows of a table with a header. Tables of tabs are published without quoting too: PartiPrompts."""
    for delimiter in TABLES[path.suffix.lower()]:
        _, header = next(table_rows(path, delimiter), (0, []))
        if named(header, PROMPT_NAMES, str(path)) is not None:
            break
    else:
        _, header = next(table_rows(path, TABLES[path.suffix.lower()][0]), (0, []))
        if header:
            columns, names = ", ".join(header)[:200], ", ".join(itertools.chain(*PROMPT_NAMES))
            raise BadInput(f"{path}: no column is called {names}; its header is {columns!r}")
        return
    try:
        entries = table_prompts(path, table_rows(path, delimiter))
    except BadInput:
        if delimiter != "\t":
            raise
        cells = (cell for _, row in table_rows(path, delimiter, quoted=False) for cell in row)
        if any(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells):
            raise  # it does quote
        entries = table_prompts(path, table_rows(path, delimiter, quoted=False))
    yield from entries


def table_rows(path: Path, delimiter: str, quoted: bool = True) -> Iterator[tuple[int, list[str]]]:
    """Yield (the line it begins on, cells) of a table; rows without a word are skipped. BadInput for what csv cannot read."""
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = (line + "\n" for _, line in text_lines(path))
    reader, begins = (
        csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=True),
        1,
    )
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield begins, cells
            begins = reader.line_num + 1
    except csv.Error as error:
        raise BadInput(f"{path}:{begins}: not a row of a table: {error}") from None


def table_prompts(path: Path, rows: Iterator[tuple[int, list[str]]]) -> list[Entry]:
    """The prompts of a table's rows, the header first."""
    _, header = next(rows)
    names = [named(header, groups, str(path)) for groups in (PROMPT_NAMES, CATEGORY_NAMES)]
    places = [header.index(name) if name is not None else None for name in names]
    entries = []
    for line, cells in rows:
        if len(cells) < len(header) or any(cell.strip() for cell in cells[len(header) :]):
            raise BadInput(f"{path}:{line}: has {len(cells)} cells, the header {len(header)} (is a text not in quotes?)")
        prompt, category = (cells[place].strip() if place is not None else "" for place in places)
        if not prompt:
            raise BadInput(f"{path}:{line}: {names[0]} is empty")
        entries.append(Entry(line, prompt, category or None))
    return entries


# ---------------------------------------------------------------------------------------------------------------------
# All files of a command


class PromptFile(NamedTuple):
    """What was read from a file, or from a folder of one prompt a file."""

    path: str
    rows: list[Prompt]  # id, prompt, category and, where the file has one, foil
    places: list[str]  # of the rows: file:line
    named_by: str | None  # the category, if the file's name says it
    tabs: list[str]  # places of lines of text that hold a tab


def prompt_id(category: str, prompt: str) -> str:
    """A short id that depends on the prompt's text alone, so that files can be reordered, merged and split."""
    slug = re.sub(r"[^a-z0-9]+", "_", category.lower()).strip("_") or "prompt"
    return f"{slug[:32]}-{hashlib.sha256(prompt.encode()).hexdigest()[:10]}"


def category_of(name: str, folder: Path) -> str:
    """The category that a name says: without its split (color of color_train); of a split alone, what its folder is called."""
    if SPLIT_ALONE.fullmatch(name) and folder.name:
        return category_of(folder.name, folder.parent)
    return SPLIT.sub("", name)


def find_files(paths: Iterable[str | Path]) -> Iterator[tuple[Path, bool]]:
    """The files themselves, and those in folders by name, hidden ones left out; and whether they are of a folder."""
    for path in map(Path, paths):
        try:
            mode = os.stat(path).st_mode
            names = sorted(name for name in os.listdir(path) if name[0] != ".") if stat.S_ISDIR(mode) else None
        except OSError as error:
            raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
        if names is None:
            yield path, False
        elif not names:
            raise BadInput(f"{path}: holds no prompt: {ACCEPTED}")
        for name in names or ():
            if (path / name).is_dir():
                raise BadInput(f"{path / name}: is a folder in a folder; give it by its own name")
            yield path / name, True


def read_prompt_files(paths: Iterable[str | Path], category: str | None = None) -> list[PromptFile]:
    """The prompts of files and folders, in order, duplicates left in; `category` for all, whatever the files say.

    Without one a prompt's category is its row's, else its file's name (`category_of`). Text files of one prompt each are one
    list, and their category is their folder's name, if the folder was given, if there are MANY, or if they are numbered. Raises
    BadInput for a file with no prompt.
    """
    read = [(path, in_folder, list(read_entries(path))) for path, in_folder in find_files(paths)]
    above = [Path(os.path.abspath(path.parent)) for path, _, _ in read]
    whole = {folder for folder, (_, in_folder, _) in zip(above, read, strict=True) if in_folder}
    single = Counter(
        folder for folder, (path, _, entries) in zip(above, read, strict=True) if len(entries) == 1 and may_be_item(path)
    )
    lists: dict[Path | int, tuple[str, str, list[tuple[Path, list[Entry]]]]] = {}  # what is shown, what names it, its files
    for number, (folder, (path, _, entries)) in enumerate(zip(above, read, strict=True)):
        if not entries:
            raise BadInput(f"{path}: holds no prompt")
        numbered = path.stem[-1:].isdigit()
        item = may_be_item(path) and (numbered or folder in whole or single[folder] >= MANY)
        if item and numbered and len(entries) > 1 and single[folder] >= MANY:
            beside = f"{single[folder]} files beside it hold one prompt each"
            raise BadInput(f"{path}:{entries[1].line}: a second line, but {beside}: is it one prompt? Join its lines")
        if item and len(entries) == 1 and folder.name:
            named_by = category_of(folder.name, folder.parent)
            lists.setdefault(folder, (str(path.parent), named_by, []))[2].append((path, entries))
        else:
            lists[number] = (str(path), category_of(path.stem, folder), [(path, entries)])
    return [prompt_file(shown, files, name, category) for shown, name, files in lists.values()]


def may_be_item(path: Path) -> bool:
    """Whether a text file, if it holds one prompt, may be one of a list: not if its name says a split, and so a category."""
    return path.suffix.lower() == ".txt" and not SPLIT.search(path.stem) and not SPLIT_ALONE.fullmatch(path.stem)


def prompt_file(shown: str, files: list[tuple[Path, list[Entry]]], name: str, category: str | None) -> PromptFile:
    """The rows of a file, or of a list of files: category `category`, else the row's, else `name`."""
    found = PromptFile(shown, [], [], None if category else name, [])
    for path, entries in files:
        own = category is None and any(entry.category is not None for entry in entries)
        if own:
            found = found._replace(named_by=None)
        for entry in entries:
            place = f"{path}:{entry.line}"
            if own and entry.category is None:
                raise BadInput(f"{place}: key 'category' (or GenEval's 'tag') is missing, which other rows have")
            chosen = category or entry.category or name
            row = {"id": entry.row.get("id") or prompt_id(chosen, entry.prompt), "prompt": entry.prompt, "category": chosen}
            found.rows.append(row | ({"foil": entry.row["foil"]} if "foil" in entry.row else {}))
            found.places.append(place)
            if "\t" in entry.prompt and path.suffix.lower() in (".txt", ""):
                found.tabs.append(place)
    return found


def read_prompts(path: str | Path, category: str | None = None) -> list[Prompt]:
    """Rows of id, prompt, category and, where the file has one, foil; in file order, duplicates left in."""
    return [row for file in read_prompt_files([path], category) for row in file.rows]


def print_notes(files: list[PromptFile], others: Iterable[PromptFile] = ()) -> None:
    """Print which files' names say the same category, and how many lines of text hold a tab, those of `others` too."""
    by_name = defaultdict(list)
    for file in files:
        if file.named_by is not None:
            by_name[file.named_by].append(file.path)
    for name, paths in by_name.items():
        if len(paths) > 1:
            more = f" and {len(paths) - 2} more" if len(paths) > 2 else ""
            print(f"note           {paths[0]} and {paths[1]}{more} share the category {name!r} (--category names another)")
    if tabs := [place for file in (*files, *others) for place in file.tabs]:
        print(f"note           {len(tabs)} lines hold a tab, which stays in the prompt, the first {tabs[0]}: a table is a .tsv")

"""Write the pictures of a scored file as PNG, laid out as the benchmarks' own evaluators read them.

Reads   scored.jsonl + .safetensors; for GenEval also its evaluation_metadata.jsonl
Writes  a directory, by default named after the scored file and the layout, and in it

    t2i-compbench   samples/{prompt}_{000000}.png, and prompts.jsonl: which file is which picture, with all that its row says
    geneval         {00000}/metadata.jsonl and {00000}/samples/{0000}.png by line of GenEval's file, and prompts.jsonl
    plain           pictures/{id}/{0000}.png by candidate, and prompts.jsonl
    datasets        {000000}.png and metadata.jsonl: an imagefolder of Hugging Face datasets, with all that the rows say

    python analysis/export.py round3/heldout.jsonl --layout t2i-compbench --category color
    python analysis/export.py round3/heldout.jsonl --layout geneval --metadata evaluation_metadata.jsonl

Names are cut and cleaned where a file cannot be called so; how many is printed, and prompts.jsonl has the prompt as it was.
A picture that is there is whole and is not drawn again: a killed run continues. export.json says what a directory holds.

T2I-CompBench's evaluators take the prompt from a name up to its *first* underscore, the number from after it, and every file
in samples/ for a picture. They score one category a directory, and 3_in_1.py counts on 10 pictures a prompt, all prompts of
complex_val.txt and in its order: give score.py that file and --candidates 10. Its one underscore is why prompts lose theirs.
"""

import argparse
import hashlib
import io
import os
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can be started from anywhere
from analysis.pictures import check_decoder, decode
from common.command import BadInput, Parser, printable, progress_bar, run_script
from common.outputs import DIRECTORY, check_outputs, recognised
from common.prompt_files import prompt_id, read_entries
from common.ranks import Ranks
from common.records import Row, Tokens, check_value, content_hash, differences, parse_json, read_rows, read_scored
from common.writing import foreign_file, hold_directory, is_temporary, remove_files, write_json, write_rows

if TYPE_CHECKING:
    from model import UnifiedModel

KEPT = ("export.json", "lock")  # while a directory is emptied
MARKS = {"layout": "t2i-compbench|geneval|plain|datasets", "scored_hash": "[0-9a-f]{16}"}  # of export.json
NAME_BYTES = 255  # the longest file name that Linux's and macOS's file systems take


# ---------------------------------------------------------------------------------------------------------------------
# Names


def file_name(text: str, max_bytes: int) -> str:
    """`text` as a file name of at most `max_bytes` bytes of UTF-8: as it is where that can be, cleaned and cut where not.

    Slashes and control characters become blanks; dots in front go, because they hide a file.
    """
    name = re.sub(r"[/\x00-\x1f\x7f-\x9f]", " ", text).lstrip(".")
    return name.encode()[:max_bytes].decode(errors="ignore") or "prompt"


def unique_names(texts: list[str], max_bytes: int) -> dict[str, str]:
    """A file name for each text, no two alike, also where the file system takes a for A: some end in a hash of the text."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for text in texts:
        name = file_name(text, max_bytes)
        if name != text or case_folded(name) in taken:
            name = f"{file_name(text, max_bytes - 17)}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        if case_folded(name) in taken:
            raise BadInput(f"id {text[:60]!r} cannot be told from another one as a file name ({name[:60]!r})")
        taken.add(case_folded(name))
        names[text] = name
    return names


def case_folded(name: str) -> str:
    """What a file system that ignores case and Unicode's composition makes of a name."""
    return unicodedata.normalize("NFC", name).casefold()


def compbench_name(prompt: str, number: int) -> str:
    """{prompt}_{000000}.png such that every T2I-CompBench evaluator reads the prompt and the number back.

    They split at "_" and take the first part, and the second or the last; one splits at ".png" before. So the prompt may
    hold neither.
    """
    end = f"_{number:06d}.png"
    return file_name(prompt.replace("_", " ").replace(".png", " png"), NAME_BYTES - len(end)) + end


# ---------------------------------------------------------------------------------------------------------------------
# Layouts: the path of each row's picture, in the rows' order


def compbench_paths(rows: list[Row]) -> list[str]:
    return [f"samples/{compbench_name(row['prompt'], number)}" for number, row in enumerate(rows)]


def geneval_paths(lines: list[int]) -> list[str]:
    """lines: for each row, which line of GenEval's file, from 0, its prompt is."""
    count: Counter[int] = Counter()
    paths = []
    for line in lines:
        paths.append(f"{line:05d}/samples/{count[line]:04d}.png")
        count[line] += 1
    return paths


def plain_paths(rows: list[Row]) -> list[str]:
    directories = unique_names(list(dict.fromkeys(row["id"] for row in rows)), NAME_BYTES)
    return [f"pictures/{directories[row['id']]}/{row['candidate']:04d}.png" for row in rows]


def datasets_paths(rows: list[Row]) -> list[str]:
    """Numbers alone: `datasets` takes words such as train and test in a name for the split that a picture belongs to."""
    return [f"{number:06d}.png" for number in range(len(rows))]


def print_renamed(rows: list[Row], paths: list[str], layout: str) -> None:
    """How many prompts or ids are called otherwise than they are, and the first of them."""
    column = {"t2i-compbench": "prompt", "plain": "id"}[layout]
    called = {row[column]: path.split("/")[1] for row, path in zip(rows, paths, strict=True)}
    if layout == "t2i-compbench":
        called = {text: name.rsplit("_", 1)[0] for text, name in called.items()}
    changed = [text for text, name in called.items() if text != name]
    first = f"; first {changed[0][:60]!r} is {called[changed[0]][:60]!r}" if changed else ""
    print(f"names          {len(changed)} of {len(called)} {column}s changed to be file names{first}")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_pictures(path: Path, categories: list[str] | None) -> tuple[list[Row], Tokens]:
    """The rows of a scored file, of some categories or all, and its tokens; BadInput for what does not fit together."""
    tokens = Tokens(path)
    rows: list[Row] = []
    known: set[str] = set()
    for _, row in read_scored(path, tokens):
        known.add(row["category"])
        if not categories or row["category"] in categories:
            rows.append(row)
    if missing := sorted({*(categories or [])} - known):
        raise BadInput(f"--category {missing[0]}: {path} has {', '.join(sorted(known))}")
    return rows, tokens


def geneval_lines(rows: list[Row], path: Path) -> tuple[list[int], dict[int, Row]]:
    """For each row the line of GenEval's file, from 0, that asks for it, by id or else by text; and those lines' rows.

    Raises BadInput for a prompt that the file does not have.
    """
    wanted = []
    by_id: dict[str, int] = {}
    by_text: dict[str, int] = {}
    for line, entry in enumerate(read_entries(path)):
        for key in ("prompt", "tag"):  # their evaluator reads these
            if problem := check_value(entry.row.get(key), "text"):
                raise BadInput(f"{path}:{entry.line}: {f'{key} {problem}' if key in entry.row else f'key {key!r} is missing'}")
        wanted.append(entry.row)
        by_id.setdefault(entry.row.get("id") or prompt_id(entry.category or "", entry.prompt), line)
        by_text.setdefault(entry.prompt, line)
    lines = []
    for row in rows:
        line = by_id.get(row["id"], -1)
        if line < 0 or wanted[line]["prompt"] != row["prompt"]:
            line = by_text.get(row["prompt"], -1)
        if line < 0:
            raise BadInput(f"{path}: has no prompt {row['prompt'][:80]!r} (id {row['id'][:60]!r}): not what was drawn")
        lines.append(line)
    print(f"prompts        {len(set(lines))} of {len(wanted)} of {printable(path.name)} have pictures")
    return lines, {line: wanted[line] for line in sorted(set(lines))}


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def check_out(out: Path, settings: dict[str, Any], restart: bool) -> None:
    """Raise BadInput unless `out` can be made, or is this export begun earlier, or with `restart` any export, and only that."""
    made = out / "export.json"
    if not made.is_file():
        begun = ("lock",)  # with a temporary file, all that a run killed at its very start leaves
        if out.is_dir() and not all(file.name in begun or is_temporary(file.name) for file in out.iterdir()):
            raise BadInput(f"--out {out}: holds files, but no export.json: not a directory that this script made")
    elif not recognised(made, MARKS):
        raise BadInput(f"{made}: not of this script, so nothing beside it is touched; choose another --out")
    elif restart:
        if foreign := foreign_file(out, exported(out).__contains__):
            raise BadInput(f"{foreign}: is not of the export in {out}, so --restart does not remove it; move it away")
    else:
        found = parse_json(made.read_text(encoding="utf-8"))
        if differing := differences(found if isinstance(found, dict) else {}, settings):
            raise BadInput(f"--out {out}: holds another export ({differing}); choose another --out or add --restart")


def exported(out: Path) -> set[str]:
    """The files of an earlier export: pictures are named in a file that is written before them and removed after them."""
    layout = parse_json((out / "export.json").read_text(encoding="utf-8"))["layout"]
    name, column = ("metadata.jsonl", "file_name") if layout == "datasets" else ("prompts.jsonl", "file")
    pictures = [row[column] for _, row in read_rows(out / name, {column: "text"})] if (out / name).exists() else []
    beside = {f"{path.split('/')[0]}/metadata.jsonl" for path in pictures if layout == "geneval"}
    return {*pictures, *beside, name, *KEPT, ".picture.tmp"}


def prepare_directory(out: Path, settings: dict[str, Any], restart: bool) -> Any:
    """Make and hold `out`, emptied on `restart`; returns its lock."""
    lock = hold_directory(out)
    check_out(out, settings, restart)  # again: another process may have held it
    if restart and (out / "export.json").is_file():
        remove_files(out, exported(out).__contains__, ("prompts.jsonl", "metadata.jsonl"), KEPT)
    write_json(out / "export.json", settings)
    return lock


def write_mapping(out: Path, layout: str, rows: list[Row], paths: list[str], geneval_rows: dict[int, Row]) -> None:
    """The files beside the pictures. They come first: whatever picture is there, its prompt is known."""
    name, first = ("metadata.jsonl", "file_name") if layout == "datasets" else ("prompts.jsonl", "file")
    columns = ({key: value for key, value in row.items() if key not in (first, "row")} for row in rows)  # row: of the tokens
    write_rows(out / name, ({first: path} | row for path, row in zip(paths, columns, strict=True)))
    for directory in sorted({str(Path(path).parent) for path in paths}):
        (out / directory).mkdir(parents=True, exist_ok=True)
    for line, row in geneval_rows.items():
        write_rows(out / f"{line:05d}" / "metadata.jsonl", [row])


def write_picture(path: Path, content: bytes, out: Path) -> None:
    """Write a picture whole or not at all. writing.whole_file's temporary name would not do: it lies in the same
    directory, where evaluators take every file for a picture, and is longer than a name that may be the longest there is.
    """
    temporary = out / ".picture.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_pictures(policy: "UnifiedModel", rows: list[Row], paths: list[str], tokens: Tokens, args: argparse.Namespace) -> None:
    """Decode and write the pictures that are not there, --batch rows at a time.

    A block with a picture to write is decoded whole: a convolution's last bit depends on its batch, and a picture shall not
    depend on where an earlier run was killed.
    """
    from PIL import Image

    with progress_bar(len(rows), "picture") as bar:
        for start in range(0, len(rows), args.batch):
            part, files = rows[start : start + args.batch], [args.out / path for path in paths[start : start + args.batch]]
            bar.update(sum(path.exists() for path in files))
            if all(path.exists() for path in files):
                continue
            pictures = decode(policy, tokens[[row["row"] for row in part]], args.batch)  # (b, H, W, 3)
            for path, picture in zip(files, pictures, strict=True):
                if path.exists():
                    continue
                png = io.BytesIO()  # Pillow hides why a write to a file failed
                Image.fromarray(picture).save(png, "PNG")
                write_picture(path, png.getvalue(), args.out)
                bar.update()


# ---------------------------------------------------------------------------------------------------------------------
# Command

LAYOUTS = ("t2i-compbench", "geneval", "plain", "datasets")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("scored", type=Path, metavar="scored.jsonl", help="score.py's output, its safetensors beside it")
    parser.add_argument("--layout", choices=LAYOUTS, required=True, help="whose evaluator shall read the pictures")
    parser.add_argument("--out", type=Path, help="directory to make (default: beside the scored file, named after both)")
    parser.add_argument("--metadata", type=Path, help="GenEval's evaluation_metadata.jsonl, for --layout geneval")
    parser.add_argument("--category", nargs="+", help="only the prompts of these categories (default: all)")
    parser.add_argument("--model", help="checkpoint that decodes (default: the model that drew the pictures, by the header)")
    parser.add_argument("--restart", action="store_true", help="empty --out, which must be an earlier export, and begin anew")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--batch", type=int, default=64, help="pictures decoded at a time (default 64)")
    machine.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error(f"--batch must be at least 1, found {args.batch}")
    if args.layout == "geneval" and not args.metadata:
        parser.error("--layout geneval needs --metadata evaluation_metadata.jsonl: its evaluator reads there what to look for")
    if args.metadata and args.layout != "geneval":
        parser.error(f"--metadata goes with --layout geneval, found {args.layout}")
    if not args.scored.name:
        parser.error(f"{args.scored}: a file name is wanted")
    args.out = args.out or args.scored.with_name(f"{args.scored.stem}-{args.layout}")
    return args


def main(args: argparse.Namespace) -> None:
    ranks = Ranks()
    if ranks.world > 1:
        raise BadInput("export.py is one process; start it without torchrun")
    rows, tokens = read_pictures(args.scored, args.category)
    name = tokens.model_name(args.model)
    model = Path(name) if Path(name).is_dir() else None
    check_outputs([args.scored, args.metadata, model], {args.out: DIRECTORY})
    paths, geneval_rows = lay_out(rows, args)
    settings = {
        "layout": args.layout,
        "scored_hash": content_hash(args.scored, tokens.path),
        "metadata_hash": content_hash(args.metadata) if args.metadata else None,
        "categories": sorted(args.category) if args.category else None,
        "model": name,
    }
    check_out(args.out, settings, args.restart)

    policy = None
    if args.restart or not all((args.out / path).exists() for path in paths):
        from model import load, no_decoder  # after the cheap checks: torch takes seconds

        ranks.join(args.device)
        if reason := no_decoder(name):
            raise BadInput(f"{reason}; report.py shows the numbers without pictures")
        policy = load(name, device=ranks.device)
        check_decoder(policy, name, tokens)
    lock = prepare_directory(args.out, settings, args.restart)
    write_mapping(args.out, args.layout, rows, paths, geneval_rows)
    n_there = sum((args.out / path).exists() for path in paths)
    print(f"pictures       {len(rows)}, of which {n_there} are there already")
    if n_there < len(rows):
        if policy is None:
            raise BadInput(f"{args.out}: pictures went away meanwhile; start this again")
        write_pictures(policy, rows, paths, tokens, args)
    tokens.check_unchanged()
    (args.out / "lock").unlink()
    lock.close()
    print(printable(args.out))


def lay_out(rows: list[Row], args: argparse.Namespace) -> tuple[list[str], dict[int, Row]]:
    """The path of each row's picture, and for GenEval the rows of its file by line; prints what there is to know."""
    if args.layout == "geneval":
        lines, geneval_rows = geneval_lines(rows, args.metadata)
        return geneval_paths(lines), geneval_rows
    if args.layout == "datasets":
        return datasets_paths(rows), {}
    paths = compbench_paths(rows) if args.layout == "t2i-compbench" else plain_paths(rows)
    print_renamed(rows, paths, args.layout)
    categories = sorted({row["category"] for row in rows})
    if args.layout == "t2i-compbench" and len(categories) > 1:
        first = printable(categories[0])
        print(f"note           {len(categories)} categories in samples/, evaluators want one: --category {first}")
    return paths, {}


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))

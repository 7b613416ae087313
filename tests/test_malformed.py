"""Malformed input never hurts: exit code 2, one line that names the file, no work begun, no file touched, no code run.

Every case starts from files that are accepted as they are (the first test) and spoils one thing in a way that cannot be
right by chance. Most cases call the script in this process; every so often, and wherever memory is at stake, one is a real
process with a bound on its memory. All have a deadline.
"""

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
from conftest import ROOT, TOTALS, run, script_path, spawn

sys.path.insert(0, str(ROOT / "shapes"))  # world.py is imported as a script beside the others

from common.records import DISCARD, LABELS, PAIRS, PROMPT, READOUTS, SCORED, SFT, Tokens, read_rows, tokens_path, write_tokens
from common.writing import write_rows

DEADLINE_S = 120  # far above what any refusal takes, on a machine that is ten times slower too
MEMORY = 2**30  # bytes of address space beyond those of the imports
REFUSED = TOTALS["malformed inputs refused"]
CASES, QUICK_CASES = 24, 6  # of a kind where another command is given all of them; of any kind with --quick


# ---------------------------------------------------------------------------------------------------------------------
# One case: spoil, run, look


class Case(NamedTuple):
    """One thing wrong: what, and how it is done to the files in a directory; returns what the refusal has to name."""

    about: str
    spoil: Callable[[Path], str]


class Executed:
    """Unpickling this makes a file in the working directory."""

    def __reduce__(self) -> tuple:
        return open, ("executed", "w")


def snapshot(directory: Path) -> dict[str, tuple]:
    """Everything below a directory: kind, size, time of change and content."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        regular = stat.S_ISREG(status.st_mode)
        content = path.read_bytes() if regular and status.st_size < 2**22 else b""
        times = () if stat.S_ISDIR(status.st_mode) else (status.st_mtime_ns, status.st_ino)
        found[str(path.relative_to(directory))] = (status.st_mode, status.st_size if regular else 0, *times, content)
    return found


def sample(cases: list[Case], most: int) -> list[Case]:
    """Some of them, spread over all there are, the same every time."""
    return cases[:: len(cases) // most + 1]


def execute(python: Path, where: Path, *command: object) -> subprocess.CompletedProcess:
    """Run a script as a process in a directory; one that does not end in time has no exit code."""
    script, *args = map(str, command)
    try:
        return subprocess.run(
            [python, script_path(script), *args],
            cwd=where,
            env=os.environ | {"WARM_MORE_BYTES": str(MEMORY)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=DEADLINE_S,
            encoding="utf-8",
            errors="backslashreplace",
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, None, "", f"still running after {DEADLINE_S} s\n")


class Late(BaseException):
    """The deadline is over. Not a TimeoutError, which is an OSError: a script may take it for a file that cannot be read."""


def call(where: Path, script: str, *args: object) -> subprocess.CompletedProcess:
    """The same in this process, which takes milliseconds."""

    def stop(*_: object) -> NoReturn:
        raise Late

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(DEADLINE_S)
    try:
        with contextlib.chdir(where):
            return run(Path(script).name, *args, ok=False)
    except (Exception, SystemExit, Late) as error:
        return subprocess.CompletedProcess([script], 1, "", "".join(traceback.format_exception(error)))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def problems(done: subprocess.CompletedProcess, script: str, named: str, before: dict, after: dict) -> Iterator[str]:
    """What a refusal did wrong."""
    if done.returncode != 2:
        yield f"exit code {done.returncode}"
    if len(done.stderr.splitlines()) != 1 or not done.stderr.endswith("\n"):
        yield f"{len(done.stderr.splitlines())} lines on stderr"
    elif not done.stderr.startswith(f"{Path(script).name}: ") or named not in done.stderr:
        yield f"does not name {named!r}"
    elif len(done.stderr) > 4200:
        yield f"{len(done.stderr)} characters"
    if "Traceback" in done.stderr + done.stdout:
        yield "a traceback"
    if changed := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        yield f"changed {changed}"


def refuse(python: Path, tmp_path: Path, fill: Callable[[Path], Any], command: tuple, cases: list[Case], every: int) -> None:
    """Run the command once a case, in a directory that `fill` fills and the case spoils; all must be refused.

    Each `every`-th case, from the first on, is run as a process of its own, the others in this one; 0: all in this one.
    Pipes always have their own: a library's hopeless `open` of one cannot be interrupted, only killed.
    """
    faults = []
    if os.environ.get("QUICK_TESTS"):
        cases = sample(cases, QUICK_CASES)
    for number, case in enumerate(cases):
        where = tmp_path / "here"
        where.mkdir()
        fill(where)
        named = case.spoil(where)
        before = snapshot(tmp_path)
        alone = (every and number % every == 0) or "a pipe" in case.about
        done = execute(python, where, *command) if alone else call(where, *command)
        if found := list(problems(done, command[0], named, before, snapshot(tmp_path))):
            faults.append(f"{command[0]}, {case.about}: {'; '.join(found)}: {done.stderr[-1500:]}")
        else:
            REFUSED[Path(command[0]).name] += 1
        shutil.rmtree(where)
    assert cases
    if faults:
        pytest.fail(f"{len(faults)} of {len(cases)} cases\n" + "\n".join(faults), pytrace=False)


# ---------------------------------------------------------------------------------------------------------------------
# Good files, and the commands that read them


@pytest.fixture(scope="module")
def good(tiny, scored, pairs, tmp_path_factory) -> Path:
    """One of everything that the scripts read, a finished run directory among it."""
    directory = tmp_path_factory.mktemp("good")
    rows = [{"id": f"p{i}", "prompt": f"a red cube {i}", "category": "color", "foil": f"a blue cube {i}"} for i in range(9)]
    write_rows(directory / "prompts.jsonl", rows)
    (directory / "color_train.txt").write_text("\n".join(f"{row['prompt']}, text" for row in rows) + "\n")
    write_rows(directory / "heldout.jsonl", [{"prompt": f"a green cone {i}", "tag": "color"} for i in range(5)])
    sft = pairs.with_name("sft.jsonl")
    for file in (scored, pairs, sft):
        shutil.copy(file, directory)
        shutil.copy(tokens_path(file), directory)
    keys = [(row["id"], row["candidate"]) for _, row in read_rows(scored, SCORED)]
    labels = [{"id": i, "candidate": c, "label": n % 2, "source": "oracle"} for n, (i, c) in enumerate(keys)]
    write_rows(directory / "labels.jsonl", labels)
    discard = [{key: row[key] for key in PROMPT} | {"best_p_yes": 0.25} for row in rows[:4]]
    write_rows(directory / "discard.jsonl", discard)
    make_run(directory, directory / "run")
    make_world(directory / "world.jsonl")
    make_rounds(directory)
    asked = {row["prompt"]: {"tag": row["category"], "prompt": row["prompt"]} for _, row in read_rows(scored, SCORED)}
    write_rows(directory / "asked.jsonl", asked.values())
    return directory


def make_run(good: Path, run: Path) -> None:
    """A run directory with round 0 and round 1."""
    for number, names in enumerate((("labels",), ("labels", "prompts", "sft", "pairs", "discard"))):
        (run / f"round{number}").mkdir(parents=True)
        for name in names:
            shutil.copy(good / f"{name}.jsonl", run / f"round{number}" / f"{name}.jsonl")
        for name in ("heldout", "rejudged", "scored") if number else ("heldout",):
            for suffix in (".jsonl", ".safetensors"):
                shutil.copy(good / f"scored{suffix}", run / f"round{number}" / f"{name}{suffix}")
    shutil.copy(good / "pairs.safetensors", run / "round1")
    training = run / "round1" / "model" / "training"
    training.mkdir(parents=True)
    write_rows(training / "metrics.jsonl", [{"step": step, "loss": 1 / (step + 1), "note": "fine"} for step in range(4)])
    (training / "settings.json").write_text('{"lr": 0.001}\n')


def make_rounds(good: Path) -> None:
    """Held-out pictures of a base, of the last good round's model and of a better new one, with read-outs; the base's rejudged
    by both; labels of base and new."""
    for name, model, judge, better in (
        ("base", "base", "base", 0.0),
        ("last", "last", "last", 0.1),
        ("after", "after", "after", 0.2),
        ("again", "base", "after", 0.0),
        ("earlier", "base", "last", 0.0),
    ):
        rows = []
        for row in range(36):
            p_yes = 0.5 + better + 0.01 * (row % 7)
            key = {"id": f"h{row // 2}", "prompt": f"a red cube {row // 2}", "category": "color", "candidate": row % 2}
            answers = {"p_yes": p_yes, "coverage": 1.0, "foil": "a blue cube", "p_yes_foil": 0.25}
            readouts = {"p_yes_again": p_yes, "p_yes_foil_again": 0.25, "caption": 10 * p_yes - 20, "caption_foil": -20.5}
            rows.append(key | answers | readouts | {"row": row})
        write_rows(good / f"{name}.jsonl", rows)
        header = {"model": model, "model_hash": model, "judge": judge, "judge_hash": judge, "readouts": "Is it {prompt}?"}
        header |= {"questions": '["Does it {prompt}?"]', "threshold": "0.5", "seed": "0", "guidance": "1", "temperature": "1"}
        tokens = np.random.default_rng(len(model)).integers(0, 24, (36, 4))
        write_tokens(good / f"{name}.safetensors", tokens, header | {"codebook_size": "24", "image_tokens": "4"})
        labels = [{"id": row["id"], "candidate": row["candidate"], "label": row["row"] % 3 // 2, "source": "x"} for row in rows]
        write_rows(good / f"{name}_labels.jsonl", labels)


def make_world(path: Path) -> None:
    """A scored file of the shapes world, with random pictures."""
    with open(ROOT / "shapes" / "prompts_heldout.jsonl", encoding="utf-8") as file:
        prompts = [json.loads(line) for line in file][:6]
    answers = {"p_yes": 0.75, "coverage": 1.0, "p_yes_foil": 0.25}
    write_rows(path, [{**prompt, "candidate": 0, **answers, "row": i} for i, prompt in enumerate(prompts)])
    metadata = {"model": str(ROOT / "shapes" / "base"), "codebook_size": "32", "image_tokens": "9"}
    write_tokens(tokens_path(path), np.random.default_rng(0).integers(0, 32, (6, 9)), metadata)


SCORE = ("--candidates", 1, "--device", "cpu", "--out", "out.jsonl")
TRAIN = ("--max-steps", 1, "--batch-size", 2, "--device", "cpu", "--out", "out")
PROBE = ("--examples", 2, "--n-probes", 1, "--device", "cpu", "--out", "out.jsonl")
COMMANDS: dict[str, tuple] = {
    "curriculum prompts": ("curriculum.py", "--prompts", "prompts.jsonl", "--out", "out.jsonl"),
    "curriculum text": ("curriculum.py", "--prompts", "color_train.txt", "--out", "out.jsonl"),
    "curriculum exclude": ("curriculum.py", "--prompts", "prompts.jsonl", "--exclude", "heldout.jsonl", "--out", "out.jsonl"),
    "curriculum scored": ("curriculum.py", "--prompts", "prompts.jsonl", "--scored", "scored.jsonl", "--out", "out.jsonl"),
    "score prompts": ("score.py", "--model", "TINY", "--prompts", "prompts.jsonl", *SCORE),
    "score text": ("score.py", "--model", "TINY", "--prompts", "color_train.txt", *SCORE),
    "score rejudge": ("score.py", "--model", "TINY", "--rejudge", "scored.jsonl", *SCORE),
    "make_pairs": ("make_pairs.py", "--scored", "scored.jsonl", "--out", "out", "--force", "--threshold", "MIDDLE"),
    "sft": ("sft.py", "--data", "sft.jsonl", *TRAIN),
    "dpo": ("dpo.py", "--pairs", "pairs.jsonl", *TRAIN),
    "summary": ("summary.py", "run"),
    "world": ("shapes/world.py", "label", "world.jsonl", "--out", "out.jsonl"),
    "gate": (
        "gate.py", "--base", "base.jsonl", "--last", "last.jsonl", "--last-rejudged", "earlier.jsonl",
        "--after", "after.jsonl", "--rejudged", "again.jsonl", "--out", "out.json",
    ),
    "diagnose": (
        "diagnose.py", "--before", "base.jsonl", "--after", "after.jsonl", "--rejudged", "again.jsonl",
        "--labels", "base_labels.jsonl", "--labels-after", "after_labels.jsonl", "--out", "out.json",
    ),
    "dynamics": ("dynamics.py", "--data", "sft.jsonl", "--probes", "scored.jsonl", *PROBE),
    "dynamics pairs": ("dynamics.py", "--pairs", "pairs.jsonl", "--probes", "scored.jsonl", *PROBE),
    "report": ("report.py", "run", "--device", "cpu", "--out", "out.html"),
    "export": ("export.py", "scored.jsonl", "--layout", "plain", "--device", "cpu", "--out", "out"),
    "export geneval": (
        "export.py", "scored.jsonl", "--layout", "geneval", "--metadata", "asked.jsonl", "--device", "cpu", "--out", "out",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bench(warm, tiny, good):
    """Run a command, named as in COMMANDS, on its spoilt files."""

    def run_cases(name: str, cases: list[Case], tmp_path: Path, every: int = 25) -> None:
        command = words(name, tiny, good)
        refuse(warm, tmp_path, lambda where: copy_read(command, good, where), command, cases, every)

    return run_cases


def copy_read(command: tuple, good: Path, where: Path) -> None:
    """Copy what a command reads."""
    for name in map(str, command[1:]):
        if (good / name).is_dir() and name == "run":
            shutil.copytree(good / name, where / name)
        elif (good / name).is_file():
            shutil.copy(good / name, where)
            if tokens_path(good / name).is_file():
                shutil.copy(tokens_path(good / name), where)


def words(name: str, tiny: Path, good: Path) -> tuple:
    """A command with the checkpoint, and the threshold that divides the candidates, put in."""
    known = {"TINY": tiny, "MIDDLE": Tokens(good / "pairs.jsonl").metadata["threshold"]}
    return tuple(known.get(word, word) for word in COMMANDS[name])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_files_that_will_be_spoilt_are_accepted_as_they_are(warm, tiny, good, tmp_path, name):
    command = words(name, tiny, good)
    copy_read(command, good, tmp_path)
    done = execute(warm, tmp_path, *command)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# JSONL: one line spoilt

DEEP = 100_000
BIG = "1" + "0" * 400
WRONG = {  # JSON that is not a value of the kind
    "text": [
        "7",
        "true",
        "null",
        '["a"]',
        '{"a": "b"}',
        '""',
        '" \\t"',
        '"half \\ud83d"',
        '"\\udc00 half"',
        "[" * 990 + "]" * 990,
    ],
    "count": ["true", "1.0", "1e0", "-1", '"1"', "null", "[0]", str(2**53), BIG, "0.5", '""'],
    "probability": ["true", "false", "-1e-9", "1.0000001", '"0.5"', "null", "[0.5]", "1e999", "-1", BIG, "{}"],
    "nats": ["true", "0.5", "1e-9", "1", '"-1"', "null", "[-1]", "-1e999", "-" + BIG, "{}"],
    "bit": ["true", "2", "-1", '"1"', "null", "0.5", "1.0", "[1]"],
}


def with_value(line: str, key: str, value: str) -> str:
    """A row with raw JSON as the value of one key."""
    row = json.loads(line)
    return "{" + ", ".join(f"{json.dumps(k)}: {value if k == key else json.dumps(v)}" for k, v in row.items()) + "}"


def without(line: str, key: str) -> str:
    return json.dumps({k: v for k, v in json.loads(line).items() if k != key})


def with_more(line: str, value: str) -> str:
    """A row with one more key, which nobody reads."""
    return f'{line[:-1]}, "more": {value}}}'


def line_case(file: str, about: str, change: Callable[[str], str | bytes], chance: random.Random) -> Case:
    """Spoil one line, drawn at random; the refusal names file and line."""
    share = chance.random()

    def spoil(where: Path) -> str:
        lines = (where / file).read_bytes().splitlines()
        place = int(share * len(lines))
        spoilt = change(lines[place].decode())
        lines[place] = spoilt if isinstance(spoilt, bytes) else spoilt.encode()
        (where / file).write_bytes(b"\n".join(lines) + b"\n")
        return f"{file}:{place + 1}: "

    return Case(f"{file}: {about}", spoil)


def column_cases(file: str, columns: dict[str, str], chance: random.Random) -> list[Case]:
    """Every column missing, and with everything that it cannot be."""
    cases = [line_case(file, f"no {key}", lambda line, key=key: without(line, key), chance) for key in columns]
    for key, kind in columns.items():
        for value in WRONG[kind]:
            cases.append(line_case(file, f"{key} is {value:.30}", lambda line, k=key, v=value: with_value(line, k, v), chance))
    return cases


def cut(line: str, chance: random.Random) -> str:
    return line[: chance.randrange(1, len(line))]


def invalid_byte(line: str, chance: random.Random) -> bytes:
    place = chance.randrange(len(line))
    return line[:place].encode() + chance.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xe9"]) + line[place:].encode()


def shape_cases(file: str, chance: random.Random) -> list[Case]:
    """Lines that are no JSON object at all, or one that JSON does not have."""
    changes: dict[str, Callable[[str], str | bytes]] = {
        "cut short": lambda line: cut(line, chance),
        "cut short again": lambda line: cut(line, chance),
        "not UTF-8": lambda line: invalid_byte(line, chance),
        "a NUL byte": lambda line: line[:9] + "\0" + line[9:],
        "a raw tab in a string": lambda line: line.replace('": "', '": "\t', 1),
        "NaN": lambda line: with_more(line, "NaN"),
        "Infinity": lambda line: with_more(line, "[Infinity]"),
        "-Infinity": lambda line: with_more(line, "-Infinity"),
        "a key twice": lambda line: with_more(line, "1")[:-1] + ', "more": 1}',
        "a key twice inside": lambda line: with_more(line, '{"a": 1, "a": 2}'),
        "5,000 digits": lambda line: with_more(line, "7" * 5000),
        "400 digits": lambda line: with_more(line, "[7" + "0" * 400 + "]"),
        "1e400": lambda line: with_more(line, "1e400"),
        "-1E+999 inside": lambda line: with_more(line, '{"a": [-1E+999]}'),
        "400 digits and a point": lambda line: with_more(line, "7" + "0" * 400 + ".5"),
        "half a pair": lambda line: with_more(line, '"\\ud83d"'),
        "half a pair inside": lambda line: with_more(line, '[{"a": "cut \\uDE00 off"}]'),
        "half a pair as a key": lambda line: with_more(line, '{"\\ud83d": 1}'),
        "two halves the wrong way round": lambda line: with_more(line, '"\\ude00\\ud83d"'),
        "120 lists inside": lambda line: with_more(line, "[" * 120 + "]" * 120),
        "100,000 open brackets": lambda line: "[" * DEEP,
        "100,000 brackets inside": lambda line: with_more(line, "[" * DEEP + "]" * DEEP),
        "100,000 objects inside": lambda line: with_more(line, '{"a":' * DEEP + "1" + "}" * DEEP),
        "a list": lambda line: f"[{line}]",
        "a number": lambda line: "7",
        "a string": lambda line: json.dumps(line),
        "null": lambda line: "null",
        "true": lambda line: "true",
        "two objects": lambda line: line + line,
        "a comma at the end": lambda line: line + ",",
        "single quotes": lambda line: repr(json.loads(line)),
        "a comment": lambda line: line + " // fine",
        "no quotes": lambda line: "a red cube",
    }
    return [line_case(file, about, change, chance) for about, change in changes.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Whole files


def written(file: str, content: bytes | Callable[[bytes], bytes]) -> Callable[[Path], str]:
    """Spoil by replacing the file's content."""

    def spoil(where: Path) -> str:
        path = where / file
        path.write_bytes(content if isinstance(content, bytes) else content(path.read_bytes()))
        return file

    return spoil


def replaced(file: str, make: Callable[[Path], Any]) -> Callable[[Path], str]:
    """Spoil by putting something else in the file's place."""

    def spoil(where: Path) -> str:
        (where / file).unlink()
        make(where / file)
        return file

    return spoil


def place_cases(file: str, optional: bool = False) -> list[Case]:
    """Something that is not a file to be read where one is expected."""
    kinds: dict[str, Callable[[Path], Any]] = {
        "a directory": Path.mkdir,
        "a symlink loop": lambda path: path.symlink_to(path),
        "a symlink to nothing": lambda path: path.symlink_to("nothing"),
        "a pipe that nobody writes to": os.mkfifo,
    }
    if not optional:
        kinds["missing"] = lambda path: None
    return [Case(f"{file}: {about}", replaced(file, make)) for about, make in kinds.items()]


def content_cases(file: str, empty: bool = False) -> list[Case]:
    """Files that hold something else. empty: whether one without rows is fine."""
    contents: dict[str, bytes | Callable[[bytes], bytes]] = {
        "UTF-16": lambda data: data.decode().encode("utf-16"),
        "UTF-16 without a mark": lambda data: data.decode().encode("utf-16-le"),
        "a NUL byte at the end": lambda data: data + b"\0",
        "pickle": pickle.dumps(Executed()),
    }
    if not empty:
        contents |= {"empty": b"", "blank lines": b"\n \r\n\t\n", "a byte-order mark alone": b"\xef\xbb\xbf"}
    return [Case(f"{file}: {about}", written(file, content)) for about, content in contents.items()]


OURS = {"id": "text", "prompt": "text", "category": "text", "foil": "text"}
READ = {  # name of a command -> the JSONL files it reads, their columns
    "curriculum prompts": {"prompts.jsonl": OURS},
    "curriculum exclude": {"heldout.jsonl": {"prompt": "text", "tag": "text"}},
    "curriculum scored": {"scored.jsonl": SCORED},
    "score prompts": {"prompts.jsonl": OURS},
    "score rejudge": {"scored.jsonl": SCORED},
    "make_pairs": {"scored.jsonl": SCORED},
    "sft": {"sft.jsonl": SFT},
    "dpo": {"pairs.jsonl": PAIRS},
    "summary": {
        "run/round0/heldout.jsonl": SCORED,
        "run/round0/labels.jsonl": LABELS,
        "run/round1/heldout.jsonl": SCORED,
        "run/round1/labels.jsonl": LABELS,
        "run/round1/rejudged.jsonl": SCORED,
        "run/round1/prompts.jsonl": PROMPT,
        "run/round1/sft.jsonl": SFT,
        "run/round1/pairs.jsonl": PAIRS,
        "run/round1/discard.jsonl": DISCARD,
    },
    "world": {"world.jsonl": SCORED},
    "gate": {f"{name}.jsonl": SCORED | READOUTS for name in ("base", "last", "after", "again", "earlier")},
    "diagnose": {"base.jsonl": SCORED, "after.jsonl": SCORED, "again.jsonl": SCORED}
    | {"base_labels.jsonl": LABELS, "after_labels.jsonl": LABELS},
    "dynamics": {"sft.jsonl": SFT, "scored.jsonl": SCORED},
    "dynamics pairs": {"pairs.jsonl": PAIRS},
    "export": {"scored.jsonl": SCORED},
    "export geneval": {"asked.jsonl": {"prompt": "text", "tag": "text"}},
}
READ["report"] = READ["summary"] | {
    "run/round1/scored.jsonl": SCORED,
    "run/round1/pairs.jsonl": PAIRS,
    "run/round1/model/training/metrics.jsonl": {"step": "count"},
}
RUNS = ("summary", "report")  # these read a run's directory, in which files may be missing
MAY_LACK = ("prompts.jsonl: no id", "prompts.jsonl: no foil")
MAY_BE_EMPTY = ("prompts", "sft", "pairs", "discard", "metrics")  # files of a round: nothing may be left of it


@pytest.mark.parametrize("name", READ)
def test_a_spoilt_jsonl_file_is_refused(bench, tmp_path, name):
    chance = random.Random(name)
    cases = []
    for file, columns in READ[name].items():
        cases += column_cases(file, columns, chance) + shape_cases(file, chance)
        cases += content_cases(file, empty=name in RUNS and Path(file).stem in MAY_BE_EMPTY)
        cases += place_cases(file, optional=name in RUNS)
    cases = [case for case in cases if case.about not in MAY_LACK]
    readers = ("curriculum prompts", "make_pairs")  # of prompts, and of all that the steps hand on: the others share them
    bench(name, cases if name in readers else sample(cases, CASES), tmp_path)


@pytest.mark.parametrize("name", ["curriculum text", "score text"])
def test_a_spoilt_text_file_is_refused(bench, tmp_path, name):
    chance, file = random.Random(name), "color_train.txt"
    cases = [
        line_case(file, "not UTF-8", lambda line: invalid_byte(line, chance), chance),
        line_case(file, "Latin-1", lambda line: line.encode() + b" caf\xe9", chance),
        line_case(file, "a NUL byte", lambda line: line + "\0", chance),
        line_case(file, "17 MiB on a line", lambda line: line + "x" * 17 * 2**20, chance),
    ]
    bench(name, cases + content_cases(file) + place_cases(file), tmp_path)


def first_row(file: str, **values: object) -> Callable[[Path], str]:
    """Spoil by changing the first row."""

    def spoil(where: Path) -> str:
        first, *others = (where / file).read_text().splitlines()
        (where / file).write_text("\n".join([json.dumps(json.loads(first) | values), *others]) + "\n")
        return f"{file}:1: "

    return spoil


def again(file: str, **values: object) -> Callable[[Path], str]:
    """Spoil by adding the last row again, with some values changed."""

    def spoil(where: Path) -> str:
        lines = (where / file).read_text().splitlines()
        (where / file).write_text("\n".join([*lines, json.dumps(json.loads(lines[-1]) | values)]) + "\n")
        return f"{file}:{len(lines) + 1}: "

    return spoil


def renamed(file: str) -> Callable[[Path], None]:
    """Give every row the id of another prompt."""

    def spoil(where: Path) -> None:
        rows = [json.loads(line) for line in (where / file).read_text().splitlines()]
        (where / file).write_text("".join(json.dumps(row | {"id": f"other {row['id']}"}) + "\n" for row in rows))

    return spoil


ROUND0, ROUND1 = "run/round0", "run/round1"
MEANING = {  # name of a command -> rows that are well formed, but cannot be meant
    "curriculum prompts": [Case("an id of two prompts", lambda where: again("prompts.jsonl", prompt="x")(where)[:13])],
    "curriculum scored": [
        Case("a candidate twice", again("scored.jsonl")),
        Case("an id of two prompts", again("scored.jsonl", prompt="another", candidate=99)),
        Case("candidate 2**40", again("scored.jsonl", candidate=2**40)),
    ],
    "score prompts": [Case("an id of two prompts", lambda where: again("prompts.jsonl", prompt="x")(where)[:13])],
    "score rejudge": [
        Case("a candidate twice", again("scored.jsonl")),
        Case("a row that is not there", again("scored.jsonl", candidate=99, row=36)),
        Case("row 2**52", first_row("scored.jsonl", row=2**52)),
    ],
    "make_pairs": [
        Case("a candidate twice", again("scored.jsonl")),
        Case("an id of two prompts", again("scored.jsonl", prompt="another", candidate=99)),
        Case("an id of two categories", again("scored.jsonl", category="another", candidate=99)),
        Case("a row that is not there", again("scored.jsonl", candidate=99, row=36)),
        Case("row 2**52", first_row("scored.jsonl", row=2**52)),
    ],
    "sft": [Case(f"row {row}", first_row("sft.jsonl", row=row)) for row in (1000, 2**32, 2**52)],
    "dpo": [
        *(Case(f"{key} 2**{n}", first_row("pairs.jsonl", **{key: 2**n})) for key in ("chosen", "rejected") for n in (10, 52)),
        Case("chosen is rejected", first_row("pairs.jsonl", chosen=1, rejected=1)),
    ],
    "summary": [
        Case("a candidate twice", again(f"{ROUND0}/heldout.jsonl")),
        Case("a row that is not there", first_row(f"{ROUND1}/heldout.jsonl", row=36)),
        Case("row 2**52", first_row(f"{ROUND1}/rejudged.jsonl", row=2**52)),
        Case("a picture labelled twice", again(f"{ROUND0}/labels.jsonl")),
        Case("a picture labelled twice, later", again(f"{ROUND1}/labels.jsonl", label=0)),
        Case("a picture without a label", lambda where: (first_row(f"{ROUND1}/labels.jsonl", candidate=77)(where), ":1: ")[1]),
        Case("no round", lambda where: shutil.rmtree(where / "run" / "round0") or "no round0/heldout.jsonl"),
    ],
    "gate": [
        Case("a candidate twice", again("base.jsonl")),
        Case("a row that is not there", first_row("after.jsonl", row=36)),
        Case("row 2**52", first_row("again.jsonl", row=2**52)),
        *(
            Case(f"{file} without a common prompt", lambda where, file=file: (renamed(file)(where), file)[1])
            for file in ("last.jsonl", "after.jsonl", "again.jsonl", "earlier.jsonl")
        ),
    ],
    "diagnose": [
        Case("a candidate twice", again("base.jsonl")),
        Case("a row that is not there", first_row("after.jsonl", row=36)),
        Case("an id of two prompts", again("after.jsonl", prompt="another", candidate=99)),
        Case("another picture rejudged", first_row("again.jsonl", row=1)),
        Case("a picture labelled twice", again("base_labels.jsonl")),
        Case("a label of no picture", first_row("after_labels.jsonl", candidate=99)),
        Case("no common prompt", lambda where: (renamed("after.jsonl")(where), "after.jsonl")[1]),
    ],
    "dynamics": [
        *(Case(f"row {row}", first_row("sft.jsonl", row=row)) for row in (1000, 2**52)),
        Case("a probe that is not there", first_row("scored.jsonl", row=36)),
        Case("a probe twice", again("scored.jsonl")),
        Case("a foil of the image token", lambda where: (first_row("scored.jsonl", foil="<img>")(where), "'Does")[1]),
    ],
    "dynamics pairs": [
        *(Case(f"{key} 2**{n}", first_row("pairs.jsonl", **{key: 2**n})) for key in ("chosen", "rejected") for n in (10, 52)),
    ],
    "report": [
        Case("a candidate twice", again(f"{ROUND0}/heldout.jsonl")),
        Case("a training candidate twice", again(f"{ROUND1}/scored.jsonl")),
        Case("a row that is not there", first_row(f"{ROUND1}/heldout.jsonl", row=36)),
        Case("a training row that is not there", first_row(f"{ROUND1}/scored.jsonl", row=36)),
        Case("chosen 2**52", first_row(f"{ROUND1}/pairs.jsonl", chosen=2**52)),
        Case("a picture labelled twice", again(f"{ROUND0}/labels.jsonl")),
        Case("a picture without a label", lambda where: (first_row(f"{ROUND1}/labels.jsonl", candidate=77)(where), ":1: ")[1]),
        Case("no round", lambda where: shutil.rmtree(where / "run" / "round0") or "no round0/heldout.jsonl"),
    ],
    "export": [
        Case("a candidate twice", again("scored.jsonl")),
        Case("a row that is not there", first_row("scored.jsonl", row=36)),
        Case("row 2**52", first_row("scored.jsonl", row=2**52)),
    ],
    "export geneval": [
        Case("a prompt that is not asked for", lambda where: (first_row("asked.jsonl", prompt="x")(where), "asked.jsonl")[1]),
        *(Case(f"an id {value!r}", first_row("asked.jsonl", id=value)) for value in (["a"], {"a": 1}, 7, None, "", True)),
    ],
    "world": [
        Case("a candidate twice", again("world.jsonl")),
        Case("a row that is not there", first_row("world.jsonl", row=6)),
        Case("a prompt of another world", first_row("world.jsonl", prompt="a red cube on a table")),
    ],
}


@pytest.mark.parametrize("name", MEANING)
def test_rows_that_cannot_be_meant_are_refused(bench, tmp_path, name):
    bench(name, MEANING[name], tmp_path, every=2)


# ---------------------------------------------------------------------------------------------------------------------
# Image tokens


def packed(header: object, data: bytes) -> bytes:
    """A safetensors file by hand, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def parts(file: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


def with_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Spoil the header, in place, and leave the data."""

    def spoil(file: bytes) -> bytes:
        header, data = parts(file)
        change(header)
        return packed(header, data)

    return spoil


def with_tensor(**values: object) -> Callable[[bytes], bytes]:
    return with_header(lambda header: header["tokens"].update(values))


def metadata_of(stem: str, key: str) -> Callable[[Path], str]:
    """Say something else in the header of one of the files that make_rounds has made."""
    return written(f"{stem}.safetensors", with_metadata(**{key: "another"}))


def with_metadata(**values: object) -> Callable[[bytes], bytes]:
    return with_header(lambda header: header["__metadata__"].update(values))


def two_tensors(second: str, overlap: bool) -> Callable[[bytes], bytes]:
    def spoil(file: bytes) -> bytes:
        header, data = parts(file)
        start = 0 if overlap else len(data)
        header[second] = header["tokens"] | {"data_offsets": [start, start + len(data)]}
        return packed(header, data if overlap else data * 2)

    return spoil


def with_token(row: int, token: int = 24) -> Callable[[bytes], bytes]:
    """Change the first token of one picture."""

    def spoil(file: bytes) -> bytes:
        header, data = parts(file)
        place = row * 2 * header["tokens"]["shape"][1]
        return packed(header, data[:place] + struct.pack("<H", token) + data[place + 2 :])

    return spoil


def no_rows(file: bytes) -> bytes:
    header, _ = parts(file)
    header["tokens"] |= {"shape": [len(header["tokens"]["shape"]), 0], "data_offsets": [0, 0]}
    return packed(header, b"")


BOMB = pickle.dumps(Executed())
HEADERS: dict[str, bytes | Callable[[bytes], bytes]] = {
    "empty": b"",
    "four bytes": lambda file: file[:4],
    "a length alone": lambda file: file[:8],
    "cut in the header": lambda file: file[:60],
    "one byte short": lambda file: file[:-1],
    "half of it": lambda file: file[: len(file) // 2],
    "bytes after the end": lambda file: file + b"\0\0",
    "a header of 2**60 bytes": lambda file: struct.pack("<Q", 2**60) + file[8:],
    "a header of 2**64 - 1 bytes": lambda file: b"\xff" * 8 + file[8:],
    "a header of 90 MB": lambda file: struct.pack("<Q", 90_000_000) + file[8:],
    "a header of 0 bytes": lambda file: bytes(8) + file[8:],
    "a header one byte too long": lambda file: struct.pack("<Q", int.from_bytes(file[:8], "little") + 1) + file[8:],
    "a header of a bracket": packed(b"{", b""),
    "a header of a list": packed(b"[]", b""),
    "a header of null": packed(b"null", b""),
    "a header of nothing": packed(b"{}", b""),
    "a header not of UTF-8": packed(b"\xff\xfe{}", b""),
    "a header of NUL bytes": packed(bytes(64), b""),
    "a header of 100,000 brackets": packed(b"[" * DEEP, b""),
    "text": b"tokens: 1, 2, 3, and so on, for a while\n" * 9,
    "pickle": BOMB,
    "pickle behind a length": lambda file: struct.pack("<Q", len(BOMB)) + BOMB,
    "a zip archive": b"PK\x03\x04" + bytes(200),
}
TENSORS: dict[str, bytes | Callable[[bytes], bytes]] = HEADERS | {
    "offsets outside": with_tensor(data_offsets=[0, 2**20]),
    "offsets of 2**63": with_tensor(data_offsets=[2**63, 2**63 + 8]),
    "negative offsets": with_tensor(data_offsets=[-8, 0]),
    "offsets backwards": with_tensor(data_offsets=[8, 0]),
    "offsets that leave a hole": with_tensor(data_offsets=[2, 10]),
    "one offset": with_tensor(data_offsets=[0]),
    "offsets as text": with_tensor(data_offsets=["0", "8"]),
    "no offsets": with_header(lambda header: header["tokens"].pop("data_offsets")),
    "two tensors in one place": two_tensors("more", overlap=True),
    "two tensors": two_tensors("more", overlap=False),
    "another name": with_header(lambda header: header.update(token=header.pop("tokens"))),
    "no tensor": lambda file: packed({"__metadata__": parts(file)[0]["__metadata__"]}, b""),
    "signed": with_tensor(dtype="I16"),
    "half floats": with_tensor(dtype="F16"),
    "a type that is none": with_tensor(dtype="U17"),
    "a type that is a number": with_tensor(dtype=16),
    "bytes": with_header(
        lambda h: h["tokens"].update(dtype="U8", shape=[h["tokens"]["shape"][0], 2 * h["tokens"]["shape"][1]])
    ),
    "one dimension": with_header(lambda h: h["tokens"].update(shape=[h["tokens"]["shape"][0] * h["tokens"]["shape"][1]])),
    "three dimensions": with_header(lambda h: h["tokens"].update(shape=[*h["tokens"]["shape"], 1])),
    "more rows than data": with_tensor(shape=[10**6, 4]),
    "2**62 rows": with_tensor(shape=[2**62, 4]),
    "a negative shape": with_tensor(shape=[-1, 4]),
    "a shape of text": with_tensor(shape="many"),
    "pictures of no tokens": no_rows,
    "no metadata": with_header(lambda header: header.pop("__metadata__")),
    "metadata that is a list": with_header(lambda header: header.update(__metadata__=["24"])),
    "metadata of numbers": with_metadata(codebook_size=24),
    **{
        f"a codebook of {text!r:.20}": with_metadata(codebook_size=text)
        for text in ("", "0", "-1", "1e9", "nan", "24.0", " 24", "\u0662\u0664", "65537", "999999999", str(10**30), "x" * 10**6)
    },
    "tokens outside the codebook": with_metadata(codebook_size="1"),
    "the wrong number of tokens": with_metadata(image_tokens="5"),
}
DRAWN = {  # name of a command -> the tensor files it reads
    "score rejudge": ["scored.safetensors"],
    "make_pairs": ["scored.safetensors"],
    "sft": ["sft.safetensors"],
    "dpo": ["pairs.safetensors"],
    "summary": [f"{ROUND0}/heldout.safetensors", f"{ROUND1}/heldout.safetensors", f"{ROUND1}/rejudged.safetensors"],
    "world": ["world.safetensors"],
    "gate": [f"{name}.safetensors" for name in ("base", "last", "after", "again", "earlier")],
    "diagnose": ["base.safetensors", "after.safetensors", "again.safetensors"],
    "dynamics": ["sft.safetensors", "scored.safetensors"],
    "dynamics pairs": ["pairs.safetensors"],
    "export": ["scored.safetensors"],
}
DRAWN["report"] = [*DRAWN["summary"], f"{ROUND1}/scored.safetensors", f"{ROUND1}/pairs.safetensors"]


@pytest.mark.parametrize("name", DRAWN)
def test_a_spoilt_tensor_file_is_refused(bench, tmp_path, name):
    cases = []
    for file in DRAWN[name]:
        cases += [Case(f"{file}: {about}", written(file, content)) for about, content in TENSORS.items()]
        cases += place_cases(file)
    cases = cases if name == "make_pairs" else sample(cases, CASES)  # all read by common/tokens.py
    for file in DRAWN[name]:
        if name == "make_pairs":  # it copies some of the pictures only
            cases += [Case(f"picture {row} outside the codebook", written(file, with_token(row))) for row in range(36)]
    if name == "summary":
        cases.append(Case("no model", written(f"{ROUND0}/heldout.safetensors", with_metadata(model=""))))
    if name in ("gate", "diagnose"):
        for key in ("model", "model_hash"):
            cases.append(Case(f"no {key}", written("after.safetensors", with_metadata(**{key: ""}))))
        for key in ("questions", "guidance", "temperature"):
            cases.append(Case(f"another {key}", lambda where, k=key: (metadata_of("after", k)(where), "after")[1]))
        cases.append(Case("another's judgement", lambda where: (metadata_of("again", "judge_hash")(where), "again")[1]))
    if name == "gate":
        no_readouts = with_header(lambda header: header["__metadata__"].pop("readouts"))
        cases.append(Case("no read-outs", lambda where: (written("after.safetensors", no_readouts)(where), "after.jsonl")[1]))
        cases.append(Case("no judge", written("again.safetensors", with_metadata(judge_hash=""))))
        for file, key in (("again", "seed"), ("earlier", "seed"), ("earlier", "judge_hash"), ("last", "questions")):
            spoil = metadata_of(file, key)
            cases.append(Case(f"{file}: another {key}", lambda where, s=spoil, f=file: (s(where), f)[1]))
    if name in ("sft", "dpo"):  # what the card of the trained model will say
        file = f"{'pairs' if name == 'dpo' else 'sft'}.safetensors"
        for text in ("high", "nan", "1e400", "-1", ""):
            cases.append(Case(f"nonunified {text!r}", written(file, with_metadata(nonunified=text))))
    if name in RUNS:
        for text in ("high", "nan", "-1", "1.5", ""):
            cases.append(Case(f"threshold {text!r}", written(f"{ROUND1}/heldout.safetensors", with_metadata(threshold=text))))
    bench(name, cases, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def changed_json(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change a JSON file of a checkpoint."""

    def spoil(checkpoint: Path) -> None:
        value = json.loads((checkpoint / file).read_text())
        change(value)
        (checkpoint / file).write_text(json.dumps(value))

    return spoil


def config(part: str | None = None, **values: object) -> Callable[[Path], None]:
    """Change config.json, or one part of it."""
    return changed_json("config.json", lambda value: (value[part] if part else value).update(values))


def content(file: str, data: bytes | Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Replace what a file of a checkpoint holds."""

    def spoil(checkpoint: Path) -> None:
        path = checkpoint / file
        path.write_bytes(data if isinstance(data, bytes) else data(path.read_bytes()))

    return spoil


def instead(file: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Put something else in the place of a file of a checkpoint."""

    def spoil(checkpoint: Path) -> None:
        (checkpoint / file).unlink(missing_ok=True)
        make(checkpoint / file)

    return spoil


def weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the tensors of a checkpoint."""

    def spoil(checkpoint: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(checkpoint / WEIGHTS)
        change(tensors)
        save_file(tensors, checkpoint / WEIGHTS, {"format": "pt"})

    return spoil


def sparse(file: str) -> Callable[[Path], None]:
    """Make a file gigabytes long; it takes no room."""

    def spoil(checkpoint: Path) -> None:
        (checkpoint / file).parent.mkdir(exist_ok=True)
        (checkpoint / file).touch()
        os.truncate(checkpoint / file, 3 * 10**9)

    return spoil


def pickled(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(BOMB)


def index(names: Callable[[list[str], Path], Any], copied: str = "part.safetensors") -> Callable[[Path], None]:
    """Replace the weights by an index; the weights' own file, under another name and as a copy elsewhere, is fine."""

    def spoil(checkpoint: Path) -> None:
        keys = [key for key in parts((checkpoint / WEIGHTS).read_bytes())[0] if key != "__metadata__"]
        (checkpoint / WEIGHTS).rename(checkpoint / "part.safetensors")
        with contextlib.suppress(shutil.SameFileError):
            shutil.copy(checkpoint / "part.safetensors", checkpoint / copied)
        value = {"metadata": {}, "weight_map": names(keys, checkpoint)}
        (checkpoint / f"{WEIGHTS}.index.json").write_text(json.dumps(value))

    return spoil


def with_code(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Put code beside a JSON file that asks for it."""

    def spoil(checkpoint: Path) -> None:
        (checkpoint / "evil.py").write_text("open('executed', 'w')\nraise SystemExit(0)\n")
        changed_json(file, change)(checkpoint)

    return spoil


WEIGHTS = "model.safetensors"
NORM = "model.language_model.norm.weight"
TEMPLATES = {
    "a mistake": "{% for m in messages %}{{ m",
    "an end too many": "{% endfor %}",
    "no such filter": "{{ messages | nope }}",
    "no such function": "{{ open('executed', 'w') }}",
    "a division by zero": "{{ 1 / 0 }}",
    "an exception": "{{ raise_exception('no') }}",
    "reaching for internals": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "reaching for internals by name": "{{ (messages | attr('__class__')).__mro__ }}",
    "reaching for globals": "{{ cycler.__init__.__globals__.os.system('touch executed') }}",
    "reaching through format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}{{ ''.__class__.mro() }}",
    "changing the messages": "{{ messages.append(1) }}",
    "no end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "nothing": "",
    "no prompt": "<|User|>: {% for c in messages[0]['content'] %}{% if c['type'] == 'image' %}<img>{% endif %}{% endfor %}",
}
CONFIGS: dict[str, Callable[[Path], Any]] = {
    "config.json cut": content("config.json", lambda data: data[:-20]),
    "config.json empty": content("config.json", b""),
    "config.json a list": content("config.json", b"[]"),
    "config.json null": content("config.json", b"null"),
    "config.json a number": content("config.json", b"7"),
    "config.json UTF-16": content("config.json", lambda data: data.decode().encode("utf-16")),
    "config.json not UTF-8": content("config.json", b'{"model_type": "janus\xff"}'),
    "config.json with NaN": content("config.json", lambda data: data.replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": NaN')),
    "config.json of 100,000 brackets": content("config.json", b"[" * DEEP),
    "config.json of 5,000 digits": content("config.json", lambda data: b'{"more": ' + b"7" * 5000 + b"," + data[1:]),
    "config.json missing": instead("config.json", lambda path: None),
    "config.json a directory": instead("config.json", Path.mkdir),
    "config.json a symlink loop": instead("config.json", lambda path: path.symlink_to(path)),
    "config.json a pipe": instead("config.json", os.mkfifo),
    "model_type llama": config(model_type="llama"),
    "model_type multi_modality": config(model_type="multi_modality"),
    "model_type a list": config(model_type=["janus"]),
    "no model_type": changed_json("config.json", lambda value: value.pop("model_type")),
    **{
        f"no {part}": changed_json("config.json", lambda value, part=part: value.pop(part))
        for part in ("text_config", "vq_config")
    },
    "text_config a list": config(text_config=[]),
    "text_config null": config(text_config=None),
    "text_config of opt": config("text_config", model_type="opt"),
    "text_config of nothing known": config("text_config", model_type="../x"),
    "vision_config a string": config(vision_config="vision"),
    **{
        f"hidden_size {value}": config("text_config", hidden_size=value)
        for value in (0, -32, 33, 10**9, 10**18, 10**30, 2.5, "32", None, True)
    },
    **{f"num_hidden_layers {n}": config("text_config", num_hidden_layers=n) for n in (0, -1, 1, 3, 10**6, 10**12, "2")},
    "vocab_size 10**12": config("text_config", vocab_size=10**12),
    "vocab_size 3": config("text_config", vocab_size=3),
    "intermediate_size 10**12": config("text_config", intermediate_size=10**12),
    "num_attention_heads 0": config("text_config", num_attention_heads=0),
    "num_attention_heads 10**9": config("text_config", num_attention_heads=10**9),
    "num_key_value_heads 3": config("text_config", num_key_value_heads=3),
    "head_dim 10**9": config("text_config", head_dim=10**9),
    "max_position_embeddings 0": config("text_config", max_position_embeddings=0),
    "max_position_embeddings text": config("text_config", max_position_embeddings="512"),
    "hidden_act of nothing known": config("text_config", hidden_act="__import__"),
    "rope of nothing known": config("text_config", rope_parameters={"rope_type": "evil", "rope_theta": 1.0}),
    "rope a list": config("text_config", rope_parameters=[1]),
    "vision layers 10**6": config("vision_config", num_hidden_layers=10**6),
    "vision depth 10**6": config("vision_config", depth=10**6),
    "vision hidden_size 10**9": config("vision_config", hidden_size=10**9),
    "image_size 10**6": config("vision_config", image_size=10**6),
    "image_size 16": config("vision_config", image_size=16),
    "image_size a list": config("vision_config", image_size=[32, 32]),
    "patch_size 0": config("vision_config", patch_size=0),
    "patch_size 10**9": config("vision_config", patch_size=10**9),
    "num_embeddings 10**9": config("vq_config", num_embeddings=10**9),
    "num_embeddings 0": config("vq_config", num_embeddings=0),
    "num_embeddings 25": config("vq_config", num_embeddings=25),
    "num_res_blocks 10**6": config("vq_config", num_res_blocks=10**6),
    "channel_multiplier of 10**5": config("vq_config", channel_multiplier=[1] * 10**5),
    "channel_multiplier 10**9": config("vq_config", channel_multiplier=[10**9] * 5),
    "base_channels 10**9": config("vq_config", base_channels=10**9),
    "auto_map": with_code("config.json", lambda value: value.update(auto_map={"AutoModel": "evil.Model"})),
    "auto_map inside": with_code("config.json", lambda v: v["text_config"].update(auto_map={"AutoConfig": "evil.Config"})),
    "a quantization": config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "another's kernels": config(attn_implementation="nobody/kernels"),
    "another's weights": config(transformers_weights="../outside.safetensors"),
}
INFINITE = (  # JSON files of a checkpoint
    *("config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"),
)
CONFIGS |= {
    **{f"{file} with 1e400": content(file, lambda data: b'{"more": [1e400],' + data.lstrip()[1:]) for file in INFINITE},
    "rope_theta 1e400": content("config.json", lambda data: data.replace(b'"rope_theta": 10000.0', b'"rope_theta": 1e400')),
    "rope_theta of 400 digits": content(
        "config.json", lambda data: data.replace(b'"rope_theta": 10000.0', b'"rope_theta": 1' + b"0" * 400)
    ),
    "half a surrogate pair": content("config.json", lambda data: b'{"more": "\\ud83d",' + data.lstrip()[1:]),
}
FILES: dict[str, Callable[[Path], Any]] = {
    **{f"weights: {about}": content(WEIGHTS, data) for about, data in HEADERS.items()},
    "weights a directory": instead(WEIGHTS, Path.mkdir),
    "weights missing": instead(WEIGHTS, lambda path: None),
    "weights a symlink loop": instead(WEIGHTS, lambda path: path.symlink_to(path)),
    "weights a pipe": instead(WEIGHTS, os.mkfifo),
    "weights a pipe beside": lambda checkpoint: os.mkfifo(checkpoint / "more.safetensors"),
    "pickle alone": pickled,
    "a tensor missing": weights(lambda tensors: tensors.pop(NORM)),
    "a tensor too short": weights(lambda tensors: tensors.update({NORM: tensors[NORM][:-1].clone()})),
    "a tensor too long": weights(lambda tensors: tensors.update({NORM: tensors[NORM].repeat(2)})),
    "a tensor of two dimensions": weights(lambda tensors: tensors.update({NORM: tensors[NORM][None].clone()})),
    "another name": weights(lambda tensors: tensors.update(norm=tensors.pop(NORM))),
    "NaN weights": weights(lambda tensors: tensors[NORM].fill_(float("nan"))),
    "an infinite weight": weights(lambda tensors: tensors["lm_head.weight"][3, 3].fill_(float("inf"))),
    "an index to outside": index(lambda keys, _: dict.fromkeys(keys, "../outside.safetensors"), "../outside.safetensors"),
    "an index to outside, in part": index(
        lambda keys, _: dict.fromkeys(keys, "part.safetensors") | {keys[0]: "../outside.safetensors"}, "../outside.safetensors"
    ),
    "an index to an absolute path": index(lambda keys, at: dict.fromkeys(keys, str(at.resolve() / "part.safetensors"))),
    "an index to outside and back": index(lambda keys, _: dict.fromkeys(keys, "../chkpt/part.safetensors")),
    "an index to nothing": index(lambda keys, _: dict.fromkeys(keys, "other.safetensors")),
    "an index to numbers": index(lambda keys, _: dict.fromkeys(keys, 7)),
    "an index to pickle": index(lambda keys, _: dict.fromkeys(keys, "part.bin"), "part.bin"),
    "an index that is a list": index(lambda keys, _: keys),
    "an index of nothing": index(lambda keys, _: {}),
    "an index that is cut": lambda checkpoint: (
        index(lambda keys, _: dict.fromkeys(keys, "part.safetensors"))(checkpoint),
        content(f"{WEIGHTS}.index.json", lambda data: data[:-9])(checkpoint),
    ),
    **{f"{file} of gigabytes": sparse(file) for file in (
        "config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
        "generation_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
        "additional_chat_templates/more.jinja", "vocab.json", "merges.txt", "tokenizer.model", f"{WEIGHTS}.index.json",
    )},
    "an adapter": content("adapter_config.json", b'{"base_model_name_or_path": "nobody/nothing"}'),
    "an adapter of nothing": content("adapter_config.json", b""),
    "tokenizer.json cut": content("tokenizer.json", lambda data: data[:-9]),
    "tokenizer.json empty": content("tokenizer.json", b""),
    "tokenizer.json a list": content("tokenizer.json", b"[1]"),
    "tokenizer.json an object": content("tokenizer.json", b"{}"),
    "tokenizer.json missing": instead("tokenizer.json", lambda path: None),
    "tokenizer.json a pipe": instead("tokenizer.json", os.mkfifo),
    "tokenizer.json a directory": instead("tokenizer.json", Path.mkdir),
    "no vocabulary": changed_json("tokenizer.json", lambda value: value["model"].update(vocab={})),
    "a vocabulary too large": changed_json("tokenizer.json", lambda value: value["model"]["vocab"].update(sofa=10**6)),
    "a negative token": changed_json("tokenizer.json", lambda value: value["model"]["vocab"].update(sofa=-1)),
    "no yes": changed_json("tokenizer.json", lambda v: [v["model"]["vocab"].pop(word) for word in ("yes", "Yes")]),
    "a tokenizer of nothing known": changed_json("tokenizer.json", lambda value: value["model"].update(type="Evil")),
    "tokenizer_config.json cut": content("tokenizer_config.json", lambda data: data[:-9]),
    "tokenizer_config.json a list": content("tokenizer_config.json", b"[]"),
    "no begin-of-image": changed_json("tokenizer_config.json", lambda value: value.pop("boi_token", None)),
    "a begin-of-image unknown": changed_json("tokenizer_config.json", lambda value: value.update(boi_token="<nowhere>")),
    "a begin-of-image of a number": changed_json("tokenizer_config.json", lambda value: value.update(boi_token=7)),
    "code for the tokenizer": with_code(
        "tokenizer_config.json", lambda value: value.update(auto_map={"AutoTokenizer": ["evil.Slow", "evil.Fast"]})
    ),
    "processor_config.json cut": content("processor_config.json", lambda data: data[:-9]),
    "processor_config.json a list": content("processor_config.json", b"[]"),
    "preprocessor_config.json cut": content("preprocessor_config.json", b'{"image_mean": [0.5'),
    "code for the processor": with_code(
        "processor_config.json", lambda value: value.update(auto_map={"AutoProcessor": "evil.Processor"})
    ),
    "code for the pictures": with_code(
        "processor_config.json", lambda v: v["image_processor"].update(auto_map={"AutoImageProcessor": "evil.P"})
    ),
    **{
        f"num_image_tokens {value}": changed_json("processor_config.json", lambda v, n=value: v.update(num_image_tokens=n))
        for value in (0, 3, 10**9, "4", None)
    },
    **{
        f"{key} {value}": changed_json("processor_config.json", lambda v, k=key, x=value: v["image_processor"].update({k: x}))
        for key, value in (
            ("image_mean", "half"), ("image_mean", None), ("image_mean", [0.5, 0.5]), ("image_mean", ["0.5"] * 3),
            ("image_std", [0, 0, 0]), ("image_std", [[0.5]] * 3), ("image_std", {}),
        )
    },
    "generation_config.json cut": content("generation_config.json", lambda data: data[:-9]),
    "generation_config.json a list": content("generation_config.json", b"[]"),
    "generation_config.json a pipe": instead("generation_config.json", os.mkfifo),
    **{
        f"{key} {value}": changed_json("generation_config.json", lambda v, k=key, x=value: v.update({k: x}))
        for key in ("bos_token_id", "pad_token_id")
        for value in (10**9, -1, "1", [1])
    },
    **{f"a template with {about}": content("chat_template.jinja", text.encode()) for about, text in TEMPLATES.items()},
    "a template not of UTF-8": content("chat_template.jinja", b"\xff{{ messages }}"),
    "a template that is a directory": instead("chat_template.jinja", Path.mkdir),
    "no template": instead("chat_template.jinja", lambda path: None),
}  # fmt: skip


@pytest.fixture(scope="module")
def judge(warm, tiny, good):
    """Run a command on spoilt checkpoints; all its data is fine."""

    def run_cases(command: tuple, spoilers: dict[str, Callable[[Path], Any]], tmp_path: Path, every: int) -> None:
        def fill(where: Path) -> None:
            copy_read(command, good, where)
            shutil.copytree(tiny, where / "chkpt")

        def case(about: str, spoiler: Callable[[Path], Any]) -> Case:
            return Case(about, lambda where: (spoiler(where / "chkpt"), "chkpt")[1])

        refuse(warm, tmp_path, fill, command, [case(*item) for item in spoilers.items()], every)

    return run_cases


JUDGED = {
    "score": ("score.py", "--model", "chkpt", "--prompts", "prompts.jsonl", *SCORE),
    "rejudge": ("score.py", "--model", "chkpt", "--rejudge", "scored.jsonl", *SCORE),
    "sft": ("sft.py", "--data", "sft.jsonl", "--model", "chkpt", "--other-model", *TRAIN),
    "dpo": ("dpo.py", "--pairs", "pairs.jsonl", "--model", "chkpt", "--other-model", *TRAIN),
    "dynamics": ("dynamics.py", "--data", "sft.jsonl", "--probes", "scored.jsonl", "--model", "chkpt", "--other-model", *PROBE),
    "report": (*COMMANDS["report"], "--model", "chkpt"),
    "export": (*COMMANDS["export"], "--model", "chkpt"),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", JUDGED)
def test_a_whole_checkpoint_is_accepted_with_one_file_of_weights_or_an_index(warm, tiny, good, tmp_path, name):
    copy_read(JUDGED[name], good, tmp_path)
    shutil.copytree(tiny, tmp_path / "chkpt")
    if name in ("rejudge", "dpo"):
        index(lambda keys, _: dict.fromkeys(keys, "part.safetensors"))(tmp_path / "chkpt")
    done = execute(warm, tmp_path, *JUDGED[name])
    assert done.returncode == 0, done.stderr


SIZES = {about: spoiler for about, spoiler in CONFIGS.items() if "10**" in about or "000000" in about}


@pytest.mark.thorough
def test_a_checkpoint_of_absurd_size_is_refused_in_little_time_and_memory(judge, tmp_path):
    assert len(SIZES) > 15
    judge(JUDGED["score"], SIZES, tmp_path, every=1)


@pytest.mark.parametrize("spoilers", [CONFIGS.items() - SIZES.items(), FILES.items()], ids=["config", "files"])
def test_a_spoilt_checkpoint_is_refused(judge, tmp_path, spoilers):
    judge(JUDGED["score"], dict(sorted(spoilers, key=lambda item: item[0])), tmp_path, every=15)


def normalized(*rules: dict[str, Any]) -> Callable[[Path], None]:
    """Have a tokenizer change its text by rules, one after the other."""
    normalizer = {"type": "Sequence", "normalizers": rules}
    return changed_json("tokenizer.json", lambda value: value.update(normalizer=normalizer))


def longer(letter: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": letter}, "content": content}


LOOP = "{% for i in range(99999) %}"
SPLIT = {"type": "Split", "pattern": {"Regex": "(e|ee)+[\u0400]"}, "behavior": "Isolated", "invert": False}
ENDLESS: dict[str, Callable[[Path], Any]] = {
    "loops in a template": content("chat_template.jinja", (LOOP * 3 + "{% endfor %}" * 3).encode()),
    "loops about a picture": content(
        "chat_template.jinja",
        f"{{{{ messages }}}}{{% if 'image' in messages | string %}}{LOOP * 3}{'{% endfor %}' * 3}{{% endif %}}".encode(),
    ),
    "a number without end": content("chat_template.jinja", b"{{ 9 ** (9 ** 9) }}"),
    "a text of 100 GB": content("chat_template.jinja", b"{{ 'a' * 10 ** 11 }}"),
    "a letter doubled": normalized(*[longer("e", "ee")] * 36),
    "a letter of nobody's doubled": normalized(*[longer("\u0436", "\u0436\u0436")] * 36),
    "letters in turn": normalized(*[longer("a", "bb"), longer("b", "aa")] * 20),
    "a letter made long": normalized(*[longer("Q", "Q" * 4000)] * 4),
    "any letter doubled": normalized(*[{"type": "Replace", "pattern": {"Regex": "."}, "content": "ee"}] * 36),
    "a pattern that goes back": changed_json("tokenizer.json", lambda value: value.update(pre_tokenizer=SPLIT)),
}


def test_a_tokenizer_or_template_without_end_is_refused_in_time(judge, tmp_path, monkeypatch):
    from families import pretrained

    monkeypatch.setattr(pretrained, "LIMIT_S", 1)
    judge(JUDGED["score"], ENDLESS, tmp_path, every=0)


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(JUDGED.keys() - {"score"}))
def test_a_spoilt_checkpoint_is_refused_by_every_script(judge, tmp_path, name):
    everything = CONFIGS | FILES
    picked = random.Random(name).sample(sorted(everything), 12)
    judge(JUDGED[name], {about: everything[about] for about in picked}, tmp_path, every=4)


@pytest.mark.thorough
def test_a_spoilt_checkpoint_is_refused_by_the_oracle(warm, good, tmp_path):
    base, command = ROOT / "shapes" / "base", (*COMMANDS["world"], "--model", "chkpt")

    def fill(where: Path) -> None:
        copy_read(command, good, where)
        shutil.copytree(base, where / "chkpt")

    spoilers = {key: CONFIGS[key] for key in ("config.json cut", "hidden_size 1000000000", "auto_map")}
    spoilers |= {key: FILES[key] for key in ("pickle alone", "weights: half of it", "an index to outside", "NaN weights")}
    cases = [Case(about, lambda where, s=spoiler: (s(where / "chkpt"), "chkpt")[1]) for about, spoiler in spoilers.items()]
    refuse(warm, tmp_path, fill, command, cases, every=2)


# ---------------------------------------------------------------------------------------------------------------------
# Names and headers that mislead


LONG = "x" * 300  # no file system has such a name


@pytest.mark.parametrize("name", COMMANDS)
def test_a_name_that_no_file_can_have_is_refused(bench, warm, tiny, good, tmp_path, name):
    command = words(name, tiny, good)
    outputs = ("out", "out.jsonl", "out.json", "out.html", "run")
    places = [i for i, word in enumerate(command) if i and (word in outputs or (good / str(word)).is_file())]
    for place in places:
        inside = "taken/out.jsonl" if command[place] in outputs else "nowhere/out.jsonl"  # in a file, in no directory
        for told, word in ((LONG, f"{LONG}.jsonl"), (inside.split("/")[0], inside)):
            if command[place] == "run" and word == inside:
                continue
            spoilt = (*command[:place], word, *command[place + 1 :])
            case = Case(word, lambda where, t=told: ((where / "taken").write_text("a file"), t)[1])
            refuse(warm, tmp_path, lambda where: copy_read(command, good, where), spoilt, [case], 0)


GARBAGE = {
    "nothing": b"",
    "text": b"seed: 0\n",
    "a list": b"[1]",
    "not UTF-8": b'{"seed": "\xff"}',
    "100,000 brackets": b"[" * DEEP,
    "NaN": b'{"seed": NaN}',
}


def placed(path: str, data: bytes | None, named: str) -> Callable[[Path], str]:
    """Something in the way: a file with these bytes, a directory for None."""

    def spoil(where: Path) -> str:
        (where / path).parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            (where / path).mkdir()
        else:
            (where / path).write_bytes(data)
        return named

    return spoil


RUN = b'{"script": "sft.py", "data_hash": "0123456789abcdef", "model_hash": "0123456789abcdef"}'
EXPORT = b'{"layout": "plain", "scored_hash": "0123456789abcdef", "metadata_hash": null, "categories": null, "model": "m"}'

IN_THE_WAY = {
    "curriculum prompts": [Case("a directory", placed("out.jsonl", None, "out.jsonl"))],
    "score prompts": [
        Case("a directory", placed("out.jsonl", None, "out.jsonl")),
        Case("rows alone", placed("out.jsonl", b"{}\n", "out.safetensors")),
        Case("tensors alone", placed("out.safetensors", BOMB, "out.safetensors")),
        Case("a file for the chunks", placed("out.jsonl.chunks", b"", "out.jsonl.chunks")),
        *(
            Case(f"chunks: {about}", placed("out.jsonl.chunks/settings.json", data, "out.jsonl"))
            for about, data in GARBAGE.items()
        ),
    ],
    "make_pairs": [
        Case("a file", placed("out", b"", "out")),
        Case("pickle", placed("out/sft.safetensors", BOMB, "out/sft.safetensors")),
        Case("rows alone", placed("out/pairs.jsonl", b"{}\n", "out")),
    ],
    **{
        name: [
            Case("a file", placed("out", b"", "out")),
            Case("a directory of something else", placed("out/thesis.tex", b"all of it", "out")),
            Case("a file for the work", placed("out.training", b"", "out.training")),
            *(Case(f"model: {about}", placed("out/training/settings.json", data, "out")) for about, data in GARBAGE.items()),
            *(
                Case(f"work: {about}", placed("out.training/settings.json", data, "out.training"))
                for about, data in GARBAGE.items()
            ),
        ]
        for name in ("sft", "dpo")
    },
    "summary": [Case("a directory", placed("run/summary.jsonl", None, "summary.jsonl"))],
    "world": [Case("a directory", placed("out.jsonl", None, "out.jsonl"))],
    "gate": [Case("a directory", placed("out.json", None, "out.json"))],
    "diagnose": [Case("a directory", placed("out.json", None, "out.json"))],
    "dynamics": [
        Case("a directory", placed("out.jsonl", None, "out.jsonl")),
        Case("a directory for the summary", placed("out.json", None, "out.json")),
        Case("pictures", placed("out.safetensors", BOMB, "out.jsonl")),
    ],
    "report": [Case("a directory", placed("out.html", None, "out.html"))],
    "export": [
        Case("a file", placed("out", b"", "out")),
        Case("a directory of something else", placed("out/thesis.tex", b"all of it", "out")),
        *(Case(f"an export: {about}", placed("out/export.json", data, "out")) for about, data in GARBAGE.items()),
    ],
}


# An output over something else

OUT_FILES = {"out.jsonl", "out.json", "out.html"}  # in COMMANDS, where one file is written
WRITES = {name: word for name, words in COMMANDS.items() for word in words if word in OUT_FILES}
LINKS: dict[str, Callable[[Path, Path], Any]] = {
    "its own name": lambda file, alias: None,
    "a way round": lambda file, alias: None,
    "a link": lambda file, alias: alias.symlink_to(file.name),
    "a hard link": lambda file, alias: os.link(file, alias),
    "a link to a link": lambda file, alias: (alias.with_name("l").symlink_to(file.name), alias.symlink_to("l")),
}


@pytest.mark.parametrize("how", LINKS)
@pytest.mark.parametrize("name", WRITES)
def test_an_output_over_an_input_or_its_tensors_is_refused(bench, warm, tiny, good, tmp_path, name, how):
    command = words(name, tiny, good)
    read = [word for word in map(str, command[1:]) if (good / word).is_file()]
    read += [beside for word in read if (good / (beside := tokens_path(word).name)).is_file()]
    for file in dict.fromkeys(read):
        own = {"its own name": file, "a way round": f"sub/../{file}"}
        out = str(own.get(how, f"alias{Path(WRITES[name]).suffix}"))

        def spoil(where: Path, file: str = file, out: str = out) -> str:
            (where / "sub").mkdir()
            LINKS[how](where / file, where / out)
            return Path(out).name

        spoilt = tuple(out if word == WRITES[name] else word for word in command)
        refuse(warm, tmp_path, lambda where: copy_read(command, good, where), spoilt, [Case(f"{how} of {file}", spoil)], 0)


DERIVED = {  # what is written beside --out, by what it would replace
    "score rejudge": ("alias.safetensors", "scored.safetensors"),
    "score prompts": ("alias.safetensors", "prompts.jsonl"),
    "dynamics": ("alias.json", "sft.safetensors"),
    "dynamics pairs": ("alias.json", "scored.jsonl"),
}


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", DERIVED)
def test_what_is_written_beside_the_output_is_never_over_an_input(warm, tiny, good, tmp_path, name, link):
    command, (beside, file) = words(name, tiny, good), DERIVED[name]
    spoilt = tuple("alias.jsonl" if word == "out.jsonl" else word for word in command)
    case = Case(file, lambda where: (link(where / file, where / beside), "alias")[1])
    refuse(warm, tmp_path, lambda where: copy_read(command, good, where), spoilt, [case], 0)


@pytest.mark.parametrize("name", ["sft", "dpo", "export", "export geneval"])
def test_a_directory_that_holds_what_is_read_is_never_made_anew(warm, tiny, good, tmp_path, name):
    command = words(name, tiny, good)
    cases = [Case("itself", lambda where: "here"), Case("above", lambda where: tmp_path.name)]
    for case, out in zip(cases, (tmp_path / "here", tmp_path), strict=True):
        spoilt = (*(str(out) if word == "out" else word for word in command), "--restart")
        refuse(warm, tmp_path, lambda where: copy_read(command, good, where), spoilt, [case], 0)


def test_pairs_are_not_made_over_what_they_are_made_of(warm, good, tmp_path):
    command = ("make_pairs.py", "--scored", "pairs.jsonl", "--out", ".", "--force")

    def fill(where: Path) -> None:
        for suffix in (".jsonl", ".safetensors"):
            shutil.copy(good / f"scored{suffix}", where / f"pairs{suffix}")

    refuse(warm, tmp_path, fill, command, [Case("pairs.jsonl", lambda where: "is also read")], 0)


@pytest.mark.parametrize("suffix", ["rows", "JSONL", "txt", ""])
def test_the_tensors_of_rows_are_not_replaced_whatever_the_rows_are_called(warm, tiny, good, tmp_path, suffix):
    def fill(where: Path) -> None:
        shutil.copy(good / "scored.jsonl", where / f"mine.{suffix}".rstrip("."))
        shutil.copy(good / "scored.safetensors", where / "mine.safetensors")
        shutil.copytree(where, where / "pairs")
        for file in (where / "pairs").iterdir():
            file.rename(file.with_stem("pairs"))

    case = [Case("tensors", lambda where: "is also read")]
    rows, pairs = (f"{name}.{suffix}".rstrip(".") for name in ("mine", "pairs/pairs"))
    restart = ("score.py", "--model", tiny, "--rejudge", rows, "--out", "mine.jsonl", "--restart")
    refuse(warm, tmp_path, fill, restart, case, 0)
    refuse(warm, tmp_path, fill, ("make_pairs.py", "--scored", pairs, "--out", "pairs", "--force"), case, 0)


OWN = {"curriculum": "prompts.jsonl", "score": "scored.jsonl", "world": "labels.jsonl"}  # of the right kind: replaced
OTHERS = ("prompts.jsonl", "scored.jsonl", "sft.jsonl", "pairs.jsonl", "discard.jsonl", "labels.jsonl", "heldout.jsonl")
OTHER_TEXTS = {
    "text": b"all of it\n",
    "an array": b"[1, 2]\n",
    "JSON of something else": b'{\n  "thesis": 1\n}\n',
    "a page": b"<!doctype html>\n<html><body>all of it</body></html>\n",
    "a bomb of brackets": b"[" * DEEP,
}


@pytest.mark.parametrize("name", WRITES)
def test_a_file_of_another_kind_is_not_replaced(bench, good, tmp_path, name):
    out = WRITES[name]
    files = [file for file in OTHERS if file != OWN.get(name.split()[0])]
    cases = [Case(file, placed(out, (good / file).read_bytes(), "out")) for file in files]
    cases += [Case(about, placed(out, data, "out")) for about, data in OTHER_TEXTS.items()]
    cases.append(Case("a socket", lambda where: (os.mknod(where / out, stat.S_IFSOCK | 0o600), "out")[1]))
    cases.append(Case("a link to nowhere", lambda where: ((where / out).symlink_to("nowhere/at/all"), "out")[1]))
    bench(name, cases, tmp_path, every=0)


@pytest.mark.parametrize("name", ["curriculum prompts", "gate", "diagnose", "report", "dynamics", "summary"])
def test_a_file_of_the_own_kind_is_replaced(warm, tiny, good, tmp_path, name):
    command = words(name, tiny, good)
    copy_read(command, good, tmp_path)
    for _ in range(2):
        done = execute(warm, tmp_path, *command)
        assert done.returncode == 0, done.stderr


FOREIGN = {  # directories that are emptied: what lies there, and what the refusal has to name
    "score prompts": {
        "chunks without settings": {"out.jsonl.chunks/thesis.tex": b"all of it"},
        "chunks, foreign settings": {"out.jsonl.chunks/settings.json": b"{}", "out.jsonl.chunks/000000.jsonl": b"{}\n"},
        "settings of another program": {"out.jsonl.chunks/settings.json": b'{"kind": "scored", "work": "mine"}'},
        "a file more": {"out.jsonl.chunks/settings.json": b'{"kind": "scored", "work": "0123456789abcdef"}',
                        "out.jsonl.chunks/notes.jsonl": b"mine"},
        "a folder more": {"out.jsonl.chunks/settings.json": b'{"kind": "scored", "work": "0123456789abcdef"}',
                          "out.jsonl.chunks/sub/000000.jsonl": b"mine"},
    },
    **{
        name: {
            "a result of {}": {"out/training/settings.json": b"{}", "out/thesis.tex": b"all of it"},
            "a result without its list": {"out/training/settings.json": RUN, "out/config.json": b"{}"},
            "a result and a file more": {"out/training/settings.json": RUN, "out/thesis.tex": b"all of it",
                                         "out/training/files.json": b'["training/settings.json", "training/files.json"]'},
            "a list that leads outside": {"out/training/settings.json": RUN, "out/thesis.tex": b"all of it",
                                          "out/training/files.json": b'["../sft.jsonl", "../pairs.jsonl"]'},
            "a list of another kind": {"out/training/settings.json": RUN, "out/training/files.json": b"7"},
            "work of {}": {"out.training/settings.json": b"{}", "out.training/thesis.tex": b"all of it"},
            "work without settings": {"out.training/state-00000002/notes.txt": b"mine"},
            "work and a file more": {"out.training/settings.json": RUN, "out.training/thesis.tex": b"all of it"},
            "a state and a file more": {"out.training/settings.json": RUN, "out.training/state-00000002/notes.txt": b"mine"},
            "a folder called as a state": {"out.training/settings.json": RUN, "out.training/state-notes/a.json": b"mine"},
        }
        for name in ("sft", "dpo")
    },
    "export": {
        "of {}": {"out/export.json": b"{}", "out/thesis.tex": b"all of it"},
        "of something else": {"out/export.json": b'{"layout": "plain", "pages": 3}', "out/pictures/0000.png": b"mine"},
        "a file more": {"out/export.json": EXPORT, "out/thesis.tex": b"all of it"},
        "a picture more": {"out/export.json": EXPORT, "out/pictures/a/0000.png": b"ours", "out/pictures/a/mine.png": b"mine",
                           "out/prompts.jsonl": b'{"file": "pictures/a/0000.png"}\n'},
        "a list that leads outside": {"out/export.json": EXPORT, "out/prompts.jsonl": b'{"file": "../scored.jsonl"}\n',
                                      "out/scored.jsonl": b"mine"},
    },
}  # fmt: skip


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_directory_that_is_not_ours_is_never_emptied(warm, tiny, good, tmp_path, name, restart):
    command = (*words(name, tiny, good), *(["--restart"] if restart else []))

    def case(about: str, files: dict[str, bytes]) -> Case:
        def spoil(where: Path) -> str:
            for file, data in files.items():
                placed(file, data, "")(where)
            return "out"

        return Case(about, spoil)

    cases = [case(about, files) for about, files in FOREIGN[name].items()]
    refuse(warm, tmp_path, lambda where: copy_read(command, good, where), command, cases, 0)


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("what", ["the output", "what is beside it"])
def test_a_link_to_nowhere_is_refused_before_the_work(bench, tmp_path, name, what):
    out = "out.jsonl" if name.startswith("score") else "out"
    beside = {"score prompts": "out.jsonl.chunks", "export": "out"}.get(name, "out.training")
    link = out if what == "the output" else beside
    bench(name, [Case(link, lambda where: ((where / link).symlink_to("nowhere/at/all"), link)[1])], tmp_path, every=0)


# torchrun's variables

ENVIRONMENTS = [
    {"WORLD_SIZE": "two"},
    {"WORLD_SIZE": "0"},
    {"WORLD_SIZE": "-1"},
    {"RANK": "1.5"},
    {"LOCAL_RANK": "x"},
    {"RANK": "3"},
]


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=str)
@pytest.mark.parametrize("name", ["curriculum prompts", "score prompts", "make_pairs", "sft", "gate", "export", "world"])
def test_torchruns_variables_that_make_no_sense_are_refused(bench, tmp_path, monkeypatch, name, environment):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    bench(name, [Case(str(environment), lambda where: next(iter(environment)))], tmp_path, every=0)


@pytest.mark.parametrize("name", ["score prompts", "sft", "dpo", "export", "report", "dynamics"])
@pytest.mark.parametrize("given", [(), ("RANK",), ("RANK", "MASTER_ADDR"), ("MASTER_ADDR", "MASTER_PORT")])
def test_several_processes_that_cannot_meet_are_refused(bench, tmp_path, monkeypatch, name, given):
    for key, value in {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(key, value) if key in given else monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    bench(name, [Case(str(given), lambda where: "")], tmp_path, every=1)


@pytest.mark.parametrize("name", ["curriculum prompts", "score prompts", "sft", "dynamics", "gate"])
def test_an_empty_variable_is_unset(warm, tiny, good, tmp_path, monkeypatch, name):
    for key in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RESTART_COUNT", "GROUP_WORLD_SIZE"):
        monkeypatch.setenv(key, "")
    command = words(name, tiny, good)
    copy_read(command, good, tmp_path)
    done = execute(warm, tmp_path, *command)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_settings_of_a_training_that_are_none_are_refused_by_the_report(bench, tmp_path):
    file = f"{ROUND1}/model/training/settings.json"
    cases = [Case(about, written(file, data)) for about, data in GARBAGE.items()] + place_cases(file, optional=True)
    bench("report", cases, tmp_path, every=3)


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_what_lies_where_the_result_would_go_is_left_alone(bench, tmp_path, name):
    bench(name, IN_THE_WAY[name], tmp_path, every=4)


@pytest.mark.thorough
@pytest.mark.parametrize("script", ["score.py", "sft.py", "dpo.py", "dynamics.py", "report.py", "export.py"])
@pytest.mark.parametrize("model", ["nowhere/at/all", LONG, "prompts.jsonl", "../..", "example.org:80/model"])
def test_a_model_that_is_none_is_refused(warm, good, tmp_path, script, model):
    command = JUDGED[script.removesuffix(".py")]
    spoilt = tuple(model if word == "chkpt" else word for word in command)

    def fill(where: Path) -> None:
        copy_read(command, good, where)
        shutil.copy(good / "prompts.jsonl", where)

    refuse(warm, tmp_path, fill, spoilt, [Case(f"--model {model:.20}", lambda _: model[:100])], every=0)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["sft", "dpo", "dynamics", "export"])
def test_a_header_that_misleads_about_its_model_is_refused(bench, tmp_path, name):
    file = {"sft": "sft.safetensors", "dpo": "pairs.safetensors", "dynamics": "sft.safetensors"}.get(name, "scored.safetensors")
    told = {
        "": "names no model",
        "/nowhere": "/nowhere",
        "/nowhere\0": "nowhere\\x00",
        "nowhere\n\x1b[2Jat all": "nowhere \\x1b[2Jat all",
        "../../../etc/passwd": "etc/passwd",
        "/etc/passwd": "/etc/passwd",
        "x" * 10**6: "x" * 300,
        "file:///etc": "file:",
    }
    cases = [
        Case(f"model {model!r:.20}", lambda where, m=model, t=told: (written(file, with_metadata(model=m))(where), t)[1])
        for model, told in told.items()
    ]
    if name != "export":  # any model decodes that has the tokenizer
        cases.append(
            Case("another hash", lambda where: (written(file, with_metadata(model_hash="0" * 16))(where), "0" * 16)[1])
        )
    bench(name, cases, tmp_path, every=2)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts: text of any kind, and nothing but text

TEXTS = [
    "$(touch executed)",
    "`touch executed`",
    "; touch executed &",
    "| tee executed",
    "> executed",
    "'; touch executed; '",
    '"; touch executed; "',
    "--out executed",
    "-rf .",
    "--",
    "../../executed",
    "/etc/passwd",
    "~/executed",
    "file:///executed",
    "C:\\executed",
    "*",
    "%s %d %(a)s {0} {prompt} {}",
    "{{ 7 * 7 }} {% raw %}",
    "{prompt}",
    "\\n \\u0000 \\x00",
    "\x01\x02\x07\x08\x1b[2J\x1b]0;title\x07\x7f",
    "tab\tvertical\x0bform\x0creturn\rfile\x1cgroup\x1drecord\x1eunit\x1fnext\x85line\u2028paragraph\u2029end",
    "\u202eright to left\u202c \u200f\u200e\u2066\u2069",
    "zero\u200bwidth\u200djoiner\ufeffmark",
    "\U0001f7e5 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0010ffff",
    "e\u0301" + "\u0301" * 300,
    "\ufffd\ufffe\uffff",
    "null",
    "NaN",
    "[]",
    '{"id": "x", "prompt": "y"}',
    '"quoted"',
    "a, b\\, c",
    "#",
    "// not a comment",
    "x" * 2**20,
    "a red cube",
]


@pytest.mark.thorough
def test_prompts_of_any_kind_pass_through_unchanged_and_touch_nothing(warm, tiny, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    rows = [{"id": f"../{text[:50]}", "prompt": text, "category": f"{text[:40]}."} for text in TEXTS]
    write_rows(here / "mine.jsonl", rows)
    plain = [f"{text[:999]}, plain".replace("\r", " ").strip() for text in TEXTS]  # a bare CR would end a line
    (here / "plain_train.txt").write_text("\n".join(plain), encoding="utf-8", newline="")
    flags = ("--candidates", 2, "--guidance", 1, "--device", "cpu")
    for command in (
        ("curriculum.py", "--prompts", "mine.jsonl", "plain_train.txt", "--out", "prompts.jsonl"),
        ("score.py", "--model", tiny, "--prompts", "prompts.jsonl", "--out", "scored.jsonl", *flags),
    ):
        done = execute(warm, here, *command)
        assert done.returncode == 0, done.stderr
    scored = [row for _, row in read_rows(here / "scored.jsonl", SCORED)]
    middle = float(np.median([row["p_yes"] for row in scored]))
    pair = ("make_pairs.py", "--scored", "scored.jsonl", "--out", "data", "--force", "--threshold", middle)
    done = execute(warm, here, *pair)
    assert done.returncode == 0, done.stderr
    read = [row for _, row in read_rows(here / "prompts.jsonl", PROMPT)]
    assert [row["prompt"] for row in read] == [*TEXTS, *plain]
    assert {row["prompt"] for row in scored} == {row["prompt"] for row in read}
    made = [row["prompt"] for name, columns in (("sft", SFT), ("pairs", PAIRS), ("discard", DISCARD))
            for _, row in read_rows(here / "data" / f"{name}.jsonl", columns)]  # fmt: skip
    assert set(made) == {row["prompt"] for row in read}
    for training in (("sft.py", "--data", "data/sft.jsonl"), ("dpo.py", "--pairs", "data/pairs.jsonl")):
        done = execute(warm, here, *training, *TRAIN[:-1], training[0])
        assert done.returncode == 0, done.stderr
    names = {"mine.jsonl", "plain_train.txt", "prompts.jsonl", "scored.jsonl", "scored.safetensors", "data", "sft.py", "dpo.py"}
    assert {path.name for path in here.iterdir()} == names and list(tmp_path.iterdir()) == [here]


UNFIT = {  # prompts that a model cannot be given
    "a special token": "a <boi> cube",
    "the first token": "<bos> a cube",
    "more words than positions": "red " * 600,
    "1 MB of words": "red " * 2**18,
}


@pytest.mark.parametrize("name", ["score prompts", "score rejudge", "sft", "dpo"])
def test_prompts_that_the_model_cannot_be_given_are_refused_before_any_work(bench, tmp_path, name):
    ((file, _),) = READ[name].items()
    cases = [
        Case(about, lambda where, text=text: (first_row(file, prompt=text)(where), f"prompt {text[:20]!r}"[:-1])[1])
        for about, text in UNFIT.items()
        if "1 MB" not in about or name == "score prompts"
    ]
    if name.startswith("score"):
        cases.append(Case("a foil of the image token", lambda where: (first_row(file, foil="<img>")(where), "<img>")[1]))
    bench(name, cases, tmp_path, every=2)


def test_a_pipe_that_a_shell_makes_is_read(tmp_path):
    script = "printf 'a red cube\\na cone\\n' | $0 curriculum.py --prompts /dev/stdin --exclude <(printf 'a cone\\n') --out $1"
    spawn("bash", "-c", script, sys.executable, tmp_path / "p.jsonl")
    assert [row["prompt"] for _, row in read_rows(tmp_path / "p.jsonl", PROMPT)] == ["a red cube"]


@pytest.mark.thorough
def test_hundreds_of_malformed_inputs_were_refused(request):
    mine = [item for item in request.session.items if item.path == request.path]
    if len(mine) < 300:
        pytest.skip("only a part of this file was run")
    assert sum(REFUSED.values()) >= 1500


# ---------------------------------------------------------------------------------------------------------------------
# What may not be read or written, as a user who is not root


NOBODY = 65534
CLOSED = {  # name of a command -> what of what it reads may be closed to it, besides the files of its own arguments
    "summary": ["run", "run/round0", "run/round1", "run/round1/labels.jsonl", "run/round1/heldout.safetensors"],
    "report": ["run/round1", "run/round1/model", "run/round1/model/training/settings.json", "run/round1/pairs.jsonl"],
}


@contextlib.contextmanager
def plain_user(where: Path) -> Iterator[None]:
    """Own everything in a directory, and be a user to whom permissions apply: root may read and write everything."""
    if os.getuid():
        yield
        return
    for path in (where, *where.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    os.setresgid(NOBODY, NOBODY, 0)
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        if not os.access(ROOT, os.R_OK | os.X_OK):
            pytest.skip("other users cannot read the project")
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


@pytest.fixture
def open_place():
    """A directory that other users can reach, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def fill_place(where: Path, command: tuple, tiny: Path, good: Path) -> None:
    """Copy what a command reads, and the checkpoint that drew it, which other users cannot reach where it is."""
    where.mkdir()
    copy_read(command, good, where)
    for file in where.rglob("*.safetensors"):
        tokens = Tokens(file)
        if tokens.metadata["model"] == str(tiny):
            write_tokens(file, tokens[:], tokens.metadata | {"model": str(where / "tiny")})
    shutil.copytree(tiny, where / "tiny")


def refused_permission(where: Path, command: tuple, closed: str, mode: int) -> str | None:
    """Run a command as a plain user with one path closed to it; returns what is wrong with how it refuses."""
    (where / closed).chmod(mode)
    before = snapshot(where)
    with plain_user(where):
        done = call(where, *command)
    (where / closed).chmod(0o755)
    found = [*problems(done, command[0], Path(closed).stem, before, snapshot(where) | {closed: before.get(closed)})]
    if "Permission denied" not in done.stderr:
        found.append("does not say why")
    return f"{closed} {mode:o}: {'; '.join(found)}: {done.stderr[-600:]}" if found else None


@pytest.mark.parametrize("name", COMMANDS)
def test_what_may_not_be_read_is_refused_with_one_code_and_its_reason(tiny, good, open_place, name):
    command, faults = tuple("tiny" if word == tiny else word for word in words(name, tiny, good)), []
    fill_place(open_place / "first", command, tiny, good)
    assert call(open_place / "first", *command).returncode == 0  # and all is imported
    inputs = [str(word) for word in command[1:] if (good / str(word)).is_file()]
    inputs += [str(tokens_path(word)) for word in inputs if tokens_path(good / word).is_file() and name != "curriculum scored"]
    for number, (closed, mode) in enumerate([*((file, 0) for file in inputs + CLOSED.get(name, [])), (".", 0o555)]):
        where = open_place / str(number)
        fill_place(where, command, tiny, good)
        if closed == "." and name == "summary":
            continue  # it writes into the run
        if found := refused_permission(where, command, closed, mode):
            faults.append(found)
    assert not faults, "\n".join(faults)


def test_a_checkpoint_file_that_may_not_be_read_is_refused(tiny, good, open_place):
    command = tuple("tiny" if word == tiny else word for word in words("score prompts", tiny, good))
    faults = []
    for number, file in enumerate(sorted(path.name for path in tiny.iterdir())):
        where = open_place / str(number)
        fill_place(where, command, tiny, good)
        if found := refused_permission(where, command, f"tiny/{file}", 0):
            faults.append(found)
    assert not faults, "\n".join(faults)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens that change under a running command, and what strangers' words do to a terminal

READS_TOKENS = [
    "score rejudge",
    "make_pairs",
    "sft",
    "dpo",
    "summary",
    "world",
    "gate",
    "diagnose",
    "dynamics",
    "report",
    "export",
]


@pytest.mark.parametrize("name", READS_TOKENS)
def test_tokens_that_change_under_a_running_command_give_no_result(tiny, good, tmp_path, monkeypatch, name):
    """In place, at the same size, with the time set back: what only the content tells."""
    command = words(name, tiny, good)
    copy_read(command, good, tmp_path)
    check, changed = Tokens.check_values, []

    def check_and_change(tokens: Tokens) -> None:
        check(tokens)
        if tmp_path in Path(tokens.path).absolute().parents and "chunks" not in str(tokens.path) and not changed:
            changed.append(tokens.path)
            status = tokens.path.stat()
            content = tokens.path.read_bytes()
            with open(tokens.path, "r+b") as file:
                file.seek(-2, 2)
                file.write(b"\x00\x00" if content[-2:] != b"\x00\x00" else b"\x01\x00")
            os.utime(tokens.path, ns=(status.st_atime_ns, status.st_mtime_ns))

    monkeypatch.setattr(Tokens, "check_values", check_and_change)
    done = call(tmp_path, *command)
    assert changed and done.returncode == 2 and f"{changed[0]}: was changed while it was read" in done.stderr
    results = ("out.jsonl", "out.json", "out.html", "out/config.json", "out/pairs.jsonl", "run/summary.jsonl")
    assert not [result for result in results if (tmp_path / result).exists()]


SHOWN = "\x1b[31mred\x1b[0m\x07 \u202edetrever\u2066 \x9b2J \u2028 line\nnext\r"


@pytest.mark.parametrize(
    "name",
    [
        "curriculum prompts",
        "score prompts",
        "score rejudge",
        "make_pairs",
        "diagnose",
        "dynamics",
        "export",
        "summary",
        "report",
        "world",
        "gate",
        "sft",
    ],
)
def test_a_terminal_only_shows_what_strangers_wrote(tiny, good, tmp_path, name):
    out = "\x1b[7m\u202e  "
    command = tuple(f"{out}{word}" if str(word).startswith("out") else word for word in words(name, tiny, good))
    copy_read(command, good, tmp_path)
    for file in tmp_path.rglob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        write_rows(file, [row | ({"category": SHOWN + row["category"]} if "category" in row else {}) for row in rows])
    for file in tmp_path.rglob("*.safetensors"):
        tokens = Tokens(file)
        evil = {"questions": json.dumps([SHOWN + "{prompt}?"])} | ({"judge": SHOWN} if name == "diagnose" else {})
        write_tokens(file, tokens[:], tokens.metadata | evil)
    layout = ("--layout", "t2i-compbench") if name == "export" else ()
    done = call(tmp_path, *command, *layout)
    assert done.returncode in (0, 2), done.stderr
    printed = (done.stdout + done.stderr).replace("\n", "").replace("\r", "" if "%|" in done.stderr else "\r")
    assert printed.isprintable(), [character for character in printed if not character.isprintable()]
    assert "line\nnext" not in done.stdout
    if done.returncode == 0 and any(str(word).startswith(out) for word in command):
        assert "\\x1b[7m\\u202e  out" in done.stdout, done.stdout  # and every blank stays
    if name not in ("summary", "report", "export", "score rejudge", "world", "gate", "sft"):  # they name no category, or one
        assert "\\x1b[31mred" in printed


@pytest.mark.parametrize(
    ("name", "printer", "result"),
    [("gate", "gate.print_tables", "out.json"), ("make_pairs", "make_pairs.print_report", "out/pairs.jsonl"),
     ("curriculum prompts", "curriculum.aligned", "out.jsonl"), ("diagnose", "analysis.diagnose.print_report", "out.json"),
     ("summary", "analysis.summary.print_table", "run/summary.jsonl")],
)  # fmt: skip
def test_the_result_is_written_before_its_table_is_printed(tiny, good, tmp_path, monkeypatch, name, printer, result):
    def fail(*_: object) -> NoReturn:
        raise OSError(28, "No space left on device", "standard output")

    copy_read(words(name, tiny, good), good, tmp_path)
    monkeypatch.setattr(printer, fail)
    assert call(tmp_path, *words(name, tiny, good)).returncode == 1 and (tmp_path / result).exists()

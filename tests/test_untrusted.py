"""Untrusted files: whatever is wrong with them, exit code 2, one line, no file changed, nothing executed.

Every input is malformed by construction and made from a seed. Prompt texts of any kind, on the other hand, are fine.
"""

import functools
import json
import os
import pickle
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TOTALS, run, spawn
from safetensors.torch import load_file, save_file

from records import LABELS, PAIRS, PROMPT, SCORED, SFT, read_rows, tokens_path

REFUSED = TOTALS["malformed inputs refused"]  # by script

WRONG: dict[str, list] = {
    "text": [7, "", " \t", ["a"], {"a": 1}, "half \ud83d"],
    "count": [True, 1.0, 1.5, -1, "1", None, [], 2**60],
    "probability": [True, -0.01, 1.01, "0.5", None, [], 10**400],
    "bit": [2, -1, 0.5, True, "1", None],
}


# ---------------------------------------------------------------------------------------------------------------------
# Mutators: bytes in, malformed bytes out


def rows_of(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True)


def in_a_row(change: Callable[[bytes], bytes]) -> Callable[[bytes, random.Random], bytes]:
    """Apply `change` to one line (without its end) of a file, chosen at random."""

    def mutate(data: bytes, chance: random.Random) -> bytes:
        lines = rows_of(data)
        at = chance.randrange(len(lines))
        lines[at] = change(lines[at].rstrip(b"\r\n")) + b"\n"
        return b"".join(lines)

    return mutate


def added(text: str) -> Callable[[bytes], bytes]:
    """One more key of a row, written as given."""
    return lambda line: line[:-1] + b', "more": ' + text.encode() + b"}"


JSONL = {
    "cut in the middle of a row": in_a_row(lambda line: line[: len(line) // 2]),
    "a byte that is not UTF-8": in_a_row(lambda line: line[:9] + b"\xff" + line[9:]),
    "NaN": in_a_row(added("NaN")),
    "infinity": in_a_row(added("-Infinity")),
    "an integer of 5,000 digits": in_a_row(added("1" * 5000)),
    "a key twice": in_a_row(lambda line: line[:-1] + b', "id": "again"' * 2 + b"}"),
    "nested 100,000 deep": in_a_row(added("[" * 100_000 + "]" * 100_000)),
    "a list": in_a_row(lambda line: b"[" + line + b"]"),
    "a number": in_a_row(lambda _: b"17"),
    "null": in_a_row(lambda _: b"null"),
    "a string": in_a_row(lambda _: b'"row"'),
    "two rows on a line": in_a_row(lambda line: line + line),
    "single quotes": in_a_row(lambda line: line.replace(b'"', b"'")),
    "a NUL byte": in_a_row(lambda line: line[:1] + b"\0" + line[1:]),
    "a pickle": lambda data, _: pickle.dumps(data),
    "UTF-16": lambda data, _: data.decode().encode("utf-16"),
    "zeros": lambda data, _: bytes(len(data)),
    "nothing": lambda *_: b"",
    "blank lines": lambda *_: b"\n \n\r\n",
}


def with_value(key: str, value: object) -> Callable[[bytes, random.Random], bytes]:
    return in_a_row(lambda line: json.dumps(json.loads(line) | {key: value}).encode())


def without(key: str) -> Callable[[bytes, random.Random], bytes]:
    return in_a_row(lambda line: json.dumps({k: v for k, v in json.loads(line).items() if k != key}).encode())


def columns(table: dict[str, str], optional: tuple[str, ...] = ()) -> dict[str, Callable]:
    """Each column missing, and with each kind of wrong value."""
    found: dict[str, Callable] = {f"no {key}": without(key) for key in table if key not in optional}
    for key, kind in table.items():
        found |= {f"{key} = {str(value)[:12]!a}": with_value(key, value) for value in WRONG[kind]}
    return found


def header_of(data: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def packed(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def in_the_header(change: Callable[[dict], object]) -> Callable[[bytes, random.Random], bytes]:
    def mutate(data: bytes, _: random.Random) -> bytes:
        header, body = header_of(data)
        change(header)
        return packed(header, body)

    return mutate


def tensor(**values: object) -> Callable[[bytes, random.Random], bytes]:
    return in_the_header(lambda header: header["tokens"].update(values))


def codebook(text: object) -> Callable[[bytes, random.Random], bytes]:
    return in_the_header(lambda header: header["__metadata__"].update(codebook_size=text))


SAFETENSORS = {
    "cut short": lambda data, chance: data[: chance.randrange(1, len(data) - 1)],
    "a header of 2**60 bytes": lambda data, _: struct.pack("<Q", 2**60) + data[8:],
    "a header of 90 MB in a short file": lambda data, _: struct.pack("<Q", 90_000_000) + data[8:],
    "a header that is not JSON": lambda data, _: packed(b"{tokens}", data),
    "a header that is a list": lambda data, _: packed([1, 2], data),
    "offsets outside": tensor(data_offsets=[0, 2**40]),
    "negative offsets": tensor(data_offsets=[-2, 10]),
    "a shape of 2**62 tokens": tensor(shape=[2**31, 2**31]),
    "a shape larger than the data": tensor(shape=[10**6, 4]),
    "one dimension": in_the_header(lambda h: h["tokens"].update(shape=[h["tokens"]["shape"][0] * h["tokens"]["shape"][1]])),
    "signed tokens": tensor(dtype="I16"),
    "another name": in_the_header(lambda header: header.update(token=header.pop("tokens"))),
    "no metadata": in_the_header(lambda header: header.pop("__metadata__")),
    "metadata that is a list": in_the_header(lambda header: header.update(__metadata__=[1])),
    **{f"a codebook of {text!r}": codebook(text) for text in ("0", "-1", "1e9", "nan", "9" * 30, "", "٣")},
    "a codebook that is a number": codebook(24),
    "a codebook smaller than the tokens": codebook("1"),
    "more data than the header says": lambda data, _: data + bytes(64),
    "a pickle": lambda data, _: pickle.dumps(data),
    "text": lambda *_: b"tokens: 1 2 3\n",
    "zeros": lambda data, _: bytes(len(data)),
    "nothing": lambda *_: b"",
}


# ---------------------------------------------------------------------------------------------------------------------
# The files, and who reads them


@pytest.fixture
def files(tmp_path, scored, pairs) -> Path:
    """One of every file that a script reads."""
    rows = [row for _, row in read_rows(scored, SCORED)]
    prompts = {row["id"]: {key: row[key] for key in ("id", "prompt", "category", "foil")} for row in rows}
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts.values()))
    for name in ("scored", "run/round0/heldout"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(scored, tmp_path / f"{name}.jsonl")
        shutil.copy(tokens_path(scored), tmp_path / f"{name}.safetensors")
    labels = [{"id": row["id"], "candidate": row["candidate"], "label": 1, "source": "me"} for row in rows]
    (tmp_path / "run" / "round0" / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    for name in ("sft", "pairs"):
        for suffix in (".jsonl", ".safetensors"):
            shutil.copy(pairs.with_name(name + suffix), tmp_path)
    return tmp_path


# script: what it is told, with {d} for the directory; the file that is broken; the columns it needs
READERS = {
    "curriculum.py --prompts": ("--prompts {d}/prompts.jsonl --out {d}/out.jsonl", "prompts.jsonl", PROMPT, ("id",)),
    "curriculum.py --exclude": (
        "--prompts {d}/prompts.jsonl --exclude {d}/broken.jsonl --out {d}/out.jsonl", "broken.jsonl", PROMPT, ("id",)
    ),
    "curriculum.py --scored": ("--prompts {d}/prompts.jsonl --scored {d}/scored.jsonl --out {d}/out.jsonl", "scored.jsonl", SCORED, ()),
    "score.py --prompts": (
        "--model {m} --prompts {d}/prompts.jsonl --out {d}/out.jsonl", "prompts.jsonl", PROMPT | {"foil": "text"}, ("id", "foil")
    ),
    "score.py --rejudge": ("--model {m} --rejudge {d}/scored.jsonl --out {d}/out.jsonl", "scored.jsonl", SCORED, ()),
    "make_pairs.py --scored": ("--scored {d}/scored.jsonl --out {d}/out --force", "scored.jsonl", SCORED, ()),
    "sft.py --data": ("--data {d}/sft.jsonl --out {d}/out", "sft.jsonl", SFT, ()),
    "dpo.py --pairs": ("--pairs {d}/pairs.jsonl --out {d}/out", "pairs.jsonl", PAIRS, ()),
    "summary.py heldout": ("{d}/run", "run/round0/heldout.jsonl", SCORED, ()),
    "summary.py labels": ("{d}/run", "run/round0/labels.jsonl", LABELS, ()),
}  # fmt: skip
WITH_TENSORS = ("score.py --rejudge", "make_pairs.py --scored", "sft.py --data", "dpo.py --pairs", "summary.py heldout")


def snapshot(directory: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*") if not path.is_fifo()}


def refused(directory: Path, script: str, words: str, case: str, model: Path) -> str:
    """Run a script; assert that it refuses in one line and changes nothing. Returns the line."""
    before = snapshot(directory)
    name = script.split()[0]
    done = run(name, *words.format(d=directory, m=model).split(), ok=False)
    assert done.returncode == 2, (script, case, done.returncode, done.stderr)
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"{name}: "), (script, case, done.stderr)
    assert len(done.stderr) < 2000, (script, case)
    assert snapshot(directory) == before, (script, case)
    REFUSED[name] += 1
    return done.stderr


@pytest.mark.parametrize("script", READERS)
def test_broken_rows_are_refused(files, tiny, script):
    words, name, table, optional = READERS[script]
    path = files / name
    if not path.exists():
        shutil.copy(files / "prompts.jsonl", path)
    whole, chance = path.read_bytes(), random.Random(script)
    wrong = columns(table, optional)
    picked = dict(chance.sample(sorted(wrong.items(), key=lambda item: item[0]), min(14, len(wrong))))
    for case, mutate in (JSONL | picked).items():
        path.write_bytes(mutate(whole, chance))
        line = refused(files, script, words, case, tiny)
        assert path.name in line, (case, line)
    path.write_bytes(whole)


@pytest.mark.parametrize("script", WITH_TENSORS)
def test_broken_tensors_are_refused(files, tiny, script):
    words, name, _, _ = READERS[script]
    path = tokens_path(files / name)
    whole, chance = path.read_bytes(), random.Random(script)
    for case, mutate in SAFETENSORS.items():
        if script == "summary.py heldout" and case == "a codebook smaller than the tokens":
            continue  # it reads no tokens
        path.write_bytes(mutate(whole, chance))
        line = refused(files, script, words, case, tiny)
        assert path.name in line, (case, line)


@pytest.mark.parametrize("script", READERS)
def test_what_is_no_file_is_refused(files, tiny, script):
    words, name, _, _ = READERS[script]
    if script == "summary.py labels":
        pytest.skip("labels may be missing")
    path = files / name
    path.unlink(missing_ok=True)
    kinds: dict[str, Callable[[], object]] = {
        "missing": lambda: None,
        "a directory": path.mkdir,
        "a loop of links": lambda: path.symlink_to(path),
    }
    for case, make in kinds.items():
        make()
        refused(files, script, words, case, tiny)
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            path.rmdir()


@pytest.mark.parametrize(
    ("script", "change", "said"),
    [
        ("sft.py --data", {"row": 10**6}, "row is 1000000, but"),
        ("dpo.py --pairs", {"rejected": 10**6}, "rejected is 1000000, but"),
        ("dpo.py --pairs", {"chosen": 0, "rejected": 0}, "chosen and rejected are the same row"),
        ("make_pairs.py --scored", {"row": 10**6}, "row is 1000000, but"),
        ("score.py --rejudge", {"row": 10**6}, "row is 1000000, but"),
    ],
)
def test_rows_that_point_nowhere_are_refused(files, tiny, script, change, said):
    words, name, _, _ = READERS[script]
    path = files / name
    path.write_bytes(in_a_row(lambda line: json.dumps(json.loads(line) | change).encode())(path.read_bytes(), random.Random(1)))
    assert said in refused(files, script, words, str(change), tiny)


def test_a_line_of_over_16_mib_is_refused(files, tiny):
    with open(files / "prompts.jsonl", "a") as file:
        file.write(json.dumps({"id": "long", "prompt": "x" * 2**24, "category": "c"}) + "\n")
    assert "longer than" in refused(files, "curriculum.py", READERS["curriculum.py --prompts"][0], "long", tiny)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def configured(**values: object) -> Callable[[Path], None]:
    """Change config.json; `a__b` is key b of part a."""

    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        for key, value in values.items():
            *parents, last = key.split("__")
            part = functools.reduce(dict.__getitem__, parents, config)
            part[last] = value
        (directory / "config.json").write_text(json.dumps(config))

    return change


def written(name: str, text: str | bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(text.encode() if isinstance(text, str) else text)


def weights(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    return apply


def only_a_pickle(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(directory / "boom")))


def index_that_points_out(directory: Path) -> None:
    shutil.copy(directory / "model.safetensors", directory.parent / "outside.safetensors")
    names = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "config.json is cut": written("config.json", '{"model_type": "janus"'),
    "config.json is a list": written("config.json", "[1]"),
    "config.json is empty": written("config.json", ""),
    "config.json is missing": lambda directory: (directory / "config.json").unlink(),
    "another model": configured(model_type="llama"),
    "code of its own": configured(model_type="multi_modality", auto_map={"AutoModel": "evil.Model"}),
    "a width of a billion": configured(text_config__hidden_size=10**9),
    "a million layers": configured(text_config__num_hidden_layers=10**6),
    "a vocabulary of 10**12": configured(text_config__vocab_size=10**12),
    "a codebook of a billion": configured(vq_config__num_embeddings=10**9),
    "a negative width": configured(text_config__hidden_size=-32),
    "a width of words": configured(text_config__hidden_size="wide"),
    "no text_config": configured(text_config=7),
    "weights cut": lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]),
    "weights of nothing": written("model.safetensors", b""),
    "a header of 2**60 bytes": written("model.safetensors", struct.pack("<Q", 2**60) + b"{}"),
    "a header of 90 MB": written("model.safetensors", struct.pack("<Q", 90_000_000) + b"{}"),
    "a header with odd offsets": written("model.safetensors", packed({"a": {"dtype": "F32", "shape": [1], "data_offsets": "x"}}, b"")),
    "a tensor is missing": weights(lambda tensors: tensors.pop("model.language_model.norm.weight")),
    "a tensor of another shape": weights(
        lambda t: t.update({"model.language_model.norm.weight": t["model.language_model.norm.weight"][:-1].clone()})
    ),
    "weights that are not numbers": weights(lambda tensors: tensors["model.language_model.norm.weight"].fill_(float("nan"))),
    "only a pickle": only_a_pickle,
    "an index that points outside": index_that_points_out,
    "tokenizer.json is cut": lambda d: (d / "tokenizer.json").write_text((d / "tokenizer.json").read_text()[:-50]),
    "tokenizer.json is missing": lambda directory: (directory / "tokenizer.json").unlink(),
    "processor_config.json is cut": written("processor_config.json", "{"),
    "generation_config.json is cut": written("generation_config.json", "{"),
    "a chat template with a mistake": written("chat_template.jinja", "{% for %}"),
    "a chat template that reaches out": written(
        "chat_template.jinja", "{{ messages.__class__.__mro__[1].__subclasses__()[0].__init__.__globals__ }}"
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_broken_checkpoints_are_refused_without_running_or_allocating_anything(files, tiny, case):
    shutil.copytree(tiny, files / "model")
    (files / "model" / "evil.py").write_text(f"import os\nos.mkdir({str(files / 'boom')!r})\n")
    CHECKPOINTS[case](files / "model")
    started, held = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    words = "--model {d}/model --prompts {d}/prompts.jsonl --out {d}/out.jsonl --device cpu"
    line = refused(files, "score.py", words, case, tiny)
    assert "model" in line
    assert time.monotonic() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 500_000  # KiB
    assert not list(files.rglob("boom"))


# ---------------------------------------------------------------------------------------------------------------------
# Prompts are text


TEXTS = (
    "../../../../tmp/escaped",
    "/etc/passwd",
    "$(touch touched)",
    "`touch touched`; touch touched",
    "--out touched",
    "-rf *",
    '"quoted" and \'quoted\'',
    "a\tcube\x1b[2J\x07\x08",
    "مكعب أحمر \u202e cube",
    "🏖️ 立方体",
    "{prompt} {0} %s %(a)s",
    "a cube\u2028and a line",
    "C:\\windows\\cube",
    "{% raw %}{{ 7 * 7 }}",
)


def test_prompts_of_any_kind_never_become_a_path_or_a_word_of_the_shell(tiny, tmp_path):
    (tmp_path / "color_train.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    (tmp_path / "color_val.txt").write_text("a held-out cube\n")
    for name in ("here", "here/run"):
        (tmp_path / name).mkdir()
    settings = {
        "MODEL": str(tiny),
        "PROMPTS": str(tmp_path / "color_train.txt"),
        "EVAL_PROMPTS": str(tmp_path / "color_train.txt"),
    }
    out = tmp_path / "here"
    run("curriculum.py", "--prompts", settings["PROMPTS"], "--out", out / "prompts.jsonl")
    flags = ("--candidates", 2, "--guidance", 1, "--device", "cpu")
    run("score.py", "--model", tiny, "--prompts", out / "prompts.jsonl", "--out", out / "scored.jsonl", *flags)
    rows = [row for _, row in read_rows(out / "scored.jsonl", SCORED)]
    assert {row["prompt"] for row in rows} == {text.strip() for text in TEXTS}
    middle = sorted(row["p_yes"] for row in rows)[len(rows) // 2]
    run("make_pairs.py", "--scored", out / "scored.jsonl", "--out", out / "data", "--threshold", middle, "--force")
    run("sft.py", "--data", out / "data" / "sft.jsonl", "--out", out / "model", "--max-steps", 1, "--device", "cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["color_train.txt", "color_val.txt", "here"]
    assert sorted(path.name for path in out.iterdir()) == ["data", "model", "prompts.jsonl", "run", "scored.jsonl", "scored.safetensors"]


def test_a_prompt_longer_than_the_model_can_read_is_one_line(tiny, tmp_path):
    (tmp_path / "color_train.txt").write_text("a cube\n" + "red " * 250_000 + "\n")
    words = "--model {m} --prompts {d}/color_train.txt --out {d}/out.jsonl --device cpu"
    assert "positions" in refused(tmp_path, "score.py", words, "1 MB", tiny)


def test_a_named_pipe_is_read_like_a_file(tmp_path):
    spawn("bash", "-c", f"{os.sys.executable} curriculum.py --prompts <(printf 'a cube\\n') --out {tmp_path}/p.jsonl")
    assert "a cube" in (tmp_path / "p.jsonl").read_text()


def test_at_least_200_malformed_inputs_were_refused():
    if len(REFUSED) < 6:
        pytest.skip("counts the whole file, of which only a part was run")
    assert sum(REFUSED.values()) >= 200

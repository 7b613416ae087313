"""export.py: the layouts by the rules of those who read them, names from any prompt, resuming, refusals."""

import json
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import PROMPTS, run, save_janus
from PIL import Image

from analysis import export
from common.prompts import prompt_id
from common.records import SCORED, Tokens, read_rows, tokens_path, write_tokens
from common.writing import write_rows

HOSTILE = [
    "a red/green cube",
    "snake_case and more_of_it",
    "a file called x.png or y.png",
    ".hidden",
    "..",
    "/etc/passwd",
    "two\nlines\tand a\x7fbell",
    "nul\x00byte",
    "ß" * 200,
    "long " * 90,
    "🦊" * 90,
    "___",
    "a cube.",
    "100 % [b]*? \\ | <i> \"quoted\" 'x' : $HOME",
]


def write_scored(path: Path, prompts: list[dict], tokens: Tokens, candidates: int = 2) -> Path:
    """A scored file of given prompts (id, prompt, category), with pictures borrowed from `tokens`."""
    rows = [
        prompt | {"candidate": c, "p_yes": 0.25, "coverage": 1.0, "foil": "foil", "p_yes_foil": 0.5, "row": i * candidates + c}
        for i, prompt in enumerate(prompts)
        for c in range(candidates)
    ]
    write_rows(path, rows)
    write_tokens(tokens_path(path), tokens[np.arange(len(rows)) % tokens.rows], tokens.metadata)
    return path


def from_texts(texts: list[str], category: str = "color") -> list[dict]:
    return [{"id": prompt_id(category, text), "prompt": text, "category": category} for text in texts]


@pytest.fixture(scope="module")
def hostile(scored, tmp_path_factory) -> Path:
    return write_scored(tmp_path_factory.mktemp("hostile") / "scored.jsonl", from_texts(HOSTILE), Tokens(scored))


def pictures(policy, scored: Path) -> np.ndarray:
    """What the model itself decodes, in the rows' order."""
    import torch

    rows = [row["row"] for _, row in read_rows(scored, SCORED)]
    return policy.decode(torch.from_numpy(Tokens(scored)[rows]), batch=64).numpy()  # the batch moves the last bit


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize("text", [*HOSTILE, *PROMPTS])
@pytest.mark.parametrize("number", [0, 7, 1234567])
def test_every_way_in_which_the_evaluators_take_a_name_apart_gives_prompt_and_number(text, number):
    name = export.compbench_name(text, number)
    prompt = name.split("_")[0]
    assert int(name.split("_")[-1].split(".")[0]) == number  # BLIP-VQA, CLIPScore
    assert int(name.split("_")[1].split(".")[0]) == number  # UniDet
    assert int(name.split(".png")[0].split("_")[1]) == number  # numeracy
    assert name.split(".png")[0].split("_")[0] == prompt  # the MLLM evaluators
    assert len(name.encode()) <= 255 and not name.startswith(".") and prompt
    assert not {*"/\0\n\t\x7f"} & {*name}
    if not {*"/_\n\0"} & {*text} and ".png" not in text and not text.startswith(".") and len(text.encode()) < 244:
        assert prompt == text


def test_a_name_is_cut_between_characters_and_to_the_last_byte_that_fits():
    assert export.file_name("ß" * 200, 11) == "ß" * 5
    assert export.file_name("a" * 300, 255) == "a" * 255
    assert len(export.compbench_name("a" * 300, 1).encode()) == 255


def test_no_two_ids_get_one_directory_even_where_case_and_composition_do_not_count():
    ids = ["a/b", "a b", "A B", "a b.", "\u00e9", "e\u0301", "x" * 300, "x" * 301, ".", "..", "prompt", "CON"]
    names = export.unique_names(ids, 255)
    assert len({unicodedata.normalize("NFD", name).upper() for name in names.values()}) == len(ids)  # as macOS compares them
    assert all(len(name.encode()) <= 255 and name not in (".", "..") and "/" not in name for name in names.values())
    assert names["a b"] == "a b" and names["prompt"] != names["."]  # what can be kept is kept


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def test_compbench_reads_every_prompt_with_its_pictures_in_order(scored, policy, tmp_path):
    done = run("export.py", scored, "--layout", "t2i-compbench", "--out", tmp_path / "out", "--device", "cpu")
    names = os.listdir(tmp_path / "out" / "samples")
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    rows = [row for _, row in read_rows(scored, SCORED)]
    assert [name.split("_")[0] for name in names] == [row["prompt"] for row in rows]
    drawn = [np.asarray(Image.open(tmp_path / "out" / "samples" / name)) for name in names]
    np.testing.assert_array_equal(np.stack(drawn), pictures(policy, scored))
    mapping = rows_of(tmp_path / "out" / "prompts.jsonl")
    assert [row["file"] for row in mapping] == [f"samples/{name}" for name in names]
    assert [(row["id"], row["candidate"], row["prompt"]) for row in mapping] == [
        (row["id"], row["candidate"], row["prompt"]) for row in rows
    ]
    assert "names          0 of 6 prompts changed" in done.stdout and done.stdout.splitlines()[-1] == str(tmp_path / "out")


@pytest.mark.parametrize("layout", ["t2i-compbench", "plain", "datasets"])
def test_hostile_prompts_lose_no_picture_and_no_prompt(hostile, policy, tmp_path, layout):
    out = tmp_path / "out"
    done = run("export.py", hostile, "--layout", layout, "--out", out, "--device", "cpu")
    mapping = rows_of(out / ("metadata.jsonl" if layout == "datasets" else "prompts.jsonl"))
    column = "file_name" if layout == "datasets" else "file"
    assert [row["prompt"] for row in mapping] == [text for text in HOSTILE for _ in range(2)]
    assert len({row[column] for row in mapping}) == len(mapping) == len([*out.rglob("*.png")])
    for row, picture in zip(mapping, pictures(policy, hostile), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(out / row[column])), picture)
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")} == {"out"}
    if layout == "t2i-compbench":
        changed = [text for text in HOSTILE if export.compbench_name(text, 0) != f"{text}_000000.png"]
        assert f"names          {len(changed)} of {len(HOSTILE)} prompts changed" in done.stdout and len(changed) == 12


def test_plain_names_by_id_and_candidate(scored, tmp_path):
    run("export.py", scored, "--layout", "plain", "--out", tmp_path / "out", "--device", "cpu")
    wanted = {f"pictures/{row['id']}/{row['candidate']:04d}.png" for _, row in read_rows(scored, SCORED)}
    assert {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")} == wanted


def test_an_imagefolder_names_each_of_its_pictures_once_beside_its_metadata(scored, tmp_path):
    out = tmp_path / "out"
    run("export.py", scored, "--layout", "datasets", "--out", out, "--device", "cpu")
    metadata = rows_of(out / "metadata.jsonl")
    assert sorted(row["file_name"] for row in metadata) == sorted(path.name for path in out.glob("*.png"))
    assert len({row["file_name"] for row in metadata}) == len(metadata)
    scored_rows = [row for _, row in read_rows(scored, SCORED)]
    wanted = [key for key in SCORED if key != "row"]
    assert [{key: row[key] for key in wanted} for row in metadata] == [{key: row[key] for key in wanted} for row in scored_rows]
    assert all(row["file_name"].removesuffix(".png").isdigit() for row in metadata)  # no word that means a split


@pytest.mark.parametrize("layout, name", [("plain", "prompts.jsonl"), ("datasets", "metadata.jsonl")])
def test_whatever_a_row_says_goes_with_its_picture(scored, tmp_path, layout, name):
    more = {"easy_foil": "a cone", "p_yes_easy_foil": 0.25, "p_yes_again": 0.5, "caption": -3.5, "file_name": "mine.png"}
    rows = [row | more for row in rows_of(scored)]
    write_rows(tmp_path / "scored.jsonl", rows)
    shutil.copy(tokens_path(scored), tmp_path)
    run("export.py", tmp_path / "scored.jsonl", "--layout", layout, "--out", tmp_path / "out", "--device", "cpu")
    for row, said in zip(rows, rows_of(tmp_path / "out" / name), strict=True):
        file = said.pop("file_name" if layout == "datasets" else "file")
        assert (tmp_path / "out" / file).is_file()
        ours = ("row", "file_name") if layout == "datasets" else ("row",)  # a place in the tokens; the picture's own name
        assert said == {key: value for key, value in row.items() if key not in ours}


@pytest.fixture
def geneval(scored, tmp_path) -> tuple[Path, Path]:
    """GenEval's file of five prompts, and a scored file of three of them in another order, one under an id of its own."""
    asked = [
        {"tag": "counting", "include": [{"class": "cube", "count": n}], "prompt": f"a photo of {n} cubes, é"} for n in range(4)
    ]
    asked.append(asked[1] | {"tag": "colors"})  # one text under two tags
    metadata = tmp_path / "evaluation_metadata.jsonl"
    metadata.write_text("".join(json.dumps(row) + "\n" for row in asked))
    prompts = [
        {"id": prompt_id("counting", asked[3]["prompt"]), "prompt": asked[3]["prompt"], "category": "counting"},
        {"id": "mine", "prompt": asked[0]["prompt"], "category": "mine"},
        {"id": prompt_id("colors", asked[4]["prompt"]), "prompt": asked[4]["prompt"], "category": "colors"},
    ]
    return metadata, write_scored(tmp_path / "geneval.jsonl", prompts, Tokens(scored), candidates=3)


def test_geneval_finds_each_prompts_row_and_pictures_under_its_line(geneval, policy, tmp_path):
    metadata, scored = geneval
    flags = ("--layout", "geneval", "--metadata", metadata, "--device", "cpu")
    done = run("export.py", scored, *flags)
    out = tmp_path / "geneval-geneval"
    asked, drawn = rows_of(metadata), pictures(policy, scored)
    folders = sorted(path for path in out.iterdir() if path.is_dir() and path.name.isdigit())  # their loop, in our words
    assert [path.name for path in folders] == ["00000", "00003", "00004"]
    for folder, first in zip(folders, (3, 0, 6), strict=True):
        assert json.loads((folder / "metadata.jsonl").read_text()) == asked[int(folder.name)]
        assert sorted(os.listdir(folder / "samples")) == ["0000.png", "0001.png", "0002.png"]
        for number in range(3):
            picture = np.asarray(Image.open(folder / "samples" / f"{number:04d}.png"))
            np.testing.assert_array_equal(picture, drawn[first + number])
    assert "3 of 5 of evaluation_metadata.jsonl have pictures" in done.stdout


def test_geneval_refuses_pictures_of_prompts_that_it_does_not_ask_for(geneval, scored, tmp_path):
    metadata, _ = geneval
    out = tmp_path / "out"
    done = run("export.py", scored, "--layout", "geneval", "--metadata", metadata, "--out", out, ok=False)
    assert done.returncode == 2 and not out.exists()
    assert f"evaluation_metadata.jsonl: has no prompt '{PROMPTS[0]}'" in done.stderr


def test_one_category_can_be_taken_alone_and_a_mixture_is_told(scored, tmp_path):
    prompts = from_texts(["a red cube", "a green cube"]) + from_texts(["a cube left of a cone"], "spatial")
    mixed = write_scored(tmp_path / "mixed.jsonl", prompts, Tokens(scored))
    flags = ("--layout", "t2i-compbench", "--device", "cpu")
    both = run("export.py", mixed, *flags, "--out", tmp_path / "both")
    assert "2 categories in samples/" in both.stdout and "--category color" in both.stdout
    one = run("export.py", mixed, *flags, "--out", tmp_path / "one", "--category", "spatial")
    names = ["a cube left of a cone_000000.png", "a cube left of a cone_000001.png"]
    assert sorted(os.listdir(tmp_path / "one" / "samples")) == names and "note" not in one.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def test_the_batch_moves_a_pixel_by_one_level_at_most(scored, tmp_path):
    for batch in (1, 5):
        run("export.py", scored, "--layout", "datasets", "--device", "cpu", "--batch", batch, "--out", tmp_path / str(batch))
    one, five = (sorted((tmp_path / name).glob("*.png")) for name in "15")
    apart = [np.abs(np.asarray(Image.open(a), int) - np.asarray(Image.open(b), int)) for a, b in zip(one, five, strict=True)]
    assert np.max(apart) <= 1 and np.mean(np.array(apart) > 0) < 0.001


def test_a_killed_run_goes_on_with_what_is_missing(scored, tmp_path, monkeypatch):
    flags = ("--layout", "t2i-compbench", "--device", "cpu", "--batch", 4)
    run("export.py", scored, *flags, "--out", tmp_path / "whole")
    out, write, written = tmp_path / "out", export.write_picture, []

    def killed(path, *rest):
        if len(written) == 10:
            (out / ".picture.tmp").write_bytes(b"torn")  # what a kill in the middle of a picture leaves
            raise KeyboardInterrupt
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(export, "write_picture", killed)
    assert run("export.py", scored, *flags, "--out", out, ok=False).returncode == 130
    assert len(os.listdir(out / "samples")) == 10
    times = {path: path.stat().st_mtime_ns for path in (out / "samples").iterdir()}
    monkeypatch.setattr(export, "write_picture", write)
    done = run("export.py", scored, *flags, "--out", out)
    assert "pictures       36, of which 10 are there already" in done.stdout
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert files_of(out) == files_of(tmp_path / "whole")


def test_a_finished_export_needs_no_model(scored, tmp_path, monkeypatch):
    flags = ("--layout", "plain", "--out", tmp_path / "out", "--device", "cpu")
    run("export.py", scored, *flags)
    monkeypatch.setattr("model.load", lambda *_, **__: pytest.fail("loaded"))
    assert "36, of which 36 are there already" in run("export.py", scored, *flags).stdout


def test_a_full_disk_is_one_line_and_leaves_no_half_picture(scored, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.os, "fsync", lambda descriptor: None)
    run("export.py", scored, "--layout", "plain", "--out", tmp_path / "out", "--device", "cpu")
    picture = next((tmp_path / "out").rglob("*.png"))
    picture.unlink()
    replace = os.replace
    monkeypatch.setattr(export.os, "replace", lambda *a: full(0) if str(a[1]).endswith(".png") else replace(*a))
    done = run("export.py", scored, "--layout", "plain", "--out", tmp_path / "out", "--device", "cpu", ok=False)
    assert done.returncode == 1 and f"{picture}: No space left on device" in done.stderr.splitlines()[-1]
    assert not picture.exists() and not [*(tmp_path / "out").rglob("*.tmp")]


def test_another_export_is_refused_and_restart_replaces_it(scored, hostile, tmp_path):
    out, flags = tmp_path / "out", ("--layout", "plain", "--device", "cpu")
    run("export.py", scored, *flags, "--out", out)
    before = files_of(out)
    other = run("export.py", hostile, *flags, "--out", out, ok=False)
    assert other.returncode == 2 and "holds another export (scored_hash was" in other.stderr and files_of(out) == before
    layout = run("export.py", scored, "--layout", "datasets", "--out", out, ok=False)
    assert layout.returncode == 2 and "layout was 'plain', now 'datasets'" in layout.stderr and files_of(out) == before
    run("export.py", hostile, *flags, "--out", out, "--restart")
    run("export.py", hostile, *flags, "--out", tmp_path / "fresh")
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_a_run_killed_at_its_very_start_or_while_it_empties_the_directory_goes_on(scored, hostile, tmp_path, monkeypatch):
    out, flags = tmp_path / "out", ("--layout", "plain", "--device", "cpu", "--out", tmp_path / "out")
    out.mkdir()
    (out / "lock").touch()
    (out / ".export.json.123.tmp").write_text("{")
    run("export.py", scored, *flags)
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "pictures", "prompts.jsonl"]
    unlink = Path.unlink

    def killed(path, **options):
        if path.name == "prompts.jsonl":
            raise KeyboardInterrupt
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        assert run("export.py", hostile, *flags, "--restart", ok=False).returncode == 130
    run("export.py", hostile, *flags, "--restart")
    assert len([*out.rglob("*.png")]) == 2 * len(HOSTILE)


def test_what_is_read_is_never_in_the_directory_that_restart_empties(scored, tmp_path):
    (tmp_path / "out").mkdir()
    for file in (scored, tokens_path(scored)):
        shutil.copy(file, tmp_path / "out")
    (tmp_path / "out" / "export.json").write_text("{}")
    flags = ("--layout", "plain", "--out", tmp_path / "out", "--restart")
    done = run("export.py", tmp_path / "out" / "scored.jsonl", *flags, ok=False)
    assert done.returncode == 2 and "holds what is read" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", "scored.jsonl", "scored.safetensors"]


def test_a_directory_of_something_else_is_never_emptied(scored, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    for flags in ((), ("--restart",)):
        done = run("export.py", scored, "--layout", "plain", "--out", tmp_path / "out", *flags, ok=False)
        assert done.returncode == 2 and "holds files, but no export.json" in done.stderr
        assert files_of(tmp_path) == {"out/thesis.tex": b"x"}


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def first_row(**changed):
    return lambda rows: [rows[0] | changed, *rows[1:]]


@pytest.mark.parametrize(
    "change, message",
    [
        (first_row(row=99), "scored.jsonl:1: row is 99, but scored.safetensors has 36 rows"),
        (lambda rows: [rows[0], *rows], "scored.jsonl:2: candidate 0 of id"),
        (first_row(p_yes="high"), "scored.jsonl:1: p_yes must be a number"),
        (lambda rows: [], "scored.jsonl: holds no scored candidate"),
    ],
)
def test_a_damaged_scored_file_is_one_line_and_nothing_is_written(scored, tmp_path, change, message):
    write_rows(tmp_path / "scored.jsonl", change(rows_of(scored)))
    shutil.copy(tokens_path(scored), tmp_path)
    done = run("export.py", tmp_path / "scored.jsonl", "--layout", "plain", ok=False)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["scored.jsonl", "scored.safetensors"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--layout", "geneval"), "--layout geneval needs --metadata"),
        (("--layout", "plain", "--metadata", "x"), "--metadata goes with --layout geneval, found plain"),
        (("--layout", "plain", "--batch", 0), "--batch must be at least 1, found 0"),
        (("--layout", "plain", "--category", "texture"), "--category texture:"),
        (("--layout", "plain", "--out", "/dev/null/place"), "--out /dev/null/place: Not a directory"),
        (("--layout", "plain", "--model", "no/such"), "no/such"),
        (("--layout", "coco"), "invalid choice: 'coco'"),
    ],
)
def test_arguments_that_cannot_work_are_one_line_and_nothing_is_written(scored, tmp_path, monkeypatch, flags, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for file in (scored, tokens_path(scored)):
        shutil.copy(file, tmp_path)
    done = run("export.py", tmp_path / "scored.jsonl", *flags, ok=False)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["scored.jsonl", "scored.safetensors"]


def test_a_model_whose_tokens_mean_something_else_is_refused(scored, tmp_path):
    other = save_janus(tmp_path / "other", image_tokens_side=1)
    done = run("export.py", scored, "--layout", "plain", "--out", tmp_path / "out", "--model", other, ok=False)
    assert done.returncode == 2 and "4 tokens of a codebook of 24" in done.stderr and not (tmp_path / "out").exists()

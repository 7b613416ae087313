"""Prompt files as other people publish them: what is read is the prompts, or nothing is read; and what a model cannot read."""

import gzip
import itertools
import json
import os
from collections import Counter

import pytest
from conftest import run

import curriculum
from analysis.levels import SURVEY
from common import prompt_files, prompts, writing
from common.command import BadInput
from common.records import PROMPT, read_rows

RED, COMMA, QUOTE, LINES = "a red cube", "a cat, a dog", 'a sign that says "Stop"', "a cat\non a mat"


def read(*paths, category=None) -> list[tuple[str, str]]:
    """(prompt, category) of some files."""
    return [(row["prompt"], row["category"]) for file in prompt_files.read_prompt_files(paths, category) for row in file.rows]


# ---------------------------------------------------------------------------------------------------------------------
# Text


def test_published_text_prompts_read_the_same_whatever_the_line_ends(tmp_path):
    expected = ["a red cube and a blue vase", "a café", "a red cube and a blue vase"]
    variants = [
        "\n".join(expected),
        "\r\n".join(expected),
        "\r\n".join(expected) + "\r\n",
        "\n\n".join(expected) + "\n \n",
    ]
    for mark in (b"", b"\xef\xbb\xbf"):
        for text in variants:
            path = tmp_path / "color_train.txt"
            path.write_bytes(mark + text.encode())
            rows = prompts.read_prompts(path)
            assert [row["prompt"] for row in rows] == expected
            assert {row["category"] for row in rows} == {"color"}
            assert rows[0]["id"] == rows[2]["id"] != rows[1]["id"]


def test_the_category_of_a_text_file_is_its_stem_without_the_split(tmp_path):
    for name, category in (
        ("3d_spatial_train", "3d_spatial"),
        ("shape_val", "shape"),
        ("mine", "mine"),
        ("x_test", "x"),
    ):
        (tmp_path / f"{name}.txt").write_text("a cube")
        assert prompts.read_prompts(tmp_path / f"{name}.txt")[0]["category"] == category


def test_geneval_prompts_take_their_tag_as_category(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    lines = [{"tag": "counting", "include": [{"class": "clock", "count": 4}], "prompt": "a photo of four clocks"}]
    path.write_text("\r\n".join(map(json.dumps, lines)))
    (row,) = prompts.read_prompts(path)
    assert row["category"] == "counting" and row["prompt"] == "a photo of four clocks"
    assert row["id"] == prompts.prompt_id("counting", "a photo of four clocks")


def test_the_papers_survey_has_its_nine_tasks_from_the_published_prompts(tmp_path):
    """GenEval's metadata, T2I-CompBench's lists, Science-T2I's rows without their pictures: the categories have levels."""
    tags = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    rows = [{"tag": tag, "include": [{"class": "bench", "count": 1}], "prompt": f"a photo of {tag}"} for tag in tags]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("texture", "spatial", "complex"):
        (tmp_path / f"{name}_val.txt").write_text(f"a {name} thing\na {name} bench\n")
    science = [
        {"implicit_prompt": f"{law} at work", "explicit_prompt": "no", "superficial_prompt": "no", "scene_scoring": "s"}
        | {"real_scoring": "r", "category": category, "law": law}
        for category, law in (("Physics", "gravity"), ("Chemistry", "rust"), ("Biology", "ripeness"))
    ]
    (tmp_path / "science.jsonl").write_text("".join(json.dumps(row) + "\n" for row in science))
    found = prompts.read_prompts(tmp_path)
    known = {task for tasks in SURVEY.values() for task in tasks}
    assert {row["category"].casefold() for row in found} == known | {"counting", "colors", "position"}
    assert [row["prompt"] for row in found if row["category"] == "Physics"] == ["gravity at work"]


@pytest.mark.parametrize("name", ["test-00000-of-00001.parquet", "data-00000-of-00001.arrow"])
def test_what_is_published_as_a_binary_table_is_refused_with_the_way_to_read_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(BadInput, match=r"not known as a prompt file: .*; write its rows, without the pictures, as \.jsonl$"):
        prompts.read_prompts(tmp_path / name)


def test_our_own_prompts_keep_id_and_foil(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"id": "x", "prompt": "a cube", "category": "shape", "foil": "a ball"},
        {"id": "y", "prompt": "a ball", "category": "shape"},
    ]
    writing.write_rows(path, rows)
    assert prompts.read_prompts(path) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: holds no prompt"),
        ("a.txt", b"\r\n \n", "a.txt: holds no prompt"),
        ("a.txt", b"fine\nna\xefve\n", r"a.txt:2: not UTF-8"),
        ("a.jsonl", b"\n", "a.jsonl: holds no prompt"),
        ("a.jsonl", b"a red cube\n", "a.jsonl:1: not JSON"),
        ("a.jsonl", b'{"tag": "color"}', "a.jsonl:1: key 'prompt' is missing"),
        ("a.jsonl", b'{"prompt": "a", "category": ["color"]}', "a.jsonl:1: category must be a non-empty string"),
        ("a.jsonl", b'{"prompt": "a", "category": "c", "id": 7}', "a.jsonl:1: id must be a non-empty string, found 7"),
        ("a.jsonl", b'{"prompt": "a", "category": "c", "foil": ""}', "a.jsonl:1: foil must be a non-empty string"),
    ],
)
def test_a_bad_prompt_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        prompts.read_prompts(tmp_path / name)


def test_a_prompts_id_never_changes():
    """Scored files of earlier rounds hold these ids: another value would orphan them."""
    assert prompts.prompt_id("color", "a red cube") == "color-9f967626aa"
    assert prompts.prompt_id("3D Spatial!", "a red cube") == "3d_spatial-9f967626aa"
    assert prompts.prompt_id("色", "赤い球").startswith("prompt-")


# ---------------------------------------------------------------------------------------------------------------------
# Line ends, suffixes


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"], ids=repr)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(
    ("suffix", "lines"),
    [
        ("txt", [RED, COMMA]),
        ("jsonl", [json.dumps({"prompt": text}) for text in (RED, COMMA)]),
        ("json", ["[", f'{{"prompt": "{RED}"}},', f'{{"prompt": "{COMMA}"}}', "]"]),
        ("csv", ["prompt", RED, f'"{COMMA}"']),
        ("tsv", ["Prompt\tNote", f"{RED}\t", f"{COMMA}\tx"]),
    ],
)
def test_any_line_end_and_a_byte_order_mark_are_read(tmp_path, end, mark, last, suffix, lines):
    path = tmp_path / f"animals.{suffix}"
    path.write_bytes(mark + (end.join(lines) + end * last).encode())
    assert read(path) == [(RED, "animals"), (COMMA, "animals")]


def test_a_mark_inside_of_joined_files_is_no_letter_of_a_prompt(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa cat\n\xef\xbb\xbfa dog\n\xef\xbb\xbf\n")
    assert [text for text, _ in read(tmp_path / "a.txt")] == ["a cat", "a dog"]


@pytest.mark.parametrize("name", ["a.py", "a.md", "a.gz", "a.txt.gz", "a.jsonl.bak", "a.xlsx", "a.yaml", "a", ".txt"])
def test_a_file_that_is_not_called_as_a_prompt_file_is_refused_and_told_what_is_read(tmp_path, name):
    content = f"{RED}\n{COMMA}\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(BadInput, match=r"not known as a prompt file: .*\.txt .*\.jsonl.*\.csv and \.tsv"):
        read(tmp_path / name)


@pytest.mark.parametrize("suffix", ["TXT", "Txt"])
def test_a_suffix_may_be_in_capitals(tmp_path, suffix):
    (tmp_path / f"color_train.{suffix}").write_text(RED)
    assert read(tmp_path / f"color_train.{suffix}") == [(RED, "color")]


@pytest.mark.parametrize("content", ['{"prompt": "a"}\n{"prompt": "b"}', '[{"prompt": "a"}]', '[\n"a"\n]', '["a", "b"]'])
def test_json_that_is_called_text_is_not_drawn_line_by_line(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(BadInput, match="a.txt:1: is JSON, not a prompt"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "content", ["prompt\tcategory\na moth\tx", 'id,"Prompt"\n1,a moth', "Caption\na moth", "\n prompts ; n\na;1"]
)
def test_a_table_that_is_called_text_is_not_drawn_line_by_line(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(BadInput, match=r"a\.txt:[12]: is a table's header"):
        read(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("a prompt, on a screen\nprompt\n")
    assert len(read(tmp_path / "b.txt")) == 2


def test_lines_with_a_tab_are_told_of_once_with_their_number(tmp_path):
    (tmp_path / "a.txt").write_text(f"a moth\tor so\n{RED}\tShapes\nfine\n\tstripped \t\n")
    (tmp_path / "b.txt").write_text("a\tb\nc\n")
    done = run("curriculum.py", "--prompts", tmp_path / "a.txt", "--exclude", tmp_path / "b.txt", "--out", tmp_path / "o.jsonl")
    assert done.stdout.count("hold a tab") == 1
    assert f"3 lines hold a tab, which stays in the prompt, the first {tmp_path}/a.txt:1: " in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Tables

TABLES = {
    "PartiPrompts": ("p.tsv", "Prompt\tCategory\tChallenge\tNote\na red cube\tShapes\tBasic\t\n", [(RED, "Shapes")]),
    "two columns": ("min.tsv", "Prompt\tCategory\na red cube\tShapes\n", [(RED, "Shapes")]),
    "DrawBench": ("d.csv", f'Prompts,Category\n"{COMMA}",Colors\n', [(COMMA, "Colors")]),
    "captions": ("captions.csv", f'image_id,id,caption\n1,2,"{COMMA}"\n3,4,{RED}\n', [(COMMA, "captions"), (RED, "captions")]),
    "capitals": ("a.csv", f"CATEGORY, PROMPT \nx,{RED}\n", [(RED, "x")]),
    "captions, plural": ("a.csv", f"Captions\n{RED}\n", [(RED, "a")]),
    "prompt before caption": ("a.csv", f"caption,prompt\nno,{RED}\n", [(RED, "a")]),
    "GenEval's tag": ("a.csv", f"tag,prompt\ncounting,{RED}\n", [(RED, "counting")]),
    "quotes": ("a.csv", 'prompt\n"a sign that says ""Stop"""\n', [(QUOTE, "a")]),
    "a line break": ("a.csv", f'prompt,n\n"{LINES}",1\n{RED},2\n', [(LINES, "a"), (RED, "a")]),
    "quoted tabs": ("a.tsv", 'prompt\tn\n"a sign that says ""Stop"""\t1\n', [(QUOTE, "a")]),
    "unquoted quotes": (
        "a.tsv",
        f'prompt\tn\n"GIGGLE" on a wall\t1\n{QUOTE}\t2\n',
        [('"GIGGLE" on a wall', "a"), (QUOTE, "a")],
    ),
    "semicolons": ("a.csv", f"Prompt;Category\n{COMMA};x\n", [(COMMA, "x")]),
    "empty rows and cells": ("a.csv", f"prompt,category\n\n{RED},x,,\n,\n", [(RED, "x")]),
    "an empty category": ("a.csv", f"prompt,category\n{RED},\n", [(RED, "a")]),
    "an index": ("a.csv", f",prompt\n0,{RED}\n", [(RED, "a")]),
    "a large cell": ("a.csv", f"tuple,prompt\n{'x' * 200_000},{RED}\n", [(RED, "a")]),
}


@pytest.mark.parametrize(("name", "content", "expected"), TABLES.values(), ids=TABLES)
def test_a_tables_prompts_are_its_prompt_column(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    assert read(tmp_path / name) == expected


BAD_TABLES = {
    "no column": ("a.csv", f"text,category\n{RED},x\n", "a.csv: no column is called prompt"),
    "no header": ("a.tsv", f"{RED}\tx\n{COMMA}\ty\n", "a.tsv: no column is called prompt"),
    "two columns": ("a.csv", f"Prompt,prompts\n{RED},x\n", "a.csv: has 'Prompt' and 'prompts'"),
    "the same twice": ("a.csv", f"prompt,prompt\n{RED},x\n", "a.csv: has 'prompt' and 'prompt'"),
    "a comma not in quotes": ("a.csv", f"prompt\n{RED}\n{COMMA}\n", r"a.csv:3: has 2 cells, the header 1"),
    "a cell too few": ("a.csv", f"prompt,category\n{RED},x\n{RED}\n", r"a.csv:3: has 1 cells, the header 2"),
    "a quote without end": ("a.csv", f'prompt,category\n"{RED},x\n{COMMA},x\n', r"a.csv:2: not a row of a table"),
    "text after a quote": ("a.csv", f'prompt,category\n"{RED}" x,x\n', r"a.csv:2: not a row of a table"),
    "some cells quoted": ("a.tsv", f'prompt\tn\n"{RED}"\t1\n"no" end\t2\n', r"a.tsv:3: not a row of a table"),
    "an empty prompt": ("a.csv", f"prompt,category\n{RED},x\n,x\n", r"a.csv:3: prompt is empty"),
    "some without category": ("a.csv", f"prompt,category\n{RED},x\nx,\n", r"a.csv:3: key 'category'"),
    "a header alone": ("a.csv", "prompt,category\n", "a.csv: holds no prompt"),
    "nothing": ("a.tsv", "\n \n", "a.tsv: holds no prompt"),
    "Latin-1": ("a.csv", b"prompt\nfine\nna\xefve\n", "a.csv:3: not UTF-8"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_table_whose_prompts_are_not_sure_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("name", [name for name in TABLES if name != "a line break"])
def test_a_table_given_as_exclude_takes_its_prompts_out(tmp_path, name):
    file, content, expected = TABLES[name]
    (tmp_path / file).write_text(content)
    writing.write_rows(
        tmp_path / "p.jsonl", [{"prompt": text} for text in (*dict.fromkeys(text for text, _ in expected), "other")]
    )
    flags = ("--exclude", tmp_path / file, "--out", tmp_path / "out.jsonl")
    run("curriculum.py", "--prompts", tmp_path / "p.jsonl", *flags)
    assert [row["prompt"] for _, row in read_rows(tmp_path / "out.jsonl", PROMPT)] == ["other"]


# ---------------------------------------------------------------------------------------------------------------------
# JSON

ROWS = [{"prompt": RED, "category": "x", "extra": {"a": [1, "]"]}}, {"prompt": QUOTE, "category": "y"}]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("indent", [None, 1, 4])
@pytest.mark.parametrize("piece", [1, 7, 2**20])
def test_arrays_of_rows_are_read_however_they_are_written(tmp_path, monkeypatch, suffix, indent, piece):
    monkeypatch.setattr(prompt_files, "PIECE", piece)
    (tmp_path / f"a.{suffix}").write_text(json.dumps(ROWS, indent=indent))
    assert read(tmp_path / f"a.{suffix}") == [(RED, "x"), (QUOTE, "y")]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([RED, COMMA], [(RED, "a"), (COMMA, "a")]),
        ([{"Prompt": RED, "Category": "Culture", "Subcategory": "Food", "prompt_id": 1}], [(RED, "Culture")]),  # WISE
        ([{"id": 7, "prompt": RED}], [(RED, "a")]),
        ([{"prompt": RED, "category": None}], [(RED, "a")]),
        ([RED, {"prompt": COMMA}], [(RED, "a"), (COMMA, "a")]),
    ],
)
def test_arrays_as_others_publish_them_are_read(tmp_path, value, expected):
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert read(tmp_path / "a.json") == expected


def test_a_row_of_an_array_has_the_id_that_it_has_as_a_line(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    writing.write_rows(tmp_path / "b.jsonl", ROWS)
    assert prompts.read_prompts(tmp_path / "a.json") == prompts.read_prompts(tmp_path / "b.jsonl")


def test_a_large_array_on_one_line_is_read_a_piece_at_a_time(tmp_path):
    import tracemalloc

    with open(tmp_path / "a.json", "w") as file:
        file.write("[" + ", ".join(json.dumps({"prompt": f"cube {i}", "more": "x" * 100_000}) for i in range(400)) + "]")
    assert os.path.getsize(tmp_path / "a.json") > 2 * 2**24
    tracemalloc.start()
    entries = sum(1 for _ in prompt_files.read_entries(tmp_path / "a.json"))
    assert entries == 400 and tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


BAD_JSON = {
    "a number": ("[1]", "a.json:1: expected a JSON object or a string, found int"),
    "an array in it": ('[\n"a",\n["b"]]', "a.json:3: expected a JSON object or a string, found list"),
    "no prompt": ('[{"prompt": "a"},\n {"text": "b"}]', "a.json:2: key 'prompt' is missing"),
    "some without category": ('[{"prompt": "a", "category": "c"},\n {"prompt": "b"}]', "a.json:2: key 'category'"),
    "an empty prompt": ('[""]', "a.json:1: prompt must be a non-empty string"),
    "no end": ('["a",\n"b"', "a.json:2: not JSON: the array has no end"),
    "cut in a row": ('["a",\n{"prompt": "b', "a.json:2: not JSON"),
    "a comma at the end": ('["a",\n]', "a.json:2: not JSON"),
    "no comma": ('["a"\n"b"]', "a.json:2: not JSON"),
    "more after it": ('["a"]\n["b"]', "a.json:1: not JSON: more follows"),
    "NaN": ('[{"prompt": "a", "x": NaN}]', "a.json:1: not JSON: NaN"),
    "a key twice": ('[{"prompt": "a", "prompt": "b"}]', "a.json:1: not JSON: a key is given twice"),
    "brackets": ("[" * 100_000, "a.json:1: not JSON"),
    "two prompts": ('[{"Prompt": "a", "PROMPT": "b"}]', "a.json:1: has 'Prompt' and 'PROMPT'"),
    "one object": ('{\n"prompts": ["a"]}', "a.json:1: not JSON.* an array of rows"),
    "empty": ("[]", "a.json: holds no prompt"),
    "a list as id": ('[{"prompt": "a", "id": ["x"]}]', "a.json:1: id must be a non-empty string"),
    "Latin-1": (b'["fine",\n"na\xefve"]', "a.json:2: not UTF-8"),
    "NUL": (b'["a\0"]', "a.json: holds a NUL byte"),
}


@pytest.mark.parametrize(("content", "message"), BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_is_not_prompts_is_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=message):
        read(tmp_path / "a.json")


# ---------------------------------------------------------------------------------------------------------------------
# Categories, folders


@pytest.mark.parametrize(
    ("path", "category"),
    [
        ("color_val_seen.txt", "color"),
        ("texture_val_unseen.txt", "texture"),
        ("complex_val_action.txt", "complex"),
        ("complex_train_spatialaction.txt", "complex"),
        ("3d_spatial.txt", "3d_spatial"),
        ("crash_test_dummies.txt", "crash_test_dummies"),
        ("birds/train.txt", "birds"),
        ("birds/Validation.txt", "birds"),
        ("birds/test/test.txt", "birds"),
        ("birds_train/test.txt", "birds"),
        ("val_seen.txt", "here"),
    ],
)
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv"])
def test_a_category_is_what_the_name_says_without_the_split(tmp_path, path, category, suffix):
    path = (tmp_path / "here" / path).with_suffix(f".{suffix}")
    path.parent.mkdir(parents=True)
    contents = {"txt": f"{RED}\nx", "jsonl": json.dumps({"prompt": RED}), "json": json.dumps([RED]), "csv": f"prompt\n{RED}"}
    path.write_text(contents[suffix])
    assert read(path)[0] == (RED, category)
    assert read(path, category="mine")[0] == (RED, "mine")
    assert prompts.read_prompts(path)[0]["id"] == prompts.prompt_id(category, RED)


def test_rows_with_a_category_beside_rows_without_are_refused_unless_all_are_given_one(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "category": "c"}\n{"prompt": "b"}\n')
    with pytest.raises(BadInput, match="a.jsonl:2: key 'category' .*is missing, which other rows have"):
        read(tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl", category="all") == [("a", "all"), ("b", "all")]


def list_of(folder, names) -> list:
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        (folder / name).write_text(f"prompt {i}")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("names", [[f"{i}.txt" for i in range(3)], [f"diffusiondb{i}.txt" for i in range(30)],
                                   [f"{a}{b}.txt" for a, b in itertools.product("abcd", repeat=2)]], ids=len)  # fmt: skip
def test_files_of_one_prompt_each_are_one_category_their_folder(tmp_path, names):
    files = list_of(tmp_path / "dpg_bench" / "prompts", names)
    (tmp_path / "dpg_bench" / "prompts" / ".DS_Store").write_bytes(b"\0")
    given = [prompt_files.read_prompt_files(paths) for paths in ([files[0].parent], files, [f"{files[0].parent}/."])]
    for (read,) in given:
        assert read.rows == given[0][0].rows and {row["category"] for row in read.rows} == {"prompts"}
    assert {row["id"] for row in given[0][0].rows} == {prompts.prompt_id("prompts", f"prompt {i}") for i in range(len(names))}


def test_a_folder_of_files_with_many_prompts_is_these_files(tmp_path):
    for name in ("color_train", "shape_train"):
        (tmp_path / f"{name}.txt").write_text(f"a {name}\nanother {name}")
    (tmp_path / "texture_val.txt").write_text("one prompt, of a category")
    assert Counter(category for _, category in read(tmp_path)) == {"color": 2, "shape": 2, "texture": 1}


def test_a_few_files_of_one_prompt_with_names_keep_these_as_categories(tmp_path):
    assert read(*list_of(tmp_path / "x", ["cats.txt", "dogs.txt"])) == [("prompt 0", "cats"), ("prompt 1", "dogs")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "holds no prompt"),
        (lambda folder: (folder / "README.md").write_text("hello"), "README.md: not known as a prompt file"),
        (lambda folder: (folder / "more").mkdir(), "more: is a folder in a folder"),
        (lambda folder: (folder / "a.txt").touch(), "a.txt: holds no prompt"),
        (lambda folder: (folder / "a.txt").symlink_to("nothing"), "a.txt: cannot be read"),
        (
            lambda folder: [(folder / f"{i}.txt").write_text("a cat\n" * (1 + (i == 7))) for i in range(30)],
            "7.txt:2: a second line, but 29 files beside it hold one prompt each",
        ),
    ],
)
def test_a_folder_with_anything_else_is_refused(tmp_path, make, message):
    (tmp_path / "x").mkdir()
    make(tmp_path / "x")
    with pytest.raises(BadInput, match=message):
        read(tmp_path / "x")


def test_two_files_whose_names_say_the_same_category_are_named(tmp_path):
    for name in ("a/color", "b/color", "a/test", "b/test", "c/color_val_seen"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text(f"prompt {name}\nanother {name}")
    files = [tmp_path / name for name in ("a/color.txt", "b/color.txt", "a/test.txt", "b/test.txt", "c/color_val_seen.txt")]
    flags = ("--out", tmp_path / "o.jsonl")
    done = run("curriculum.py", "--prompts", *files, *flags)
    assert f"{files[0]} and {files[1]} and 1 more share the category 'color'" in done.stdout
    assert done.stdout.count(" share ") == 1
    assert Counter(category for _, category in read(*files)) == {"color": 6, "a": 2, "b": 2}
    assert " share " not in run("curriculum.py", "--prompts", *files, "--category", "x", *flags).stdout


@pytest.mark.parametrize("script", ["curriculum.py", "score.py"])
def test_an_output_in_a_folder_that_is_read_is_refused(tmp_path, script):
    list_of(tmp_path / "x", ["1.txt", "2.txt"])
    flags = ("--model", "none") if script == "score.py" else ()
    done = run(script, "--prompts", tmp_path / "x", "--out", tmp_path / "x" / "p.jsonl", *flags, ok=False)
    assert done.returncode == 2 and "--out" in done.stderr and len(list((tmp_path / "x").iterdir())) == 2


# ---------------------------------------------------------------------------------------------------------------------
# What is the same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a caf\u00e9", "a cafe\u0301"),  # NFC, NFD
        ("a red cube", "a\u200b red\u200d cu\u2060be\ufeff"),
        ("a red cube", "\u202ea red cube\u202c\u00ad"),
        ("a red cube", "\uff41\u3000\uff32\uff25\uff24\u3000cube\uff0e"),
        ("a heart \u2764", "a heart \u2764\ufe0f"),
        ("a \ufb01sh", "a fish"),
        ("a stra\u00dfe", "a STRASSE"),
        ("\u0130stanbul", "i\u0307stanbul"),
        ("a caf\u00e9", "a cafe\u200b\u0301"),
        ("a\u00a0cat", "a cat"),
    ],
)
def test_prompts_that_look_alike_are_the_same(one, other):
    assert curriculum.normalise(one) == curriculum.normalise(other)
    assert curriculum.normalise(one) != curriculum.normalise(one + "s")


def test_evaluation_prompts_that_only_normalisation_finds_are_taken_out_and_counted(tmp_path):
    (tmp_path / "p.txt").write_text("a cafe\u0301\nA red cube.\na \u200bdog\na cow\n", encoding="utf-8")
    (tmp_path / "v.txt").write_text("a caf\u00e9\na red cube\na dog\n", encoding="utf-8")
    flags = ("--exclude", tmp_path / "v.txt", "--out", tmp_path / "o.jsonl")
    done = run("curriculum.py", "--prompts", tmp_path / "p.txt", *flags)
    assert "v.txt: takes out 3 prompts, 2 of them only by Unicode normalisation\n" in done.stdout
    assert read(tmp_path / "o.jsonl") == [("a cow", "p")]

"""Promises about README.md and docs/: what they name exists, what they tell people to type works as it is typed."""

import importlib
import itertools
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run, script_path, spawn

sys.path.insert(0, str(ROOT / "experiments"))
import tables

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
OTHERS = ["CONTRIBUTING.md", "CHANGELOG.md", "experiments/README.md", "benchmarks/README.md"]
TORCHRUN = {"--standalone", "--nnodes", "--nproc-per-node", "--max-restarts", "--shutdown-timeout"}
TORCHRUN |= {"--rdzv-backend", "--rdzv-id", "--rdzv-endpoint"}


def read(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), flags=re.M | re.S)


def shell_lines(block: str) -> list[list[str]]:
    """The commands of a shell block as words: continuation lines joined, comments dropped."""
    return [words for line in block.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def script_of(words: list[str]) -> int | None:
    """Where in a command the script stands that Python or torchrun starts."""
    if words[0] not in ("python", "torchrun", "$PYTHON"):
        return None
    return next((i for i, word in enumerate(words) if word.endswith(".py")), None)


# What people type


@pytest.mark.parametrize("page", [*PAGES, "experiments/README.md"])
def test_every_script_line_parses(page, monkeypatch):
    for words in (words for block in blocks(page, "bash") for words in shell_lines(block)):
        if (at := script_of(words)) is None:
            continue
        numbers = {flag: int(number) for flag, number in itertools.pairwise(words) if number.isdigit()}
        monkeypatch.setenv("WORLD_SIZE", str(numbers.get("--nnodes", 1) * numbers.get("--nproc-per-node", 1)))
        path = script_path(words[at])
        assert path == ROOT / words[at], f"{words[at]} cannot be typed in the root"
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        module.parse_args(words[at + 1 :])  # SystemExit if a flag is gone


def test_every_command_has_a_line():
    commands = {path.name for path in ROOT.glob("*.py") if path.name != "model.py"}
    commands |= {f"analysis/{path.name}" for path in (ROOT / "analysis").glob("*.py") if "__main__" in path.read_text()}
    lines = [words for page in PAGES for block in blocks(page, "bash") for words in shell_lines(block)]
    assert {words[at] for words in lines if (at := script_of(words)) is not None} == commands


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_every_flag_exists(page):
    rooms = [ROOT, *(ROOT / name for name in ("common", "analysis", "experiments", "benchmarks", "shapes"))]
    sources = [path.read_text() for room in rooms for path in room.glob("*.py")]
    code = re.findall(r"^```bash\n.*?^```|`[^`\n]+`", read(page), flags=re.M | re.S)
    for flag in {flag for text in code for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)} - TORCHRUN - {"--help"}:
        assert any(f'"{flag}"' in source for source in sources), flag


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_every_make_target_and_variable_exists(page):
    makefile, code = read("Makefile"), "\n".join(re.findall(r"^```bash\n.*?^```|`[^`\n]+`", read(page), flags=re.M | re.S))
    for target in re.findall(r"(?:^|`|; )make ([\w./-]+)", code, flags=re.M):
        assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.M), target
    settings = read("self_improve.sh") + "".join(script.read_text() for script in (ROOT / "experiments").glob("*.sh"))
    python = read("benchmarks/gpu.py") + read("families/autoregressive.py")
    for variable in re.findall(r"(?<![\w$-])([A-Z][A-Z_]{2,})=", code):
        known = variable.startswith("TORCH_") or f'environ.get("{variable}")' in python or f"$({variable}:" in makefile
        assert known or re.search(rf"^\s*{variable}=", settings, flags=re.M), variable


def section(page: str, heading: str) -> str:
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", read(page), flags=re.M | re.S)[1]


def lines_below(heading: str) -> list[list[str]]:
    (block,) = re.findall(r"^```bash\n(.*?)^```", section("docs/files-and-numbers.md", heading), flags=re.M | re.S)
    return shell_lines(block)


def type_lines(lines: list[list[str]], replaced: dict[str, str]) -> None:
    for words in lines:
        assert words[0] == "python"
        run(words[1], *(replaced.get(word, word) for word in words[2:]))


def test_a_round_by_hand_as_it_is_written(tmp_path, monkeypatch):
    """No directory is made beforehand."""
    for name, every in (("train", 60), ("heldout", 16)):
        prompts = [json.loads(line)["prompt"] for line in read(f"shapes/prompts_{name}.jsonl").splitlines()]
        (tmp_path / f"color_{name.replace('heldout', 'val')}.txt").write_text("\n".join(prompts[::every]))
    monkeypatch.chdir(tmp_path)
    replaced = {"deepseek-community/Janus-Pro-1B": str(ROOT / "shapes" / "base")}
    lines = lines_below("A round by hand")
    type_lines([words for words in lines if "--judge" not in words], replaced)  # test_vlm.py has such a judge
    assert {path.name for path in tmp_path.iterdir()} == {"color_train.txt", "color_val.txt", "round1", "round2"}
    made = ["round1/model/model.safetensors", "round1/model-dpo/model.safetensors", "round1/rejudged.jsonl"]
    for name in [*made, "round2/prompts.jsonl"]:
        assert (tmp_path / name).is_file(), name


def test_a_run_is_looked_at_as_it_is_written(loop, tmp_path, monkeypatch):
    demo = tmp_path / "runs" / "demo"
    shutil.copytree(loop[1], demo)
    shutil.copytree(demo / "round2", demo / "round3")  # the demo has three rounds
    monkeypatch.chdir(tmp_path)
    lines = lines_below("Looking at a run")
    gate = next(words for words in lines if words[1] == "gate.py")
    type_lines([words for words in lines if words is not gate], {})
    assert run(gate[1], *gate[2:], ok=False).returncode in (0, 3, 4)  # so little training may be no good round
    for made in ("summary.jsonl", "report.html", "round1/gate.json", "round3/diagnosis.json", "round1/dynamics.jsonl"):
        assert (demo / made).is_file(), made
    assert list((demo / "round3").rglob("*.png"))


def test_a_step_is_copied_as_it_is_written(tmp_path):
    (words,) = (words for block in blocks("README.md", "bash") for words in shell_lines(block) if words[0] == "cp")
    subprocess.run([*words[:-1], tmp_path], cwd=ROOT, check=True)
    copied = next(word for word in words if word.endswith(".py"))
    assert spawn(sys.executable, tmp_path / copied, "--help").stdout.startswith(f"usage: {copied}")


def test_python_as_it_is_written(monkeypatch):
    (code,) = blocks("README.md", "python")
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(code, names)
    assert names["tokens"].shape[:2] == (1, 4) and names["pictures"].shape[0] == 4
    assert names["p_yes"].shape == (4, 1) and names["logps"].shape == names["tokens"][0].shape


# What they name


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_every_link_leads_somewhere(page):
    for path, anchor in re.findall(r"(?:\]\(|src=\")(?!http)([^)#\"]*)(?:#([^)\"]*))?[)\"]", read(page)):
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.M)
            assert anchor in map(slug, headings), f"{path}#{anchor}"


def test_the_readme_links_every_page():
    for page in PAGES[1:]:
        assert f"]({page})" in read("README.md"), page


def named_in_the_tree() -> set[Path]:
    """Every file and folder that the README's tree names. An indented line's first name lies in the room of the line above it
    that names one; what a text mentions may lie in the room or at the top."""
    (tree,) = re.findall(r"^```text\n(.*?)^```", section("README.md", "Where everything is"), flags=re.M | re.S)
    room, found = ROOT, set()
    for line in tree.splitlines():
        names = re.findall(r"(?<![\w/])\w+(?:/|\.py\b|\.sh\b)", line)
        if line.startswith(" "):
            found.add(room / names.pop(0))
        else:
            room = ROOT / names[0] if names[0].endswith("/") else ROOT
        found |= {room / name if (room / name).exists() else ROOT / name for name in names}
    return found


def test_the_tree_names_what_is_there():
    named = named_in_the_tree()
    for path in named:
        assert path.exists(), path.relative_to(ROOT)
    assert {ROOT / "docs", *(path.parent for path in ROOT.glob("[!.]*/*.py"))} <= named
    assert set(ROOT.glob("*.py")) <= named
    assert {path for path in (ROOT / "analysis").glob("*.py") if "__main__" in path.read_text()} <= named


# How they are written


def test_the_readme_is_short():
    assert len(read("README.md")) <= 12_000


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_nothing_is_left_to_fill_and_no_directory_to_make(page):
    assert "mkdir" not in read(page)
    assert not re.findall(r"^[A-Z_]{6,}$|\b[A-Z]+_(?:TABLE|TEXT|OUTPUT)\b|\b(?:TODO|TBD|XXX)\b|@@", read(page), flags=re.M)


def test_a_table_of_results_lies_in_one_place():
    marks = [mark for page in [*PAGES, *OTHERS] for mark in re.findall(r"<!-- table (\w+) -->", read(page))]
    assert len(marks) == len(set(marks))
    assert set(marks) == set(tables.NAMES)


def test_the_figures_that_the_readme_draws_from_the_tables_are_theirs():
    rows = tables.read_results(ROOT / "experiments" / "results.jsonl")
    mean = {
        (family, name): statistics.mean(row["accuracy"] for row in rows if (row["family"], row["name"]) == (family, name))
        for family in tables.measured(rows)
        for name in ("base", *(f"{name}-3" for name in tables.LOOPS.values()))
    }
    text = read("README.md")
    gained = {
        family: [round(100 * (mean[key] - mean[family, "base"])) for key in mean if key[0] == family]
        for family in tables.measured(rows)
    }
    for family, title in (("janus", "Janus"), ("showo", "Show-o"), ("tar", "Tar")):
        assert f"by {min(gained[family][1:])} to {max(gained[family])} {'points ' * (family == 'janus')}in {title}" in text
    shipped = [row for row in rows if row["family"] in tables.FAMILIES]
    for kind, said in (("bad", "stopped {} of {} bad runs"), ("good", "{} of {} good ones")):
        lines = [line for line in tables.tables("stops", shipped).splitlines() if line.startswith(f"| {kind}")]
        counts = [map(int, found) for line in lines for found in re.findall(r"(\d+) of (\d+)", line.split(" | ", 1)[1])]
        assert said.format(*map(sum, zip(*counts, strict=True))) in text
        lines = [line.split(" | ") for line in tables.tables("trial", rows).splitlines() if line.startswith(f"| {kind}")]
        assert (
            f"{sum(int(cells[2]) for cells in lines)} of {sum(int(cells[1]) for cells in lines)}"
            in text.partition("other bases")[2]
        )

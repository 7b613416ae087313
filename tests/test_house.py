"""Promises about the code as a whole: who imports whom, what an import costs, what can be copied, what the README says."""

import ast
import itertools
import re
import shlex
import shutil
import sys

import pytest
from conftest import ROOT, run, spawn

GROUND_FLOOR = {"model", "families", "pretrained", "lora", "janus", "janus_drawing", "janus_files", "llama"}
GROUND_FLOOR |= {"showo", "masked_diffusion", "showo_files", "phi", "magvit", "vlm", "foils"}
GROUND_FLOOR |= {"writing", "command", "records", "chunks", "ranks", "train", "checkpoint"}
STEPS = {"curriculum", "score", "make_pairs", "sft", "dpo", "summary", "gate", "dynamics", "diagnose", "report", "export"}
GROUND_FLOOR |= {"stats", "judgements", "measures", "evidence", "probes", "rundir", "galleries", "pictures", "charts", "page"}


def imported(path) -> set[str]:
    """Names of all modules a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def needed(name: str, without: str = "") -> set[str]:
    """The ground-floor files that a script imports, and those that they import, all but one and what that alone needs."""
    floor = GROUND_FLOOR - {without}
    found, before = imported(ROOT / f"{name}.py") & floor, set()
    while found != before:
        before = found
        found = found.union(*(imported(ROOT / f"{file}.py") & floor for file in found))
    return found


@pytest.mark.parametrize("name", sorted(STEPS | GROUND_FLOOR))
def test_nothing_imports_a_step(name):
    assert not imported(ROOT / f"{name}.py") & STEPS


def test_importing_a_step_does_nothing_and_leaves_torch_out():
    code = f"import sys, {', '.join(sorted(STEPS))}; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    done = spawn(sys.executable, "-c", code)
    assert done.stdout == "" and done.stderr == ""


@pytest.mark.parametrize("name", sorted(STEPS))
def test_every_flag_has_a_help_text_and_every_number_its_default(name, monkeypatch):
    import command

    parsers = []
    make = command.Parser.__init__
    monkeypatch.setattr(command.Parser, "__init__", lambda self, text: (make(self, text), parsers.append(self))[0])
    run(f"{name}.py", "--help")
    for action in parsers[0]._actions:
        assert action.help, action.option_strings
        if action.type in (int, float):
            assert "default" in action.help, action.option_strings


@pytest.mark.parametrize("name", sorted(STEPS))
def test_a_wrong_flag_is_one_line_and_exit_2(name):
    done = run(f"{name}.py", "--no-such-flag", ok=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"{name}.py: ")


def test_dpo_works_copied_with_its_ground_floor_alone(pairs, tmp_path):
    """And without Show-o, where the model is a Janus."""
    for name in ("dpo", *needed("dpo", without="showo")):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    out = tmp_path / "out"
    spawn(sys.executable, tmp_path / "dpo.py", "--pairs", pairs, "--out", out, "--max-steps", 1, "--device", "cpu", env={})
    assert (out / "model.safetensors").is_file()


def test_the_readme_names_the_files_to_copy():
    (paragraph,) = re.findall(r"## Copy one script\n\n(.*?)nothing else; a test", (ROOT / "README.md").read_text(), flags=re.S)
    named = re.findall(r"`(\w+)\.py`", paragraph)
    assert sorted(named) == sorted({"dpo", *needed("dpo")}) and "vlm" not in named
    assert needed("dpo") - needed("dpo", without="showo") == {"showo", "showo_files", "masked_diffusion", "phi", "magvit"}


def readme_commands() -> list[list[str]]:
    """Every line of the README's shell blocks, continuation lines joined, comments dropped, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_readmes_script_lines_parse(monkeypatch):
    seen = set()
    for words in readme_commands():
        numbers = {flag: int(number) for flag, number in itertools.pairwise(words) if number.isdigit()}
        monkeypatch.setenv("WORLD_SIZE", str(numbers.get("--nnodes", 1) * numbers.get("--nproc-per-node", 1)))
        for i, word in enumerate(words):
            if word.endswith(".py") and word.removesuffix(".py") in STEPS:
                script = sys.modules.get(word.removesuffix(".py")) or __import__(word.removesuffix(".py"))
                script.parse_args(words[i + 1 :])  # SystemExit if a flag is gone
                seen.add(word.removesuffix(".py"))
                break
    assert seen == STEPS


def test_the_readme_has_no_blank_left_to_fill():
    assert not re.findall(r"^[A-Z_]{6,}$|\b[A-Z]+_(?:TABLE|TEXT|OUTPUT)\b", (ROOT / "README.md").read_text(), flags=re.M)


def test_the_readmes_make_targets_files_and_variables_exist():
    text = (ROOT / "README.md").read_text()
    makefile, loop = (ROOT / "Makefile").read_text(), (ROOT / "self_improve.sh").read_text()
    for words in readme_commands():
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile
        for variable in (word.split("=")[0] for word in words if re.match(r"[A-Z_]+=", word)):
            assert f"\n{variable}=" in loop or f"\n  {variable}=" in loop, variable
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / path).exists(), path

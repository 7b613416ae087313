"""Promises about the code as a whole: which room imports which, what an import costs, what can be copied or pasted."""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run, script_path, spawn

MAY_IMPORT = {  # room -> what of the project its files may import
    "common": {"common"},
    "families": {"common", "families"},
    "analysis": {"common", "families", "analysis", "model"},
    ".": {"common", "families", "model"},
}
FILES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).glob("*.py"))
STEPS = sorted(path.stem for path in ROOT.glob("*.py") if path.name != "model.py")
COMMANDS = [*STEPS, *sorted(path.stem for path in (ROOT / "analysis").glob("*.py") if "__main__" in path.read_text())]
MOST_LINES = {"dpo": 260, "sft": 130, "score": 380, "make_pairs": 380}
OTHERS = 400  # lines


def imports(path: Path) -> set[str]:
    """The top-level names of all modules that a file imports, wherever in it; not the interface, named as a type alone."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":  # never run
            node.body = [one for one in node.body if getattr(one, "module", "") != "model"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import, which a script cannot have"
            found.add(node.module.split(".")[0])
    return found


def room_of(path: Path) -> str:
    return "." if path.parent == ROOT else path.parent.name


# Rooms


def test_at_most_eight_files_lie_at_the_top():
    assert len(list(ROOT.glob("*.py"))) <= 8
    assert {"curriculum", "score", "make_pairs", "sft", "dpo", "gate"} == set(STEPS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{room_of(path)}/{path.stem}")
def test_a_file_imports_only_the_rooms_below_its_own(path):
    rooms = {"common", "families", "analysis", "shapes", "experiments", "benchmarks", "tests"}
    ours = rooms | {file.stem for file in ROOT.glob("*.py")}
    allowed = MAY_IMPORT["families"] if path == ROOT / "model.py" else MAY_IMPORT[room_of(path)]
    assert imports(path) & ours <= allowed, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{room_of(path)}/{path.stem}")
def test_no_file_is_longer_than_can_be_read(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES.get(path.stem if room_of(path) == "." else "", OTHERS)


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_main_of_a_trainer_is_chapter_titles(name):
    (main,) = (node for node in ast.parse((ROOT / f"{name}.py").read_text()).body if getattr(node, "name", "") == "main")
    assert main.end_lineno - main.lineno + 1 <= 40


def test_nothing_outside_the_families_room_names_a_family():
    """But model.load, which tells them apart."""
    names = {"janus", "showo", "magvit", "Janus", "ShowO", "JanusForConditionalGeneration", "PhiForCausalLM"}
    names |= {"codes", "CodesInVocabulary", "tar", "Tar", "liquid", "Liquid", "qwen2", "gemma", "autoregressive"}
    names |= {"Qwen2ForCausalLM", "GemmaForCausalLM"}
    for path in FILES:
        if room_of(path) != "families" and path != ROOT / "model.py":
            tree = ast.parse(path.read_text())
            found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            found |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom):
                    found |= {alias.name for alias in node.names} | set(node.module.split("."))
            assert not found & names, path


# Start-up


def test_importing_a_command_does_nothing_and_leaves_torch_out():
    modules = [".".join(script_path(f"{name}.py").relative_to(ROOT).with_suffix("").parts) for name in COMMANDS]
    code = f"import sys, {', '.join(modules)}; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    done = spawn(sys.executable, "-c", code)
    assert done.stdout == "" and done.stderr == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_has_a_help_text_and_every_number_its_default(name, monkeypatch):
    from common import command

    parsers = []
    make = command.Parser.__init__
    monkeypatch.setattr(command.Parser, "__init__", lambda self, text: (make(self, text), parsers.append(self))[0])
    run(f"{name}.py", "--help")
    for action in parsers[0]._actions:
        assert action.help, action.option_strings
        if action.type in (int, float):
            assert "default" in action.help, action.option_strings


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_flag_is_one_line_and_exit_2(name):
    done = run(f"{name}.py", "--no-such-flag", ok=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"{name}.py: ")


# Copying


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """Another project, with modules of its own that are called as ours might be."""
    project = tmp_path_factory.mktemp("project")
    for name in ("utils.py", "common_utils.py", "models/__init__.py", "models/model.py"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("raise RuntimeError('another project's module was imported')")
    for name in ("model.py", "common", "families"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, project / name)
    return project


# Torch and transformers are imported once; each command is a process of its own that finds nothing of this repository.
IN_TURN = """
import json, os, runpy, sys
import torch, transformers.models.janus.modeling_janus
codes = []
for argv in json.loads(sys.argv[1]):
    if not (pid := os.fork()):
        sys.argv, sys.path[0] = argv, os.path.dirname(argv[0])
        runpy.run_path(argv[0], run_name="__main__")
        sys.exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(codes))
"""


@pytest.mark.thorough
def test_every_step_works_copied_with_model_common_and_families(elsewhere, tiny, scored, pairs, tmp_path):
    """And each makes the directories above its output."""
    cpu, out = ("--device", "cpu"), tmp_path / "new"
    train = ("--max-steps", 1, *cpu)
    prompts = scored.parent / "color_train.txt"
    draw = ("--model", tiny, "--prompts", prompts, "--candidates", 2, "--readouts", *cpu)
    wanted = {
        "curriculum": ("--prompts", prompts, "--out", out / "prompts" / "prompts.jsonl"),
        "score": (*draw, "--out", out / "drawn" / "scored.jsonl"),
        "make_pairs": ("--scored", scored, "--out", out / "round" / "data", "--force"),
        "sft": ("--data", pairs.with_name("sft.jsonl"), "--out", out / "models" / "sft", *train),
        "dpo": ("--pairs", pairs, "--out", out / "models" / "dpo", *train),
        "gate": (
            *(word for flag in ("--base", "--after", "--rejudged") for word in (flag, out / "drawn" / "scored.jsonl")),
            *("--out", out / "gate" / "gate.json"),
        ),
    }
    assert sorted(wanted) == STEPS
    commands = []
    for name, flags in wanted.items():
        alone = shutil.copytree(elsewhere, tmp_path / name)  # no step beside it
        commands.append([str(word) for word in (shutil.copy(ROOT / f"{name}.py", alone), *flags)])
    done = spawn(sys.executable, "-c", IN_TURN, json.dumps(commands), env={"OMP_NUM_THREADS": "1"})
    assert json.loads(done.stdout.splitlines()[-1]) == [0] * 5 + [3], done.stderr  # a random judge says neither yes nor no
    models = ("models/sft/model.safetensors", "models/dpo/model.safetensors")
    for made in ("prompts/prompts.jsonl", "drawn/scored.jsonl", "round/data/pairs.jsonl", *models, "gate/gate.json"):
        assert (out / made).is_file()


def mathematics(name: str) -> str:
    """The lines of a script between its heading "The mathematics" and the next heading."""
    (found,) = re.findall(r"^# The mathematics\n\n(.*?)^# -{9}", (ROOT / f"{name}.py").read_text(), flags=re.M | re.S)
    return found


def test_the_mathematics_runs_where_these_lines_alone_are_pasted():
    import numpy as np
    import torch

    pasted = {}
    for name in ("sft", "dpo", "score"):
        exec("import numpy as np\nimport torch\n" + mathematics(name), pasted)
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    assert pasted["sft_loss"](logps, torch.tensor([[True, True], [True, False]])).tolist() == [3.0, 3.0]
    same = pasted["dpo_loss"](*[torch.zeros(2)] * 4, beta=0.1)
    assert torch.allclose(same[0], torch.tensor(0.6931472)) and not same[1].any() and not same[2].any()
    assert pasted["picture_logps"](logps, average=False).tolist() == [-3.0, -7.0]
    assert pasted["kl_to_reference"](logps, logps).tolist() == [0.0, 0.0]
    p_yes, prompt = np.array([0.9, 0.1, 0.2]), np.array(["a", "a", "b"])
    assert pasted["nonunified_score"](p_yes, prompt, threshold=0.5) == 0.75
    assert abs(pasted["separation"](p_yes, np.zeros(3)) - 0.4) < 1e-12

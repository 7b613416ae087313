"""self_improve.sh and summary.py: the whole loop by its real command on the shipped model, and its numbers by hand."""

import fcntl
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import HANGS_S, ROOT, SHIPPED, run, spawn

from common.records import write_tokens
from common.writing import write_rows

# The numbers


def write_judged(path, answers, model="M"):
    """A scored file with given (id, candidate, p_yes)."""
    rows = [
        {
            "id": i,
            "prompt": i,
            "category": "c",
            "candidate": c,
            "p_yes": p,
            "coverage": 1.0,
            "foil": "f",
            "p_yes_foil": 0.25,
            "row": n,
        }
        for n, (i, c, p) in enumerate(answers)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, rows)
    header = {"model": model, "model_hash": "h", "codebook_size": "8", "threshold": "0.5"}
    import numpy as np

    write_tokens(path.with_suffix(".safetensors"), np.zeros((len(rows), 4), np.int64), header)


def write_labels(path, labels):
    write_rows(path, [{"id": i, "candidate": c, "label": v, "source": "oracle"} for i, c, v in labels])


def test_a_row_holds_what_the_files_say(tmp_path):
    base, first = tmp_path / "round0", tmp_path / "round1"
    write_judged(base / "heldout.jsonl", [("a", 0, 0.9), ("a", 1, 0.1), ("b", 0, 0.2), ("b", 1, 0.3)])
    write_labels(base / "labels.jsonl", [("a", 0, 1), ("a", 1, 0), ("b", 0, 1), ("b", 1, 0)])
    write_judged(first / "heldout.jsonl", [("a", 0, 0.9), ("a", 1, 0.8), ("b", 0, 0.7), ("b", 1, 0.3)], model="M1")
    write_judged(first / "rejudged.jsonl", [("a", 0, 0.9), ("a", 1, 0.1), ("b", 0, 0.8), ("b", 1, 0.7)])
    write_labels(first / "labels.jsonl", [("a", 0, 1), ("a", 1, 1), ("b", 0, 0), ("b", 1, 0)])
    prompt = {"prompt": "p", "category": "c"}
    write_rows(first / "prompts.jsonl", [{"id": i} | prompt for i in "xyz"])
    write_rows(first / "sft.jsonl", [{"id": "x", "p_yes": 0.9, "row": n} | prompt for n in range(5)])
    write_rows(first / "discard.jsonl", [{"id": "z", "best_p_yes": 0.2} | prompt])
    done = run("summary.py", tmp_path)
    zero, one = (json.loads(line) for line in (tmp_path / "summary.jsonl").read_text().splitlines())
    assert (zero["nonunified"], zero["separation"], zero["accuracy"]) == (0.75, 0.125, 0.5)
    assert (zero["judge_accuracy"], zero["false_negative_rate"], zero["weak_generation"]) == (0.75, 0.5, 2 / 3)
    assert one["model"] == "M1" and one["n_prompts"] == 3 and one["n_sft"] == 5 and one["discard"] == 1
    assert (one["nonunified"], one["accuracy"]) == (0.25, 0.5)
    assert (one["judge_accuracy"], one["false_positive_rate"]) == (0.75, 0.5)  # of the base model's pictures
    assert one["weak_generation"] == 1.0  # of its own
    assert done.stdout.splitlines()[-1] == str(tmp_path / "summary.jsonl")


def test_recovered_are_the_prompts_that_left_the_discard_pool(tmp_path):
    prompt = {"prompt": "p", "category": "c"}
    for number, discarded, drawn in ((1, "xyz", "a"), (2, "z", "ay")):
        directory = tmp_path / f"round{number}"
        write_judged(directory / "heldout.jsonl", [("h", 0, 0.9)])
        write_rows(directory / "discard.jsonl", [{"id": i, "best_p_yes": 0.2} | prompt for i in discarded])
        write_rows(directory / "sft.jsonl", [{"id": i, "p_yes": 0.9, "row": 0} | prompt for i in drawn])
    write_judged(tmp_path / "round0" / "heldout.jsonl", [("h", 0, 0.9)])
    run("summary.py", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "summary.jsonl").read_text().splitlines()]
    assert [row.get("recovered") for row in rows] == [None, 0, 1]
    assert [row.get("discard") for row in rows] == [None, 3, 1]


def test_a_directory_without_a_round_and_pictures_without_labels_are_refused(tmp_path):
    done = run("summary.py", tmp_path, ok=False)
    assert done.returncode == 2 and "holds no finished round" in done.stderr
    write_judged(tmp_path / "round0" / "heldout.jsonl", [("a", 0, 0.9), ("b", 0, 0.9)])
    write_labels(tmp_path / "round0" / "labels.jsonl", [("a", 0, 1)])
    done = run("summary.py", tmp_path, ok=False)
    assert done.returncode == 2 and "heldout.jsonl:2: candidate 0 of id 'b' has no label" in done.stderr
    assert not (tmp_path / "summary.jsonl").exists()


# The loop


def test_each_round_leaves_its_files_and_a_row(loop):
    _, out, stdout = loop
    rows = [json.loads(line) for line in (out / "summary.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1, 2]
    wanted = "n_prompts nonunified separation discard recovered n_sft n_pairs accuracy judge_accuracy false_positive_rate "
    wanted += "false_negative_rate weak_generation model"
    assert set(wanted.split()) <= rows[2].keys()
    for name in ("prompts", "scored", "sft", "pairs", "discard", "heldout", "labels", "rejudged"):
        assert (out / "round2" / f"{name}.jsonl").is_file(), name
    assert stdout.splitlines()[-1] == str(out / "report.html")
    assert not list(out.rglob("*.tmp")) and not list(out.rglob("*.training")) and not list(out.rglob("*.chunks"))


def test_the_layout_at_its_top_is_what_it_makes(loop):
    header = (ROOT / "self_improve.sh").read_text().partition("# OUT holds")[2].partition("\nset -e")[0]
    promised = {name.rstrip("/") for line in header.splitlines() for name in re.findall(r"[\w-]+(?:\.\w+|/)|best", line[:45])}
    out = loop[1]
    made = {"roundN" if path.name in ("round1", "round2") else path.name for path in out.iterdir()}
    made |= {path.name for path in out.glob("round*/*") if path.suffix != ".safetensors"}
    sometimes = {"best", "heldout-2.jsonl", "rejudged-2.jsonl"}  # only after a good round, and an undecided one
    assert made - {"model-sft", "best"} == promised - sometimes
    assert (out / "round2" / "model" / "training").is_dir()


def test_each_round_draws_with_the_model_of_the_round_before(loop):
    from common.records import Tokens
    from families.pretrained import weights_hash

    environment, out, _ = loop
    assert Tokens(out / "round2" / "scored.jsonl").metadata["model_hash"] == weights_hash(out / "round1" / "model")
    assert Tokens(out / "round2" / "heldout.jsonl").metadata["model_hash"] == weights_hash(out / "round2" / "model")
    assert Tokens(out / "round1" / "scored.jsonl").metadata["model_hash"] == weights_hash(SHIPPED[environment["FAMILY"]])


def test_started_again_it_does_nothing_and_after_a_loss_it_ends_the_same(loop):
    environment, out, _ = loop
    before = (out / "summary.jsonl").read_bytes()
    again = subprocess.run([ROOT / "self_improve.sh"], env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "$ " not in again.stdout and (out / "summary.jsonl").read_bytes() == before
    (file,) = (out / "round2" / "model").glob("*model.safetensors")
    weights = file.read_bytes()
    shutil.rmtree(out / "round2" / "model")
    for name in ("heldout", "rejudged"):
        for path in (out / "round2").glob(f"{name}.*"):
            path.unlink()
    (out / "round2" / "labels.jsonl").unlink()
    (out / "summary.jsonl").unlink()
    subprocess.run([ROOT / "self_improve.sh"], env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (out / "summary.jsonl").read_bytes() == before
    assert file.read_bytes() == weights


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_papers_curriculum_draws_the_pool_again_and_ends_when_it_is_empty(loop, tmp_path, method):
    """Algorithm 2 in rounds: the pool alone is drawn, by the model as it is; one growing set; the reference stays the base."""
    from common.records import Tokens
    from families.pretrained import weights_hash

    def improve(n_rounds):
        return spawn(ROOT / "self_improve.sh", env=environment | {"ROUNDS": str(n_rounds)})

    def rows(name):
        return [json.loads(line) for line in (out / name).read_text().splitlines()]

    out = tmp_path / "run"
    environment = loop[0] | {"OUT": str(out), "METHOD": method, "CURRICULUM": "paper", "CANDIDATES": "2"}
    improve(2)
    assert "CURRICULUM=paper\n" in (out / "settings.txt").read_text()
    pool = [row["id"] for row in rows("round1/discard.jsonl")]
    assert 0 < len(pool) < len(rows("round1/prompts.jsonl")) and [row["id"] for row in rows("round2/prompts.jsonl")] == pool
    base, first = weights_hash(SHIPPED[environment["FAMILY"]]), weights_hash(out / "round1" / "model")
    before, after = (sorted((row["id"], row["p_yes"]) for row in rows(f"round{number}/sft.jsonl")) for number in (1, 2))
    assert before == sorted((row["id"], row["p_yes"]) for row in rows("round2/sft.jsonl") if row["model_hash"] == base)
    joined = {row["id"] for row in rows("round2/sft.jsonl") if row["model_hash"] == first}
    assert joined <= set(pool) and len(before) < len(after)
    assert joined == set(pool) - {row["id"] for row in rows("round2/discard.jsonl")}
    assert Tokens(out / "round2" / "scored.jsonl").metadata["model_hash"] == first
    settings = json.loads((out / "round2" / "model" / "training" / "settings.json").read_text())
    assert settings["model_hash"] == first and settings.get("reference_hash") == (base if method == "dpo" else None)
    summary = [json.loads(line) for line in (out / "summary.jsonl").read_text().splitlines()]
    assert summary[2]["recovered"] == len(joined) and summary[2]["n_sft"] == len(after)

    shutil.rmtree(out / "round2" / "model")  # killed while it trained
    made = (out / "summary.jsonl").read_bytes()
    improve(2)
    assert (out / "summary.jsonl").read_bytes() == made
    answers = [row | {"p_yes": 0.9} for row in rows("round2/scored.jsonl")]
    write_rows(out / "round2" / "scored.jsonl", answers)  # as if all had been accepted
    done = improve(3)
    assert "nothing is left to be drawn again" in done.stdout and not (out / "round3").exists()
    assert done.stdout.splitlines()[-1] == str(out / "report.html")


def test_another_run_in_the_same_directory_is_refused(loop):
    environment, out, _ = loop
    before = sorted(out.rglob("*"))
    done = spawn(ROOT / "self_improve.sh", env=environment | {"METHOD": "dpo"}, ok=False)
    assert done.returncode == 2 and "holds another run" in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(out.rglob("*")) == before


# A python that takes locks, makes what --out names, and as gate.py says what $CODES has for so many files of --after.
STAND_IN = """#!/bin/bash
[[ $1 == -c ]] && exec {python} "$@"
echo "$*" >> {directory}/work
while (( $# )); do
  case $1 in
    */gate.py) gate=1 ;;
    --after) [[ $2 =~ round([0-9]+) ]]; n=0; while [[ $2 != --* ]]; do n=$((n + 1)); shift; done ;;
    --out) out=$2 ;;
    */make_pairs.py) made=/discard.jsonl ;;
  esac
  shift
done
if [[ -n ${gate-} ]]; then
  IFS=/ read -ra rounds <<< "$CODES"
  codes=(${rounds[BASH_REMATCH[1] - 1]-$CODES})
  exit "${codes[n - 1]}"
fi
[[ -z ${out-} ]] || { mkdir -p "${out%/*}"; touch "$out${made-}"; }
"""


def stand_in(tmp_path):
    """Variables of a loop whose steps only make what they write, and where its calls are written down."""
    tmp_path.mkdir(exist_ok=True)
    (python := tmp_path / "python").write_text(
        STAND_IN.replace("{python}", sys.executable).replace("{directory}", str(tmp_path))
    )
    python.chmod(0o755)
    files = {"PYTHON": str(python), "MODEL": "m", "PROMPTS": "p.txt", "EVAL_PROMPTS": "e.txt", "OUT": str(tmp_path / "run")}
    return os.environ | files | {"ROUNDS": "2", "CODES": "0"}, tmp_path / "work"


@pytest.mark.parametrize("curriculum", ["rounds", "paper", "none"])
def test_the_pool_is_of_the_threshold_that_the_data_are_of(tmp_path, curriculum):
    """Else a prompt whose best picture lies between the two is discarded by one step and never drawn again by the other."""
    for expected, flags in ((None, "--per-prompt 4"), ("0.7", "--threshold 0.7 --per-prompt 4"), ("0.8", "--threshold=0.8")):
        environment, log = stand_in(tmp_path / str(expected))
        spawn(ROOT / "self_improve.sh", env=environment | {"CURRICULUM": curriculum, "PAIRS_FLAGS": flags})
        steps = [step.removeprefix(f"{ROOT}/") for step in log.read_text().splitlines()]
        drawn = [step for step in steps if step.startswith("curriculum.py")]
        assert len(drawn) == 2 and all(re.findall(r"--threshold (\S+)", step) == [expected] * bool(expected) for step in drawn)
        assert sum(step.startswith("make_pairs.py") and step.endswith(flags) for step in steps) == 2
        assert ("--only-discarded" in drawn[1], "--no-replay" in drawn[1]) == (curriculum == "paper", curriculum == "none")


def test_what_was_refused_at_once_does_not_occupy_out(tmp_path):
    environment, log = stand_in(tmp_path)

    def loop_of(**changed):
        return spawn(ROOT / "self_improve.sh", env=environment | {"ROUNDS": "0"} | changed, ok=False)

    done = loop_of(QUESTION="Is it good?")
    assert done.returncode == 2 and done.stderr == "QUESTION must hold {prompt}, found Is it good?\n" and not log.exists()
    done = loop_of(PAIRS_FLAGS="--leave-out spatial")
    assert done.returncode == 2 and 'set CURRICULUM_FLAGS="--leave-out ..."' in done.stderr and not log.exists()
    (refusing := tmp_path / "refusing").write_text(f'#!/bin/bash\n[[ $1 == -c ]] && exec {sys.executable} "$@"\nexit 2\n')
    refusing.chmod(0o755)
    assert loop_of(PYTHON=str(refusing), ANSWER="score").returncode == 2 and (tmp_path / "run" / "settings.txt").exists()
    assert loop_of().returncode == 0
    done = loop_of(ANSWER="score")
    assert done.returncode == 2 and "holds another run" in done.stderr


def test_an_unknown_method_is_refused():
    done = spawn(ROOT / "self_improve.sh", env=os.environ | {"METHOD": "ppo"}, ok=False)
    assert done.returncode == 2 and "METHOD is sft, dpo or sft+dpo, found ppo" in done.stderr


def test_an_unknown_curriculum_and_one_that_the_paper_does_not_have_are_refused():
    done = spawn(ROOT / "self_improve.sh", env=os.environ | {"CURRICULUM": "epochs"}, ok=False)
    assert done.returncode == 2 and "CURRICULUM is rounds, paper or none, found epochs" in done.stderr
    done = spawn(ROOT / "self_improve.sh", env=os.environ | {"CURRICULUM": "paper", "METHOD": "sft+dpo"}, ok=False)
    assert done.returncode == 2 and "CURRICULUM=paper trains by METHOD sft or dpo" in done.stderr


def test_an_unknown_family_is_refused():
    done = spawn(ROOT / "self_improve.sh", env=os.environ | {"FAMILY": "llava"}, ok=False)
    assert done.returncode == 2 and "FAMILY is janus, showo or tar, found llava" in done.stderr


NUMBERS = ("ROUNDS", "NPROC", "SEED", "CANDIDATES", "EVAL_CANDIDATES", "EVAL_LOOKS")


@pytest.mark.parametrize("value", ["1.5", "abc", "-1", "08", "1e3", " 1", "PATH", "a[$(touch hurt)]", "99999999999999999999"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_none_is_refused_before_the_work(tmp_path, name, value):
    done = spawn(ROOT / "self_improve.sh", env=os.environ | {"OUT": str(tmp_path / "run"), name: value}, ok=False)
    assert done.returncode == 2 and done.stderr.startswith(f"{name} is a whole number") and value in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "run").exists() and not (ROOT / "hurt").exists()


def test_no_process_and_no_picture_are_refused(tmp_path):
    for name in ("NPROC", "CANDIDATES", "EVAL_CANDIDATES"):
        done = spawn(ROOT / "self_improve.sh", env=os.environ | {"OUT": str(tmp_path / "run"), name: "0"}, ok=False)
        assert done.returncode == 2 and f"{name} is a whole number of at least 1, found 0" in done.stderr


def start_in(directory, **environment):
    """The loop, by a python that only takes locks: whatever it gets to, it does no work."""
    python = directory / "python"
    python.write_text(
        f'#!/bin/bash\n[[ $1 == -c ]] && exec {sys.executable} "$@"\necho "at work: $*" >> {directory}/work\nexit 1\n'
    )
    python.chmod(0o755)
    settings = os.environ | {"PYTHON": str(python)} | environment
    return subprocess.run(
        [ROOT / "self_improve.sh"], env=settings, cwd=directory, capture_output=True, text=True, timeout=HANGS_S
    )


IN_OUT = {
    "best is a directory": lambda out: (out / "best" / "thesis").mkdir(parents=True),
    "best is a file": lambda out: (out / "best").write_text("mine"),
    "best is a link of another's": lambda out: (out / "best").symlink_to("/etc"),
    "best is a dead link of another's": lambda out: (out / "best").symlink_to("nowhere"),
    "a round is a file": lambda out: (out / "round2").write_text("mine"),
    "a round is a link to nowhere": lambda out: (out / "round0").symlink_to("nowhere"),
    "a report of something else": lambda out: (out / "report.html").write_text("mine"),
    "a summary of something else": lambda out: (out / "summary.jsonl").write_text("mine"),
    "the lock is a directory": lambda out: (out / "loop.lock").mkdir(),
}


@pytest.mark.parametrize("what", IN_OUT)
def test_what_is_in_the_way_in_out_is_refused_before_the_work(tmp_path, what):
    out = tmp_path / "run"
    out.mkdir()
    IN_OUT[what](out)
    before = sorted(out.rglob("*"))
    done = start_in(tmp_path, OUT=str(out))
    assert done.returncode == 2 and str(out) in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert sorted(out.rglob("*")) == before and not (tmp_path / "work").exists()


def test_an_out_that_is_no_directory_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link", "file/below"):
        done = start_in(tmp_path, OUT=name)
        assert done.returncode == 2 and name in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "work").exists()


def test_an_out_and_prompts_that_look_like_flags_are_paths(tmp_path):
    done = start_in(tmp_path, OUT="-dash", PROMPTS="-p.txt", EVAL_PROMPTS="-e.txt", MODEL="m")
    assert done.returncode == 1 and (tmp_path / "-dash" / "settings.txt").is_file(), done.stderr
    assert "--prompts ./-e.txt --out ./-dash/round0/heldout.jsonl" in (tmp_path / "work").read_text()


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:a", "cpu:0", "cuda:0 --batch 1", "--help", "a[$(touch hurt)]"])
def test_a_device_that_is_none_is_refused_before_the_work(tmp_path, device):
    done = start_in(tmp_path, OUT=str(tmp_path / "run"), DEVICE=device)
    assert done.returncode == 2 and done.stderr == f"DEVICE is cpu, cuda or cuda:N, found {device}\n"
    assert not (tmp_path / "run").exists() and not (tmp_path / "work").exists()


def test_the_device_is_each_steps_own_choice_unless_it_is_named_and_the_demos_is_the_cpu(tmp_path):
    """And it is no setting of the run, which may go on on another."""
    real = {"MODEL": "m", "PROMPTS": "p.txt", "EVAL_PROMPTS": "e.txt"}
    cases = ((real, None), (real | {"DEVICE": "cuda:1"}, "cuda:1"), (real | {"DEVICE": "cpu"}, "cpu"))
    for settings, wanted in (*cases, ({}, "cpu"), ({"DEVICE": "cuda"}, "cuda")):
        start_in(tmp_path, OUT=str(tmp_path / ("real" if "MODEL" in settings else "demo")), **settings)
        (line,) = (tmp_path / "work").read_text().splitlines()
        assert re.findall(r"--device (\S+)", line) == ([wanted] if wanted else [])
        (tmp_path / "work").unlink()


def test_every_step_that_takes_a_device_is_given_it(loop):
    commands = [line for line in loop[2].splitlines() if line.startswith("$ ")]
    for line in commands:
        assert ("--device cpu" in line) == any(f"/{name}.py " in line for name in ("score", "sft", "dpo")), line
    assert len(commands) > 10 and '"$OUT" $device' in (ROOT / "self_improve.sh").read_text()  # the page, which prints no line


def test_a_second_loop_is_refused_and_settings_are_as_they_were(tmp_path):
    out = tmp_path / "run"
    start_in(tmp_path, OUT=str(out))
    (tmp_path / "work").unlink()
    settings = (out / "settings.txt").stat()
    assert not list(out.glob(".settings*"))
    with open(out / "loop.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = start_in(tmp_path, OUT=str(out))
    assert done.returncode == 2 and done.stderr == f"OUT={out}: another loop is at work here\n"
    assert (out / "settings.txt").stat() == settings and not (tmp_path / "work").exists()


# GATE, EVAL_LOOKS, gate.py's words by the look (of all rounds, or A/B of each) -> exit code, how many files it was given, best
LOOKS = {
    "more pictures decide": ("stop", "3", "4 0", 0, [1, 2, 1, 2], "round2/model"),
    "more pictures tell that it is bad": ("stop", "3", "4 4 3", 3, [1, 2, 3], None),
    "undecided to the end": ("stop", "3", "4 4 4", 0, [1, 2, 3] * 2, None),
    "undecided, and then bad": ("stop", "1", "4/3", 3, [1, 1], None),
    "good, and then bad": ("stop", "3", "0/3", 3, [1, 1], "round1/model"),
    "two looks are enough": ("strict", "2", "4 4 0", 4, [1, 2], None),
    "not looked at again": ("warn", "3", "4 0", 0, [1, 1], None),
}


@pytest.mark.parametrize("what", LOOKS)
def test_an_undecided_round_is_looked_at_again_with_more_pictures(tmp_path, what):
    gate, looks, codes, code, files, best = LOOKS[what]
    environment, log = stand_in(tmp_path)
    environment |= {"GATE": gate, "EVAL_LOOKS": looks, "CODES": codes, "SEED": "7"}
    out = tmp_path / "run"

    def given(words, flag):
        return list(itertools.takewhile(lambda word: not word.startswith("--"), words[words.index(flag) + 1 :]))

    def work():
        """Of each call of score.py that draws: what it writes, pictures a prompt, seed; and all calls of gate.py."""
        calls = [line.removeprefix(f"{ROOT}/").replace(f"{out}/", "").split() for line in log.read_text().splitlines()]
        draws = [words for words in calls if words[0] == "score.py" and "--prompts" in words]
        drawn = [[given(words, flag)[0] for flag in ("--out", "--candidates", "--seed")] for words in draws]
        return drawn, [words for words in calls if words[0] == "gate.py"]

    done = spawn(ROOT / "self_improve.sh", env=environment, ok=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("UNDECIDED: ") == {"undecided to the end": 2, "undecided, and then bad": 1}.get(what, 0)
    assert (f"The last good model is {out / best if best else 'm'}. " in done.stderr) == (code != 0)
    assert ("is not shown to have made the model better or worse, and was not built upon" in done.stderr) == (code == 4)
    assert (os.readlink(out / "best") if (out / "best").is_symlink() else None) == best
    drawn, asked = work()
    rounds = files.count(1)
    wanted = [[f"round{number}/scored.jsonl", "10", str(7 + number)] for number in range(1, rounds + 1)]
    for number in range(rounds + 1):  # of the base once for all rounds
        pictures = zip(("", "-2", "-3"), "448", ("1007", "2007", "3007"), strict=True)
        wanted += [[f"round{number}/heldout{look}.jsonl", n, seed] for look, n, seed in pictures][: max(files)]
    assert sorted(drawn) == sorted(wanted)
    for flag in ("--base", "--after", "--rejudged"):
        assert [len(given(words, flag)) for words in asked] == files
    second = [words for words in asked if "round2/heldout.jsonl" in words]
    assert [len(given(words, "--last")) for words in second] == [max(files)] * len(second)
    assert [len(given(words, "--last-rejudged")) for words in second] == files[: len(second)]
    if what == "undecided to the end":  # typed again, it does no more than ask
        spawn(ROOT / "self_improve.sh", env=environment)
        assert work() == (drawn, asked * 2)


@pytest.mark.thorough
def test_a_bad_round_is_not_built_upon(loop, tmp_path):
    """A learning rate that ruins the model: the loop stops after the first round, says so, and makes the page."""
    environment = loop[0] | {"OUT": str(tmp_path / "run"), "METHOD": "sft", "GATE": "stop"}
    environment |= {"SFT_FLAGS": "--lr 0.03 --epochs 4 --batch-size 8"}
    done = subprocess.run([ROOT / "self_improve.sh"], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "round1/model is a bad round: " in done.stderr and "STOPPED: round 1" in done.stderr
    assert f"The last good model is {SHIPPED[environment['FAMILY']]}" in done.stderr
    assert not (tmp_path / "run" / "round2").exists() and not (tmp_path / "run" / "best").exists()
    assert done.stdout.splitlines()[-1] == str(tmp_path / "run" / "report.html")
    assert json.loads((tmp_path / "run" / "round1" / "gate.json").read_text())["good"] is False

"""experiments/paper.sh and paper.py: the paper's numbers, what they imply, what a run costs, and a run at tiny size."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import HANGS_S, ROOT, run, spawn

sys.path.insert(0, str(ROOT / "experiments"))
import paper

from common.answers import QUESTION
from common.records import LABELS, SCORED, Tokens, read_rows
from common.writing import write_rows

SCRIPT = ROOT / "experiments" / "paper.sh"


# ---------------------------------------------------------------------------------------------------------------------
# Theirs


def test_every_printed_non_is_the_share_of_its_count():
    """Of 300 pictures, but of 295 in color after training, where hardly one is a share of 300: so no figure is mistyped."""
    for method, found in paper.JANUS.items():
        for cell, (count, total), name in zip(found[:6], paper.counts(method), paper.CATEGORIES, strict=True):
            assert round(100 * count / total, 2) == cell.non, (method, name)
            assert total == (295 if name == "color" and method not in ("base", "T2I-R1") else 300)
    for method, (cell,) in paper.SHOWO.items():
        assert abs(100 * round(cell.non * 18) / 1800 - cell.non) < 0.011, method


def test_every_overall_figure_is_the_mean_of_its_categories():
    for method, found in paper.JANUS.items():
        for column in (0, 2):
            assert np.mean([cell[column] for cell in found[:6]]) == pytest.approx(found[6][column], abs=0.0051), method
    for method in ("base", "SFT", "DPO", "C-DPO"):
        assert np.mean([cell.und for cell in paper.JANUS[method][:6]]) == pytest.approx(paper.JANUS[method][6].und, abs=0.01)


def test_counts_and_statistics_by_hand():
    totals = {name: sum(count for count, _ in paper.counts(name)) for name in paper.JANUS}
    assert totals == {"base": 472, "SFT": 305, "C-SFT": 304, "DPO": 466, "C-DPO": 463, "T2I-R1": 330}
    assert paper.smallest_fraction(63.64) == (7, 11) and paper.smallest_fraction(75) == (3, 4)
    assert paper.z_score((30, 100), (10, 100)) == pytest.approx(0.2 / (0.2 * 0.8 * 2 / 100) ** 0.5)
    assert paper.difference_error(50, 50, 100) == pytest.approx(100 * (2 * 0.25 / 100) ** 0.5)
    assert paper.interval(472, 1800) == "26.22 [24.24, 28.30] (472/1800)" and paper.interval(0, 0) == "-"


def test_the_docs_show_what_the_command_prints():
    printed = run("paper.py", "--theirs").stdout
    table, _, rest = printed.partition("\n\n")
    text = (ROOT / "docs" / "results.md").read_text()
    assert f"<!-- paper -->\n{table}\n<!-- end -->" in text
    (found,) = re.findall(r"^## The paper, re-read\n(.*?)^## ", text, flags=re.M | re.S)
    low, high, middle = re.findall(r"at least (\d+) to (\d+) pictures a cell, (\d+) in the median", rest)[0]
    assert f"at least {low} to {high} pictures a cell, {middle} in the median" in found
    for name, change, error in re.findall(r"GenEval, (.*?): [+-]([\d.]+) points, standard error ([\d.]+)", rest):
        assert change in found and error in found, name


@pytest.mark.parametrize(
    ("model", "color", "overall"),
    [
        ("deepseek-community/Janus-Pro-7B", "27.33", "26.22"),
        ("showlab/show-o-512x512", "-", "0.95"),
        ("csuhan/Tar-1.5B", "-", "-"),
        (str(ROOT / "shapes" / "showo"), "-", "0.95"),
        (str(ROOT / "shapes" / "base"), "27.33", "26.22"),
    ],
)
def test_theirs_stand_beside_ours_where_the_paper_has_that_family(monkeypatch, model, color, overall):
    ours = paper.Ours({}, Counter(), Counter({("color", "of"): 4, ("overall", "of"): 4}))
    base = SimpleNamespace(provenance={"model": model, "answer": "yes-no"})
    monkeypatch.setattr(paper, "read_ours", lambda *given: ({"base": ours}, [], base))
    text = paper.table(Path(), None, ["sft"])
    found = table_of(text)
    assert (found["base", "color"][4], found["base", "overall"][4]) == (color, overall)
    assert ("Theirs: none of this model" in text) == (overall == "-")


# ---------------------------------------------------------------------------------------------------------------------
# What it costs


def test_the_rates_are_those_of_the_docs():
    floors = (ROOT / "benchmarks" / "README.md").read_text()
    small, large = paper.MACHINES["1B"], paper.MACHINES["7B"]
    draw = f"| batch 128 | {small.draw[0]} | {large.draw[0]} | 65 %: {small.draw[1]} and {large.draw[1]} |"
    assert draw in floors
    assert f"| judging three questions, images/s | {small.judge[0]} | {large.judge[0]} | 50 % |" in floors
    assert f"| training, images/s (DPO: two a pair) | {small.train[0]} | {large.train[0]} | 45 % |" in floors
    for machine in (small, large):
        assert machine.judge[1] == machine.judge[0] / 2 and machine.train[1] == pytest.approx(0.45 * machine.train[0])
    real = (ROOT / "docs" / "real-models.md").read_text()
    for words in (f"A saved 7B is {large.saved_gb} GB in float32", f"for a moment twice: {large.state_gb // 2} GB for 7B"):
        assert words in real


def test_what_a_run_does_by_hand():
    """42 training prompts, 10 held out, 2 pictures each: the paper's yield is 22 of 42, and 10 more by replay."""
    todo = paper.work(42, 10, 2, (20, 30))
    assert todo.drawn == 42 * 2 + 7 * 10 + 2 * 20 * 2 and todo.judged == todo.drawn + 6 * 10
    few = 20 * 22 + 10 * 22 + 10 * 32 + 2 * (30 * 22 + 15 * 22 + 15 * 32)
    assert todo.trained == (few, round(20 * (2 * 42 * 2 * (1 - 0.2622) + 5) + 2 * 30 * 2 * 42))
    machine = paper.Machine((10, 5), (100, 50), (20, 10), 1, 1)
    judged = 1 / 100 + 32 / 576 / 10
    assert paper.hours(machine, paper.Work(3600, 7200, (0, 0)), 0, 720) == pytest.approx(0.1 + 2 * judged + 0.01)


def plan(python, tmp_path, **environment):
    """paper.sh by a python that does the plan alone; the first thing that a loop asks for is written down, and fails."""
    only = tmp_path / "python"
    ready = f'[[ $* == *--plan* || $1 == -c ]] && exec {python} "$@"'  # -c: the loop's lock
    only.write_text(f'#!/bin/bash\n{ready}\necho "$*" >> {tmp_path}/work\nexit 1\n')
    only.chmod(0o755)
    for name in ("train", "val"):
        (tmp_path / f"color_{name}.txt").write_text("".join(f"a {name} picture of {n} cubes\n" for n in range(20)))
    files = {"PROMPTS": tmp_path / "color_train.txt", "EVAL_PROMPTS": tmp_path / "color_val.txt", "OUT": tmp_path / "run"}
    settings = {"PYTHON": only, "MODEL": ROOT / "shapes" / "base"} | files | environment
    return spawn(SCRIPT, env=os.environ | {key: str(value) for key, value in settings.items()}, ok=False)


def test_it_says_what_it_will_cost_before_the_work(warm, tmp_path):
    done = plan(warm, tmp_path)
    assert "prompts   20 to train on, 10 pictures each; 20 held out, one picture each\n" in done.stdout
    assert "hours     not known" in done.stdout
    (asked,) = (tmp_path / "work").read_text().splitlines()  # by the loop, of which no variable is set but these
    assert "score.py" in asked and " --candidates 1 --guidance 5 --temperature 1 --seed 1000 --answer reply --readouts" in asked
    kept = (tmp_path / "run" / "sft" / "settings.txt").read_text().splitlines()
    assert {"CANDIDATES=10", "PAIRS_FLAGS=--per-prompt\\ 0\\ --force", "QUESTION=''", "ANSWER=reply"} < {*kept}, kept
    flags = ("--prompts", tmp_path / "color_train.txt", "--eval-prompts", tmp_path / "color_val.txt")
    told = run("paper.py", tmp_path, "--plan", "--model", "deepseek/Janus-Pro-7B", "--processes", 2, *flags, ok=False)
    assert re.search(r"hours     [\d.]+ at the floor to [\d.]+ at the targets, on 2 H200", told.stdout)
    assert "disk      323.60 GB of pictures, models and a training's state together" in told.stdout
    todo = paper.work(4200, 1800, 10, (20, 30))
    low, high = (paper.hours(paper.MACHINES["7B"], todo, at, todo.trained[at]) / 8 for at in (0, 1))
    assert (
        f"{todo.drawn:,} pictures, {low:.1f} h at the floor to {high:.1f} h" in (ROOT / "experiments" / "README.md").read_text()
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"MODEL": "nowhere"}, "nowhere: no such directory"),
        ({"MODEL": ROOT / "docs"}, "no config.json"),
        ({"PROMPTS": "missing_train.txt"}, "missing_train.txt: cannot be read: No such file or directory"),
        ({"EVAL_PROMPTS": "a_val.txt b_val.txt"}, "a_val.txt: cannot be read"),
        ({"SFT_EPOCHS": "5"}, "SFT_EPOCHS is an even number of at least 2, found 5"),
        ({"DPO_EPOCHS": "many"}, "DPO_EPOCHS is an even number of at least 2, found many"),
        ({"NPROC": "0"}, "at least 1"),
        ({"JUDGE": "a/b", "LABELLER": "c"}, "JUDGE is a/b and LABELLER is c: one of them"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line_before_the_work(warm, tmp_path, changed, message):
    done = plan(warm, tmp_path, **changed)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "work").exists() and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# A run


@pytest.fixture(scope="module")
def finished(warm, tmp_path_factory):
    """A run at tiny size that was stopped once and killed once: (environment, OUT, what the last start printed)."""
    directory = tmp_path_factory.mktemp("paper")
    for name, every in (("train", 40), ("heldout", 8)):
        lines = (ROOT / "shapes" / f"prompts_{name}.jsonl").read_text().splitlines()
        (directory / f"{name}.jsonl").write_text("\n".join(lines[::every]) + "\n")
    out = directory / "run"
    environment = os.environ | {"PROMPTS": str(directory / "train.jsonl"), "EVAL_PROMPTS": str(directory / "heldout.jsonl")}
    environment |= {"MODEL": "shapes/base", "OUT": str(out), "PYTHON": str(warm), "OMP_NUM_THREADS": "1", "DEVICE": "cpu"}
    environment |= {"CANDIDATES": "2", "GUIDANCE": "1", "SFT_EPOCHS": "4", "DPO_EPOCHS": "2"}
    environment |= {"QUESTION": QUESTION, "SCORE_FLAGS": "--reply-tokens 2"}  # this model's replies begin with yes or no
    environment |= {f"{name}_FLAGS": "--lr 3e-4 --batch-size 8" for name in ("SFT", "DPO")}
    environment |= {"LABELLER": f"{warm} shapes/world.py label"}

    def start_until(path, stop):
        with open(directory / "log", "a") as log:
            process = subprocess.Popen([SCRIPT], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
            while not path.exists():
                assert process.poll() is None, (directory / "log").read_text()[-2000:]
                time.sleep(0.02)
            stop(process)
            return process.wait(timeout=HANGS_S)

    assert start_until(out / "sft" / "round1" / "scored.jsonl", lambda process: process.terminate()) == 143
    assert not (out / "sft" / "round1" / "model").exists() and not (out / "c-sft").exists()
    killed = start_until(out / "dpo" / "round1" / "pairs.jsonl", lambda process: os.killpg(process.pid, signal.SIGKILL))
    assert killed == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for name in ("sft", "c-sft") for path in (out / name).rglob("*.safetensors")}
    done = spawn(SCRIPT, env=environment)
    assert len(before) > 10 and all(path.stat().st_mtime_ns == before[path] for path in before)  # nothing was made twice
    return environment, out, done.stdout


def rows_of(path):
    return {(row["id"], row["candidate"]): row for _, row in read_rows(path, SCORED)}


def table_of(text):
    """(method, category) -> cells."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {(cells[0], cells[1]): cells[2:] for cells in lines[2:]}


@pytest.mark.thorough
def test_the_table_at_the_end_is_what_the_files_say(finished):
    _, out, printed = finished
    text = (out / "table.md").read_text()
    assert printed.endswith(f"{text}\n{out / 'table.md'}\n")
    found = table_of(text)
    kinds = ("shape", "color", "spatial", "numeracy", "overall")
    assert [*found] == [*itertools.product(paper.METHODS.values(), kinds)]
    base = rows_of(out / "sft" / "round0" / "heldout.jsonl")
    right = {(row["id"], row["candidate"]): row["label"] for _, row in read_rows(out / "base" / "labels.jsonl", LABELS)}
    assert len(base) == 16 == len(right)
    for name, label in paper.METHODS.items():
        number = 0 if name == "base" else 2 if name.startswith("c-") else 1
        directory = out / ("sft" if name == "base" else name) / f"round{number}"
        drawn = rows_of(directory / "heldout.jsonl")
        judged = base if name == "base" else rows_of(directory / "rejudged.jsonl")
        for kind in kinds:
            own = [key for key, row in base.items() if kind in ("overall", row["category"])]
            rejected = sum(drawn[key]["p_yes"] <= 0.5 for key in own)
            disputed = [key for key in own if (base[key]["p_yes"] > 0.5) != (judged[key]["p_yes"] > 0.5)]
            won = sum((judged[key]["p_yes"] > 0.5) == right[key] for key in disputed)
            cells = found[label, kind]
            assert cells[5].endswith(f"({rejected}/{len(own)})") and cells[1] == "-"
            assert cells[3] == (f"{100 * won / len(disputed):.2f} ({won}/{len(disputed)})" if disputed else "-")
            if kind == "numeracy":
                assert cells[::2] == ["-"] * 3
            else:
                theirs = paper.JANUS[label][6 if kind == "overall" else paper.CATEGORIES.index(kind)]
                assert cells[::2] == [f"{value:.2f}" for value in theirs]
    assert "SFT: lr 0.0003, warmup 0.05, batch size 8, uncond prob 0.1; DPO: lr 0.0003, warmup 0.05, " in text
    assert "batch size 8, uncond prob 0.1, beta 0.1, nll weight 1.0" in text


@pytest.mark.thorough
def test_the_four_runs_share_the_bases_pictures_and_train_as_the_paper_says(finished):
    _, out, _ = finished
    for name in ("c-sft", "dpo", "c-dpo"):
        for file in ("round0/heldout.jsonl", "round0/heldout.safetensors", "round1/scored.safetensors", "round1/scored.jsonl"):
            assert (out / name / file).samefile(out / "sft" / file)
    for name, round_, epochs in (
        ("sft", 1, 4),
        ("c-sft", 1, 2),
        ("c-sft", 2, 2),
        ("dpo", 1, 2),
        ("c-dpo", 1, 1),
        ("c-dpo", 2, 1),
    ):
        directory = out / name / f"round{round_}"
        assert json.loads((directory / "model" / "training" / "settings.json").read_text())["epochs"] == epochs
    for path in out.glob("*/round*/*.jsonl"):
        if path.stem in ("heldout", "scored", "rejudged", "sft", "pairs"):
            assert Tokens(path).metadata["answer"] == "reply", path
    pool = {row["id"] for _, row in read_rows(out / "c-sft" / "round1" / "discard.jsonl", {})}
    drawn = {row["id"] for _, row in read_rows(out / "c-sft" / "round2" / "prompts.jsonl", {})}
    assert drawn == pool and pool
    assert not (out / "sft" / "round2").exists() and not (out / "dpo" / "round2").exists()


@pytest.mark.thorough
def test_an_evaluators_numbers_join_the_table_and_bad_ones_are_refused(finished):
    _, out, _ = finished
    labels = ("--labels", out / "base" / "labels.jsonl")
    gen = out / "c-sft" / "gen.csv"
    gen.write_text("category,score\ncolor,50\nshape,30.5\nspatial,20\nnumeracy,10\n")
    run("paper.py", out, *labels)
    text = (out / "table.md").read_text()
    found = table_of(text)
    assert (found["C-SFT", "shape"][1], found["C-SFT", "overall"][1], found["SFT", "overall"][1]) == ("30.50", "27.62", "-")
    for bad, line, message in (
        ("color,50\n", 1, "expected the header category,score"),
        ("category,score\ncolor,101\n", 2, "expected a category and a score of 0 to 100, found 'color,101'"),
        ("category,score\ncolor,nan\n", 2, "expected a category and a score"),
        ("category,score\nshape,1\ntaste,50\n", 3, "category 'taste' is not one of the run"),
        ("category,score\ncolor,50\ncolor,50\n", 3, "category 'color' twice"),
    ):
        gen.write_text(bad)
        done = run("paper.py", out, *labels, ok=False)
        assert done.returncode == 2 and f"{gen}:{line}: {message}" in done.stderr and len(done.stderr.splitlines()) == 1
    gen.unlink()
    assert (out / "table.md").read_text() == text
    run("paper.py", out, *labels)
    (out / "table.md").write_text("my notes\n")
    done = run("paper.py", out, *labels, ok=False)
    assert done.returncode == 2 and "is no table of this command" in done.stderr
    assert (out / "table.md").read_text() == "my notes\n"
    (out / "table.md").unlink()


@pytest.mark.thorough
def test_a_curriculum_with_nothing_to_replay_is_algorithm_1_and_an_unfinished_run_is_none(finished, tmp_path):
    _, out, _ = finished
    run_of = tmp_path / "run"
    subprocess.run(["cp", "-r", out, run_of], check=True)
    second = run_of / "c-sft" / "round2"
    second.rename(tmp_path / "aside")
    done = run("paper.py", run_of, ok=False)
    assert done.returncode == 2 and f"{second / 'rejudged.jsonl'}: is not there: type paper.sh again" in done.stderr
    (run_of / "c-sft" / "round1" / "discard.jsonl").write_text("")
    run("paper.py", run_of)
    text = (run_of / "table.md").read_text()
    assert "C-SFT: no prompt was left to replay, so it is SFT." in text and "Und: give JUDGE or LABELLER." in text
    found = table_of(text)
    assert all(found["C-SFT", kind][5] == found["SFT", kind][5] for kind in ("color", "overall"))


@pytest.mark.thorough
def test_the_win_rate_is_of_the_pictures_on_which_the_judges_differ(finished, tmp_path):
    """Three verdicts of SFT's judge turned round by hand: it wins where the independent judge says what it now says."""
    _, out, _ = finished
    subprocess.run(["cp", "-r", out, tmp_path / "run"], check=True)
    file = tmp_path / "run" / "sft" / "round1" / "rejudged.jsonl"
    base = rows_of(out / "sft" / "round0" / "heldout.jsonl")
    rows = [row | {"p_yes": base[row["id"], row["candidate"]]["p_yes"]} for row in rows_of(file).values()]
    for row in rows[:3]:
        row["p_yes"] = round(1 - row["p_yes"], 7)
    write_rows(file, rows)
    right = {(row["id"], row["candidate"]): row["label"] for _, row in read_rows(out / "base" / "labels.jsonl", LABELS)}
    labels = [{"id": i, "candidate": c, "label": label, "source": "a person"} for (i, c), label in right.items()]
    for number, row in enumerate(rows[:3]):  # it is right about the first alone
        for label in labels:
            if (label["id"], label["candidate"]) == (row["id"], row["candidate"]):
                label["label"] = int((row["p_yes"] > 0.5) == (number == 0))
    write_rows(tmp_path / "labels.jsonl", labels)
    run("paper.py", tmp_path / "run", "--labels", tmp_path / "labels.jsonl")
    found = table_of((tmp_path / "run" / "table.md").read_text())
    assert found["SFT", "overall"][3] == "33.33 (1/3)" and found["base", "overall"][3] == "-"
    kinds = Counter(row["category"] for row in rows[:3])
    for kind, count in kinds.items():
        assert found["SFT", kind][3].endswith(f"/{count})")


@pytest.mark.thorough
def test_an_independent_judge_is_asked_as_the_models_were(finished, tiny, tmp_path):
    """JUDGE: another model of the hub's classes. One that does not answer is refused before any training."""
    environment, out, _ = finished
    environment = environment | {"LABELLER": ""}
    done = spawn(SCRIPT, env=environment | {"JUDGE": str(tiny), "OUT": str(tmp_path)}, ok=False)
    assert done.returncode == 2 and "coverage is" in done.stderr.splitlines()[-1], done.stderr
    assert (tmp_path / "sft" / "round0").is_dir() and not (tmp_path / "sft" / "round1").exists()
    judge = out / "dpo" / "round1" / "model"
    done = spawn(SCRIPT, env=environment | {"JUDGE": str(judge)})
    (file,) = (out / "base").glob("judged-by-*.jsonl")
    header = Tokens(file).metadata
    assert (header["judge"], header["answer"]) == (str(judge), "reply")
    assert f"Und by {file.name}" in (out / "table.md").read_text() and "| base | overall | 35.21 |" in done.stdout

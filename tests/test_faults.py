"""Any number of ranks, killed anywhere, the same result: real processes, real signals, full disks, real torchrun.

Kills come at moments drawn from a seed over the time that an undisturbed run takes. Byte comparisons are of runs with one
thread a process, on one machine.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import HANGS_S, ROOT, TOTALS, run, script_path, spawn
from safetensors.torch import load_file

from common.records import SCORED, Tokens, read_rows, tokens_path
from common.records import SFT as SFT_COLUMNS

pytestmark = [
    pytest.mark.faults,
    pytest.mark.thorough,
    pytest.mark.skipif(sys.platform != "linux", reason="finds and limits processes by way of /proc"),
]

KILLED = TOTALS["kills survived"]  # by what was killed; counted where the result at the end is compared
CPU = ("--device", "cpu")
SFT = ("--epochs", 4, "--batch-size", 5, "--micro-batch", 2, "--lr", 1e-3, "--save-every", 2, *CPU)
DPO = ("--epochs", 8, "--batch-size", 5, "--micro-batch", 2, "--lr", 1e-3, "--save-every", 2, *CPU)
STATE = "model.training/state-" + "[0-9]" * 8
SCORE = ("--candidates", 6, "--guidance", 2, "--chunk", 1, *CPU)


class Runner:
    """Starts scripts in the warm Python, on any number of ranks."""

    def __init__(self, python: Path):
        self.python = python

    def start(self, script: str, *args: object, ranks: int = 1, restarts: int = 0, **environment: str) -> subprocess.Popen:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
        command = [*(launch if ranks > 1 else []), script_path(script), *args]
        run = str(random.getrandbits(60))
        fixed = {"PYTHON_EXEC": str(self.python), "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "FAULT_RUN": run}
        process = subprocess.Popen(
            [self.python, *map(str, command)],
            env=os.environ | fixed | environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        process.fault_run = run
        return process

    def finish(self, *args: object, ok: bool = True, **options) -> subprocess.CompletedProcess:
        process = self.start(*args, **options)
        try:
            stdout, stderr = process.communicate(timeout=HANGS_S)
        except subprocess.TimeoutExpired:
            kill(process)
            raise
        assert not ok or process.returncode == 0, stderr
        return subprocess.CompletedProcess(args, process.returncode, stdout, without_bars(stderr, options.get("ranks", 1)))

    def kill_until_done(self, what: str, kills: int, moments: random.Random, longest_s: float, *args: object, **options) -> str:
        """Start, kill after a random time, start again, ...; in the end let it finish. Returns what it printed then."""
        done = 0
        while done < kills:
            process = self.start(*args, **options)
            time.sleep(moments.uniform(0.1, longest_s))
            if process.poll() is not None:
                assert process.returncode == 0, process.stderr.read()
                break
            kill(process)
            done += 1
        KILLED[what] += done
        return self.finish(*args, **options).stdout


def kill(process: subprocess.Popen) -> None:
    """SIGKILL a process and, where it is torchrun, its ranks, which would live on."""
    process.kill()
    for _ in range(60):  # of a rank that torchrun was just starting the number is known a moment later
        for pid in rank_pids(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=1)
            return
    raise AssertionError("a process of the run lives on")


def rank_pids(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started for a run, in rank order."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            words = dict(word.split("=", 1) for word in (directory / "environ").read_text().split("\0") if word)
            if words.get("FAULT_RUN") == process.fault_run and "RANK" in words:
                found.append((int(words["RANK"]), int(directory.name)))
    return [pid for _, pid in sorted(found)]


def wait_for(process: subprocess.Popen, directory: Path, pattern: str) -> None:
    """Until something of that name is there; a process that ends first is a failure."""
    while not list(directory.glob(pattern)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def without_bars(text: str, ranks: int = 1) -> str:
    """stderr without progress bars; of several ranks also without torchrun's and gloo's own reports."""
    lines = [line.rsplit("\r", 1)[-1] for line in text.split("\n")]
    lines = [line for line in lines if line.strip() and not re.search(r"\d+/\d+ \[.*(step|batch|picture)", line)]
    if ranks > 1:
        lines = [
            line for line in lines if re.match(r'\w+\.py: |waiting |  File "\S*/(score|sft|dpo|train|checkpoint)\.py"', line)
        ]
    return "\n".join(lines)


def same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def curve(out: Path) -> list[list[float]]:
    """Loss and gradient norm of each step."""
    rows = [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]
    return [[row.get("loss", 0.0), row["grad_norm"]] for row in rows]


def assert_same_curve(one: Path, other: Path) -> None:
    """Equal but for the order of float32 additions.

    AdamW and clipping forgive a wrong scale of the gradients (a mean over ranks for a sum): only their norm shows it. The
    norm is compared less closely, because at steps with a steep loss rounding moves it by up to 2e-4 (the loss: 3e-6).
    """
    (one_losses, one_norms), (other_losses, other_norms) = (np.transpose(curve(out)) for out in (one, other))
    assert np.allclose(one_losses, other_losses, rtol=2e-5) and np.allclose(one_norms, other_norms, rtol=1e-3)


@pytest.fixture(scope="module")
def python(warm):
    return Runner(warm)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """36 prompts for the tiny checkpoint."""
    path = tmp_path_factory.mktemp("prompts") / "color_train.txt"
    nouns, colors, numbers = ("cube", "sphere", "cone"), ("red", "green", "blue", "yellow"), ("one", "two", "three")
    path.write_text("\n".join(f"{n} {c} {x}" for n in numbers for c in colors for x in nouns))
    return path


@pytest.fixture(scope="module")
def whole_score(python, tiny, prompts, tmp_path_factory) -> Path:
    """An undisturbed scoring on one rank."""
    out = tmp_path_factory.mktemp("whole") / "scored.jsonl"
    python.finish("score.py", "--model", tiny, "--prompts", prompts, "--out", out, *SCORE)
    return out


@pytest.fixture(scope="module")
def data(whole_score, tmp_path_factory) -> Path:
    """sft.jsonl and pairs.jsonl of the undisturbed scoring, a few rows of each."""
    middle = np.median([row["p_yes"] for _, row in read_rows(whole_score, SCORED)])
    out = tmp_path_factory.mktemp("data") / "data"
    run("make_pairs.py", "--scored", whole_score, "--out", out, "--threshold", middle, "--per-prompt", 1, "--force")
    return out


@pytest.fixture(scope="module")
def whole(python, data, tmp_path_factory):
    """Undisturbed trainings: (script, ranks) -> output directory."""
    directory, made = tmp_path_factory.mktemp("undisturbed"), {}

    def make(script: str, ranks: int) -> Path:
        if (script, ranks) not in made:
            out = directory / f"{script}-{ranks}"
            python.finish(*command(script, data, out), ranks=ranks)
            made[script, ranks] = out
        return made[script, ranks]

    return make


def command(script: str, data: Path, out: Path) -> list[object]:
    if script == "sft.py":
        return [script, "--data", data / "sft.jsonl", "--out", out, *SFT]
    return [script, "--pairs", data / "pairs.jsonl", "--out", out, *DPO]


# ---------------------------------------------------------------------------------------------------------------------
# score.py


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.sample), 4])
def test_scores_are_the_same_bytes_on_any_number_of_ranks(python, tiny, prompts, whole_score, tmp_path, ranks):
    out = tmp_path / "scored.jsonl"
    done = python.finish("score.py", "--model", tiny, "--prompts", prompts, "--out", out, *SCORE, ranks=ranks)
    assert same(out, whole_score) and same(tokens_path(out), tokens_path(whole_score))
    assert done.stdout.count("nonunified") == 1 and done.stdout.splitlines()[-1] == str(out)  # one rank speaks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scored.jsonl", "scored.safetensors"]


def test_a_rank_without_work_is_fine(python, tiny, tmp_path):
    (tmp_path / "two.txt").write_text("a red cube\na green cone\n")
    out = tmp_path / "scored.jsonl"
    python.finish("score.py", "--model", tiny, "--prompts", tmp_path / "two.txt", "--out", out, *SCORE, ranks=4)
    assert len(out.read_text().splitlines()) == 12


@pytest.mark.parametrize("ranks", [1, 2])
def test_scoring_killed_anywhere_ends_with_the_same_bytes(python, tiny, prompts, whole_score, tmp_path, ranks):
    moments = random.Random(ranks)
    for name in ("a", "b"):
        out = tmp_path / name / "scored.jsonl"
        out.parent.mkdir()
        score = ("score.py", "--model", tiny, "--prompts", prompts, "--out", out, *SCORE)
        python.kill_until_done("score", 4, moments, 0.8 * ranks, *score, ranks=ranks)
        assert same(out, whole_score) and same(tokens_path(out), tokens_path(whole_score))
        assert sorted(path.name for path in out.parent.iterdir()) == ["scored.jsonl", "scored.safetensors"]


def test_torn_flipped_and_foreign_chunks_are_never_used(python, tiny, prompts, whole_score, tmp_path):
    out = tmp_path / "scored.jsonl"
    score = ("score.py", "--model", tiny, "--prompts", prompts, "--out", out, *SCORE)
    chunks = tmp_path / "scored.jsonl.chunks"
    process = python.start(*score)
    while len(list(chunks.glob("0*.safetensors"))) < 8 and process.poll() is None:
        time.sleep(0.005)
    kill(process)
    assert chunks.is_dir()
    rows, tensors = sorted(chunks.glob("0*.jsonl")), sorted(chunks.glob("0*.safetensors"))
    rows[0].write_bytes(rows[0].read_bytes()[:-40])  # torn
    rows[1].write_text(rows[1].read_text().replace('"p_yes": 0.', '"p_yes": 0.1', 1))  # changed
    flipped = bytearray(tensors[2].read_bytes())
    flipped[-1] ^= 1
    tensors[2].write_bytes(flipped)  # a bit flipped
    shutil.copy(rows[4], rows[3]), shutil.copy(tensors[4], tensors[3])  # another chunk's
    tensors[5].write_bytes(tensors[5].read_bytes()[:100])
    rows[6].unlink()
    done = python.finish(*score)
    assert "5 damaged and made again" in done.stdout
    assert same(out, whole_score) and same(tokens_path(out), tokens_path(whole_score))


def test_chunks_of_another_run_are_refused_and_restart_replaces_them(python, tiny, prompts, whole_score, tmp_path):
    out = tmp_path / "scored.jsonl"
    score = ["score.py", "--model", tiny, "--prompts", prompts, "--out", out, *SCORE]
    process = python.start(*score, "--seed", 5)
    while not list((tmp_path / "scored.jsonl.chunks").glob("0*.safetensors")):
        time.sleep(0.005)
    kill(process)
    done = python.finish(*score, ok=False)
    assert done.returncode == 2 and "seed was '5', now '0'" in done.stderr and len(done.stderr.splitlines()) == 1
    python.finish(*score, "--restart")
    assert same(out, whole_score) and same(tokens_path(out), tokens_path(whole_score))


def test_two_processes_on_one_output_do_the_work_once(python, tiny, prompts, whole_score, tmp_path):
    out = tmp_path / "scored.jsonl"
    score = ("score.py", "--model", tiny, "--prompts", prompts, "--out", out, *SCORE)
    processes = [python.start(*score) for _ in range(2)]
    told = [process.communicate(timeout=HANGS_S) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("waiting" in stderr for _, stderr in told) == 1
    assert sum("already scored" in stdout for stdout, _ in told) == 1
    assert same(out, whole_score)


# ---------------------------------------------------------------------------------------------------------------------
# Two at once, 50 times


TWICE = {
    "curriculum.py": ("--prompts", "PROMPTS", "--out", "OUT/new/prompts.jsonl"),
    "make_pairs.py": ("--scored", "SCORED", "--out", "OUT/new/data", "--threshold", "MIDDLE", "--force"),
    "score.py": ("--model", "TINY", "--prompts", "PROMPTS", "--out", "OUT/new/scored.jsonl", "--candidates", 1, "--chunk", 18,
                 *CPU),
}  # fmt: skip


@pytest.mark.parametrize("script", TWICE)
def test_two_processes_on_one_output_never_disturb_each_other(python, tiny, prompts, whole_score, tmp_path, script):
    middle = np.median([row["p_yes"] for _, row in read_rows(whole_score, SCORED)])
    known = {"PROMPTS": prompts, "SCORED": whole_score, "MIDDLE": middle, "TINY": tiny}
    results = set()
    for number in range(5 if script == "score.py" else 50):  # a model is loaded; its chunks alone: 50 times, below
        out = tmp_path / str(number)
        command = [str(known.get(word, word)).replace("OUT", str(out)) for word in TWICE[script]]
        processes = [python.start(script, *command) for _ in range(2)]
        told = [process.communicate(timeout=HANGS_S) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], told
        files = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        assert not [name for name in files if name.endswith((".tmp", "lock"))]
        results.add(tuple(sorted(files.items())))
        shutil.rmtree(out)
    assert len(results) == 1


FEW_CHUNKS = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import numpy as np
from common.chunks import Chunks
from common.ranks import Ranks
header = {{"kind": "scored", "answer": "yes-no", "work": "0123456789abcdef", "model": "m"}}
header |= {{"codebook_size": "8", "image_tokens": "4"}}
work = [{{"id": str(i), "prompt": "p", "category": "c", "candidate": 0, "foil": "f"}} for i in range(3)]
answers = {{"p_yes": 0.5, "coverage": 1.0, "p_yes_foil": 0.5}}
chunks = Chunks(Path(sys.argv[1]), work, 1, header, Ranks())
chunks.run(lambda rows, advance: ([row | answers for row in rows], np.ones((len(rows), 4), int)), False, 1, 8)
"""


def test_two_processes_on_the_same_few_chunks_never_disturb_each_other(python, tmp_path):
    script, results = tmp_path / "few_chunks.py", set()
    script.write_text(FEW_CHUNKS.format(root=str(ROOT)))
    for number in range(50):
        out = tmp_path / str(number) / "scored.jsonl"
        processes = [python.start(str(script), out) for _ in range(2)]
        told = [process.communicate(timeout=HANGS_S) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], told
        results.add(tuple((path.name, path.read_bytes()) for path in sorted(out.parent.iterdir())))
    assert len(results) == 1 and [name for name, _ in results.pop()] == ["scored.jsonl", "scored.safetensors"]


def test_two_makers_of_other_pairs_do_not_mix_them(python, whole_score, tmp_path):
    """One is refused: it finds the other's, whoever was first."""
    middle = np.median([row["p_yes"] for _, row in read_rows(whole_score, SCORED)])
    for number in range(10):
        out = tmp_path / str(number)
        fixed = ("--scored", whole_score, "--out", out, "--threshold", middle, "--force", "--per-prompt")
        processes = [python.start("make_pairs.py", *fixed, n) for n in (1, 2)]
        told = [process.communicate(timeout=HANGS_S)[1] for process in processes]
        assert sorted(process.returncode for process in processes) == [0, 2], told
        assert "holds another run" in "".join(told)
        wanted = 1 + [process.returncode for process in processes].index(0)
        assert Tokens(out / "sft.jsonl").metadata["per_prompt"] == str(wanted)
        rows = Counter(row["id"] for _, row in read_rows(out / "sft.jsonl", SFT_COLUMNS))
        assert max(rows.values()) == wanted


CONTAINER = """
import os, sys
sys.path.insert(0, {root!r})
from common.writing import whole_file
assert os.getpid() == 1
for number in range(50):
    with whole_file({path!r}, "w") as file:
        for _ in range(20):
            file.write({letter!r} * 10_000)
            file.flush()
    with open({path!r}) as file:
        found = file.read()
    assert found in ("a" * 200_000, "b" * 200_000), (len(found), set(found))
"""


def test_two_containers_whose_processes_have_the_same_id_do_not_share_a_temporary_file(tmp_path):
    unshare = next(
        (command for flags in ((), ("--user", "--map-root-user")) if own_processes(command := ["unshare", *flags])), None
    )
    if unshare is None:
        pytest.skip("this user may not make a space of process ids (unshare --pid), as a container has one")
    code = [CONTAINER.format(root=str(ROOT), path=str(tmp_path / "file"), letter=letter) for letter in "ab"]
    command = [*unshare, "--pid", "--fork", sys.executable, "-c"]
    processes = [subprocess.Popen([*command, one], stderr=subprocess.PIPE, text=True) for one in code]
    told = [process.communicate(timeout=HANGS_S)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def own_processes(unshare: list[str]) -> bool:
    try:
        return subprocess.run([*unshare, "--pid", "--fork", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Training on several ranks


@pytest.mark.parametrize("script", ["sft.py", "dpo.py"])
def test_the_loss_curve_and_the_weights_do_not_depend_on_the_ranks(whole, script):
    one = whole(script, 1)
    weights = load_file(one / "model.safetensors")
    for ranks in (2, 4):
        other = whole(script, ranks)
        assert_same_curve(other, one)
        for name, tensor in load_file(other / "model.safetensors").items():
            assert np.allclose(tensor, weights[name], atol=2e-5), name


@pytest.mark.parametrize(
    "flags",
    [("--gradient-checkpointing", "--max-grad-norm", 1e9), ("--train", "drawing"), ("--replicate", 2), ("--lora-rank", 2)],
)
def test_variants_train_the_same_on_four_ranks_as_on_one(python, data, tmp_path, flags):
    alone = () if "--replicate" in flags else flags
    for ranks, extra in ((1, alone), (4, flags)):
        python.finish(*command("dpo.py", data, tmp_path / str(ranks)), *extra, ranks=ranks)
    one, four = (load_file(tmp_path / str(ranks) / "model.safetensors") for ranks in (1, 4))
    assert_same_curve(tmp_path / "4", tmp_path / "1")
    assert all(np.allclose(four[name], one[name], atol=2e-5) for name in one)


def test_what_ranks_saved_together_plain_transformers_loads(whole, data):
    import torch
    from transformers import JanusForConditionalGeneration

    model = JanusForConditionalGeneration.from_pretrained(whole("sft.py", 2))
    saved = load_file(whole("sft.py", 2) / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items() if name in saved)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_large_models_are_saved_in_shards(policy, tmp_path, monkeypatch):
    import copy

    from families.janus import Janus
    from model import load

    monkeypatch.setattr("families.pretrained.SHARD_BYTES", 100_000)
    Janus(copy.deepcopy(policy.model), policy.processor).save(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    again = load(tmp_path / "model", device="cpu").model.state_dict()
    assert all((tensor == again[name]).all() for name, tensor in policy.model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Killed and started again


@pytest.mark.parametrize(
    ("script", "ranks"), [pytest.param("sft.py", 1, marks=pytest.mark.sample), ("sft.py", 2), ("dpo.py", 1), ("dpo.py", 2)]
)
def test_training_killed_anywhere_ends_with_the_same_bits(python, data, whole, tmp_path, script, ranks):
    reference = whole(script, ranks)
    out = tmp_path / "model"
    process = python.start(*command(script, data, out), ranks=ranks)
    wait_for(process, tmp_path, STATE)
    kill(process)
    KILLED[script] += 1
    moments = random.Random(ranks)
    last = python.kill_until_done(script, 5, moments, 1.2 * ranks, *command(script, data, out), ranks=ranks)
    assert "resumed        after step" in last or "already trained" in last  # the states were used
    assert same(out / "model.safetensors", reference / "model.safetensors")
    assert curve(out) == curve(reference)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_state_of_two_ranks_is_resumed_on_another_number(python, data, whole, tmp_path, ranks):
    out = tmp_path / "model"
    process = python.start(*command("sft.py", data, out), ranks=2)
    wait_for(process, tmp_path, STATE)
    kill(process)
    KILLED["sft.py, other ranks"] += 1
    done = python.finish(*command("sft.py", data, out), ranks=ranks)
    assert "resumed        after step" in done.stdout
    reference = whole("sft.py", 1)
    assert_same_curve(out, reference)
    weights = load_file(reference / "model.safetensors")
    assert all(np.allclose(tensor, weights[name], atol=2e-5) for name, tensor in load_file(out / "model.safetensors").items())


@pytest.mark.parametrize("script", ["score.py", "sft.py"])
def test_a_rank_killed_alone_takes_the_run_down_and_the_run_continues(
    python, tiny, prompts, whole_score, data, whole, tmp_path, script
):
    out = tmp_path / ("scored.jsonl" if script == "score.py" else "model")
    score = ["score.py", "--model", tiny, "--prompts", prompts, "--out", out, *SCORE]
    what = score if script == "score.py" else command(script, data, out)
    begun = "*.chunks/0*.safetensors" if script == "score.py" else "*.training/state-" + "[0-9]" * 8
    for victim in (1, 0):
        process = python.start(*what, ranks=2)
        before = len(list(tmp_path.glob(begun)))
        while len(list(tmp_path.glob(begun))) == before and process.poll() is None:
            time.sleep(0.005)
        os.kill(rank_pids(process)[victim], signal.SIGKILL)
        _, stderr = process.communicate(timeout=HANGS_S)  # torchrun waits 30 s for ranks that do not end
        assert process.returncode == 1 and "exitcode  : -9" in stderr
        KILLED[f"{script}, one rank"] += 1
    python.finish(*what, ranks=2)
    if script == "score.py":
        assert same(out, whole_score) and same(tokens_path(out), tokens_path(whole_score))
    else:
        assert same(out / "model.safetensors", whole(script, 2) / "model.safetensors")


@pytest.mark.parametrize("before", ["nothing", "the same run", "another run"])
def test_torchrun_restarts_killed_ranks_by_itself_even_with_restart(python, data, whole, tmp_path, before):
    out = tmp_path / "model"
    if before != "nothing":
        python.finish(*command("dpo.py", data, out), *(("--seed", 7) if before == "another run" else ()))
    process = python.start(*command("dpo.py", data, out), "--restart", ranks=2, restarts=3)
    for kills, victim in enumerate((1, 0, 1), start=1):
        wait_for(process, tmp_path, f"model.training/state-0000000[{2 * kills}-9]")
        os.kill(rank_pids(process)[victim], signal.SIGKILL)
        while len(rank_pids(process)) == 2 and process.poll() is None:
            time.sleep(0.005)
    assert not out.exists() and (tmp_path / "model.training" / "replaced").is_dir() == (before != "nothing")
    stdout, stderr = process.communicate(timeout=HANGS_S)
    assert process.returncode == 0, stderr
    assert stdout.count("resumed        after step") == 3  # --restart threw nothing away but the first time
    KILLED["dpo.py, --max-restarts"] += 3
    assert same(out / "model.safetensors", whole("dpo.py", 2) / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("script", ["score.py", "sft.py"])
def test_a_restart_that_was_killed_goes_on_without_restart(python, tiny, prompts, whole_score, data, whole, tmp_path, script):
    out = tmp_path / ("scored.jsonl" if script == "score.py" else "model")
    score = ["score.py", "--model", tiny, "--prompts", prompts, "--out", out, *SCORE]
    what = score if script == "score.py" else command(script, data, out)
    python.finish(*what, "--seed", 7)
    process = python.start(*what, "--restart")
    wait_for(process, tmp_path, "*.chunks/00000[2-9].safetensors" if script == "score.py" else STATE)
    kill(process)
    KILLED[f"{script}, --restart"] += 1
    assert not out.exists() and list(tmp_path.glob("*/replaced*"))
    assert "resumed" in python.finish(*what).stdout
    if script == "score.py":
        assert same(out, whole_score) and same(tokens_path(out), tokens_path(whole_score))
    else:
        assert same(out / "model.safetensors", whole(script, 1) / "model.safetensors")
    assert len(list(tmp_path.iterdir())) == (2 if script == "score.py" else 1)


def test_ranks_that_outlive_torchrun_are_waited_for(python, data, tmp_path):
    train = lambda out: (*command("sft.py", data, tmp_path / out), "--epochs", 12)  # long enough to be found at work
    process = python.start(*train("model"), ranks=2)
    while not (tmp_path / "model.training" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)  # torchrun alone
    done = python.finish(*train("model"), ranks=2)
    assert "waiting" in done.stderr
    python.finish(*train("undisturbed"), ranks=2)
    assert same(tmp_path / "model" / "model.safetensors", tmp_path / "undisturbed" / "model.safetensors")
    KILLED["torchrun alone"] += 1


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.sample), 2])
def test_sigterm_finishes_the_step_saves_and_exits_143(python, data, whole, tmp_path, ranks):
    out, work = tmp_path / "model", tmp_path / "model.training"
    what = [*command("sft.py", data, out), "--save-every", 0]
    process = python.start(*what, ranks=ranks)
    while not (work / "metrics.jsonl").exists() or not (work / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=HANGS_S)
    if ranks == 1:
        assert process.returncode == 143
        assert re.fullmatch(r"sft.py: stopped by SIGTERM after step \d+, whose state is saved in .*", without_bars(stderr))
    else:  # torchrun's own code, whatever its ranks say
        assert process.returncode == 1 and "stopped by SIGTERM after step" in stderr
    assert len(list(work.glob("state-" + "[0-9]" * 8))) == 1
    done = python.finish(*what, ranks=ranks)
    assert "resumed        after step" in done.stdout
    assert same(out / "model.safetensors", whole("sft.py", ranks) / "model.safetensors")


def test_what_may_not_change_is_listed_and_what_may_is_not(python, data, tmp_path):
    out = tmp_path / "model"
    process = python.start(*command("sft.py", data, out))
    wait_for(process, tmp_path, STATE)
    kill(process)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = python.finish(*command("sft.py", data, out), "--lr", 1, "--epochs", 9, ok=False)
    assert done.returncode == 2 and "epochs was 4, now 9; lr was 0.001, now 1.0" in done.stderr
    shutil.copytree(data, tmp_path / "other")
    (tmp_path / "other" / "sft.jsonl").write_text("\n".join((data / "sft.jsonl").read_text().splitlines()[:-1]))
    done = python.finish(*command("sft.py", tmp_path / "other", out), ok=False)
    assert done.returncode == 2 and "data_hash was" in done.stderr and len(done.stderr.splitlines()) == 1
    shutil.rmtree(tmp_path / "other")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    done = python.finish(*command("sft.py", data, out), "--micro-batch", 1, "--gradient-checkpointing")
    assert "resumed        after step" in done.stdout
    process = python.finish(*command("sft.py", data, out), "--restart", "--lr", 2e-3)
    assert "resumed" not in process.stdout


@pytest.mark.parametrize("damage", ["a flipped bit", "a file too few", "a file too many", "COMPLETE is cut"])
def test_a_damaged_state_is_refused(python, data, tmp_path, damage):
    out = tmp_path / "model"
    process = python.start(*command("sft.py", data, out))
    wait_for(process, tmp_path, STATE)
    kill(process)
    state = sorted(tmp_path.glob(STATE))[-1]
    tensors = next(state.glob("*.safetensors"))
    if damage == "a flipped bit":
        flipped = bytearray(tensors.read_bytes())
        flipped[-1] ^= 1
        tensors.write_bytes(flipped)
    elif damage == "a file too few":
        tensors.unlink()
    elif damage == "a file too many":
        shutil.copy(tensors, state / "shard-00009-model-00001-of-00001.safetensors")
    else:
        (state / "COMPLETE").write_bytes((state / "COMPLETE").read_bytes()[:-9])
    done = python.finish(*command("sft.py", data, out), ok=False)
    assert done.returncode == 2 and re.search(r"(not as it was written|cannot be read).*; add --restart", done.stderr)
    assert len(done.stderr.splitlines()) == 1


def test_ranks_that_read_different_files_are_refused(python, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    out = tmp_path / "model"
    stand_in = tmp_path / "python"  # rank 1 finds one row less
    stand_in.write_text(
        "#!/bin/bash\n"
        "words=()\n"
        f"for word; do [[ $RANK == 1 && $word == */data/sft.jsonl ]] && word={tmp_path}/other/sft.jsonl\n"
        'words+=("$word"); done\n'
        f'exec {python.python} "${{words[@]}}"\n'
    )
    stand_in.chmod(0o755)
    shutil.copytree(data, tmp_path / "other")
    (tmp_path / "other" / "sft.jsonl").write_text("".join((data / "sft.jsonl").read_text().splitlines(keepends=True)[:-1]))
    done = python.finish(*command("sft.py", tmp_path / "data", out), ranks=2, PYTHON_EXEC=str(stand_in), ok=False)
    assert done.returncode == 1 and "the ranks do not read the same files or arguments: data_hash was" in done.stderr
    assert not out.exists()


def test_nothing_of_a_run_is_a_pickle(python, data, tmp_path):
    process = python.start(*command("dpo.py", data, tmp_path / "model"), ranks=2)
    wait_for(process, tmp_path, STATE)
    kill(process)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and ".tmp" not in str(path)]
    assert {path.suffix for path in files if path.name not in ("COMPLETE", "lock")} == {".safetensors", ".json", ".jsonl"}
    for path in files:
        if path.suffix == ".safetensors":
            load_file(path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_non_finite_loss_names_step_and_examples_and_keeps_the_last_state(python, data, tmp_path, ranks):
    out = tmp_path / "model"
    flags = ("--lr", 1e30, "--warmup", 0, "--save-every", 1)
    done = python.finish(*command("sft.py", data, out), *flags, ranks=ranks, ok=False)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    match = re.search(r"step (\d): loss is nan; examples: (\S+?)[,;]", done.stderr)
    assert match and match[2] in (data / "sft.jsonl").read_text()
    assert not out.exists() and (tmp_path / "model.training" / f"state-{int(match[1]):08d}").is_dir()


# ---------------------------------------------------------------------------------------------------------------------
# Disks and memory


@pytest.fixture
def small_disk(tmp_path):
    """(mount(bytes), directory): a disk of a given size, where this user may make one."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: int, options: str = "") -> Path:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "none", place], check=True)
        return place

    probe = subprocess.run(["mount", "-t", "tmpfs", "none", place], capture_output=True)
    if probe.returncode:
        pytest.skip("this user may not mount a small disk; the file-size limit below is tested anyway")
    subprocess.run(["umount", place], check=True)
    yield mount
    subprocess.run(["umount", "--lazy", place], check=False)


@pytest.mark.sample
def test_a_disk_known_to_be_too_small_is_refused_before_the_work(python, tiny, prompts, data, small_disk):
    disk = small_disk(2**17)
    done = python.finish("score.py", "--model", tiny, "--prompts", prompts, "--out", disk / "s.jsonl", *SCORE, ok=False)
    assert done.returncode == 1
    assert re.search(r"No space left on device: 216 pictures.* will need 0.\d+ GB \(0.\d+ GB free\)", done.stderr), done.stderr
    done = python.finish(*command("sft.py", data, disk / "model"), ok=False)
    assert done.returncode == 1 and re.search(r"No space left.* model.* will need 0.\d+ GB \(0.\d+ GB free\)", done.stderr)
    assert len(done.stderr.splitlines()) == 1 and not (disk / "s.jsonl").exists() and not (disk / "model").exists()


@pytest.mark.parametrize("script", ["score.py", "sft.py", "dpo.py", "make_pairs.py", "curriculum.py"])
@pytest.mark.parametrize("limit", [100, 3000, 20000])
def test_a_file_that_cannot_grow_is_one_line_and_leaves_nothing_under_a_final_name(
    python, tiny, prompts, whole_score, data, tmp_path, script, limit
):
    out = tmp_path / "out"
    what = {
        "score.py": ["score.py", "--model", tiny, "--prompts", prompts, "--out", out.with_suffix(".jsonl"), *SCORE],
        "sft.py": command("sft.py", data, out),
        "dpo.py": command("dpo.py", data, out),
        "make_pairs.py": ["make_pairs.py", "--scored", whole_score, "--out", out, "--force"],
        "curriculum.py": ["curriculum.py", "--prompts", prompts, "--out", out.with_suffix(".jsonl")],
    }[script]
    done = python.finish(*what, WARM_FILE_BYTES=str(limit), ok=False)
    if done.returncode == 0:
        assert max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= limit  # small files fit
        return
    assert done.returncode == 1 and "File too large" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]
    assert not [path for path in left if path.suffix == ".tmp"]
    assert all(".chunks" in str(path) or ".training" in str(path) for path in left), left
    python.finish(*what)  # with room, the same command goes on


def test_a_disk_that_fills_up_while_states_are_written_is_one_line_and_an_earlier_result_stays(python, data, whole, small_disk):
    size = 3 * 2**20
    disk = small_disk(size)
    out = disk / "model"
    what = command("sft.py", data, out)
    process = python.start(*what)
    wait_for(process, disk, STATE)
    kill(process)
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(bytes(free - 30_000))  # room for the record, not for a state
    done = python.finish(*what, ok=False)
    assert done.returncode == 1 and "No space left on device" in done.stderr and "free)" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not out.exists()
    assert list(disk.glob("model.training/state-" + "[0-9]" * 8))
    (disk / "ballast").unlink()
    python.finish(*what)
    assert same(out / "model.safetensors", whole("sft.py", 1) / "model.safetensors")


def test_a_disk_that_cannot_be_written_is_one_line(python, tiny, prompts, whole_score, data, small_disk):
    disk = small_disk(2**20, ",ro")
    for what in (
        ["score.py", "--model", tiny, "--prompts", prompts, "--out", disk / "s.jsonl", *SCORE],
        command("sft.py", data, disk / "model"),
        command("dpo.py", data, disk / "model"),
        ["make_pairs.py", "--scored", whole_score, "--out", disk / "pairs", "--force"],
        ["curriculum.py", "--prompts", prompts, "--out", disk / "p.jsonl"],
    ):
        done = python.finish(*what, ok=False)
        assert done.returncode in (1, 2) and len(done.stderr.splitlines()) == 1, (what[0], done.stderr)
        assert "cannot be written" in done.stderr or "Read-only" in done.stderr


def test_a_run_on_a_disk_that_cannot_be_written_is_not_summarised(python, whole_score, small_disk, tmp_path):
    disk = small_disk(2**21)
    for source in (whole_score, tokens_path(whole_score)):
        (disk / "round0").mkdir(exist_ok=True)
        shutil.copy(source, disk / "round0" / f"heldout{source.suffix}")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    done = python.finish("summary.py", disk, ok=False)
    assert done.returncode in (1, 2) and len(done.stderr.splitlines()) == 1 and "Read-only" in done.stderr


def test_out_of_memory_names_the_batch_the_numbers_and_what_to_try(python, data, tmp_path):
    out = tmp_path / "model"
    many = (data / "pairs.jsonl").read_text().splitlines() * 20_000
    (tmp_path / "pairs.jsonl").write_text("\n".join(many[:20_000]))
    shutil.copy(data / "pairs.safetensors", tmp_path)
    what = [*command("dpo.py", tmp_path, out), "--batch-size", 20_000, "--micro-batch", 20_000]
    said = r"out of memory before step 0 with --micro-batch 20000 \(.* wanted; .* GB free\); try --micro-batch 10000 or --grad"
    done = python.finish(*what, WARM_MORE_BYTES=str(2**28), ok=False)
    assert done.returncode == 1 and re.search(said, done.stderr), done.stderr
    assert not out.exists()


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@pytest.fixture(scope="module")
def loop(warm, tmp_path_factory):
    """(environment for a directory, the summary of an undisturbed run of two small rounds)."""
    directory = tmp_path_factory.mktemp("faulty-loop")
    for name, every in (("train", 40), ("heldout", 16)):
        lines = (ROOT / "shapes" / f"prompts_{name}.jsonl").read_text().splitlines()
        (directory / f"{name}.jsonl").write_text("\n".join(lines[::every]) + "\n")
    settings = {
        "PROMPTS": str(directory / "train.jsonl"),
        "EVAL_PROMPTS": str(directory / "heldout.jsonl"),
        "ROUNDS": "2",
        "CANDIDATES": "3",
        "EVAL_CANDIDATES": "1",
        "METHOD": "sft+dpo",
        "GATE": "warn",  # so little training shows nothing
        "SCORE_FLAGS": "--batch 256 --chunk 8",
        "PAIRS_FLAGS": "--force",
        "SFT_FLAGS": "--lr 3e-4 --epochs 1 --batch-size 8 --save-every 1",
        "DPO_FLAGS": "--lr 1e-4 --epochs 1 --batch-size 8 --save-every 1",
        "PYTHON": str(warm),
        "OMP_NUM_THREADS": "1",
    }

    def start(out: Path, **extra: str) -> subprocess.Popen:
        environment = os.environ | settings | {"OUT": str(out)} | extra
        return subprocess.Popen(
            [ROOT / "self_improve.sh"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    whole = start(directory / "whole")
    _, stderr = whole.communicate(timeout=HANGS_S)
    assert whole.returncode == 0, stderr
    return start, directory / "whole" / "summary.jsonl"


def test_the_loop_killed_anywhere_ends_with_the_same_summary(loop, tmp_path):
    start, summary = loop
    moments = random.Random(3)
    out = tmp_path / "run"
    for kills in range(8):
        process = start(out)
        time.sleep(moments.uniform(0.5, 4.0))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)  # the shell and what it runs
        process.communicate(timeout=HANGS_S)
        KILLED["self_improve.sh"] += 1
    assert kills >= 4
    process = start(out)
    _, stderr = process.communicate(timeout=HANGS_S)
    assert process.returncode == 0, stderr
    mended = [json.loads(line) | {"model": ""} for line in (out / "summary.jsonl").read_text().splitlines()]
    assert mended == [json.loads(line) | {"model": ""} for line in summary.read_text().splitlines()]  # but for the place
    assert not [path for path in out.rglob("*") if path.suffix in (".tmp", ".chunks", ".training")]


def test_a_loop_whose_shell_alone_was_killed_can_be_started_again_at_once(loop, tmp_path):
    start, summary = loop
    out = tmp_path / "run"
    for delay in (1.0, 2.5):
        process = start(out)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)  # the step it was running lives on
        KILLED["self_improve.sh, shell alone"] += 1
    process = start(out)
    _, stderr = process.communicate(timeout=HANGS_S)
    assert process.returncode == 0, stderr
    mended = [json.loads(line) | {"model": ""} for line in (out / "summary.jsonl").read_text().splitlines()]
    assert mended == [json.loads(line) | {"model": ""} for line in summary.read_text().splitlines()]


def test_sigterm_to_the_loop_stops_its_step_and_the_loop_goes_on_later(loop, tmp_path):
    start, summary = loop
    out = tmp_path / "run"
    process = start(out)
    while not list(out.rglob("metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=HANGS_S)
    assert process.returncode == 143 and "stopped by SIGTERM after step" in stderr, stderr
    process = start(out)
    _, stderr = process.communicate(timeout=HANGS_S)
    assert process.returncode == 0, stderr
    mended = [json.loads(line) | {"model": ""} for line in (out / "summary.jsonl").read_text().splitlines()]
    assert mended == [json.loads(line) | {"model": ""} for line in summary.read_text().splitlines()]


def test_the_loop_on_two_ranks(loop, warm, tmp_path):
    start, summary = loop
    process = start(tmp_path / "run", NPROC="2", PYTHON_EXEC=str(warm))
    _, stderr = process.communicate(timeout=HANGS_S)
    assert process.returncode == 0, stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "summary.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in summary.read_text().splitlines()]
    assert len(rows) == len(expected)
    assert rows[0] | {"model": ""} == expected[0] | {"model": ""}  # scores are the same; training only up to rounding


# ---------------------------------------------------------------------------------------------------------------------
# By torchrun's real command, without the warm Python


def test_the_readmes_torchrun_line(data, whole, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    spawn(*launch, *[ROOT / "dpo.py", *command("dpo.py", data, tmp_path / "model")[1:]], env=environment)
    assert same(tmp_path / "model" / "model.safetensors", whole("dpo.py", 2) / "model.safetensors")


def test_at_least_twenty_kills_were_survived():
    wanted = {"score", "sft.py", "dpo.py", "self_improve.sh", "torchrun alone", "dpo.py, --max-restarts"}
    if not wanted <= KILLED.keys():
        pytest.skip("counts the kills of the whole file, of which only a part was run")
    assert sum(KILLED.values()) >= 20

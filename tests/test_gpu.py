"""On a GPU: it computes what a CPU computes. Skipped, and no GPU is seen, unless `make test-gpu` asks for it.

What is compared, and each tolerance with its reason, stands in benchmarks/checks.py, which benchmarks/gpu.py uses as well.
"""

import contextlib
import os
import sys

import pytest
from conftest import ROOT, spawn

sys.path.insert(0, str(ROOT / "benchmarks"))

FAMILIES = ("janus", "showo", "tar")
asked = pytest.mark.skipif(os.environ.get("GPU_TESTS") != "1", reason="asked for by `make test-gpu`")


def as_it_must_be(name, *about):
    import checks

    assert checks.misses(getattr(checks, name)(*about, "cuda")) == []


@asked
def test_recorded_steps_draw_what_eager_ones_draw():
    as_it_must_be("recorded")


@asked
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_in_float32_are_those_of_a_cpu(family):
    as_it_must_be("tokens", family)


@asked
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_float32_are_those_of_a_cpu(family):
    as_it_must_be("answers", family)


@asked
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_a_cpus_in_float32_and_nearly_those_in_bfloat16(family):
    as_it_must_be("training", family)


# Without one


def test_a_check_that_fails_says_what_and_by_how_much():
    from checks import Finding, misses

    good, bad = Finding("tokens", 1, 1, 1), Finding("log-probs", 0.25, 0, 0.1)
    assert misses([good]) == [] and misses([bad, good]) == ["log-probs: 0.25, allowed 0 to 0.1"]
    assert misses([Finding("gradient", float("nan"), 0, 1)]) == ["gradient: NaN"]


def test_the_checks_see_a_recording_that_does_nothing(monkeypatch):
    """A graph recorded on a stream of another card is empty (pytorch issue 87894): replayed, it leaves old tokens standing."""
    import checks

    from families.janus import Janus

    sample, eager, old = Janus.sample, checks.eager, []

    @contextlib.contextmanager
    def told_apart(policy):
        with eager(policy), monkeypatch.context() as patch:
            patch.setattr(Janus, "sample", sample)
            yield

    def stale(self, *flags, **more):
        old.append(sample(self, *flags, **more))
        return old[0]

    monkeypatch.setattr(checks, "eager", told_apart)
    monkeypatch.setattr(Janus, "sample", stale)
    missed = [line.partition(":")[0] for line in checks.misses(checks.recorded("cpu"))]
    assert missed == ["recorded as eager, temperature 0", "recorded as eager, temperature 1", "other seeds draw other tokens"]


def test_other_tests_see_no_gpu_whatever_the_environment_says(tmp_path):
    code = "import os, conftest; print([os.environ['CUDA_VISIBLE_DEVICES']], conftest.spawn('env', env={}).stdout)"
    environment = {"CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": f"{ROOT / 'tests'}", "PATH": os.environ["PATH"]}
    own = {key: value for key, value in os.environ.items() if key != "GPU_TESTS"}
    for more, seen in (({}, ""), ({"GPU_TESTS": "1"}, "0")):
        words = " ".join(f"{key}={value}" for key, value in (environment | more).items())  # `spawn` itself would set it
        done = spawn("sh", "-c", f'{words} {sys.executable} -c "{code}"', env=own)
        assert done.stdout.splitlines()[:1] == [f"['{seen}'] CUDA_VISIBLE_DEVICES={seen}"]


@pytest.mark.skipif(os.environ.get("GPU_TESTS") == "1", reason="is itself what `make test-gpu` runs")
def test_make_test_gpu_says_in_one_line_that_there_is_none():
    where = f"BIN={os.path.dirname(sys.executable)}"
    flags, hidden = ("--no-print-directory", "--old-file=.venv/ready"), {"CUDA_VISIBLE_DEVICES": ""}
    done = spawn("make", *flags, "test-gpu", where, env=os.environ | hidden, ok=False)
    assert done.returncode != 0 and done.stdout == ""
    assert [line for line in done.stderr.splitlines() if "***" not in line] == ["make test-gpu: torch sees no GPU here"]

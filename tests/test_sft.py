"""sft.py and common/training.py: the loss by hand, the order of the data, the schedule, and what a run leaves behind."""

import json
import math
import shutil
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run, spawn
from safetensors.torch import load_file

from common import training as train
from common.command import BadInput
from common.ranks import Ranks
from common.records import SFT, read_examples, tokens_path
from sft import sft_loss

TINY = ("--uncond-prob", 0.5, "--epochs", 2, "--batch-size", 5, "--micro-batch", 3, "--lr", 1e-3, "--device", "cpu")


@pytest.fixture(scope="module")
def data(pairs):
    """sft.jsonl, made beside pairs.jsonl."""
    return pairs.with_name("sft.jsonl")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """One finished run: (what it printed, its output directory)."""
    out = tmp_path_factory.mktemp("sft") / "model"
    return run("sft.py", "--data", data, "--out", out, *TINY), out


# The mathematics


def test_loss_is_the_sum_over_counted_tokens_of_each_picture():
    logps = torch.tensor([[-1.0, -2.0, -4.0], [-0.5, -0.25, -8.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    assert sft_loss(logps, mask).tolist() == [7.0, 0.75]


def test_loss_gradient_is_cross_entropys():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = torch.tensor([[0, 4, 2], [1, 1, 3]])
    logps = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    (ours,) = torch.autograd.grad(sft_loss(logps, torch.ones_like(logps)).sum(), logits, retain_graph=True)
    reference = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")
    assert torch.allclose(ours, torch.autograd.grad(reference, logits)[0])


# Order and schedule


def test_every_epoch_visits_every_example_once_in_a_new_order():
    steps = train.batches(n=10, batch_size=4, epochs=3, seed=0)
    assert [len(step) for step in steps] == [4, 4, 2] * 3
    epochs = [np.concatenate(steps[start : start + 3]) for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert all(np.array_equal(a, b) for a, b in zip(steps, train.batches(10, 4, 3, 0), strict=True))


def test_max_steps_cuts_the_run_short():
    assert len(train.batches(n=10, batch_size=4, epochs=3, seed=0, max_steps=5)) == 5


def test_learning_rate_rises_linearly_then_falls_as_a_cosine():
    rates = [train.learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[54] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 91)))
    assert 0 < rates[-1] < 0.001
    assert train.learning_rate(0, 1, 1.0, 0.0) == 1.0  # a run of one step learns too


def test_caption_dropout_has_its_rate_and_depends_on_seed_and_step():
    indices = np.arange(4000)
    dropped = train.dropped_captions(indices, 0.1, seed=3, step=7)
    assert dropped.mean() == pytest.approx(0.1, abs=0.02)
    assert np.array_equal(dropped, train.dropped_captions(indices, 0.1, seed=3, step=7))
    assert not np.array_equal(dropped, train.dropped_captions(indices, 0.1, seed=3, step=8))
    assert not train.dropped_captions(indices, 0.0, 3, 7).any()


def test_update_clips_to_the_norm_and_a_nan_gradient_changes_nothing():
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = train.make_optimizer({"w": weight}, weight_decay=0.0)
    weight.grad = torch.full((4, 4), 10.0)
    assert train.update(optimizer, {"w": weight}, 0.1, max_norm=1.0).item() == pytest.approx(40.0)
    assert torch.allclose(weight, torch.full((4, 4), -0.1), atol=1e-4)  # Adam's first step is the rate, signed
    before = weight.detach().clone()
    weight.grad = torch.full((4, 4), math.nan)
    assert math.isnan(train.update(optimizer, {"w": weight}, 0.1, max_norm=1.0).item())
    assert torch.equal(weight, before)


def test_norms_and_biases_are_not_decayed():
    parameters = {"matrix": torch.nn.Parameter(torch.ones(2, 2)), "norm": torch.nn.Parameter(torch.ones(2))}
    decays = {group["params"][0].dim(): group["weight_decay"] for group in train.make_optimizer(parameters, 0.1).param_groups}
    assert decays == {2: 0.1, 1: 0.0}


def test_a_non_finite_number_stops_the_run_and_names_its_examples():
    alone = Ranks()
    train.check_finite(3, {"loss": 1.0}, ["a", "b"], alone)
    with pytest.raises(train.TrainingError, match=r"step 3: grad_norm is inf; examples: a, b;"):
        train.check_finite(3, {"loss": 1.0, "grad_norm": math.inf}, ["a", "b"], alone)
    with pytest.raises(train.TrainingError, match=r"step 3: loss is nan; examples: b;"):
        train.check_finite(3, {"loss": math.nan}, ["a", "b"], alone, ["b"])


@pytest.mark.parametrize(("n", "size", "world"), [(10, 4, 1), (10, 2, 3), (5, 8, 4), (2, 1, 4), (7, 3, 2)])
def test_ranks_share_a_step_without_loss_and_run_equally_many_passes(n, size, world):
    shares = [list(train.micro_batches(n, size, SimpleNamespace(rank=rank, world=world))) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for part, counted in share for i in part[counted]) == list(range(n))
    for share in shares:
        for part, counted in share:
            assert 1 <= len(part) <= size and len(part) == len(counted)


def test_one_rank_runs_a_step_in_its_own_order():
    assert [part.tolist() for part, _ in train.micro_batches(10, 4, SimpleNamespace(rank=0, world=1))] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]


def test_torchs_random_numbers_depend_on_seed_step_and_rank_alone():
    def numbers(*place):
        train.restart_randomness(*place)
        return torch.rand(3).tolist()

    first = numbers(0, 5, 0)
    assert numbers(0, 5, 0) == first
    assert len({tuple(numbers(*place)) for place in ((0, 5, 0), (1, 5, 0), (0, 6, 0), (0, 5, 1))}) == 4


# The command


def test_the_loss_is_nats_per_token_of_the_whole_step(data, trained, policy):
    rows, tokens = read_examples(data, SFT, ("row",))
    order = train.batches(len(rows), 5, 2, 0)[0]
    dropped = torch.from_numpy(train.dropped_captions(order, 0.5, 0, 0))
    assert 0 < dropped.sum() < len(dropped)
    images = torch.from_numpy(tokens[[rows[i]["row"] for i in order]])
    with torch.no_grad():
        logps = policy.logps([rows[i]["prompt"] for i in order], images, unconditional=dropped)
    first = json.loads((trained[1] / "training" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(-logps.mean().item(), rel=1e-4)


def test_the_pictures_trained_on_become_likelier(data, trained, policy):
    from model import load

    rows, tokens = read_examples(data, SFT, ("row",))
    prompts, images = [row["prompt"] for row in rows], torch.from_numpy(tokens[[row["row"] for row in rows]])
    with torch.no_grad():
        before, after = (one.logps(prompts, images).mean().item() for one in (policy, load(trained[1], device="cpu")))
    assert after > before + 0.2  # nats a token


def test_only_the_language_model_has_changed_unless_told_otherwise(tiny, data, trained, tmp_path):
    run("sft.py", "--data", data, "--out", tmp_path / "wide", *TINY, "--train", "drawing", "--max-steps", 2)
    before = load_file(tiny / "model.safetensors")
    changed = {
        where: {
            ".".join(name.split(".")[:2]) for name, tensor in load_file(path).items() if not torch.equal(tensor, before[name])
        }
        for where, path in {
            "default": trained[1] / "model.safetensors",
            "wide": tmp_path / "wide" / "model.safetensors",
        }.items()
    }
    drawing = {"model.generation_embeddings", "model.generation_aligner", "model.generation_head"}
    assert changed == {"default": {"model.language_model"}, "wide": {"model.language_model"} | drawing}


def test_training_twice_with_one_seed_gives_identical_weights_and_another_seed_does_not(data, trained, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        run("sft.py", "--data", data, "--out", tmp_path / name, *TINY, "--seed", seed)
    same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("same", "other"))
    assert same == (trained[1] / "model.safetensors").read_bytes() != other


def test_a_real_process_writes_the_same_bytes(data, trained, tmp_path):
    import sys

    spawn(sys.executable, "sft.py", "--data", data, "--out", tmp_path / "model", *TINY)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (trained[1] / "model.safetensors").read_bytes()


def test_the_arguments_are_saved_beside_the_weights(trained):
    settings = json.loads((trained[1] / "training" / "settings.json").read_text())
    assert (settings["lr"], settings["epochs"], settings["script"], settings["train"]) == (1e-3, 2, "sft.py", "language-model")


def test_save_dtype_is_the_models_own_unless_chosen(data, trained, tmp_path):
    run("sft.py", "--data", data, "--out", tmp_path / "half", *TINY, "--max-steps", 1, "--save-dtype", "bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in load_file(trained[1] / "model.safetensors").values()} == {torch.float32}


def test_an_output_that_is_not_a_run_is_left_alone(data, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("all my work")
    done = run("sft.py", "--data", data, "--out", tmp_path / "precious", *TINY, ok=False)
    assert done.returncode == 2 and "holds no run of this script" in done.stderr and len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["precious", "thesis.tex"]


def test_data_without_its_tensors_and_empty_data_are_refused(data, tmp_path):
    shutil.copy(data, tmp_path)
    done = run("sft.py", "--data", tmp_path / "sft.jsonl", ok=False)
    assert done.returncode == 2 and "sft.safetensors: not found" in done.stderr
    shutil.copy(tokens_path(data), tmp_path)
    (tmp_path / "sft.jsonl").write_text("\n")
    done = run("sft.py", "--data", tmp_path / "sft.jsonl", ok=False)
    assert done.returncode == 2 and "holds no example" in done.stderr


def test_other_codebooks_are_refused_by_name():
    identity = {"model_hash": "aa", "codebook_size": "24", "image_tokens": "4"}
    tokens = SimpleNamespace(path="d.safetensors", metadata=dict(identity))
    train.check_model("M", identity, tokens, allowed=False)
    tokens.metadata["codebook_size"] = "99"
    with pytest.raises(BadInput, match="codebook_size is 99, but M has 24"):
        train.check_model("M", identity, tokens, allowed=True)


def test_peak_memory_is_in_gigabytes():
    assert 0.05 < train.peak_memory_gb(torch.device("cpu")) < 64


def test_common_arguments_reach_both_scripts():
    import dpo
    import sft

    mine, theirs = sft.parse_args(["--data", "x.jsonl"]), dpo.parse_args(["--pairs", "x.jsonl"])
    assert isinstance(mine, Namespace) and vars(mine).keys() - {"data"} == vars(theirs).keys() - {
        "pairs",
        "beta",
        "nll_weight",
        "average_logps",
        "reference",
    }


def test_restart_takes_away_a_finished_run_but_no_file_that_is_not_of_it(pairs, tmp_path):
    command = (
        "sft.py",
        "--data",
        pairs.with_name("sft.jsonl"),
        "--out",
        tmp_path / "model",
        "--max-steps",
        1,
        "--device",
        "cpu",
    )
    run(*command)
    made = {path for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "model" / "thesis.tex").write_text("all of it")
    done = run(*command, "--restart", ok=False)
    assert done.returncode == 2 and "model/thesis.tex: is not of the run" in done.stderr and len(done.stderr.splitlines()) == 1
    (tmp_path / "model" / "thesis.tex").unlink()
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == made
    run(*command, "--restart", "--seed", 3)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == made

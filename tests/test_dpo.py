"""dpo.py: the loss by hand and against float64, what training changes, and what it refuses."""

import json
import math
import shutil

import pytest
import torch
from conftest import run
from safetensors.torch import load_file

from common.records import PAIRS, SCORED, read_examples, read_rows, tokens_path
from common.writing import write_rows
from dpo import LN_2, dpo_loss, kl_to_reference, picture_logps

TINY = ("--epochs", 3, "--batch-size", 4, "--micro-batch", 3, "--lr", 1e-3, "--device", "cpu")


def four(seed: int = 0, n: int = 6) -> list[torch.Tensor]:
    """Policy chosen, policy rejected, reference chosen, reference rejected log-probs, each (n,) float64."""
    generator = torch.Generator().manual_seed(seed)
    return [-30 * torch.rand(n, generator=generator, dtype=torch.float64) for _ in range(4)]


# The mathematics


def test_loss_and_rewards_by_hand():
    one = [torch.tensor([value]) for value in (-10.0, -12.0, -11.0, -11.0)]
    losses, chosen, rejected = dpo_loss(*one, beta=0.5)
    assert losses.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.5 * 2))))  # margin (+1) - (-1) = 2 nats
    assert (chosen.item(), rejected.item()) == pytest.approx((0.5, -0.5))


def test_policy_equal_to_reference_gives_ln_2_and_no_rewards():
    chosen, rejected, _, _ = four()
    losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, chosen, rejected, beta=0.1)
    assert torch.allclose(losses, torch.full_like(losses, LN_2))
    assert chosen_rewards.abs().max() == 0 and rejected_rewards.abs().max() == 0


def test_the_gradient_raises_chosen_and_lowers_rejected_by_equal_amounts():
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = four()
    policy_chosen.requires_grad_(), policy_rejected.requires_grad_()
    losses, _, _ = dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.1)
    losses.sum().backward()
    assert (policy_chosen.grad < 0).all()  # descending the loss raises log p(chosen)
    assert torch.allclose(policy_chosen.grad, -policy_rejected.grad)
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    assert torch.allclose(policy_chosen.grad, -0.1 * torch.sigmoid(-0.1 * margin.detach()))  # Rafailov et al., eq. 8


def test_swapping_chosen_and_rejected_flips_the_margin():
    chosen, rejected, reference_chosen, reference_rejected = four()
    losses, rewards, other = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=0.3)
    swapped, first, second = dpo_loss(rejected, chosen, reference_rejected, reference_chosen, beta=0.3)
    assert torch.equal(first, other) and torch.equal(second, rewards)
    assert torch.allclose((-losses).exp() + (-swapped).exp(), torch.ones_like(losses))  # P(chosen) + P(rejected) = 1


def test_averaged_logps_with_t_times_beta_are_summed_logps():
    tokens = [torch.randn(5, 9, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(4)]
    summed = dpo_loss(*[picture_logps(x, average=False) for x in tokens], beta=0.1)
    averaged = dpo_loss(*[picture_logps(x, average=True) for x in tokens], beta=0.9)
    for ours, theirs in zip(summed, averaged, strict=True):
        assert torch.allclose(ours, theirs)


def test_large_margins_stay_finite_in_float32():
    far = [torch.tensor([value]) for value in (-5000.0, -10.0, -10.0, -5000.0)]
    losses, _, _ = dpo_loss(*far, beta=1.0)
    assert losses.item() == pytest.approx(9980.0)


def test_kl_estimate_is_zero_at_the_reference_and_right_on_average():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64)  # reference, policy
    reference, policy = probabilities.log()
    exact = (probabilities[0] * (reference - policy)).sum()
    per_token = torch.stack([kl_to_reference(policy[i : i + 1], reference[i : i + 1]) for i in range(3)])
    assert torch.allclose((probabilities[0] * per_token).sum(), exact)  # expectation under the reference
    assert kl_to_reference(reference, reference) == 0


def test_a_pair_without_its_caption_trains_its_nll_alone():
    from argparse import Namespace

    from dpo import step_loss

    policy = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()  # (side, pair, T)
    args = Namespace(beta=0.1, nll_weight=1.0, average_logps=False)
    both = torch.tensor([True, True])
    objective, logged = step_loss(policy, torch.zeros(2, 2, 3), torch.tensor([True, False]), both, args, with_kl=True)
    objective.sum().backward()
    assert torch.allclose(policy.grad[0, 1], torch.full((3,), -1 / 3))  # chosen: the mean over T tokens
    assert policy.grad[1, 1].abs().max() == 0  # rejected: nothing
    assert policy.grad[1, 0].min() > 0  # the pair that kept its caption pushes its rejected picture down
    assert logged["loss"][1] == 0 and logged["margin"][1] == 0 and logged["nll"][1] != 0
    alone, _ = step_loss(policy[:, :1], torch.zeros(2, 1, 3), both[:1], both[:1], args, with_kl=True)
    assert torch.allclose(objective[0], alone[0])


def test_a_pair_that_is_not_counted_leaves_no_trace():
    from argparse import Namespace

    from dpo import step_loss

    policy = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    args = Namespace(beta=0.1, nll_weight=1.0, average_logps=False)
    yes, counted = torch.tensor([True, True]), torch.tensor([True, False])
    objective, logged = step_loss(policy, torch.zeros(2, 2, 3), yes, counted, args, with_kl=True)
    objective.sum().backward()
    assert objective[1] == 0 and all(values[1] == 0 for values in logged.values())
    assert policy.grad[:, 1].abs().max() == 0 and policy.grad[:, 0].abs().min() > 0


# The command


def test_training_writes_a_checkpoint_and_a_record_that_starts_at_ln_2(pairs, trained_dpo):
    done, out = trained_dpo
    assert "step 0         loss 0.6931" in done.stdout
    assert done.stdout.splitlines()[-1] == str(out)
    metrics = [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["loss"] == pytest.approx(LN_2, abs=1e-4)
    assert metrics[0]["chosen_rewards"] == pytest.approx(0, abs=1e-4)
    assert metrics[-1]["loss"] < 0.6 and metrics[-1]["margin"] > 0 and metrics[-1]["accuracy"] > 0.5
    assert metrics[-1]["kl"] > metrics[0]["kl"]
    wanted = "step loss nll chosen_rewards rejected_rewards margin accuracy chosen_logps rejected_logps kl grad_norm lr"
    assert set(wanted.split()) | {"images_per_s", "peak_memory_gb"} == metrics[0].keys()


def test_only_the_language_model_has_changed(tiny, trained_dpo):
    before, after = load_file(tiny / "model.safetensors"), load_file(trained_dpo[1] / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = ("model.language_model.layers.", "model.language_model.norm.")
    assert changed and all(name.startswith(trained) for name in changed)
    assert {name for name in before if name.startswith(trained)} == changed  # and all of it has


def test_training_moved_the_right_picture_up(pairs, trained_dpo, policy):
    from common.records import Tokens
    from model import load

    tokens, rows = Tokens(pairs), [row for _, row in read_rows(pairs, {})]
    after = load(trained_dpo[1], device="cpu")
    margins = []
    for row in rows:
        images = torch.from_numpy(tokens[[row["chosen"], row["rejected"]]])
        with torch.no_grad():
            gain = (after.logps([row["prompt"]] * 2, images) - policy.logps([row["prompt"]] * 2, images)).sum(-1)
        margins.append((gain[0] - gain[1]).item())
    assert min(margins) > 0


def test_training_twice_with_one_seed_gives_identical_weights(pairs, trained_dpo, tmp_path):
    run("dpo.py", "--pairs", pairs, "--out", tmp_path / "again", *TINY)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (trained_dpo[1] / "model.safetensors").read_bytes()


def test_accumulation_changes_memory_not_the_result(pairs, trained_dpo, tmp_path):
    run("dpo.py", "--pairs", pairs, "--out", tmp_path / "small", *TINY, "--micro-batch", 1, "--gradient-checkpointing")
    one, other = load_file(tmp_path / "small" / "model.safetensors"), load_file(trained_dpo[1] / "model.safetensors")
    assert all(torch.allclose(one[name], other[name], atol=2e-4) for name in one)


def test_with_no_other_flag_it_trains_the_model_that_drew_the_pairs(pairs, tmp_path):
    for path in (pairs, tokens_path(pairs)):
        shutil.copy(path, tmp_path)
    done = run("dpo.py", "--pairs", tmp_path / "pairs.jsonl", "--max-steps", 1)
    assert (tmp_path / "pairs-dpo" / "model.safetensors").is_file()
    assert done.stdout.splitlines()[-1] == str(tmp_path / "pairs-dpo")


def test_it_warns_when_the_loss_never_left_ln_2(pairs, tmp_path):
    done = run("dpo.py", "--pairs", pairs, "--out", tmp_path / "slow", "--lr", 1e-12, "--max-steps", 3, "--device", "cpu")
    assert "never left ln 2" in done.stdout


def test_a_policy_that_is_not_its_reference_stops_at_step_0(pairs, policy):
    from argparse import Namespace

    from common.training import TrainingError
    from dpo import check_step_0, pair_logps

    rows, tokens = read_examples(pairs, PAIRS, ("chosen", "rejected"))
    rows = [row | {"seed": 0} for row in rows]
    with torch.no_grad():
        reference = pair_logps(policy, rows, tokens).transpose(0, 1)
    run = Namespace(tokens=tokens, args=Namespace(average_logps=False, beta=0.1, nll_weight=1.0))
    check_step_0(policy, rows, reference, run)
    with pytest.raises(TrainingError, match="policy and reference differ"):
        check_step_0(policy, rows, reference + 0.01, run)


def test_at_step_0_rounding_of_half_precision_passes_and_another_reference_does_not(pairs, policy, monkeypatch):
    """On a GPU: noise of 0.1 nats a token of either sign is rounding; 0.02 all in one direction, or mixed-up rows, are not."""
    from argparse import Namespace

    import dpo
    from common.training import TrainingError

    rows, tokens = read_examples(pairs, PAIRS, ("chosen", "rejected"))
    rows = [row | {"seed": 0} for row in rows]
    with torch.no_grad():
        reference = dpo.pair_logps(policy, rows, tokens).transpose(0, 1)
    run = Namespace(tokens=tokens, args=Namespace(average_logps=False, beta=0.1, nll_weight=1.0))
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(0))
    noise = 0.1 * (noise - noise.mean())
    with pytest.raises(TrainingError):
        dpo.check_step_0(policy, rows, reference + noise, run)  # a CPU is as strict as ever
    monkeypatch.setitem(dpo.ROUNDING, "cpu", dpo.ROUNDING["cuda"])
    dpo.check_step_0(policy, rows, reference + noise, run)
    for wrong in (reference + 0.02, reference - 0.02, reference.roll(1, dims=2), reference * math.nan):
        with pytest.raises(TrainingError, match="policy and reference differ"):
            dpo.check_step_0(policy, rows, wrong, run)


def test_step_0_is_compared_in_a_pass_that_the_reference_was_computed_in(pairs, tmp_path, monkeypatch):
    """The same rows side by side: on a GPU other shapes would round otherwise."""
    import dpo

    passes, compute = [], dpo.pair_logps
    monkeypatch.setattr(
        dpo,
        "pair_logps",
        lambda policy, rows, *rest: (passes.append([row["seed"] for row in rows]), compute(policy, rows, *rest))[1],
    )
    n = len(read_examples(pairs, PAIRS, ("chosen", "rejected"))[0])
    run("dpo.py", "--pairs", pairs, "--out", tmp_path / "out", "--max-steps", 1, *TINY)
    n_reference = -(-n // 3)
    assert len(passes[0]) == 3 and passes[n_reference] == passes[0]


def test_the_same_command_again_finds_its_result_and_another_is_refused(pairs, trained_dpo):
    out = trained_dpo[1]
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert "already trained" in run("dpo.py", "--pairs", pairs, "--out", out, *TINY).stdout
    done = run("dpo.py", "--pairs", pairs, "--out", out, *TINY, "--beta", 0.2, ok=False)
    assert done.returncode == 2 and "beta was 0.1, now 0.2" in done.stderr
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_another_model_than_the_one_that_drew_is_refused_and_both_are_named(pairs, tiny, tmp_path):
    from conftest import save_janus

    other = save_janus(tmp_path / "other", seed=9)
    done = run("dpo.py", "--pairs", pairs, "--model", other, "--out", tmp_path / "out", ok=False)
    assert done.returncode == 2 and str(other) in done.stderr and str(tiny) in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


# Pairs of several rounds


@pytest.fixture(scope="module")
def rounds(scored, tiny, trained_dpo, tmp_path_factory):
    """The scores of two rounds: pictures of the tiny model, and of what one training made of it; every other one accepted."""
    files = [tmp_path_factory.mktemp("rounds") / f"{number}.jsonl" for number in (1, 2)]
    flags = ("--candidates", 3, "--guidance", 2, "--chunk", 4, "--seed", 1, "--device", "cpu")
    for file, model in zip(files, (tiny, trained_dpo[1]), strict=True):
        run("score.py", "--model", model, "--prompts", scored.with_name("color_train.txt"), "--out", file, *flags)
        rows = [row | {"p_yes": 0.9 - 0.8 * (row["candidate"] % 2)} for _, row in read_rows(file, SCORED)]
        write_rows(file, rows)
    return files


def merge(out, *files):
    """pairs.jsonl of the files, in this order."""
    run("make_pairs.py", "--scored", *files, "--out", out, "--mix-models", "--pairs-per-prompt", 2, "--force")
    return out / "pairs.jsonl"


def test_pairs_of_several_rounds_train_the_last_model_against_the_base(rounds, policy, tiny, trained_dpo, tmp_path):
    from common.training import draw_seeds
    from dpo import pair_logps
    from model import load, model_hash

    pairs = merge(tmp_path / "round2", *rounds)
    drawn_by = {json.loads(line)["model_hash"] for line in pairs.read_text().splitlines()}
    assert drawn_by == {model_hash(tiny), model_hash(trained_dpo[1])}
    done = run("dpo.py", "--pairs", pairs, "--out", tmp_path / "model", *TINY, "--max-steps", 2)
    assert f"reference      {tiny} (weights {model_hash(tiny)})" in done.stdout and "step 0  " not in done.stdout
    settings = json.loads((tmp_path / "model" / "training" / "settings.json").read_text())
    assert (settings["model_hash"], settings["reference_hash"]) == (model_hash(trained_dpo[1]), model_hash(tiny))
    history = json.loads((tmp_path / "model" / "training" / "history.json").read_text())
    assert [one.get("reference_hash") for one in history] == [None, model_hash(tiny)]

    rows, tokens = read_examples(pairs, PAIRS, ("chosen", "rejected"))
    rows = [row | {"seed": seed} for row, seed in zip(rows, draw_seeds(range(len(rows)), 0), strict=True)]
    found = load_file(tmp_path / "model" / "training" / "reference.safetensors")["reference"]  # (pairs, 2, T)
    with torch.no_grad():
        base, last = (pair_logps(one, rows, tokens).transpose(0, 1) for one in (policy, load(trained_dpo[1], device="cpu")))
    assert torch.allclose(found, base, atol=1e-4) and (found - last).abs().max() > 0.01
    again = run("dpo.py", "--pairs", pairs, "--out", tmp_path / "model", *TINY, "--max-steps", 2, "--reference", tiny)
    assert "already trained" in again.stdout


def test_the_reference_may_be_named_where_it_is_the_model_to_train_itself(pairs, trained_dpo, tmp_path):
    model = ("--model", trained_dpo[1], "--other-model", "--reference", trained_dpo[1])
    done = run("dpo.py", "--pairs", pairs, "--out", tmp_path / "model", *TINY, "--max-steps", 1, *model)
    assert "step 0         loss 0.6931" in done.stdout


def test_a_reference_that_is_not_the_base_of_the_run_is_refused(rounds, pairs, tiny, trained_dpo, tmp_path):
    from conftest import save_janus

    merged, other = merge(tmp_path / "round2", *rounds), save_janus(tmp_path / "other", seed=9)
    for data in (merged, pairs):  # of one round too: its reference is what drew it
        done = run("dpo.py", "--pairs", data, "--reference", other, "--out", tmp_path / "out", ok=False)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert f"its reference is {tiny} (weights" in done.stderr and f"but {other} has weights" in done.stderr
    backwards = merge(tmp_path / "backwards", *rounds[::-1])  # the base of these would be the model after training
    done = run("dpo.py", "--pairs", backwards, "--out", tmp_path / "out", ok=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"{tiny}: by its record none of its trainings began with the reference {trained_dpo[1]}" in done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()


def test_a_reference_that_is_the_model_itself_changes_nothing(pairs, tiny, trained_dpo):
    done = run("dpo.py", "--pairs", pairs, "--out", trained_dpo[1], *TINY, "--reference", tiny)
    assert "already trained" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--beta", 0), "--beta must be greater than 0, found 0.0"),
        (("--lr", -1), "--lr must be greater than 0, found -1.0"),
        (("--nll-weight", -1), "--nll-weight must be at least 0, found -1.0"),
        (("--uncond-prob", 1.5), "--uncond-prob must be at least 0 and less than 1, found 1.5"),
        (("--micro-batch", 100), "--micro-batch 100 is more than --batch-size 64"),
        (("--out", "/dev/null/model"), "--out /dev/null/model: Not a directory"),
    ],
)
def test_arguments_that_cannot_work_are_named(pairs, flags, message):
    done = run("dpo.py", "--pairs", pairs, *flags, ok=False)
    assert done.returncode == 2 and message in done.stderr


def test_a_token_outside_the_codebook_is_refused_before_anything_is_written(pairs, tmp_path):
    from common.records import Tokens, write_tokens

    shutil.copy(pairs, tmp_path)
    tokens = Tokens(pairs)
    block = tokens[:]
    block[-1, 0] = tokens.codebook_size
    write_tokens(tmp_path / "pairs.safetensors", block, tokens.metadata)
    done = run("dpo.py", "--pairs", tmp_path / "pairs.jsonl", ok=False)
    assert done.returncode == 2 and "outside the codebook" in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "pairs.safetensors"]


def test_restart_replaces_a_run_but_nothing_else(pairs, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("all my work")
    done = run("dpo.py", "--pairs", pairs, "--out", tmp_path / "precious", *TINY, "--restart", ok=False)
    assert done.returncode == 2 and (tmp_path / "precious" / "thesis.tex").is_file()


def test_rows_that_are_not_there_are_named_with_file_and_line(pairs, tmp_path):
    lines = pairs.read_text().splitlines()
    broken = json.loads(lines[2]) | {"chosen": 812}
    (tmp_path / "pairs.jsonl").write_text("\n".join([*lines[:2], json.dumps(broken)]) + "\n")
    shutil.copy(tokens_path(pairs), tmp_path)
    done = run("dpo.py", "--pairs", tmp_path / "pairs.jsonl", ok=False)
    assert done.returncode == 2
    assert "pairs.jsonl:3: chosen is 812, but pairs.safetensors has" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "pairs.safetensors"]

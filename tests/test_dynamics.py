"""dynamics.py: its statistics by hand, its gradients against what steps really do, its step against sft.py and dpo.py."""

import itertools
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from conftest import pair_up, run, score, script_path, spawn
from safetensors.numpy import load_file, save_file
from showo_golden import random_checkpoint

from analysis import dynamics
from analysis.dynamics import cosine, inner_product
from analysis.probes import (
    MEANS,
    OTHER_STATISTICS,
    PREDICTED,
    ProbeSet,
    choose_alternatives,
    choose_question,
    subsample,
    summarize,
)
from common import sharding
from common import training as train
from common.records import LIKELIHOOD, READOUTS, SCORED, Tokens, read_rows, stable_seed, tokens_path
from common.stats import residual
from common.writing import write_rows
from dpo import dpo_loss
from model import load
from sft import sft_loss

SGD = ("--optimizer", "sgd")


def run_dynamics(data, drawn, out, *flags, ok=True):
    """Run dynamics.py on sft.jsonl or pairs.jsonl; its rows and its summary, or the process where it is to fail."""
    flag = "--pairs" if data.stem == "pairs" else "--data"
    few = ("--n-probes", 3, "--device", "cpu")
    done = run("dynamics.py", flag, data, "--probes", drawn, "--out", out, *few, *flags, ok=ok)
    if not ok:
        assert not out.exists() and not out.with_suffix(".json").exists()
        return done
    assert done.stdout.splitlines()[-1] == str(out)
    return [row for _, row in read_rows(out, {})], json.loads(out.with_suffix(".json").read_text())


def columns(rows, *keys, kind=None):
    return [np.array([row[key] for row in rows if kind in (None, row["kind"])]) for key in keys]


def draw_seeds(probes):
    """What fixes the masks from which dynamics.py --seed 0 estimates the log p of probes."""
    return [stable_seed("probe", 0, probe["id"], probe["candidate"]) for probe in probes]


def copied(jsonl, directory, change=lambda row: row, metadata=None):
    """A copy of a JSONL file and its tokens with changed rows, or another entry in the header."""
    directory.mkdir(exist_ok=True)
    out = directory / jsonl.name
    write_rows(out, [change(row) for _, row in read_rows(jsonl, {})])
    shutil.copy(tokens_path(jsonl), tokens_path(out))
    if metadata is not None:
        save_file(load_file(tokens_path(jsonl)), tokens_path(out), Tokens(jsonl).metadata | metadata)
    return out


@pytest.fixture(scope="module", params=["janus", pytest.param("showo", marks=pytest.mark.thorough)])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family, request, tmp_path_factory):
    """A random tiny checkpoint of the family."""
    if family == "janus":
        return request.getfixturevalue("tiny")
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "showo", seed=1, bits=4, norms=0.5)


@pytest.fixture(scope="module")
def drawn(family, request, checkpoint, tmp_path_factory):
    """scored.jsonl of it."""
    return request.getfixturevalue("scored") if family == "janus" else score(checkpoint, tmp_path_factory.mktemp("scored"))


@pytest.fixture(scope="module")
def paired(family, request, drawn, tmp_path_factory):
    """pairs.jsonl of that, sft.jsonl beside it."""
    return request.getfixturevalue("pairs") if family == "janus" else pair_up(drawn, tmp_path_factory.mktemp("round") / "data")


@pytest.fixture(scope="module")
def policy(checkpoint):
    return load(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def sft(paired):
    return paired.with_name("sft.jsonl")


@pytest.fixture(scope="module")
def rows(sft, drawn, tmp_path_factory):
    """The rows after one step of AdamW on all of sft.jsonl."""
    return run_dynamics(sft, drawn, tmp_path_factory.mktemp("dynamics") / "out.jsonl", "--lr", 1e-3, "--n-probes", 6)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics


def test_the_objectives_are_those_of_the_trainers():
    policy, reference = -5 * torch.rand(2, 2, 3, 7, generator=torch.Generator().manual_seed(0))  # each (side, pair, T)
    assert torch.allclose(dynamics.sft_objective(policy[0]), sft_loss(policy[0], torch.ones(3, 7)) / 7)
    losses, _, _ = dpo_loss(*policy.sum(-1), *reference.sum(-1), beta=0.3)
    nll = sft_loss(policy[0], torch.ones(3, 7)) / 7
    assert torch.allclose(dynamics.dpo_objective(policy, reference, 0.3, 0.5), losses + 0.5 * nll)


def test_inner_products_do_not_lose_small_terms_beside_large_ones():
    one, other = torch.tensor([3e4, 1.0, -3e4]), torch.tensor([3e4, 1.0, 3e4])
    assert inner_product([one, torch.ones(2, 2)], [other, torch.ones(2, 2)]) == 5.0  # 1 + 4; float32 is off by 64
    assert cosine(5.0, 25.0, 4.0) == 0.5 and cosine(0.0, 0.0, 4.0) == 0.0


def test_a_change_of_exactly_0_has_no_sign():
    zero = dict.fromkeys((*MEANS, *PREDICTED), 0.0)
    deltas = [(1, 1), (-1, -1), (1, -1), (0, 1), (1, 0)]
    found = summarize([zero | {"delta_g": g, "delta_u": u} for g, u in deltas])
    assert found["n_probes"] == 5 and found["sign_agreement"]["value"] == pytest.approx(2 / 3)
    assert (found["g_rises"]["value"], found["u_rises"]["value"]) == (0.6, 0.4)
    found = summarize([zero | {"delta_u": u, "delta_u_bayes": w, "predicted_u_bayes": w / 2} for u, w in deltas])
    assert found["sign_agreement_u_bayes"]["value"] == pytest.approx(2 / 3) and found["u_bayes_rises"]["value"] == 0.4
    assert found["sign_agreement_g_bayes"]["value"] is None and found["slope_u_bayes"]["value"] == pytest.approx(2)


def test_bayes_rule_by_hand():
    log_w = dynamics.bayes_logps(torch.tensor([0.3, 0.1, 0.4]).log().double() - 700)
    assert log_w.exp().tolist() == pytest.approx([3 / 8, 1 / 8, 4 / 8])
    assert dynamics.bayes_inner_product(log_w, torch.tensor([5.0, 1, 3]).double()) == pytest.approx(1 / 8 * 4 + 4 / 8 * 2)


PROMPTS, PICTURES = 4, torch.tensor([[1, 0, 2], [2, 2, 1]])  # of the toy: prompts by number, M = 3 tokens of V = 3


def toy_logits(weights, prompt, picture):
    """Logits (M, V) of a picture's tokens, one after the other: a model that any change of a weight moves everywhere."""
    before = torch.cat([torch.tensor([3]), picture[:-1]])
    state = torch.zeros(5, dtype=torch.float64)
    found = []
    for token in before:
        state = torch.tanh(weights["recurrent"] @ state + weights["prompt"][prompt] + weights["token"][token])
        found.append(weights["head"] @ state)
    return torch.stack(found)


def toy_logp(weights, prompt, picture):
    return toy_logits(weights, prompt, picture).log_softmax(-1).gather(-1, picture[:, None]).sum()


def test_the_first_order_form_is_proposition_1s_sum_over_the_kernel_and_holds_as_the_rate_goes_to_0():
    """Word by word, float64: K (M V, M V) between the logits of two prompts; then the ratio to what a step really changes."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"recurrent": (5, 5), "prompt": (PROMPTS, 5), "token": (4, 5), "head": (3, 5)}
    weights = {name: torch.randn(shape, generator=generator).double().requires_grad_() for name, shape in shapes.items()}
    (x_0, x_u), y_0, y_u = PICTURES, 0, 1

    def jacobian(prompt, picture):  # (M V, parameters)
        rows = toy_logits(weights, prompt, picture).flatten()
        return torch.stack(
            [flat(torch.autograd.grad(row, [*weights.values()], retain_graph=True, materialize_grads=True)) for row in rows]
        )

    def flat(gradient):
        return torch.cat([part.flatten() for part in gradient])

    def error(prompt, picture):  # e - pi (M V,)
        pi = toy_logits(weights, prompt, picture).detach().softmax(-1)
        return (torch.nn.functional.one_hot(picture, 3) - pi).flatten()

    def changes(eta):
        def measure(some):
            logps = torch.stack([toy_logp(some, prompt, x_0) for prompt in range(PROMPTS)]).detach()
            return torch.stack([logps[y_0], dynamics.bayes_logps(logps)[0]])

        loss = torch.autograd.grad(-toy_logp(weights, y_u, x_u), [*weights.values()])
        after = {name: weight - eta * part for (name, weight), part in zip(weights.items(), loss, strict=True)}
        return measure(after) - measure(weights)

    of_u = jacobian(y_u, x_u)
    kernels = [jacobian(prompt, x_0) @ of_u.T for prompt in range(PROMPTS)]
    sums = [error(prompt, x_0) @ kernels[prompt] @ -error(y_u, x_u) for prompt in range(PROMPTS)]  # of Delta G, per -eta
    w = torch.stack([toy_logp(weights, prompt, x_0) for prompt in range(PROMPTS)]).detach().softmax(0)
    delta_g = -sums[0]
    delta_u = -sum(w[i] * (sums[0] - sums[i]) for i in range(1, PROMPTS))

    step = [-part for part in torch.autograd.grad(-toy_logp(weights, y_u, x_u), [*weights.values()])]  # d of a rate of 1
    inner = []
    for prompt in range(PROMPTS):
        of_g = torch.autograd.grad(toy_logp(weights, prompt, x_0), [*weights.values()], materialize_grads=True)
        inner.append(inner_product(of_g, step))
    assert inner[0] == pytest.approx(delta_g.item(), rel=1e-10)
    assert dynamics.bayes_inner_product(w.log(), torch.tensor(inner, dtype=torch.float64)) == pytest.approx(
        delta_u.item(), rel=1e-10
    )
    off = [(changes(eta) / eta / torch.stack([delta_g, delta_u]) - 1).abs() for eta in (1e-3, 1e-4, 1e-5)]
    assert (off[0] > 1e-6).all() and (off[2] < 1e-3).all()
    assert (off[1] / off[0]).tolist() == pytest.approx([0.1, 0.1], rel=0.1)
    assert (off[2] / off[1]).tolist() == pytest.approx([0.1, 0.1], rel=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# The judge, differentiable

QUESTIONS = ["Does this image describe a red cube?", "Is this one blue cone left of a red cube?", "Does this describe cone?"]


def images_of(policy, n=3):
    """Image tokens (n, T)."""
    return policy.sample(["a red cube"], n, guidance=1, seeds=[5])[0]


def test_answer_logps_are_the_judges_numbers_whatever_stands_beside(policy):
    images = images_of(policy)
    yes, no, coverage = (values.detach() for values in policy.answer_logps(images, QUESTIONS))  # of different lengths
    p_yes, judged_coverage = policy.judge(images, [[question] for question in QUESTIONS])
    assert (yes.exp() - p_yes[:, 0]).abs().max() < 1e-5 and (coverage - judged_coverage[:, 0]).abs().max() < 1e-5
    assert (yes.exp() + no.exp() - 1).abs().max() < 1e-6
    assert p_yes.max() - p_yes.min() > 1e-3  # the three differ
    alone = policy.answer_logps(images[2:], QUESTIONS[2:])[0]
    assert (alone - yes[2]).abs() < 1e-5


def test_log_likelihoods_are_sums_of_logps_with_the_same_masks_for_all_prompts(family, policy):
    images, seeds = images_of(policy), [3, 4, 5]
    texts = [["a red cube", "one blue cone"], ["a cone", "a red cube"], ["one blue cone left of a red cube", "a cone"]]
    found = policy.log_likelihoods(texts, images, seeds)
    assert found.shape == (3, 2) and found.dtype == torch.float64 and not found.requires_grad
    for i in range(3):
        for k in range(2):
            alone = policy.logps([texts[i][k]], images[[i]], [seeds[i]])
            assert found[i, k].item() == pytest.approx(alone.double().sum().item(), abs=1e-4)
    assert torch.allclose(policy.log_likelihoods(texts, images, seeds, batch=1), found, atol=1e-4)
    others = policy.log_likelihoods(texts, images, [6, 7, 8])
    assert ((others - found).abs().max() > 1e-3) == (family == "showo")


@pytest.mark.parametrize("source", ["prompts", "rejudge"])
def test_the_likelihood_readout_is_the_policys_for_prompt_and_foil(family, source, policy, checkpoint, drawn, tmp_path):
    """score.py --readouts likelihood; the same read-out whatever the batch, and beside it what --readouts alone says."""
    out, again = tmp_path / "out.jsonl", tmp_path / "again.jsonl"
    work = ("--prompts", drawn.with_name("color_train.txt"), "--candidates", 2) if source == "prompts" else ("--rejudge", drawn)
    run("score.py", "--model", checkpoint, *work, "--out", out, "--readouts", "likelihood", "--batch", 5, "--device", "cpu")
    run("score.py", "--model", checkpoint, "--rejudge", out, "--out", again, "--readouts", "--device", "cpu")
    rows, tokens = [row for _, row in read_rows(out, SCORED | READOUTS | LIKELIHOOD)], Tokens(out)
    assert tokens.metadata["likelihood"] == {"janus": "exact", "showo": f"estimated from {policy.mask_draws} masks"}[family]
    plain = [row for _, row in read_rows(again, SCORED | READOUTS)]
    assert "likelihood" not in Tokens(again).metadata and not any(key in row for row in plain for key in LIKELIHOOD)
    assert [row["caption"] for row in rows] == pytest.approx([row["caption"] for row in plain], abs=1e-2)
    seeds = [stable_seed("likelihood", row["id"], row["candidate"]) for row in rows]
    for key, column in (("prompt", "log_likelihood"), ("foil", "log_likelihood_foil")):
        with torch.no_grad():
            wanted = policy.logps([row[key] for row in rows], tokens[[row["row"] for row in rows]], seeds).double().sum(-1)
        assert [row[column] for row in rows] == pytest.approx(wanted.tolist(), abs=1e-4)
    assert len({row["log_likelihood"] - row["log_likelihood_foil"] for row in rows}) > len(rows) / 2


def test_the_answers_gradient_reaches_every_trained_weight_and_no_other(checkpoint):
    policy = load(checkpoint, device="cpu")
    trained = policy.trainable_parameters()
    policy.answer_logps(images_of(policy), QUESTIONS)[0].sum().backward()
    assert len(trained) > 18 and all(parameter.grad.abs().max() > 0 for parameter in trained.values())
    assert all(parameter.grad is None for name, parameter in policy.model.named_parameters() if name not in trained)


def test_log_p_yes_keeps_its_digits_and_its_gradient_where_p_yes_rounds_to_1(family, checkpoint):
    policy = load(checkpoint, device="cpu")
    with torch.no_grad():
        head = {"janus": policy.model, "showo": policy.branch}[family].lm_head
        head.weight[policy._yes] *= 60
    trained = list(policy.trainable_parameters().values())
    logps = policy.answer_logps(images_of(policy, 8), QUESTIONS[:1] * 8)
    sure = max(((side[i], i) for side in logps[:2] for i in range(8)), key=lambda found: found[0].item())[0]
    assert sure.exp() == 1 and sure < 0
    assert any(gradient.abs().max() > 0 for gradient in torch.autograd.grad(sure, trained))


# ---------------------------------------------------------------------------------------------------------------------
# Which probes


def test_kinds_are_told_by_prompt_and_tokens(paired, sft, drawn, tmp_path):
    for data, names in ((sft, ["matching"]), (paired, ["chosen", "rejected"])):
        rows, _ = run_dynamics(data, drawn, tmp_path / f"{data.stem}.jsonl", "--examples", 3, "--seed", 1, "--n-probes", 6)
        examples = subsample([row for _, row in read_rows(data, {})], 3, [1, 0], 0)
        tokens, probes = load_file(tokens_path(data))["tokens"], load_file(tokens_path(drawn))["tokens"]
        where = {(row["id"], row["candidate"]): row["row"] for _, row in read_rows(drawn, SCORED)}
        prompts = {row["prompt"] for row in examples}
        column = {"matching": "row", "chosen": "chosen", "rejected": "rejected"}
        sides = {name: {(row["prompt"], tokens[row[column[name]]].tobytes()) for row in examples} for name in names}
        assert {row["kind"] for row in rows} == {*names, "near", "random"}
        for row in rows:
            picture = (row["prompt"], probes[where[row["id"], row["candidate"]]].tobytes())
            kind = next((name for name in names if picture in sides[name]), "near" if row["prompt"] in prompts else "random")
            assert row["kind"] == kind
            assert row["partner"] == row["id"] if kind != "random" else row["partner"] in {one["id"] for one in examples}


def test_a_kind_has_one_probe_a_prompt(sft, drawn, tmp_path):
    rows, summary = run_dynamics(sft, drawn, tmp_path / "out.jsonl", "--examples", 8, "--n-probes", 36)
    for kind, found in summary["kinds"].items():
        prompts = [row["prompt"] for row in rows if row["kind"] == kind]
        assert len(prompts) == len({*prompts}) == found["n_probes"]


def test_the_seed_alone_decides_what_is_drawn_and_the_file_its_order():
    rows = [{"prompt": str(i % 10), "i": i} for i in range(40)]
    drawn = [subsample(rows, 6, [seed, 1], 1) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len({row["prompt"] for row in drawn[0]}) == 6
    assert [row["i"] for row in drawn[0]] == sorted(row["i"] for row in drawn[0])
    assert len(subsample(rows, 30, [0, 1], 1)) == 10 and subsample(rows, 99, [0, 0], 0) == rows


def test_bayes_rule_chooses_among_prompt_foil_and_others_of_the_category():
    rows = [{"id": f"{c}{i}", "prompt": f"{c} {i}", "category": c, "foil": f"{c} {9 - i}"} for c in "ab" for i in range(10)]
    found = choose_alternatives(rows + rows[:3], 4, seed=0)
    assert [*found] == [row["id"] for row in rows]
    for row in rows:
        own, foil, *others = found[row["id"]]
        assert (own, foil) == (row["prompt"], row["foil"]) and len({*others} - {own, foil}) == 4
        assert all(text.startswith(row["category"]) for text in others)
    assert found == choose_alternatives(rows, 4, 0) != choose_alternatives(rows, 4, 1)
    assert len({*map(tuple, ([text[2:] for text in some[2:]] for some in found.values()))}) > 10  # each its own
    assert [len(some) for some in choose_alternatives(rows[:3], 4, 0).values()] == [4] * 3  # there are no more
    assert choose_alternatives(rows[:1], 4, 0) == {"a0": ["a 0", "a 9"]}


def test_held_out_probes_are_all_random(sft, drawn, tmp_path):
    other = copied(drawn, tmp_path / "heldout", lambda row: row | {"prompt": row["prompt"] + " and a cone"})
    rows, summary = run_dynamics(sft, other, tmp_path / "out.jsonl", "--n-probes", 6)
    assert {row["kind"] for row in rows} == {"random"} and len(rows) == 6
    assert summary["kinds"]["near"] == summarize([]) and summary["kinds"]["near"]["delta_u"]["value"] is None


# ---------------------------------------------------------------------------------------------------------------------
# The chain: gradients, the step, what it changes


@pytest.mark.parametrize("stem", ["sft", "pairs"])
def test_a_step_of_half_the_size_leaves_half_the_share_unpredicted(stem, paired, drawn, tmp_path):
    """delta U = grad U . d + O(d^2): the rest per change falls like d, until float32's rounding."""
    left = []
    for rate in (0.02, 0.01):
        flags = (*SGD, "--lr", rate, "--nll-weight", 0, "--n-probes", 6)
        rows, summary = run_dynamics(paired.with_name(f"{stem}.jsonl"), drawn, tmp_path / f"{rate}.jsonl", *flags)
        predicted, u = columns(rows, "predicted_u", "delta_u")
        left.append(residual(predicted, u))
        assert all(found["prediction"]["value"] > 0.95 for found in summary["kinds"].values() if found["n_probes"] > 2)
    assert left[0] < 0.3 and 0.4 < left[1] / left[0] < 0.6


def test_measured_per_predicted_goes_to_1_as_the_rate_goes_to_0(sft, drawn, tmp_path, monkeypatch):
    """In float64, so that rounding hides nothing: what is left of each probe's ratio falls as the rate does."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # what the families make float32, and what transformers does
        to = torch.Tensor.to
        patch.setattr(
            torch.Tensor, "to", lambda self, *a, **k: to(self, *(x if x != torch.float32 else torch.float64 for x in a), **k)
        )
        patch.setattr("model.load", lambda name, device, dtype: load(name, device, torch.float64))
        files = [run_dynamics(sft, drawn, tmp_path / f"{rate}.jsonl", *SGD, "--lr", rate) for rate in (1e-3, 1e-4, 1e-5)]
    for predicted, measured in PREDICTED.items():
        ratios = [np.divide(*columns(rows, measured, predicted)) for rows, _ in files]
        off = [np.abs(ratio - 1) for ratio in ratios]
        assert np.median(off[0]) > 1e-4 and np.max(off[2]) < 0.05 and np.median(off[2]) < 1e-3
        for larger, smaller in itertools.pairwise(off):
            assert np.median(smaller / larger) == pytest.approx(0.1, rel=0.2)
        slopes = [files[2][1]["kinds"][kind][measured.replace("delta", "slope")]["value"] for kind in ("matching", "random")]
        assert slopes == pytest.approx([1, 1], abs=0.01)


def test_descent_on_one_example_moves_looking_by_the_kernel_between_the_branches(sft, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(ProbeSet, "draw_seed", lambda *_: train.draw_seeds([0], 0)[0])  # log p from the masks of the step
    rows, _ = run_dynamics(sft, drawn, tmp_path / "out.jsonl", *SGD, "--lr", 0.1, "--examples", 1)
    for row in rows:  # d = lr grad G(e) / T, the loss being the mean over T = 4 tokens of the one example
        assert row["predicted_u"] == pytest.approx(0.1 * row["inner_product"] / 4, rel=1e-3, abs=1e-5)
        assert row["cosine_step"] == pytest.approx(row["cosine"], abs=1e-4)
    assert {row["kind"] for row in rows} == {"matching", "near", "random"}


def test_gradients_are_taken_where_the_step_began(rows, sft, drawn, tmp_path):
    keys = ("log_p", "p_yes", "w_bayes", "inner_product", "cosine", "cosine_foil", "cosine_g_foil", "cosine_g_others")
    further, _ = run_dynamics(sft, drawn, tmp_path / "out.jsonl", "--lr", 1e-2, "--n-probes", 6)
    for small, large in zip(rows, further, strict=True):
        assert [small[key] for key in keys] == [large[key] for key in keys]
        assert small["delta_g"] != large["delta_g"]


def test_where_activations_would_not_fit_they_are_recomputed_to_the_same_numbers(rows, sft, drawn, tmp_path, monkeypatch):
    """What is asked for is what float32 takes: twice autocast's, of a whole micro-batch."""
    asked, passes = [], []
    monkeypatch.setattr(sharding, "must_recompute", lambda policy, *numbers: asked.append(numbers) or True)
    checkpoint = torch.utils.checkpoint.checkpoint
    look = lambda *args, **options: (passes.append(1), checkpoint(*args, **options))[1]
    for module in list(sys.modules.values()):  # transformers has bound it by name
        if getattr(module, "checkpoint", None) is checkpoint:
            monkeypatch.setattr(module, "checkpoint", look)
    flags = ("--lr", 1e-3, "--n-probes", 6, "--micro-batch", 5)
    recomputed, _ = run_dynamics(sft, drawn, tmp_path / "out.jsonl", *flags)
    assert asked[0][1:] == (10, 1) and passes
    for row, other in zip(rows, recomputed, strict=True):
        for key in ("log_p", "inner_product", "cosine", "predicted_u", "delta_u"):
            assert row[key] == pytest.approx(other[key], rel=2e-3, abs=1e-5), key


def test_inner_products_and_cosines_are_those_of_whole_gradients(rows, drawn, checkpoint):
    policy = load(checkpoint, device="cpu")
    trained = policy.trainable_parameters()
    where = {(row["id"], row["candidate"]): row for _, row in read_rows(drawn, SCORED)}
    tokens = torch.from_numpy(load_file(tokens_path(drawn))["tokens"].astype(np.int64))

    def flat(value):
        policy.model.zero_grad()
        value.sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in trained.values()])

    for row in (row for row in rows if row["kind"] == "matching"):
        there = where[row["id"], row["candidate"]]
        image = tokens[there["row"]][None]
        of_g = flat(policy.logps([row["prompt"]], image, draw_seeds([row])))
        texts = choose_alternatives([row for _, row in read_rows(drawn, SCORED)], 4, 0)[row["id"]]
        given = [torch.cosine_similarity(of_g, flat(policy.logps([text], image, draw_seeds([row]))), dim=0) for text in texts]
        assert [row["cosine_g"], row["cosine_g_foil"]] == pytest.approx([1, given[1].item()], abs=1e-5)
        assert row["cosine_g_others"] == pytest.approx(torch.stack(given[2:]).mean().item(), abs=1e-5) and len(texts) == 6
        for key, text in (("cosine", row["prompt"]), ("cosine_foil", there["foil"])):
            of_u = flat(policy.answer_logps(image, [f"Does this image describe {text}?"])[0])
            assert row[key] == pytest.approx(torch.cosine_similarity(of_g, of_u, dim=0).item(), abs=1e-5)
            if key == "cosine":
                assert row["inner_product"] == pytest.approx((of_g @ of_u).item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("stem", ["sft", "pairs"])
def test_one_step_is_the_trainers_step(stem, checkpoint, paired, drawn, tmp_path):
    data = paired.with_name(f"{stem}.jsonl")
    script, flag = ("dpo.py", "--pairs") if stem == "pairs" else ("sft.py", "--data")
    once = ("--max-steps", 1, "--warmup", 0, "--uncond-prob", 0, "--batch-size", 100, "--lr", 1e-3, "--device", "cpu")
    run(script, flag, data, "--out", tmp_path / "model", *once)
    rows, _ = run_dynamics(data, drawn, tmp_path / "out.jsonl", "--lr", 1e-3, "--examples", 100)  # there are fewer: all of them
    where = {(row["id"], row["candidate"]): row for _, row in read_rows(drawn, SCORED)}
    probes = [where[row["id"], row["candidate"]] for row in rows]
    tokens = torch.from_numpy(load_file(tokens_path(drawn))["tokens"].astype(np.int64))[[probe["row"] for probe in probes]]
    asked = [[f"Does this image describe {probe[key]}?" for key in ("prompt", "foil")] for probe in probes]
    alternatives = choose_alternatives([row for _, row in read_rows(drawn, SCORED)], 4, 0)
    for model, times in ((checkpoint, 0), (tmp_path / "model", 1)):  # before and after
        policy = load(model, device="cpu")
        with torch.no_grad():
            g = policy.logps([probe["prompt"] for probe in probes], tokens, draw_seeds(probes)).double().sum(-1).numpy()
        p_yes = policy.judge(tokens, asked)[0].double().numpy()
        given = [alternatives[probe["id"]] for probe in probes]
        log_w = policy.log_likelihoods(given, tokens, draw_seeds(probes)).log_softmax(-1)[:, 0]
        for row, wanted in zip(rows, log_w.tolist(), strict=True):
            assert math.log(row["w_bayes"]) + times * row["delta_u_bayes"] == pytest.approx(wanted, abs=2e-4)
        for row, wanted_g, (wanted, wanted_foil) in zip(rows, g, p_yes, strict=True):
            assert row["log_p"] + times * row["delta_g"] == pytest.approx(wanted_g, abs=2e-4)
            assert row["p_yes"] * math.exp(times * row["delta_u"]) == pytest.approx(wanted, abs=1e-4)
            assert row["p_yes_foil"] * math.exp(times * row["delta_u_foil"]) == pytest.approx(wanted_foil, abs=1e-4)
    for row in rows:
        assert abs(row["delta_g"]) > 1e-3
        assert row["delta_margin"] == pytest.approx(row["delta_u"] - row["delta_u_foil"], abs=1e-6)
    assert np.abs(columns(rows, "delta_u_bayes")).max() > 1e-2


def test_sft_raises_what_it_trains_on(sft, drawn, tmp_path):
    rows, summary = run_dynamics(sft, drawn, tmp_path / "out.jsonl", *SGD, "--lr", 0.01)
    assert np.median(columns(rows, "delta_g", kind="matching")) > 0
    assert summary["kinds"]["matching"]["delta_g"]["value"] > 0


def test_dpo_lowers_what_was_rejected_against_what_was_chosen(paired, drawn, tmp_path):
    """Its loss is of their difference: the chosen pictures' own log-probs may rise or fall."""
    rows, summary = run_dynamics(paired, drawn, tmp_path / "out.jsonl", *SGD, "--lr", 0.01, "--nll-weight", 0)
    chosen, rejected = (np.median(columns(rows, "delta_g", kind=kind)) for kind in ("chosen", "rejected"))
    assert rejected < 0 and chosen > rejected
    chosen, rejected = (summary["kinds"][kind]["delta_g"]["value"] for kind in ("chosen", "rejected"))
    assert rejected < 0 and chosen > rejected


def test_the_reference_stays_where_training_began(paired, drawn, tmp_path):
    flags = ("--pairs", paired, "--probes", drawn, "--out", tmp_path / "out.jsonl", "--steps", 3, "--nll-weight", 0)
    done = run("dynamics.py", *flags, *SGD, "--lr", 0.02, "--device", "cpu")
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in done.stdout.splitlines() if line.startswith("step ")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[0] > losses[1] + 1e-4 > losses[2] + 2e-4


def test_a_foil_that_is_the_prompt_moves_as_the_prompt_does(rows, sft, drawn, tmp_path):
    same = copied(drawn, tmp_path / "same", lambda row: row | {"foil": row["prompt"]})
    for row in run_dynamics(sft, same, tmp_path / "out.jsonl", "--lr", 1e-3)[0]:
        assert row["delta_u"] == row["delta_u_foil"] and row["delta_margin"] == 0 and row["cosine"] == row["cosine_foil"]
    others = [row for row in rows if row["prompt"] != "a big cube"]  # the tiny Show-o has no word for big, nor for small
    assert others and all(row["delta_u"] != row["delta_u_foil"] for row in others)


def test_training_the_head_too_leaves_inner_products_and_makes_cosines_smaller(family, rows, sft, drawn, tmp_path):
    """Janus-Pro's head has no part in looking: predictions hold, grad U is 0 there, but grad G is longer. Show-o has one head
    for codes and words, so that its inner products change."""
    wide, _ = run_dynamics(sft, drawn, tmp_path / "wide.jsonl", *SGD, "--lr", 1e-3, "--train", "drawing", "--n-probes", 6)
    for one, other in zip(wide, rows, strict=True):
        alike = one["inner_product"] == pytest.approx(other["inner_product"], rel=1e-4, abs=1e-5)
        assert alike == (family == "janus") and (not alike or abs(one["cosine"]) < abs(other["cosine"]))
    assert residual(*columns(wide, "predicted_u", "delta_u")) < 0.1


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_same_command_writes_the_same_bytes(paired, drawn, tmp_path):
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run_dynamics(paired, drawn, tmp_path / name / "out.jsonl", "--examples", 4, "--n-probes", 3)
        texts = [(tmp_path / name / file).read_text() for file in ("out.jsonl", "out.json")]
        files.append([text.replace(str(tmp_path / name), "") for text in texts])
    assert files[0] == files[1]


@pytest.mark.thorough
def test_the_real_command_prints_the_table_and_leaves_the_model_alone(family, sft, drawn, checkpoint, tmp_path):
    weights = {path: path.read_bytes() for path in checkpoint.rglob("*.safetensors")}
    out = tmp_path / "out.jsonl"
    command = ("dynamics.py", "--data", sft, "--probes", drawn, "--out", out, "--examples", 4, "--device", "cpu")
    done = spawn(sys.executable, script_path(command[0]), *command[1:])
    lines = done.stdout.splitlines()
    assert any(line.split() == ["matching", "near", "random"] for line in lines) and lines[-1] == str(out)
    assert all(any(line.startswith(name) for line in lines) for name in (MEANS | OTHER_STATISTICS).values())
    assert weights and weights == {path: path.read_bytes() for path in checkpoint.rglob("*.safetensors")}
    estimated = [line for line in lines if line.startswith("log p  ")]
    assert len(estimated) == (family == "showo") and all("a lower bound's, estimated from masks" in line for line in estimated)
    settings = json.loads(out.with_suffix(".json").read_text())["settings"]
    assert settings["question"] == "Does this image describe {prompt}?" and settings["examples"] == 4 and settings["model_hash"]


def test_the_question_is_the_flags_the_probes_own_or_the_papers(drawn, tmp_path):
    header = {"questions": json.dumps(["Is this {prompt}?", "Does this describe {prompt}?"])}
    tokens = Tokens(copied(drawn, tmp_path / "several", metadata=header))
    assert choose_question("Is {prompt}?", tokens) == ("Is {prompt}?", "--question")
    assert choose_question(None, tokens) == ("Is this {prompt}?", "the first of what the probes were asked")
    tokens.metadata.pop("questions")
    assert choose_question(None, tokens) == ("Does this image describe {prompt}?", "the default")


def test_the_question_is_what_is_asked(rows, sft, drawn, tmp_path):
    other, summary = run_dynamics(sft, drawn, tmp_path / "out.jsonl", "--question", "Is this {prompt}?", "--n-probes", 6)
    assert summary["settings"]["question"] == "Is this {prompt}?"
    assert all(one["log_p"] == two["log_p"] and one["p_yes"] != two["p_yes"] for one, two in zip(rows, other, strict=True))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lr", 0), "--lr must be greater than 0, found 0.0"),
        (("--alternatives", -1), "--alternatives must be at least 0, found -1"),
        (("--examples", 0), "--examples must be at least 1, found 0"),
        (("--n-probes", 0), "--n-probes must be at least 1, found 0"),
        (("--nll-weight", -1), "--nll-weight must be at least 0, found -1.0"),
        (("--question", "Is it right?"), "--question must hold {prompt}, found 'Is it right?'"),
        (("--pairs", "pairs.jsonl"), "not allowed with argument"),
        (("--model", "nowhere"), "nowhere"),
        (("--lr", 1e30, *SGD, "--steps", 2), "try a smaller --lr than 1e+30"),
    ],
)
def test_what_cannot_work_is_refused_on_one_line(flags, message, sft, drawn, tmp_path):
    done = run_dynamics(sft, drawn, tmp_path / "out.jsonl", *flags, ok=False)
    assert message in done.stderr and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("dynamics.py: ")
    assert done.returncode == (1 if "smaller --lr" in message else 2)


def test_several_processes_are_refused(sft, drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run_dynamics(sft, drawn, tmp_path / "out.jsonl", ok=False)
    assert done.returncode == 2 and "start it with python; torchrun has started 2" in done.stderr


def test_bad_files_are_refused_with_their_line(family, sft, drawn, tmp_path):
    no_row = copied(sft, tmp_path / "a", lambda row: row | {"row": 99})
    no_number = copied(drawn, tmp_path / "b", lambda row: row | {"p_yes": 2})
    no_prompt = copied(drawn, tmp_path / "c", metadata={"questions": '["Is it?"]'})
    stranger = copied(drawn, tmp_path / "d", metadata={"model_hash": "0"})
    token, spelled = {
        "janus": ("<img>", "spells a special token of the model"),
        "showo": ("<|endoftext|>", "spells a special token of the model"),
    }[family]
    image = copied(drawn, tmp_path / "e", lambda row: row | {"foil": token})
    for data, probes, message in (
        (no_row, drawn, "sft.jsonl:1: row is 99, but sft.safetensors has"),
        (sft, no_number, "scored.jsonl:1: p_yes must be a number from 0 to 1"),
        (sft, no_prompt, "metadata questions must be a JSON list of texts with {prompt}"),
        (sft, tmp_path / "no.jsonl", "no.safetensors: not found"),
        (sft, stranger, "add --other-model"),
        (sft, image, spelled),
    ):
        done = run_dynamics(data, probes, tmp_path / "out.jsonl", ok=False)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_pictures_of_another_model_are_looked_at_where_that_is_meant(sft, drawn, tmp_path):
    other = copied(drawn, tmp_path / "other", metadata={"model_hash": "0"})
    assert run_dynamics(sft, other, tmp_path / "out.jsonl", "--other-model", "--examples", 2, "--n-probes", 1)[0]


def test_data_is_not_overwritten(sft, paired, drawn):
    before = {path: path.read_bytes() for path in (sft, paired, drawn)}
    for out in before:
        done = run("dynamics.py", "--data", sft, "--probes", drawn, "--out", out, "--device", "cpu", ok=False)
        assert done.returncode == 2 and "which would be lost" in done.stderr
    done = run("dynamics.py", "--data", sft, "--probes", drawn, "--out", drawn.with_suffix(".json"), ok=False)
    assert done.returncode == 2 and "must end in .jsonl" in done.stderr
    assert before == {path: path.read_bytes() for path in before}

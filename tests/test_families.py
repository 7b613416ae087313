"""All families pass the same tests: the interface, every command on a tiny checkpoint of each, two ranks, kills, the loop."""

import ast
import contextlib
import inspect
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HANGS_S, PROMPTS, ROOT, build_janus, learnt, pair_up, run, save_codes, save_janus, score, spawn
from safetensors.torch import load_file, save_file
from showo_golden import random_checkpoint
from test_faults import Runner, assert_same_curve, same
from torch.utils._python_dispatch import TorchDispatchMode

from common import lora
from common.records import SCORED, Tokens, read_rows, stable_seed, tokens_path
from families.codes import CodesInVocabulary
from families.family import PromptError
from families.janus import Janus
from families.pretrained import CheckpointError
from families.showo import ShowO
from model import Judge, UnifiedModel, load, model_hash

TINY = ("--batch-size", 5, "--micro-batch", 3, "--lr", 1e-3, "--device", "cpu")
DATA = {"sft.py": ("--data", "sft.jsonl"), "dpo.py": ("--pairs", "pairs.jsonl")}
CLASSES = {"janus": Janus, "showo": ShowO, "codes": CodesInVocabulary}
OUTSIDE = [*ROOT.glob("*.py"), *(ROOT / "common").glob("*.py"), *(ROOT / "analysis").glob("*.py"), ROOT / "shapes" / "world.py"]


def save_showo(path: Path, seed: int = 1) -> Path:
    return random_checkpoint(path, seed=seed, bits=4, norms=0.5)


@pytest.fixture(scope="module", params=[*CLASSES])
def family(request, tmp_path_factory):
    """A tiny checkpoint of a family, loaded, what score.py and make_pairs.py made of it, and how to make another."""
    if request.param == "janus":
        path, scored, pairs = map(request.getfixturevalue, ("tiny", "scored", "pairs"))
        data, other = pairs.parent, save_janus
    else:
        # gemma: token embedding and head are one table; asked where that matters
        other = {"showo": save_showo, "codes": save_codes, "gemma": partial(save_codes, kind="gemma")}[request.param]
        path = other(tmp_path_factory.mktemp("checkpoint") / request.param)
        scored = score(path, tmp_path_factory.mktemp("scored"))
        data = pair_up(scored, tmp_path_factory.mktemp("round") / "data").parent
    return SimpleNamespace(
        name=request.param, path=path, policy=load(path, device="cpu"), scored=scored, data=data, other=other
    )


@pytest.fixture(scope="module")
def trained(family, tmp_path_factory):
    """script -> one finished run of it on the family's data: its output directory."""
    made = {}

    def make(script: str) -> Path:
        if script not in made:
            made[script] = tmp_path_factory.mktemp(script) / "model"
            run(*command(script, family, made[script]))
        return made[script]

    return make


def command(script: str, family: SimpleNamespace, out: Path) -> tuple:
    flag, file = DATA[script]
    return script, flag, family.data / file, "--out", out, *TINY, "--epochs", 4 if script == "dpo.py" else 2


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors in the one safetensors file of a checkpoint's top directory."""
    (file,) = directory.glob("*.safetensors")
    return load_file(file)


def assert_same_weights(one: Path, other: Path, atol: float) -> None:
    """But for biases of all keys alike, on which no answer depends: their gradient is rounding, which AdamW scales to --lr."""
    ours, theirs = weights(one), weights(other)
    names = [name for name in ours if not name.endswith("k_layernorm.bias")]
    assert len(names) >= 20 and ours.keys() == theirs.keys()
    for name in names:
        assert np.allclose(ours[name], theirs[name], atol=atol), name


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]


def rows_of(path: Path) -> list[dict]:
    return [row for _, row in read_rows(path, SCORED)]


# The interface


def test_load_tells_the_families_apart(family, tmp_path):
    assert type(family.policy) is CLASSES[family.name]
    shutil.copytree(family.path, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    key = "_class_name" if family.name == "showo" else "model_type"
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {key: config[key] + "2"}))
    told = f"found {key} '{config[key]}2'; supported is Janus-Pro .* Show-o .* or a language model with image codes"
    with pytest.raises(CheckpointError, match=told):
        load(tmp_path / "other", device="cpu")


def test_an_adapter_in_the_directory_is_refused_by_who_loads_and_who_asks_for_the_hash(family, tmp_path):
    shutil.copytree(family.path, tmp_path / "other")
    (tmp_path / "other" / "adapter_config.json").write_text('{"base_model_name_or_path": "nobody/nothing"}')
    for read in (load, model_hash):
        with pytest.raises(CheckpointError, match="other: has an adapter_config.json: an adapter is not a whole checkpoint"):
            read(tmp_path / "other")


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything; whoever else runs the tests stays who they are."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("which", ["config.json", "*.safetensors", "tokenizer.json", ".", ".."])
def test_what_may_not_be_read_is_told_as_that(family, which):
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o755)  # tmp_path is root's alone
        directory = Path(shutil.copytree(family.path, Path(made) / "above" / "other"))
        for path in directory.rglob("*.*"):
            path.chmod(0o755)
        found = sorted(directory.rglob(which), key=lambda path: len(path.parts))
        file = {".": directory, "..": directory.parent}.get(which) or found[0]
        file.chmod(0)
        for read in (load, model_hash) if file.parent != directory / "phi-1_5" else (load,):
            with pytest.raises(CheckpointError, match=r"^\S*other(/\S+)?: .*Permission denied$") as refused, as_nobody():
                read(directory)
            assert str(file) in str(refused.value)
        file.chmod(0o755)


def test_every_attribute_that_is_used_outside_is_there(family):
    used = set()
    for path in OUTSIDE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("policy", "judge"):
                used.add(node.attr)
    promised = {name for kind in (Judge, UnifiedModel) for name in (*vars(kind), *kind.__annotations__) if name[0] != "_"}
    assert {"judge", "logps", "mask_draws", "activation_bytes", "drawing_batch", "save"} <= used <= promised
    assert {name for name in promised if not hasattr(family.policy, name)} == set()


def test_methods_of_one_name_are_called_alike():
    methods = [name for name, member in vars(ShowO).items() if name[0] != "_" and callable(member) and hasattr(Janus, name)]
    assert {"sample", "decode", "logps", "save"} <= {*methods}
    for name in methods:
        one, *others = (inspect.signature(getattr(kind, name)).parameters.values() for kind in CLASSES.values())
        for other in others:
            assert [(p.name, p.default) for p in one] == [(p.name, p.default) for p in other], name


def test_the_scripts_draw_judge_and_train_what_the_class_does(family):
    """Rows point at the tokens that were drawn, and P(yes) is of these very tokens."""
    rows, tokens = rows_of(family.scored), Tokens(family.scored)
    block = torch.from_numpy(tokens[[row["row"] for row in rows]])
    asked = [[f"Does this image describe {row[key]}?" for key in ("prompt", "foil")] for row in rows]
    p_yes, coverage = family.policy.judge(block, asked)
    assert np.allclose(p_yes[:, 0], [row["p_yes"] for row in rows], atol=1e-3)
    assert np.allclose(p_yes[:, 1], [row["p_yes_foil"] for row in rows], atol=1e-3)
    assert np.allclose(coverage[:, 0], [row["coverage"] for row in rows], atol=1e-3)
    assert p_yes.std() > 0.01 and len({tuple(row) for row in block.tolist()}) > 18


@pytest.mark.parametrize("whole", [np.uint16, np.int32, np.int64])
def test_logps_take_arrays_of_numpy_and_of_torch_alike(family, whole):
    block = Tokens(family.scored)[[0, 1, 2]]
    dropped = np.array([False, True, False])
    prompts, seeds = ["a red cube", "a big cube", "two green sphere"], [3, 4, 5]
    with torch.no_grad():
        expected = family.policy.logps(prompts, torch.from_numpy(block).long(), seeds, torch.from_numpy(dropped))
        plain = family.policy.logps(prompts, torch.from_numpy(block).long(), seeds)
        for tokens in (block.astype(whole), torch.from_numpy(block.astype(whole))):
            for rows in (dropped, torch.from_numpy(dropped)):
                assert torch.equal(family.policy.logps(prompts, tokens, seeds, rows), expected)
    changed = (expected - plain).abs().sum(dim=-1) > 0
    assert changed.tolist() == dropped.tolist()


def test_looking_with_captions_judges_the_same_and_each_caption_alone(family):
    tokens = torch.from_numpy(Tokens(family.scored)[:3])
    asked = [["Does this image describe a red cube?"]] * 3
    said = ["a red cube", "a sphere", "green"]
    p_yes, coverage, logps = family.policy.judge_with_captions(tokens, asked, [said] * 3, batch=2)
    alone = family.policy.judge(tokens, asked)
    assert torch.allclose(p_yes, alone[0], atol=1e-5) and torch.allclose(coverage, alone[1], atol=1e-5)
    for k, caption in enumerate(said):
        alone = family.policy.judge_with_captions(tokens, asked, [[caption]] * 3)[2][:, 0]
        assert torch.allclose(alone, logps[:, k], atol=1e-4)
    assert (logps < 0).all() and logps.std() > 0.1 and logps.dtype == torch.float32
    with pytest.raises(PromptError, match="caption"):
        family.policy.judge_with_captions(tokens, asked, [[""]] * 3)


def asked_of(family: SimpleNamespace) -> tuple[torch.Tensor, list[str]]:
    """Three drawings and a question about each, of different lengths."""
    questions = [
        "Does this image describe a red cube?",
        "Does this image describe a?",
        "Is this a picture of two green sphere?",
    ]
    return torch.from_numpy(Tokens(family.scored)[[0, 7, 20]]), questions


def test_texts_that_are_filled_up_as_on_a_gpu_change_nothing_but_their_width(family, monkeypatch):
    policy, tokens = family.policy, torch.arange(2 * family.policy.image_tokens).view(2, -1) % family.policy.codebook_size
    short, long = "Is it red?", "Is this a picture of two small red cubes?"
    hidden_states, widths = policy._hidden_states, []

    def watched(inputs, texts):
        widths.append((hidden := hidden_states(inputs, texts)).shape[2])
        return hidden

    def answers() -> list[torch.Tensor]:
        with torch.no_grad():
            found = [policy.logps(["red", "a small red cube"], tokens, seeds=[1, 2])]
            found += policy.answer_logps(tokens, [short, long])
            for caption in ("a red cube", "a red cube and a green cone left of two blue balls"):
                found += policy.judge_with_captions(tokens, [[short, long]] * 2, [[caption]] * 2)
        return found

    monkeypatch.setattr(policy, "_hidden_states", watched)
    plain = answers()
    assert len(set(widths)) > 1
    monkeypatch.setattr(policy, "text_step", 16)
    widths.clear()
    for ours, theirs in zip(answers(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # float32 sums of other lengths
    assert all(width % 16 == 0 for width in widths)


def test_a_text_is_tokenized_once_however_many_pictures_are_asked(family, monkeypatch):
    policy = load(family.path, device="cpu")
    tokens = torch.zeros(6, policy.image_tokens, dtype=torch.int64)
    written = []
    tokenize = policy._tokenize
    monkeypatch.setattr(policy, "_tokenize", lambda text: written.append(text) or tokenize(text))
    for _ in range(2):
        policy.judge_with_captions(tokens, [["Is it red?"]] * 6, [["a cube"]] * 6, batch=2)
        policy.logps(["a red cube"] * 6, tokens)
        assert max(written.count(text) for text in written) == 1
    policy.prompt_ids("a red cube").append(0)
    assert policy.prompt_ids("a red cube")[-1] != 0  # what was given out is the caller's
    monkeypatch.setattr("families.family.REMEMBERED", 5)
    for number in range(20):
        policy.prompt_ids("red " * number)
    assert len(policy.reserved._known) <= 5  # not without end


def test_answer_logps_are_the_logs_of_the_judges_numbers_for_tokens_and_pictures(family):
    tokens, questions = asked_of(family)
    for seen in (tokens, family.policy.decode(tokens)):
        yes, no, coverage = (values.detach() for values in family.policy.answer_logps(seen, questions))
        p_yes, judged_coverage = (values[:, 0] for values in family.policy.judge(seen, [[question] for question in questions]))
        assert torch.allclose(yes, p_yes.log(), atol=1e-5) and torch.allclose(no, (1 - p_yes).log(), atol=1e-5)
        assert torch.allclose(coverage, judged_coverage, atol=1e-6)
        assert p_yes.max() - p_yes.min() > 1e-3  # the three differ
        assert torch.allclose(family.policy.answer_logps(seen[2:], questions[2:])[0], yes[2:], atol=1e-5)


def test_the_gradient_of_an_answer_is_its_slope_and_reaches_the_trained_weights_alone(family):
    fresh = load(family.path, device="cpu")
    trained = list(fresh.trainable_parameters().values())
    tokens, questions = asked_of(family)
    fresh.answer_logps(tokens, questions)[0].sum().backward()
    assert {parameter for parameter in fresh.model.parameters() if parameter.grad is not None} == set(trained)
    torch.manual_seed(0)
    along = [torch.randn_like(parameter) * parameter.std() for parameter in trained]  # a direction, and 1e-3 of it a step
    predicted = sum((parameter.grad.double() * d).sum() for parameter, d in zip(trained, along)).item()
    values = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            for parameter, d in zip(trained, along):
                parameter += step * d
            values.append(fresh.answer_logps(tokens, questions)[0].double().sum().item())
    assert abs(predicted) > 0.05 and (values[0] - values[1]) / 2e-3 == pytest.approx(predicted, rel=2e-3)


def test_the_automatic_batch_follows_free_memory(family, monkeypatch):
    from families import family as shared

    free = 0
    monkeypatch.setattr(shared, "memory", lambda device: (free, free))
    found: dict[float, list[int]] = {1.0: [], 2.0: []}
    for free in (2**power for power in range(10, 41)):
        for guidance, sizes in found.items():
            sizes.append(family.policy.drawing_batch(PROMPTS, guidance))
    for sizes in found.values():
        assert sizes == sorted(sizes) and (sizes[0], sizes[-1]) == (1, 64) and len(set(sizes)) > 4
    assert sum(found[1.0]) > sum(found[2.0])  # guided pictures take more room
    family.policy._drawing = None


# score.py


def test_a_stopped_scoring_goes_on_to_the_same_bytes(family, tmp_path, monkeypatch):
    import score as step

    write, done = step.Chunks.write, []

    def write_one_then_stop(self, *args):
        if done:
            raise KeyboardInterrupt
        done.append(write(self, *args))

    flags = (
        "--model",
        family.path,
        "--prompts",
        family.scored.with_name("color_train.txt"),
        "--out",
        tmp_path / "scored.jsonl",
    )
    flags = (*flags, "--candidates", 6, "--guidance", 2, "--chunk", 4, "--device", "cpu")
    with monkeypatch.context() as patched:
        patched.setattr(step.Chunks, "write", write_one_then_stop)
        assert run("score.py", *flags, ok=False).returncode == 130
    run("score.py", *flags)
    assert same(tmp_path / "scored.jsonl", family.scored)
    assert same(tmp_path / "scored.safetensors", tokens_path(family.scored))


def test_another_model_of_the_family_rejudges_the_same_pictures(family, tmp_path):
    other = family.other(tmp_path / "other", seed=4)
    run("score.py", "--model", other, "--rejudge", family.scored, "--out", tmp_path / "re.jsonl", "--device", "cpu")
    old, new = rows_of(family.scored), rows_of(tmp_path / "re.jsonl")
    assert [row["row"] for row in old] == [row["row"] for row in new]
    assert [row["p_yes"] for row in old] != [row["p_yes"] for row in new]
    metadata = Tokens(tmp_path / "re.jsonl").metadata
    assert metadata["model"] == str(family.path) and metadata["judge"] == str(other)


def test_one_family_does_not_judge_the_tokens_of_the_other(family, tiny, tmp_path):
    stranger = save_showo(tmp_path / "stranger") if family.name == "janus" else tiny
    done = run("score.py", "--model", stranger, "--rejudge", family.scored, "--out", tmp_path / "re.jsonl", ok=False)
    assert done.returncode == 2 and "but" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_number_of_steps_draws_other_pictures_and_is_kept_or_refused(family, tmp_path):
    draw = ("score.py", "--model", family.path, "--prompts", family.scored.with_name("color_train.txt"), "--device", "cpu")
    draw = (*draw, "--candidates", 6, "--guidance", 2, "--out", tmp_path / "scored.jsonl")
    assert "--steps must be at least 1, found 0" in run(*draw, "--steps", 0, ok=False).stderr
    done = run(*draw, "--steps", 2, ok=False)
    if family.policy.steps is None:
        assert done.returncode == 2 and "takes no --steps, found 2: it draws one token after the other" in done.stderr
        assert not list(tmp_path.iterdir()) and "steps" not in Tokens(family.scored).metadata
        return
    made, usual = Tokens(tmp_path / "scored.jsonl"), Tokens(family.scored)
    assert (made.metadata["steps"], usual.metadata["steps"]) == ("2", str(family.policy.steps))
    seeds = [stable_seed("sample", 0, row["id"]) for row in rows_of(family.scored)[::6]]
    drawn = load(family.path, device="cpu", steps=2).sample(PROMPTS, 6, guidance=2.0, seeds=seeds)
    assert np.array_equal(made[:], drawn.flatten(0, 1)) and not np.array_equal(made[:], usual[:])
    again = run(*draw, ok=False)
    assert again.returncode == 2 and f"steps was '2', now '{family.policy.steps}'" in again.stderr
    pair_up(tmp_path / "scored.jsonl", tmp_path / "data")
    assert Tokens(tmp_path / "data" / "sft.jsonl").metadata["steps"] == "2"


# sft.py and dpo.py


def test_what_is_trained_has_the_log_probs_that_it_draws_with_whatever_dropout_its_config_asks_for(family):
    from common.sharding import to_training

    policy = load(family.path, device="cpu")
    of = list(policy.branch.modules())
    attention = [module for module in of if isinstance(getattr(module, "attention_dropout", None), float)]
    dropouts = [module for module in of if isinstance(module, torch.nn.Dropout)]
    tokens = Tokens(family.scored)[:3]

    def logps() -> torch.Tensor:
        with torch.no_grad():
            return policy.logps(PROMPTS[:3], tokens, [1, 2, 3])

    drawn = logps()
    policy.branch.train()
    for module in attention:
        module.attention_dropout = 0.5
    for module in dropouts:
        module.p = 0.5
    assert attention and (logps() - drawn).abs().max() > 0.01
    to_training(policy)
    assert policy.branch.training and torch.allclose(logps(), drawn, atol=1e-5)


@pytest.mark.parametrize("flags", [(), ("--lora-rank", 2)])
def test_of_the_layers_only_those_that_are_named_learn(family, tmp_path, flags):
    what = (*command("sft.py", family, tmp_path / "model"), "--max-steps", 1, *flags)
    for layers, told in {"1": "--layers", "1-0": "--layers", "0-2": "has layers 0 to 1"}.items():
        done = run(*what, "--layers", layers, ok=False)
        assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1
    if not flags:  # what draws is in no layer
        done = run(*what, "--layers", "1-1", "--train", "drawing", ok=False)
        assert done.returncode == 2 and "--layers 1-1 are decoder layers; --train drawing wants more" in done.stderr
    done = run(*what, "--layers", "1-1")
    assert "layers 1 to 1)" in done.stdout
    before, after = weights(family.path), weights(tmp_path / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".layers.1." in name for name in changed)


@pytest.mark.parametrize("script", ["sft.py", "dpo.py"])
def test_the_number_of_mask_draws_changes_the_estimates_and_is_kept_or_refused(family, trained, tmp_path, script):
    what = (*command(script, family, tmp_path / "model"), "--max-steps", 1)
    assert "--mask-draws must be at least 1, found 0" in run(*what, "--mask-draws", 0, ok=False).stderr
    done = run(*what, "--mask-draws", 3, ok=False)
    if family.policy.mask_draws is None:
        assert done.returncode == 2 and "takes no --mask-draws, found 3: its log-probs are exact" in done.stderr
        assert not list(tmp_path.iterdir())
        return
    assert "estimated from 3 masks a picture" in done.stdout
    settings = json.loads((tmp_path / "model" / "training" / "settings.json").read_text())
    assert settings["mask_draws"] == 3
    (first,), usual = metrics(tmp_path / "model"), metrics(trained(script))[0]
    key = {"sft.py": "loss", "dpo.py": "chosen_logps"}[script]
    assert abs(first[key] - usual[key]) > 1e-3
    again = run(*what, "--mask-draws", 4, ok=False)
    assert again.returncode == 2 and "mask_draws was 3, now 4" in again.stderr


@pytest.mark.parametrize("script", ["sft.py", "dpo.py"])
def test_training_lowers_its_loss_and_changes_the_decoder_layers_alone(family, trained, script):
    out, numbers = trained(script), metrics(trained(script))
    before, after = weights(family.path), weights(out)
    assert {
        name for name in before if not torch.equal(before[name], after[name])
    } == family.policy.trainable_parameters().keys()
    tokens, rows = Tokens(family.data / "sft.jsonl"), [row for _, row in read_rows(family.data / "sft.jsonl", {})]
    images, prompts = torch.from_numpy(tokens[[row["row"] for row in rows]]), [row["prompt"] for row in rows]
    with torch.no_grad():
        gains = load(out, device="cpu").logps(prompts, images) - family.policy.logps(prompts, images)
    assert gains.sum(-1).mean() > 0.1  # nats a picture
    if script == "dpo.py":
        assert numbers[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and numbers[-1]["margin"] > 0
        assert ("kl" in numbers[0]) == (family.policy.mask_draws is None) == (family.name != "showo")


@pytest.mark.parametrize("script", ["sft.py", "dpo.py"])
def test_a_step_waits_for_the_device_once_however_many_passes_it_takes(script, monkeypatch):
    import dpo
    import sft

    class Waits(TorchDispatchMode):
        """Counts what asks the device for a number; on a GPU each is a wait."""

        n = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.n += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return function(*args, **kwargs or {})

    class Rows(np.ndarray):
        length = 3

    weight = torch.zeros((), requires_grad=True)
    logps = lambda prompts, tokens, seeds, dropped: weight - torch.as_tensor(tokens) - 1.0
    policy = SimpleNamespace(device=torch.device("cpu"), logps=logps, mask_draws=None)
    tokens = np.arange(24).reshape(8, 3).view(Rows)
    rows = [{"id": str(i), "prompt": "a", "seed": 1, "row": i, "chosen": i, "rejected": i + 4} for i in range(4)]
    args = SimpleNamespace(micro_batch=None, average_logps=False, beta=0.1, nll_weight=1.0)
    run = SimpleNamespace(args=args, ranks=SimpleNamespace(rank=0, world=1), tokens=tokens)
    waits = []
    for args.micro_batch in (1, 4):
        with Waits() as counted:
            dropped = np.zeros(4, bool)
            if script == "sft.py":
                sft.accumulate(policy, rows, dropped, run)
            else:
                dpo.accumulate(policy, rows, dropped, torch.zeros(4, 2, 3), run)
        waits.append(counted.n)
    assert waits[0] == waits[1] > 0


@pytest.mark.parametrize("script", ["sft.py", "dpo.py"])
def test_the_micro_batch_and_recomputation_change_memory_alone_and_the_seed_all(family, trained, tmp_path, script):
    what = command(script, family, tmp_path / "small")
    run(*what, "--micro-batch", 1, "--gradient-checkpointing")
    run(*command(script, family, tmp_path / "other"), "--seed", 5)
    assert_same_curve(tmp_path / "small", trained(script))
    assert_same_weights(tmp_path / "small", trained(script), atol=2e-4)
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "other", trained(script), atol=2e-4)


def test_a_trained_model_draws_judges_and_trains_on(family, trained, tmp_path):
    model = trained("sft.py")
    draw = ("--prompts", family.scored.with_name("color_train.txt"), "--candidates", 3, "--guidance", 2, "--device", "cpu")
    run("score.py", "--model", model, *draw, "--out", tmp_path / "scored.jsonl")
    assert Tokens(tmp_path / "scored.jsonl").metadata["model_hash"] == load(model, device="cpu").identity()["model_hash"]
    pair_up(tmp_path / "scored.jsonl", tmp_path / "data")
    run("sft.py", "--data", tmp_path / "data" / "sft.jsonl", "--out", tmp_path / "next", *TINY, "--max-steps", 1)
    assert (tmp_path / "next" / "training").is_dir()


def test_adapters_learn_and_are_merged_into_an_ordinary_checkpoint(family, tmp_path):
    flags = ("--lora-rank", 2, "--lr", 1e-2, "--epochs", 4)
    run(*command("dpo.py", family, tmp_path / "model"), *flags)
    numbers, before, after = metrics(tmp_path / "model"), weights(family.path), weights(tmp_path / "model")
    assert numbers[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and numbers[-1]["loss"] < numbers[0]["loss"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    begins = {"janus": "model.language_model", "showo": "showo.model", "codes": "model"}[family.name]
    matrices = {name for name, tensor in before.items() if name.startswith(f"{begins}.layers.") and tensor.dim() == 2}
    assert changed == matrices and load(tmp_path / "model", device="cpu")


@pytest.mark.parametrize("family", ["janus", "showo"], indirect=True)  # the layers of the third are of the same kind
def test_frozen_weights_stored_in_half_precision_stay_so_and_change_no_bit(family, tmp_path):
    """On a CPU, which computes in float32. Between the passes nothing keeps their float32 but what `nn.Linear` would keep."""
    load(family.path, device="cpu").save(tmp_path / "half", dtype=torch.bfloat16)
    found, images = [], torch.arange(3 * family.policy.image_tokens).view(3, -1) % family.policy.codebook_size
    for kept in (torch.bfloat16, torch.float32):
        policy = learnt(tmp_path / "half")
        layers = lora.adapters(policy.model).values()
        assert {layer.weight.dtype for layer in layers} == {torch.bfloat16} and policy.head.weight.dtype == torch.float32
        for layer in layers:
            layer.weight.data = layer.weight.data.to(kept)
        sizes: list[int] = []
        watched = {tuple(layer.weight.shape) for layer in layers}

        def keep(tensor):
            sizes.append(tensor.nbytes if {tuple(tensor.shape), tuple(tensor.shape)[::-1]} & watched else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logps = policy.logps(PROMPTS[:3], images)
        logps.sum().backward()
        found.append([logps, *(value.grad for value in policy.trainable_parameters("adapters").values()), sum(sizes)])
    assert found[0][-1] * 1.5 < found[1][-1]  # what is kept of the weights
    for half, full in zip(found[0][:-1], found[1][:-1], strict=True):
        assert torch.equal(half, full)
    assert {layer.weight.dtype for layer in lora.adapters(learnt(family.path).model).values()} == {torch.float32}


def save_by_library(directory: Path, adapted: UnifiedModel, plain: UnifiedModel, dtype: torch.dtype, shard: str) -> None:
    """What transformers and safetensors write of `plain` once the additions of `adapted` are in it, in float32."""
    with torch.no_grad():
        for name, layer in lora.adapters(adapted.model).items():
            plain.model.get_submodule(name).weight += layer.scale * (layer.lora_b @ layer.lora_a)
        for parameter in (plain.model["showo"] if isinstance(plain, ShowO) else plain.model).parameters():
            parameter.data = parameter.data.to(dtype)
    if isinstance(plain, Janus):
        plain.model.generation_config = adapted.model.generation_config
        for part in (plain.model.config.text_config, plain.model.config.vision_config, plain.model.config.vq_config):
            part.dtype = "float32"  # what transformers says of a model that it was asked for in float32
        plain.model.save_pretrained(directory, max_shard_size=shard)
        plain.processor.save_pretrained(directory)
        return
    if isinstance(plain, CodesInVocabulary):
        plain.model.save_pretrained(directory, max_shard_size=shard)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(plain.directory / file, directory)
        (directory / "magvitv2").mkdir()
        save_file(plain.vq.state_dict(), directory / "magvitv2" / "pytorch_model.safetensors", {"format": "pt"})
        return
    state = {name: tensor.contiguous() for name, tensor in plain.model.state_dict().items()}
    showo = {name: tensor for name, tensor in state.items() if name.startswith("showo.")}
    vq = {name.removeprefix("magvitv2."): tensor for name, tensor in state.items() if name not in showo}
    vq = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in vq.items()}
    (directory / "magvitv2").mkdir(parents=True)
    save_file(showo, directory / "pytorch_model.safetensors", {"format": "pt"})
    save_file(vq, directory / "magvitv2" / "pytorch_model.safetensors", {"format": "pt"})
    for file, content in plain.files.items():
        (directory / file).parent.mkdir(exist_ok=True)
        (directory / file).write_bytes(content)


@pytest.mark.parametrize(
    "family, stored, saved",
    [
        *itertools.product(["janus", "showo"], [torch.float32, torch.bfloat16], [torch.float32, torch.bfloat16]),
        ("codes", torch.bfloat16, torch.bfloat16),  # which writes as Janus does
    ],
    indirect=["family"],
    ids=str,
)
def test_a_save_with_adapters_is_the_librarys_own_byte_for_byte(family, tmp_path, monkeypatch, stored, saved):
    """Shards, index, header, padding, config, and the sums, of float32 whatever the live weights are rounded to."""
    monkeypatch.setattr("families.pretrained.SHARD_BYTES", 40_000)
    base = load(family.path, device="cpu")
    base.save(tmp_path / "base", dtype=stored)
    for live in (torch.float32, torch.bfloat16):
        adapted = learnt(tmp_path / "base", dtype=live)
        plain = load(tmp_path / "base", device="cpu", dtype=torch.float32)
        save_by_library(tmp_path / f"library-{live}", adapted, plain, saved, "40KB")
        adapted.save(tmp_path / f"ours-{live}", dtype=saved)
        files = {path.relative_to(tmp_path / f"ours-{live}") for path in (tmp_path / f"ours-{live}").rglob("*")}
        assert files == {path.relative_to(tmp_path / f"library-{live}") for path in (tmp_path / f"library-{live}").rglob("*")}
        assert sum(path.suffix == ".safetensors" for path in files) >= (4 if family.name == "janus" else 2)
        for file in files:
            ours, theirs = tmp_path / f"ours-{live}" / file, tmp_path / f"library-{live}" / file
            assert ours.is_dir() or ours.read_bytes() == theirs.read_bytes(), file


def test_a_save_that_dies_half_way_leaves_what_was_there(family, tmp_path, monkeypatch):
    """And no file of its own: the second tensor is not to be had."""
    policy, calls = learnt(family.path), []
    merged = lora.Adapted.merged

    def once(self, stored):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return merged(self, stored)

    monkeypatch.setattr(lora.Adapted, "merged", once)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    with pytest.raises(OSError, match="the model cannot be saved"):
        policy.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["old"]


SAVING = """
import re, sys, torch
from common import lora
from model import load
policy = load(sys.argv[1], device="cpu", dtype=getattr(torch, sys.argv[3]))
lora.add_adapters(policy.blocks, rank=2, alpha=4.0, seed=0)
tensors = list(policy.model.parameters())
peak = lambda what: int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # from here on VmHWM starts anew
policy.save(sys.argv[2], dtype=torch.float32)
print(sum(t.nbytes for t in tensors), 4 * max(t.numel() for t in tensors), peak("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
# The third writes as the first does, and each of the two with both types takes as long again.
@pytest.mark.parametrize(("family", "live"), [("janus", "bfloat16"), ("showo", "float32")], indirect=["family"])
def test_saving_adapters_takes_a_few_tensors_of_memory_not_a_model(family, tmp_path, live):
    """In a process of its own: a model of 100 MB, its largest tensor of 4 MB. Up to 36 MB are made once, of any model."""
    if family.name == "janus":
        model, processor = build_janus()
        text = model.config.text_config
        text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.head_dim = 512, 1376, 8, 128
        model.config.vision_config.projection_dim = model.config.vq_config.projection_dim = 512
        model.config.vq_config.image_token_embed_dim = 512
        type(model)(model.config).save_pretrained(tmp_path / "wide")
        processor.save_pretrained(tmp_path / "wide")
    else:
        random_checkpoint(tmp_path / "wide", width=512, mlp=2048, layers=8)
    done = spawn(sys.executable, "-c", SAVING, tmp_path / "wide", tmp_path / "saved", live)
    whole, largest, grown = map(int, done.stdout.split())
    assert whole > 90e6 * (0.5 if live == "bfloat16" else 1) and largest < 5e6
    assert grown < 50e6, (whole, largest, grown)  # the whole model in float32 is 100e6


def test_every_adapter_and_nothing_else_trains(family):
    fresh = load(family.path, device="cpu")
    n_matrices = sum(isinstance(module, torch.nn.Linear) for block in fresh.blocks for module in block.modules())
    lora.add_adapters(fresh.blocks, rank=3, alpha=6.0, seed=0)
    trained = fresh.trainable_parameters("adapters")
    assert {name.rsplit(".", 1)[1] for name in trained} == {"lora_a", "lora_b"} and len(trained) == 2 * n_matrices
    assert trained.keys() == {name for name, parameter in fresh.model.named_parameters() if parameter.requires_grad}


def test_the_pictures_scripts_read_a_familys_files(family, trained, tmp_path):
    """diagnose, export and report on a run of one round."""
    for number in (0, 1):
        (tmp_path / f"round{number}").mkdir()
    after, rejudged = tmp_path / "round1" / "heldout.jsonl", tmp_path / "round1" / "rejudged.jsonl"
    before = tmp_path / "round0" / "heldout.jsonl"
    for file in (family.scored, tokens_path(family.scored)):
        shutil.copy(file, before.with_suffix(file.suffix))
    shutil.copytree(trained("sft.py"), tmp_path / "round1" / "model")
    model = ("--model", tmp_path / "round1" / "model", "--device", "cpu")
    draw = ("--prompts", family.scored.with_name("color_train.txt"), "--candidates", 6, "--guidance", 2)
    run("score.py", *model, *draw, "--out", after)
    run("score.py", *model, "--rejudge", before, "--out", rejudged)
    done = run("diagnose.py", "--before", before, "--after", after, "--rejudged", rejudged)
    assert (tmp_path / "round1" / "diagnosis.json").is_file() and "verdict" in done.stdout
    run("export.py", before, "--layout", "plain", "--out", tmp_path / "pictures", "--device", "cpu")
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == 36
    run("summary.py", tmp_path)
    done = run("report.py", tmp_path, "--device", "cpu")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") > 10, done.stdout


# The random draws of estimated log-probs


def recorded(monkeypatch, kind: type) -> list[tuple]:
    """(prompts, seeds, whether it trains) of every call of a family's logps."""
    calls, logps = [], kind.logps

    def recording(self, prompts, tokens, seeds=None, unconditional=None):
        calls.append((prompts, seeds, torch.is_grad_enabled()))
        return logps(self, prompts, tokens, seeds, unconditional)

    monkeypatch.setattr(kind, "logps", recording)
    return calls


def test_supervised_steps_never_draw_the_same_masks_twice(family, tmp_path, monkeypatch):
    calls = recorded(monkeypatch, type(family.policy))
    run(*command("sft.py", family, tmp_path / "model"))
    seeds = [seed for _, given, _ in calls for seed in given]
    examples = len((family.data / "sft.jsonl").read_text().splitlines())
    assert len(seeds) == 2 * examples == len(set(seeds))


def test_a_pair_has_one_seed_for_both_pictures_the_reference_and_every_step(family, tmp_path, monkeypatch):
    calls = recorded(monkeypatch, type(family.policy))
    run(*command("dpo.py", family, tmp_path / "model"))
    for _, seeds, _ in calls:
        half = len(seeds) // 2
        assert seeds[:half] == seeds[half:]
    reference, training = ({seed for _, seeds, grad in calls if grad is kind for seed in seeds} for kind in (False, True))
    assert reference == training and len(reference) == len((family.data / "pairs.jsonl").read_text().splitlines())


def test_estimates_that_are_far_apart_stop_no_run():
    from argparse import Namespace

    from dpo import step_loss

    policy, reference = torch.tensor([[[90.0, -300.0]], [[0.0, -500.0]]]), torch.tensor([[[-200.0, 0.0]], [[-90.0, -9.0]]])
    args, both = Namespace(beta=0.1, nll_weight=1.0, average_logps=False), torch.tensor([True])
    _, exact = step_loss(policy, reference, both, both, args, with_kl=True)
    _, estimated = step_loss(policy, reference, both, both, args, with_kl=False)
    assert exact["kl"].isinf().all() and estimated.keys() == exact.keys() - {"kl"}
    assert all(torch.isfinite(values).all() and torch.equal(values, exact[key]) for key, values in estimated.items())


def test_draw_seeds_depend_on_seed_step_and_place_alone():
    from common.training import draw_seeds

    assert draw_seeds([3, 8], 0, 2)[1] == draw_seeds([8], 0, 2)[0]
    every = [seed for s in range(3) for step in range(3) for seed in draw_seeds(range(50), s, step)]
    assert len(set(every)) == len(every) == 450 and all(type(seed) is int and 0 <= seed < 2**64 for seed in every)


# Real processes. Of Janus, test_faults.py asks the same and more.


@pytest.mark.thorough
@pytest.mark.faults
@pytest.mark.parametrize("family", ["showo", "codes"], indirect=True)
def test_two_ranks_score_the_same_bytes_and_train_the_same_weights(family, trained, warm, tmp_path):
    python = Runner(warm)
    draw = ("--prompts", family.scored.with_name("color_train.txt"), "--candidates", 6, "--guidance", 2, "--chunk", 4)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    for ranks, out in ((1, one), (2, two)):  # each on one thread: other numbers of them round a Tar's answers otherwise
        python.finish("score.py", "--model", family.path, *draw, "--out", out, "--device", "cpu", ranks=ranks)
    assert same(one, two) and same(tokens_path(one), tokens_path(two)) and len(Tokens(two)[:]) == 36
    for script in ("sft.py", "dpo.py"):
        python.finish(*command(script, family, tmp_path / script), ranks=2)
        assert_same_curve(tmp_path / script, trained(script))
        assert_same_weights(tmp_path / script, trained(script), atol=2e-5)


@pytest.mark.thorough
@pytest.mark.faults
@pytest.mark.parametrize(
    "family, flags",
    [
        ("showo", ("--lora-rank", 2)),
        ("showo", ("--train", "drawing", "--gradient-checkpointing")),
        ("codes", ("--train", "drawing")),
        ("codes", ("--lora-rank", 2)),
        ("gemma", ("--train", "drawing")),
    ],
    indirect=["family"],
)
def test_variants_train_the_same_on_two_ranks_as_on_one(family, warm, tmp_path, flags):
    what = (*flags, "--max-steps", 3)
    run(*command("dpo.py", family, tmp_path / "one"), *what)
    Runner(warm).finish(*command("dpo.py", family, tmp_path / "two"), *what, ranks=2)
    assert_same_curve(tmp_path / "two", tmp_path / "one")
    assert_same_weights(tmp_path / "two", tmp_path / "one", atol=2e-5)


@pytest.mark.faults
@pytest.mark.parametrize("family", ["showo", "codes"], indirect=True)
def test_training_stopped_by_sigterm_ends_with_the_same_bytes(family, trained, warm, tmp_path):
    python, out, work = Runner(warm), tmp_path / "model", tmp_path / "model.training"
    what = (*command("dpo.py", family, out), "--save-every", 0)
    reference = tmp_path / "whole"
    python.finish(*command("dpo.py", family, reference), "--save-every", 0)
    process = python.start(*what)
    while not (work / "metrics.jsonl").exists() or not (work / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=HANGS_S)
    assert process.returncode == 143 and len(list(work.glob("state-*"))) == 1
    assert "resumed        after step" in python.finish(*what).stdout
    (file,) = reference.glob("*.safetensors")
    assert same(out / file.name, file)


@pytest.mark.thorough
@pytest.mark.faults
def test_the_loop_runs_on_a_show_o_with_two_ranks(warm, tmp_path):
    model = save_showo(tmp_path / "showo")
    (tmp_path / "train.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "val.txt").write_text("a red cone\na green cube\n")
    settings = {
        "MODEL": model,
        "PROMPTS": tmp_path / "train.txt",
        "EVAL_PROMPTS": tmp_path / "val.txt",
        "OUT": tmp_path / "run",
        "ROUNDS": 1,
        "CANDIDATES": 4,
        "EVAL_CANDIDATES": 2,
        "GUIDANCE": 2.75,
        "METHOD": "sft+dpo",
        "NPROC": 2,
        "PAIRS_FLAGS": "--force --threshold 0.47",
        "GATE": "warn",  # a random judge never says yes or no
        "SFT_FLAGS": "--epochs 1 --batch-size 8",
        "DPO_FLAGS": "--epochs 1 --batch-size 8",
        "PYTHON": warm,
        "PYTHON_EXEC": warm,
        "OMP_NUM_THREADS": 1,
    }
    environment = os.environ | {key: str(value) for key, value in settings.items()}
    done = subprocess.run([ROOT / "self_improve.sh"], env=environment, capture_output=True, text=True, timeout=HANGS_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "run" / "report.html")
    rows = [json.loads(line) for line in (tmp_path / "run" / "summary.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1]
    assert type(load(tmp_path / "run" / "round1" / "model", device="cpu")) is ShowO

"""What is fast must be the same: recorded steps, joined weights, batches, logits in pieces, low-rank adapters, start-up."""

import argparse
import contextlib
import copy
import json
import os
import resource
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import CODEBOOK, ROOT, build_janus, learnt, run, script_path, spawn
from test_house import COMMANDS
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import lora
from common.memory import memory
from common.records import Tokens
from families import autoregressive, family, llama
from families.drawing import Drawing
from families.janus import DrawingBranch, Janus
from families.judging import answer_logits, yes_no
from families.llama import Llama
from families.logits import head_logps, token_logps
from model import load

PROMPTS = ["a red cube", "two big blue sphere and one small green cone left of a red cube", "green"]


class Graph(TorchDispatchMode):
    """A stand-in for torch.cuda.CUDAGraph: what is called while it records changes nothing and is repeated at each replay.

    As a CUDA graph it knows tensors by where they lie: a Python number of the recording stays what it was.
    """

    made: ClassVar[list["Graph"]] = []
    replays = 0

    def __init__(self):
        super().__init__()
        Graph.made.append(self)
        self.calls, self.written = [], []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for value, argument in zip(args, operation._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written.append((value, value.clone()))
        result = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, result))
        return result

    def undo(self):
        for tensor, before in reversed(self.written):
            tensor.copy_(before)

    def replay(self):
        Graph.replays += 1
        for operation, args, kwargs, before in self.calls:
            for old, new in zip(tree_leaves(before), tree_leaves(operation(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # no view, nothing in place
                    old.copy_(new)

    def pool(self):
        return "pool"


class Card:
    """A stand-in for what torch.cuda does about streams and recording; `did` is what it was asked for, in order."""

    def __init__(self):
        self.did, self.current, self.failure = [], "outside", None

    def install(self, monkeypatch):
        monkeypatch.setattr(Graph, "made", [])
        monkeypatch.setattr(Graph, "replays", 0)
        for name in ("Stream", "current_stream", "stream", "device", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)

    def Stream(self, device):
        return Stream(self, "drawing's")

    def current_stream(self):
        return Stream(self, self.current)

    @contextlib.contextmanager
    def device(self, device):
        self.did.append(f"on {device}")
        yield

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None):
        self.did.append(f"recorded in {pool}, on the {stream.name} stream, current is the {self.current}")
        self.current = "lost"  # torch's own leaves its stream current where the end of a recording raises
        if self.failure:
            raise self.failure
        with graph:
            yield
        graph.undo()
        self.current = stream.name


class Stream:
    def __init__(self, card, name):
        self.card, self.name = card, name

    def wait_stream(self, other):
        self.card.did.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def card(policy, monkeypatch):
    """Steps as on a GPU: read up to multiples of READ_STEP, the first of each kind run and recorded, later ones replayed."""
    card = Card()
    card.install(monkeypatch)
    monkeypatch.setattr(policy, "record", True)
    monkeypatch.setattr(policy, "_drawing", None)
    monkeypatch.setattr(policy, "_longest", 0)
    return card


# Drawing


def test_a_step_never_waits_for_the_device(policy):
    """On the meta device there are no values: reading one back, as a host sync does, is an error."""
    model = copy.deepcopy(policy.model).to("meta")
    drawing = Drawing(DrawingBranch(model), Llama(model.model.language_model), 10, 3, 4, 2.0, 1.0, False)
    drawing.masked = True
    with torch.no_grad():
        drawing._feed_and_choose(12)
    assert drawing.tokens.is_meta


@pytest.mark.parametrize("temperature", [0, 1])
def test_recorded_steps_draw_the_same_pictures(policy, card, monkeypatch, temperature):
    monkeypatch.setattr("families.drawing.READ_STEP", 3)  # the four image tokens then need two kinds of step
    recorded = policy.sample(PROMPTS, 3, 2.0, temperature, [5, 6, 7], batch=4)
    assert len(Graph.made) == 2 and Graph.replays > 2 and policy.record
    policy.record = False
    assert torch.equal(policy.sample(PROMPTS, 3, 2.0, temperature, [5, 6, 7], batch=4), recorded)
    assert len(Graph.made) == 2


def test_recording_happens_on_the_drawings_own_device_and_stream(policy, card):
    """Else the kernels of cuda:1 run while they should be recorded, the graph is empty, and replays leave what was there."""
    policy.sample(PROMPTS[:1], 1, 2.0, 1.0)
    assert card.did == [
        "on cpu",
        "drawing's waits for outside",
        "recorded in None, on the drawing's stream, current is the drawing's",
        "outside waits for drawing's",
    ]
    assert card.current == "outside"


def test_one_process_too_makes_its_gpu_the_current_one(monkeypatch):
    from common.ranks import Ranks

    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in ("cuda:1", None, "cpu"):
        Ranks().join(device)
    assert chosen == [torch.device("cuda", 1), torch.device("cuda", 0)]


def test_chunks_of_longer_and_shorter_prompts_are_drawn_by_the_same_recorded_steps(policy, card, monkeypatch):
    monkeypatch.setattr("families.drawing.READ_STEP", 32)
    monkeypatch.setattr(autoregressive, "PROMPT_STEP", 4)
    chunks = [[PROMPTS[0]] * 3, PROMPTS, [PROMPTS[2]] * 3, [PROMPTS[1]] * 3]
    policy.drawing_batch([prompt for chunk in chunks for prompt in chunk], 2.0)
    recorded = [policy.sample(chunk, 2, 2.0, 1.0, [5, 6, 7], batch=6) for chunk in chunks]
    assert len({len(policy.prompt_ids(prompt)) for prompt in PROMPTS}) == 3 and len(Graph.made) == 1  # all read 32 places
    policy.record = False
    for chunk, tokens in zip(chunks, recorded, strict=True):
        policy._drawing = None
        assert torch.equal(policy.sample(chunk, 2, 2.0, 1.0, [5, 6, 7], batch=6), tokens)


@pytest.mark.parametrize("failure", ["raises", "replays nothing"])
def test_where_recording_fails_drawing_goes_on_without_and_says_so_once(policy, card, monkeypatch, capsys, failure):
    monkeypatch.setattr("families.drawing.READ_STEP", 3)
    if failure == "raises":
        card.failure = RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors ...")
        told = "CUDA error: operation not permitted when stream is capturing"
    else:
        monkeypatch.setattr(Graph, "undo", lambda self: self.calls.clear())  # what happened on another device than cuda:0
        told = "replayed, the step chose other tokens"
    drawn = [policy.sample(PROMPTS, 3, 2.0, 1.0, seeds, batch=4) for seeds in ([5, 6, 7], [1, 2, 3])]
    assert capsys.readouterr().err == (
        f"warning        decode steps cannot be recorded on cpu ({told}); drawing goes on without, slower\n"
    )
    assert not policy.record and len(Graph.made) == 1 and card.current == "outside"
    policy._drawing = None
    for seeds, tokens in zip(([5, 6, 7], [1, 2, 3]), drawn, strict=True):
        assert torch.equal(policy.sample(PROMPTS, 3, 2.0, 1.0, seeds, batch=4), tokens)


def test_running_out_of_memory_while_recording_is_no_failure_of_recording(policy, card):
    card.failure = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(torch.OutOfMemoryError):
        policy.sample(PROMPTS, 1, 2.0, 1.0)
    assert policy.record and policy._drawing is None


def test_recording_is_for_gpus_and_can_be_switched_off(tiny, policy, monkeypatch):
    assert load(tiny, device="cpu").record is False
    monkeypatch.setattr(Janus, "_read_special_tokens", lambda self: setattr(self, "device", torch.device("cpu")))
    for eagerly, record in (("", True), ("1", False)):
        monkeypatch.setenv("DRAW_EAGERLY", eagerly)
        with monkeypatch.context() as patched:
            patched.setattr(type(policy.model), "device", torch.device("cuda", 0))
            patched.setattr(family, "answer_ids", lambda *_: (None, None))
            assert Janus(policy.model, policy.processor).record is record


def test_the_next_batch_of_the_same_shape_allocates_nothing_and_another_shape_does(policy):
    policy.sample(PROMPTS, 2, 2.0, 1.0, batch=3)
    first = policy._drawing
    policy.sample(PROMPTS, 2, 2.0, 1.0, seeds=[8, 9, 10], batch=3)
    policy.sample([PROMPTS[0]] * 3, 2, 2.0, 1.0, batch=3)  # shorter prompts leave room
    assert policy._drawing is first
    policy.sample(PROMPTS, 2, 3.0, 1.0, batch=3)
    assert policy._drawing is not first


def test_a_picture_does_not_depend_on_what_was_drawn_before_it(policy):
    short, long = PROMPTS[:1], PROMPTS[1:2]
    policy._drawing = None
    alone = policy.sample(short, 2, 2.0, 1.0, [5])
    policy.sample(long, 2, 2.0, 1.0)
    room = policy._drawing
    assert torch.equal(policy.sample(short, 2, 2.0, 1.0, [5]), alone) and policy._drawing is room


def test_a_decode_step_has_thirteen_operations_a_layer(policy, monkeypatch):
    """On a GPU each is a kernel, and they are what a step of few pictures consists of."""
    monkeypatch.setattr("families.llama.norm", lambda x, weight, eps: x * weight)  # one kernel too; on a CPU it is six

    class Count(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            returns = operation._schema.returns
            if not any(value.alias_info is not None and not value.alias_info.is_write for value in returns):  # no view
                self.names.append(operation.name())
            return operation(*args, **(kwargs or {}))

    counts = []
    for layers in (2, 1):
        model = copy.deepcopy(policy.model)
        del model.model.language_model.layers[layers:]
        drawing = Drawing(DrawingBranch(model), Llama(model.model.language_model), 10, 1, 4, 2.0, 1.0, False)
        drawing.masked = True
        Count.names.clear()
        with torch.no_grad(), Count():
            drawing._feed_and_choose(12)
        counts.append(Counter(Count.names))
    layer = counts[0] - counts[1]
    assert sum(layer.values()) <= 13, layer


def test_the_lean_pass_leaves_the_embeddings_as_they_were(policy):
    """It adds to them in place: to its own copy."""
    embeddings = torch.randn(2, 5, policy.llama.config.hidden_size, generator=torch.Generator().manual_seed(0))
    before, place = embeddings.clone(), torch.arange(5)
    with torch.no_grad():
        policy.lean.forward(embeddings, policy.lean.angles(place[None]), policy.lean.cache(2, 5), place, 5, None)
    assert torch.equal(embeddings, before)


def test_batches_of_one_size_hold_all_candidates_of_all_prompts(policy, monkeypatch):
    sizes = []
    draw_batch = Drawing.draw
    monkeypatch.setattr(Drawing, "draw", lambda self, *inputs: (sizes.append(len(inputs[-2])), draw_batch(self, *inputs))[1])
    cut = policy.sample(PROMPTS, 5, 2.0, 1.0, [5, 6, 7], batch=4)
    assert sizes == [4, 4, 4, 4]  # 15 pictures; the last batch is filled up
    sizes.clear()
    assert torch.equal(policy.sample(PROMPTS, 5, 2.0, 1.0, [5, 6, 7], batch=12), cut)
    assert sizes == [8, 8]  # and not 12 and 3


def test_grouped_key_heads_draw_as_transformers_does_and_ask_no_kernel_for_a_mask_and_groups_at_once(monkeypatch):
    """No fused kernel of a GPU takes both; what does copies the cache in float32."""
    model, processor = build_janus()
    text = model.config.text_config
    text.num_key_value_heads = 2
    torch.manual_seed(0)
    generation, model = model.generation_config, type(model)(model.config).eval()
    model.generation_config = generation
    grouped = Janus(model, processor)
    attention, asked = F.scaled_dot_product_attention, Counter()

    def watched(*tensors, **flags):
        asked[
            tensors[0].shape[1] != tensors[1].shape[1], flags.get("attn_mask") is not None, flags.get("enable_gqa", False)
        ] += 1
        return attention(*tensors, **flags)

    ids = torch.tensor([grouped.prompt_ids(PROMPTS[0])])
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_mode="image", do_sample=False, guidance_scale=3.0
    )
    monkeypatch.setattr(llama.F, "scaled_dot_product_attention", watched)
    images = grouped.sample(PROMPTS[:1], 1, 3.0, 0)[0]
    assert torch.equal(images, theirs)
    grouped.judge(images, [[f"Is it {prompt}?" for prompt in PROMPTS]])
    assert asked and not any(more_heads != groups or (groups and mask) for more_heads, mask, groups in asked), asked


def test_a_model_that_has_drawn_is_trained_saved_and_replaced_like_any_other(tiny, tmp_path):
    """Joining makes the projections views of one matrix: that must not show."""
    used = load(tiny, device="cpu")
    first = used.sample(PROMPTS, 2, 2.0, 1.0)
    used.save(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved", device="cpu").sample(PROMPTS, 2, 2.0, 1.0), first)
    weight = used.llama.layers[0].self_attn.k_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight += torch.randn_like(weight)  # in place, as an optimizer
    changed = used.sample(PROMPTS, 2, 2.0, 1.0)
    assert not torch.equal(changed, first)
    weight.data = before  # replaced, as loading does
    assert torch.equal(used.sample(PROMPTS, 2, 2.0, 1.0), first)
    assert used.logps(PROMPTS, first[:, 0]).requires_grad


def test_automatic_batch_fills_its_share_of_free_memory(policy, monkeypatch):
    monkeypatch.setattr(autoregressive, "PROMPT_STEP", 0)
    monkeypatch.setattr(autoregressive, "READ_STEP", 0)
    config = policy.llama.config
    tokens = len(policy.prompt_ids(PROMPTS[1])) + policy.image_tokens
    picture = 2 * tokens * 2 * config.num_hidden_layers * config.hidden_size * 4 + 2 * CODEBOOK * 4 + CODEBOOK * 24
    for fitting, expected in ((5, 5), (21, 16), (1000, 64)):
        monkeypatch.setattr(family, "memory", lambda device, n=fitting: (int(n * picture / 0.65) + 100, 0))
        assert policy.drawing_batch(PROMPTS, 2.0) == expected


def test_on_a_gpu_the_automatic_batch_is_of_the_whole_card_less_the_model_whatever_is_free(monkeypatch):
    model = torch.nn.Linear(1000, 1000, bias=False)  # 4 MB
    for free in (0, 10**9):
        monkeypatch.setattr(family, "memory", lambda device, free=free: (free, 24_000_000))
        assert family.pictures_that_fit(model, torch.device("cuda:1"), 10**6, 64) == 8  # 0.65 * 20 = 13, of which 8
        assert family.pictures_that_fit(model, torch.device("cpu"), 10**6, 64) == (64 if free else 1)


def test_where_pictures_depend_on_the_batch_it_is_in_the_header_and_a_run_goes_on_with_it(scored, tiny, tmp_path, monkeypatch):
    """As on a GPU: a resumed run, or the same command on another card, draws with the batch that the first one chose."""
    import score as step

    fitting = 7
    monkeypatch.setattr(step, "batch_matters", lambda device: True)
    monkeypatch.setattr(Janus, "drawing_batch", lambda self, prompts, guidance: fitting)
    what = ("score.py", "--model", tiny, "--prompts", scored.parent / "color_train.txt", "--candidates", 6, "--guidance", 2)
    what = (*what, "--chunk", 2, "--device", "cpu", "--out", tmp_path / "scored.jsonl")
    tried, sample, write = [], Janus.sample, step.Chunks.write

    def stop_at_second(self, index, *args):
        if index == 1:
            raise KeyboardInterrupt
        write(self, index, *args)

    monkeypatch.setattr(Janus, "sample", lambda self, *args: (tried.append(args[5]), sample(self, *args))[1])
    with monkeypatch.context() as patched:
        patched.setattr(step.Chunks, "write", stop_at_second)
        assert run(*what, ok=False).returncode == 130
    fitting = 11
    refused = run(*what, "--batch", 5, ok=False)
    assert refused.returncode == 2 and "batch was '7', now '5'" in refused.stderr and len(refused.stderr.splitlines()) == 1
    run(*what)
    assert set(tried) == {7} and Tokens(tmp_path / "scored.jsonl").metadata["batch"] == "7"
    assert "already scored" in run(*what).stdout
    monkeypatch.setattr(step, "batch_matters", lambda device: False)
    assert "already scored" in run(*what).stdout  # on a machine without a GPU
    flags = ("--model", tiny, "--rejudge", tmp_path / "scored.jsonl", "--out", tmp_path / "again.jsonl", "--device", "cpu")
    run("score.py", *flags)
    assert Tokens(tmp_path / "again.jsonl").metadata["batch"] == "7"  # of the pictures
    run(*what, "--restart")
    assert "batch" not in Tokens(tmp_path / "scored.jsonl").metadata
    monkeypatch.setattr(step, "batch_matters", lambda device: True)
    assert "already scored" in run(*what).stdout  # what an earlier version has made, too


def test_all_ranks_draw_with_the_batch_that_rank_0_chooses(scored, tiny, tmp_path, monkeypatch):
    from common.ranks import Ranks

    drawn, sample, here, there = [], Janus.sample, 11, 3
    monkeypatch.setattr(Janus, "drawing_batch", lambda self, prompts, guidance: here)
    told = lambda self, function, *args: there if (found := function(*args)) == here else found
    monkeypatch.setattr(Ranks, "on_rank_0", told)
    monkeypatch.setattr(Janus, "sample", lambda self, *args: (drawn.append(args[5]), sample(self, *args))[1])
    flags = ("--model", tiny, "--prompts", scored.parent / "color_train.txt", "--candidates", 1, "--device", "cpu")
    run("score.py", *flags, "--out", tmp_path / "scored.jsonl")
    assert set(drawn) == {there}


@pytest.mark.parametrize("batch", ["auto", 4])
def test_every_rank_is_asked_about_all_prompts_so_that_there_is_room_for_the_longest(
    scored, tiny, tmp_path, monkeypatch, batch
):
    told, fitting = [], Janus.drawing_batch
    monkeypatch.setattr(
        Janus, "drawing_batch", lambda self, prompts, w: (told.append(len(prompts)), fitting(self, prompts, w))[1]
    )
    monkeypatch.setattr("common.ranks.Ranks.on_rank_0", lambda self, function, *args: function(*args))
    file = scored.parent / "color_train.txt"
    flags = ("--model", tiny, "--prompts", file, "--candidates", 1, "--chunk", 2, "--device", "cpu", "--batch", batch)
    run("score.py", *flags, "--out", tmp_path / "scored.jsonl")
    assert told == [len(file.read_text().splitlines())]


def test_free_memory_is_some_of_the_machines():
    free, total = memory(torch.device("cpu"))
    assert 0 < free < total
    assert total == pytest.approx(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), rel=0.01)


def test_scoring_halves_its_batch_when_memory_runs_out_and_says_so(scored, tiny, tmp_path, monkeypatch):
    """What comes out is what --batch 5 makes; a batch of 1 that does not fit ends the run."""
    sample, limit = Janus.sample, 5
    tried = []

    def small_device(self, prompts, n, guidance, temperature, seeds, batch, advance):
        tried.append(batch)
        if batch > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free.")
        return sample(self, prompts, n, guidance, temperature, seeds, batch, advance)

    monkeypatch.setattr(Janus, "sample", small_device)
    what = ("score.py", "--model", tiny, "--prompts", scored.parent / "color_train.txt", "--candidates", 6, "--guidance", 2)
    what = (*what, "--chunk", 4, "--device", "cpu", "--batch", 20)
    done = run(*what, "--out", tmp_path / "scored.jsonl")
    assert tried[:4] == [20, 10, 5, 5]  # and it stays there
    assert "with --batch 20 (2.00 GiB wanted)" in done.stderr and "going on with --batch 5" in done.stderr
    run(*what[:-1], 5, "--out", tmp_path / "small.jsonl")
    for suffix in (".jsonl", ".safetensors"):
        assert (tmp_path / f"scored{suffix}").read_bytes() == (tmp_path / f"small{suffix}").read_bytes()
    limit = 0
    done = run(*what, "--out", tmp_path / "other.jsonl", ok=False)
    assert done.returncode == 1 and "--batch 1 " in done.stderr.splitlines()[-1]
    assert not (tmp_path / "other.jsonl").exists()


def test_speculative_decoding_gains_and_loses_what_the_documentation_says(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import bench
    import sampling

    told = {"janus-pro-1b": (3.7, 1.6, 1.04, 0.75, 0.56), "janus-pro-7b": (3.7, 1.5, 0.88, 0.57, 0.36)}
    text, h200 = (ROOT / "benchmarks" / "README.md").read_text(), bench.Limits(790e12, 4.3e12)
    for name, ratios in told.items():
        geometry = bench.GEOMETRIES[name]
        for n, ratio in zip((1, 8, 16, 32, 128), ratios, strict=True):
            found = sampling.floor_s(geometry, n, 30, h200) / sampling.floor_s(geometry, n, 30, h200, passes=154, window=32)
            assert found == pytest.approx(ratio, abs=0.06 if ratio > 1.5 else 0.006)
        assert " | ".join(str(ratio) for ratio in ratios) in text


# Judging


def test_a_half_precision_judge_answers_from_full_precision_logits(tiny):
    rounded = load(tiny, device="cpu", dtype=torch.bfloat16)
    hidden = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = F.linear(hidden.double(), rounded.model.lm_head.weight.double())
    expected = yes_no(exact.float(), rounded._yes, rounded._no)[0]
    answered = yes_no(
        answer_logits(rounded.model.lm_head, hidden, torch.cat([rounded._yes, rounded._no])), rounded._yes, rounded._no
    )[0]
    plain = yes_no(rounded.model.lm_head(hidden), rounded._yes, rounded._no)[0]
    assert torch.allclose(answered, expected, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-3)


# Training


def test_logits_in_pieces_give_the_same_log_probs_and_gradients():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 11, (3, 5), generator=generator)
    head = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 11)).double()
    found = []
    for most in (10**9, 4 * 11):  # whole; four tokens at a time
        logps = head_logps(head, hidden, tokens, 11, most)
        found.append([logps, *torch.autograd.grad((logps * logps.detach()).sum(), [hidden, *head.parameters()])])
    assert torch.equal(found[0][0], token_logps(head(hidden), tokens))
    for whole, pieces in zip(*found, strict=True):
        assert torch.allclose(whole, pieces, atol=1e-6)


def test_logits_in_pieces_are_never_there_all_at_once():
    head, tokens = torch.nn.Linear(8, 1000), torch.zeros(4, 50, dtype=torch.int64)
    hidden = torch.randn(4, 50, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor.numel()), tensor)[1], lambda tensor: tensor
    ):
        head_logps(head, hidden, tokens, 1000, most=10_000)
    assert max(kept) <= 10_000 and sum(kept) < 200 * 1000 / 2


def test_activation_bytes_are_what_the_backward_pass_keeps(tiny):
    model, processor = build_janus(image_tokens_side=12)
    config = model.config
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.head_dim = 128, 352, 4, 32
    config.vision_config.projection_dim = 128
    config.vq_config.projection_dim = config.vq_config.image_token_embed_dim = 128
    policy = Janus(type(model)(config), processor)
    policy.trainable_parameters()
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor  # held, so that no address is given twice
        return tensor

    tokens = torch.randint(0, CODEBOOK, (2, 144))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        policy.logps(PROMPTS[:2], tokens)
    copies = 2 * sum(parameter.numel() for parameter in policy.llama.layers.parameters())  # the weights in bfloat16
    counted = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) - copies
    length = max(len(policy.prompt_ids(prompt)) for prompt in PROMPTS[:2]) + 143
    predicted = 2 * policy.activation_bytes * length / (64 + 144)
    assert counted == pytest.approx(predicted, rel=0.15)


def test_activations_are_recomputed_only_where_they_do_not_fit(policy, monkeypatch):
    from common import sharding

    monkeypatch.setattr(sharding, "autocasts", lambda device: True)
    needed = 8 * policy.activation_bytes + 1000 * 14
    for free, recomputed in ((needed / 0.9 + 10, False), (needed / 0.9 - 10, True)):
        monkeypatch.setattr(sharding, "memory", lambda device, free=free: (free, 0))
        assert sharding.must_recompute(policy, 1000, 8, 1) is recomputed
    asked: list[int] = []
    monkeypatch.setattr(sharding, "must_recompute", lambda policy, n, pictures, group: asked.append(group) or False)
    monkeypatch.setattr(sharding, "shard", lambda *args: None)
    from common.flags import add_training_flags

    for replicate, group in ((1, 16), (2, 8), (16, 1)):
        parser = argparse.ArgumentParser()
        add_training_flags(parser, "--data", 1, 1e-5)
        args = parser.parse_args(["--micro-batch", "2", "--replicate", str(replicate)])
        ranks = SimpleNamespace(world=16, on_rank_0=lambda function, *args: function(*args))
        sharding.prepare(load(policy.directory, device="cpu"), args, ranks, 1)
        assert asked.pop() == group  # those that hold the model together
    monkeypatch.undo()
    assert not sharding.must_recompute(policy, 10**15, 8, 1)  # a CPU


SHARDING = """
import sys, torch
import torch.distributed as dist
from datetime import timedelta
from types import SimpleNamespace
from common.ranks import GLOO_PATIENCE
from common.sharding import shard
from model import load
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 1), rank=0, world_size=1, timeout=timedelta(minutes=1))
policy = load(sys.argv[1], device="cpu")
policy.trainable_parameters()
shard(policy, SimpleNamespace(world=1), 1)
groups = dist.distributed_c10d._world.pg_map
assert {group._get_backend(torch.device("cpu")).options._timeout for group in groups} == {GLOO_PATIENCE}
dist.destroy_process_group()
"""


def test_the_groups_that_weights_are_sharded_over_wait_as_long_as_the_ranks(tiny, tmp_path):
    spawn(sys.executable, "-c", SHARDING, tiny, tmp_path / "store")


@pytest.mark.thorough
def test_compiled_layers_train_the_same(pairs, tmp_path, monkeypatch):
    compiled = []
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: (compiled.append(self), compile_(self, backend="aot_eager"))[1]
    )  # the real backend needs a C compiler
    losses = []
    for flags in ((), ("--compile",)):
        out = tmp_path / f"out{len(flags)}"
        run(
            "dpo.py",
            "--pairs",
            pairs,
            "--out",
            out,
            "--max-steps",
            3,
            "--batch-size",
            4,
            "--lr",
            1e-3,
            "--device",
            "cpu",
            *flags,
        )
        losses.append([json.loads(line)["loss"] for line in (out / "training" / "metrics.jsonl").read_text().splitlines()])
    assert len(compiled) == 2 and len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# Low-rank adapters


@pytest.fixture
def adapted(tiny):
    """A Janus with adapters that add something."""
    return learnt(tiny)


def test_new_adapters_change_nothing_and_are_all_that_trains(tiny, policy):
    fresh = load(tiny, device="cpu")
    lora.add_adapters(fresh.blocks, rank=3, alpha=6.0, seed=0)
    tokens = torch.zeros(3, 4, dtype=torch.int64)
    assert torch.equal(fresh.logps(PROMPTS, tokens), policy.logps(PROMPTS, tokens))
    trained = fresh.trainable_parameters("adapters")
    assert len(trained) == 2 * 2 * 7  # two layers of seven matrices
    assert {name.rsplit(".", 1)[1] for name in trained} == {"lora_a", "lora_b"}
    assert trained.keys() == {name for name, parameter in fresh.model.named_parameters() if parameter.requires_grad}


def test_an_adapted_layer_is_w_plus_scaled_b_a(adapted):
    layer = adapted.blocks[0].mlp.down_proj
    x = torch.randn(2, layer.in_features)
    expected = x.double() @ (layer.weight.double() + 2.0 * layer.lora_b.double() @ layer.lora_a.double()).T
    assert torch.allclose(layer(x).double(), expected, atol=1e-5)


def test_merged_and_saved_adapters_are_an_ordinary_checkpoint_with_the_same_log_probs(adapted, policy, tmp_path):
    tokens = torch.zeros(3, 4, dtype=torch.int64)
    expected = adapted.logps(PROMPTS, tokens)
    adapted.save(tmp_path / "saved")
    merged = load(tmp_path / "saved", device="cpu")
    assert {name for name, _ in merged.model.named_parameters()} == {name for name, _ in policy.model.named_parameters()}
    assert torch.allclose(merged.logps(PROMPTS, tokens), expected, atol=1e-5)
    assert not torch.allclose(policy.logps(PROMPTS, tokens), expected, atol=1e-2)


def test_merging_adds_to_the_weights_as_stored_not_to_their_rounded_copy(tiny, tmp_path):
    """On a GPU the frozen weights are bfloat16: merged into those, an addition of a thousandth would be lost."""
    rounded = load(tiny, device="cpu", dtype=torch.bfloat16)
    lora.add_adapters(rounded.blocks, rank=1, alpha=1.0, seed=0)
    layer = rounded.blocks[1].self_attn.q_proj
    with torch.no_grad():
        layer.lora_b.fill_(1e-5)
        addition = layer.lora_b @ layer.lora_a
    stored = load(tiny, device="cpu").blocks[1].self_attn.q_proj.weight.detach()
    rounded.save(tmp_path / "saved", dtype=torch.float32)
    saved = load(tmp_path / "saved", device="cpu").blocks[1].self_attn.q_proj.weight.detach()
    assert torch.equal(saved, stored + addition)


def test_an_adapted_model_refuses_to_draw_rather_than_leave_its_adapters_out(adapted):
    with pytest.raises(AssertionError, match="not a plain projection"):
        adapted.sample(PROMPTS, 1)


def test_dpo_with_adapters_learns_and_changes_the_decoder_matrices_alone(pairs, tiny, tmp_path):
    from safetensors.torch import load_file

    out = tmp_path / "model"
    flags = ("--lora-rank", 4, "--epochs", 20, "--batch-size", 8, "--lr", 1e-2, "--device", "cpu")
    done = run("dpo.py", "--pairs", pairs, "--out", out, *flags)
    assert "trained (adapters of rank 4)" in done.stdout
    rows = [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert np.mean([row["margin"] for row in rows[-3:]]) > 0.1
    before, after = (load_file(path / "model.safetensors") for path in (tiny, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and len(changed) == 14
    assert all(".layers." in name and "_proj." in name for name in changed)


# Start-up


def processor_s(*command: object) -> float:
    """Processor time of a command, not the clock: what a loaded machine makes of it is not ours."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("script", [f"{name}.py" for name in COMMANDS])
def test_help_takes_less_than_three_times_an_import_of_numpy(script):
    """1.5 to 1.8 times (importing torch: some 10 times); one try of three, since seconds here differ from one to the next."""
    tries = ((script_path(script), "--help"), ("-c", "import argparse, numpy"))
    assert any(processor_s(*tries[0]) < 3 * processor_s(*tries[1]) for _ in range(3))

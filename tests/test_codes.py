"""A causal language model with image codes in its vocabulary against plain transformers, and what is refused as none.

What every family is asked, this one is asked in test_families.py.
"""

import json
import shutil

import pytest
import torch
from conftest import PROMPTS, WORDS, learnt, run, save_codes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LogitsProcessor

from common.records import Tokens
from families import codes_files
from families.family import PromptError
from families.magvit import VQGAN, MagViT
from families.pretrained import CheckpointError
from model import load

QUESTIONS = ["Is this a picture of a red cube?", "Does this image describe a?"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The directories of a tiny Tar and a tiny Liquid."""
    return {kind: save_codes(tmp_path_factory.mktemp("codes") / kind, kind=kind, seed=3) for kind in ("qwen2", "gemma")}


@pytest.fixture(scope="module", params=["qwen2", "gemma"])
def plain(request, made):
    """Each of them: loaded by us, by transformers, and the directory."""
    path = made[request.param]
    return load(path, device="cpu"), AutoModelForCausalLM.from_pretrained(path), path


class OnlyCodes(LogitsProcessor):
    def __init__(self, policy):
        self.codes = slice(policy.branch.first_code, policy.branch.first_code + policy.codebook_size)

    def __call__(self, ids, scores):
        masked = torch.full_like(scores, float("-inf"))
        masked[:, self.codes] = scores[:, self.codes]
        return masked


def code_logits(policy, model, ids, tokens):
    """The codes' logits (T, V) of a plain forward without cache, after a prompt and given codes."""
    row = torch.tensor([[*ids, *(tokens + policy.branch.first_code).tolist()]])
    return OnlyCodes(policy)(None, model(row).logits[0, len(ids) - 1 : -1])[:, OnlyCodes(policy).codes]


def test_greedy_sample_is_transformers_generate_restricted_to_the_codes(plain):
    policy, model, _ = plain
    drawn = policy.sample(PROMPTS, 1, guidance=1, temperature=0)[:, 0]  # of different lengths: padded on the left
    assert len({tuple(row) for row in drawn.tolist()}) > 2
    for prompt, tokens in zip(PROMPTS, drawn):
        ids = torch.tensor([policy.prompt_ids(prompt)])
        options = {"do_sample": False, "max_new_tokens": policy.image_tokens, "eos_token_id": None}
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=[OnlyCodes(policy)], **options)
        assert torch.equal(theirs[0, ids.shape[1] :] - policy.branch.first_code, tokens)


def test_guided_greedy_sample_is_what_plain_forwards_of_both_prompts_choose(plain):
    policy, model, _ = plain
    drawn = policy.sample(PROMPTS[:3], 1, guidance=4.0, temperature=0)[:, 0]
    unasked = policy._tokenize({"qwen2": codes_files.CHATML.format("") + "<im_start><S0>", "gemma": "<unconditional><boi>"}[
        model.config.model_type
    ])  # fmt: skip
    for prompt, tokens in zip(PROMPTS, drawn):
        given, free = (code_logits(policy, model, ids, tokens) for ids in (policy.prompt_ids(prompt), unasked))
        assert torch.equal((free + 4 * (given - free)).argmax(-1), tokens)


def test_logps_are_the_log_softmax_over_the_codes_of_a_plain_forward(plain):
    policy, model, _ = plain
    tokens = policy.sample(PROMPTS, 1, guidance=1)[:, 0]
    dropped = torch.tensor([False, True, *[False] * (len(PROMPTS) - 2)])
    with torch.no_grad():
        ours = policy.logps(PROMPTS, tokens, unconditional=dropped)
        for prompt, row, drop, logps in zip(PROMPTS, tokens, dropped, ours):
            ids = policy._unasked if drop else policy.prompt_ids(prompt)
            theirs = code_logits(policy, model, ids, row).log_softmax(-1).gather(-1, row[:, None])[:, 0]
            torch.testing.assert_close(logps, theirs, rtol=0, atol=1e-5)


def test_the_judge_reads_the_codes_as_one_plain_forward_does(plain):
    policy, model, _ = plain
    tokens = policy.sample(PROMPTS[:2], 2, guidance=1).flatten(0, 1)
    p_yes, coverage = policy.judge(tokens, [QUESTIONS] * 4)
    for row, codes in enumerate(tokens):
        for column, question in enumerate(QUESTIONS):
            prefix, rest = policy.question_ids(question)
            ids = torch.tensor([[*prefix[: -len(codes)], *(codes + policy.branch.first_code).tolist(), *rest]])
            p = model(ids).logits[0, -1].softmax(-1)
            yes, no = p[policy._yes].sum(), p[policy._no].sum()
            assert p_yes[row, column].item() == pytest.approx((yes / (yes + no)).item(), abs=1e-5)
            assert coverage[row, column].item() == pytest.approx((yes + no).item(), abs=1e-5)
    assert p_yes.std() > 0.01


@pytest.mark.parametrize("kind, ask", [("qwen2", "{}\n{}<|im_end|>"), ("gemma", "<boi>{}<eoi>\n{}<end_of_turn>")])
def test_an_answer_that_is_begun_and_one_that_is_written_are_those_of_plain_transformers(tmp_path, kind, ask):
    words = [*dict.fromkeys([*WORDS, "The", "score", "is", "0", "1"])]
    path = save_codes(tmp_path / kind, kind=kind, seed=4, words=words)
    policy, model = load(path, device="cpu"), AutoModelForCausalLM.from_pretrained(path)
    codes = policy.sample(PROMPTS[:2], 1, guidance=1)[:, 0]
    p_one, coverage = policy.judge(codes, [QUESTIONS] * 2, scored=True)
    replies = policy.reply(codes, [QUESTIONS] * 2, 12)
    one, zero = policy.tokenizer.convert_tokens_to_ids(["1", "0"])
    begin, end = (
        policy.template.look.partition("[codes]")[0].partition("<boi>")[0],
        "assistant\n" if kind == "qwen2" else "model\n",
    )
    reply_from = "<|im_start|>" if kind == "qwen2" else "<start_of_turn>"
    for row, picture in enumerate(codes):
        for column, question in enumerate(QUESTIONS):
            chat = f"{begin}{ask.format('[codes]', question)}\n{reply_from}{end}"
            ids = []
            for part in (chat.partition("[codes]")[0], picture, chat.partition("[codes]")[2], "The score is"):
                text = isinstance(part, str)
                ids += (
                    policy.tokenizer(part, add_special_tokens=False).input_ids
                    if text
                    else (part + policy.branch.first_code).tolist()
                )
            ids = ([policy.tokenizer.bos_token_id] if kind == "gemma" else []) + ids
            with torch.no_grad():
                p = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
            assert p_one[row, column].item() == pytest.approx((p[one] / (p[one] + p[zero])).item(), abs=1e-5)
            assert coverage[row, column].item() == pytest.approx((p[one] + p[zero]).item(), abs=1e-5)
            asked = torch.tensor([ids[:-3]])
            written = model.generate(
                asked, attention_mask=torch.ones_like(asked), max_new_tokens=12, do_sample=False, eos_token_id=[]
            )
            text = policy.tokenizer.decode(written[0, asked.shape[1] :], skip_special_tokens=True)
            assert replies[row][column].text == text.strip() and len(text) > 12
    assert p_one.std() > 0.01


def test_texts_are_what_the_authors_write_to_the_last_id(plain):
    policy, model, _ = plain
    prefix, rest = policy.question_ids("Is it red?")
    prompt, ids = policy.prompt_ids("a red cube"), policy.tokenizer.convert_tokens_to_ids
    codes = [policy.branch.first_code] * 4
    if model.config.model_type == "qwen2":
        chat = "<|im_start|> system You are a helpful assistant . <|im_end|> "
        chat += "<|im_start|> user {} <|im_end|> <|im_start|> assistant"
        assert prompt == ids(f"{chat.format('a red cube')} <im_start> <S0>".split())
        asked = [*ids(chat.split("{}")[0].split()), *codes, *ids("Is <unk> red ?".split()), *ids(chat.split("{}")[1].split())]
    else:
        told = "<bos> a red cube <unk> <unk> image <unk> <unk> this <unk> . <boi>"
        assert prompt == ids(told.split())
        asked = [*ids("<bos> <start_of_turn> user <boi>".split()), *codes]
        asked += ids("<eoi> Is <unk> red ? <end_of_turn> <start_of_turn> model".split())
    assert prefix + rest == asked and prefix[-4:] == codes


def test_biases_that_learn_in_place_are_seen_by_the_next_drawing(plain):
    policy = load(plain[2], device="cpu")
    before = policy.logps(PROMPTS[:1], torch.zeros(1, 4, dtype=torch.int64))
    policy.sample(PROMPTS[:1], 1, guidance=1)  # the weights are joined now
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    drawn = policy.sample(PROMPTS, 1, guidance=1, temperature=0)[:, 0]
    for prompt, tokens in zip(PROMPTS, drawn):
        assert torch.equal(code_logits(policy, policy.model, policy.prompt_ids(prompt), tokens).argmax(-1), tokens)
    assert (policy.logps(PROMPTS[:1], torch.zeros(1, 4, dtype=torch.int64)) - before).abs().max() > 1e-3


def test_one_table_at_both_ends_stays_one_when_it_is_saved_and_never_learns(made, tmp_path):
    policy, model = learnt(made["gemma"]), AutoModelForCausalLM.from_pretrained(made["gemma"])
    policy.model.lm_head.weight = torch.nn.Parameter(policy.head.weight.detach().clone())  # as sharded training leaves it
    policy.save(tmp_path / "saved")
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / "model.safetensors")
    again, theirs = load(tmp_path / "saved", device="cpu"), AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.head.weight is again.model.get_input_embeddings().weight
    assert torch.equal(theirs.lm_head.weight, model.lm_head.weight)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    torch.testing.assert_close(again.logps(PROMPTS[:1], tokens), policy.logps(PROMPTS[:1], tokens), rtol=0, atol=1e-5)
    assert "model.embed_tokens.weight" not in again.trainable_parameters()


def test_gemmas_embeddings_are_scaled_as_in_float32_where_they_are_stored_in_half_of_it(tmp_path):
    """transformers makes the scale in the type that it loads: 55.5 for 55.4256 of 3,072 numbers, 6.9375 for 6.9282 of 48."""
    path = save_codes(tmp_path / "model", kind="gemma", hidden_size=48)
    half = load(path, device="cpu", dtype=torch.bfloat16)
    half.save(tmp_path / "half", torch.bfloat16)
    policy, plain = (
        load(tmp_path / "half", device="cpu"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32),
    )
    tokens = torch.tensor([[3, 1, 0, 2]])
    ids = torch.tensor([policy.prompt_ids(PROMPTS[0]) + (tokens[0] + policy.branch.first_code).tolist()])
    with torch.no_grad():
        codes = plain(ids).logits[:, -5:-1, policy.branch.first_code :].log_softmax(-1)
        expected = codes.gather(-1, tokens[..., None])[..., 0]
        torch.testing.assert_close(policy.logps(PROMPTS[:1], tokens), expected, rtol=0, atol=1e-5)


def test_guidance_of_a_model_that_never_drew_without_a_prompt_is_told_once_and_not_refused(plain, tmp_path, capsys):
    _, model, path = plain
    policy = load(path, device="cpu")
    for guidance in (1.0, 3.0, 2.0):
        policy.sample(PROMPTS[:1], 1, guidance=guidance)
    told = capsys.readouterr().out
    if model.config.model_type == "gemma":
        assert told == ""
        return
    assert (
        told.count("\n") == 1 and "a Tar comes never trained without a prompt; guidance 3 contrasts with an empty one" in told
    )
    changed(path, tmp_path / "learnt", trained_without_prompt=True)
    load(tmp_path / "learnt", device="cpu").sample(PROMPTS[:1], 1, guidance=3.0)
    assert capsys.readouterr().out == ""


def test_a_vqgan_is_magvit_where_its_vectors_are_the_bits(tmp_path):
    """The same encoder and decoder; the nearest vector of signs is the sign of each number."""
    torch.manual_seed(0)
    levels = ((32, 1), (64, 2))
    magvit, vqgan = MagViT(levels, levels, bits=4), VQGAN(levels, levels, 16, 4)
    renamed = {"encoder.quant_conv": "quant_conv", "decoder.post_quant_conv": "post_quant_conv"}
    state = {"quantize.embedding.weight": magvit.quantize.embedding}
    for key, value in magvit.state_dict().items():
        if not key.startswith("quantize."):
            module, name = key.rsplit(".", 1)
            state[f"{renamed.get(module, module)}.{name}"] = value
    vqgan.load_state_dict(state)
    pixels, codes = torch.rand(2, 3, 8, 8) * 2 - 1, torch.arange(32).view(2, 16) % 16
    with torch.no_grad():
        assert torch.equal(vqgan.encode(pixels), magvit.encode(pixels)) and len(vqgan.encode(pixels).unique()) > 1
        torch.testing.assert_close(vqgan.decode(codes), magvit.decode(codes), rtol=1e-5, atol=1e-6)


# What is no such model


def changed(path, out, tokenizer=lambda text: text, **config):
    """A copy of a checkpoint with other words in its config.json, and another tokenizer.json."""
    shutil.copytree(path, out)
    known = json.loads((out / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(known))
    (out / "tokenizer.json").write_text(tokenizer((out / "tokenizer.json").read_text()))
    return out


WINDOW = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2}
BAD = {
    "qwen2": {
        "no codes": ({"tokenizer": lambda text: text.replace("<I", "<J")}, "without image codes .no <I0> in its tokenizer"),
        "a hole": ({"tokenizer": lambda text: text.replace("<I7>", "<J7>")}, "its 15 image codes have a hole: <I7> is not"),
        "no scale": ({"tokenizer": lambda text: text.replace("<S1>", "<T1>")}, "its tokenizer has no <S1>, which Tar writes"),
        "too small": ({"vocab_size": 60}, "the tokenizer has a token .*, but the model knows 60"),
        "no length": ({"tokens_per_picture": 0}, "tokens_per_picture must be a whole number above 0, found 0"),
        "too long": ({"tokens_per_picture": 512}, "tokens_per_picture 512 leaves no place for a prompt in 512 positions"),
        "no square": ({"tokens_per_picture": 5}, "makes square pictures, but the model beside it draws 5 codes a picture"),
        "a window": (WINDOW, "only full causal attention"),
        "too deep": ({"num_hidden_layers": 10**6, "layer_types": None}, "wants 1000000 layers, but the weights are"),
        "too wide": ({"intermediate_size": 10**6}, "config.json wants .* weights, but its files hold"),
        "another width": (
            {"intermediate_size": 64},
            r"mlp.gate_proj.weight is of shape .48, 32., but config.json makes it one of shape .64, 32.",
        ),
        "one layer more": (
            {"num_hidden_layers": 3, "layer_types": None},
            r"weight model.layers.2.\S+ is missing, but config.json",
        ),
        "other code": ({"auto_map": {"AutoModel": "x.y"}}, "config.json has 'auto_map'"),
    },
    "gemma": {
        "no codes": ({"vocab_size": 49}, "without image codes .no ids behind its 49 tokens"),
        "another number": (
            {"vocab_size": 57},
            "embed_tokens.weight is of shape .65, 32., but config.json makes it one of shape .57,",
        ),
        "no begin of image": ({"tokenizer": lambda text: text.replace("<boi>", "<bbi>")}, "has no <boi>, which Liquid writes"),
        "both ways": ({"use_bidirectional_attention": True}, "only full causal attention"),
    },
}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, cases in BAD.items() for name in cases])
def test_what_has_no_codes_as_they_should_be_is_one_line_before_a_weight_is_read(made, tmp_path, monkeypatch, kind, name):
    for name_of_reader in ("read_model", "read_vq", "read_vqgan"):
        monkeypatch.setattr(codes_files, name_of_reader, lambda *given: pytest.fail("weights were read"))
    change, told = BAD[kind][name]
    with pytest.raises(CheckpointError, match=told) as refused:
        load(changed(made[kind], tmp_path / "bad", **change), device="cpu")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["qwen2", "gemma"])
def test_an_image_tokenizer_of_other_codes_is_refused_before_it_is_read(made, tmp_path, monkeypatch, kind):
    path, other = changed(made[kind], tmp_path / "bad"), save_codes(tmp_path / "other", kind=kind, bits=3)
    place = codes_files.PICTURES[MagViT if kind == "qwen2" else VQGAN]
    shutil.copy(other / place, path / place)
    for name in ("read_model", "read_vq", "read_vqgan"):
        monkeypatch.setattr(codes_files, name, lambda *given: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError, match="knows 8 codes, but the model beside it draws 16"):
        load(path, device="cpu")


def test_a_picture_of_the_wrong_number_of_codes_is_refused(plain):
    with pytest.raises(PromptError, match="a picture of 5 codes, but .* reads 4"):
        plain[0].judge(torch.zeros(1, 5, dtype=torch.int64), [["Is it red?"]])


WRITTEN = {"qwen2": ["a <I3> cube", "<|im_start|>", "an <im_start> of it"], "gemma": ["<boi>", "<unconditional> cube"]}


@pytest.mark.parametrize("kind, text", [(kind, text) for kind, texts in WRITTEN.items() for text in texts])
def test_nobody_writes_codes_or_special_tokens(made, kind, text):
    policy = load(made[kind], device="cpu")
    for write in (policy.prompt_ids, policy.question_ids, policy.caption_ids):
        with pytest.raises(PromptError, match="special token"):
            write(text)


# Without an image tokenizer


def test_without_a_decoder_all_but_pictures_is_there_and_each_command_says_so_in_a_line(tmp_path, monkeypatch):
    model = save_codes(tmp_path / "model")
    shutil.rmtree(model / "magvitv2")
    policy = load(model, device="cpu")
    told = "model has no decoder of its codes (magvitv2/ or vqgan/ beside it): they can be judged, not shown"
    assert policy.no_pictures.endswith(told)
    policy.save(tmp_path / "saved")
    assert load(tmp_path / "saved", device="cpu").no_pictures
    (tmp_path / "prompts.txt").write_text("a red cube\ntwo green sphere\n")
    out = tmp_path / "run" / "round0" / "heldout.jsonl"
    cpu = ("--device", "cpu")
    draw = ("--prompts", tmp_path / "prompts.txt", "--candidates", 2, "--guidance", 1)
    run("score.py", "--model", model, *draw, "--out", out, *cpu)
    assert len(Tokens(out)[:]) == 4
    monkeypatch.setattr(codes_files, "read_model", lambda *given: pytest.fail("weights were read"))  # 15 GB of a real one
    done = run("export.py", out, "--layout", "plain", *cpu, ok=False)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "round0" / "heldout-plain").exists()
    done = run("score.py", "--rejudge", out, "--judge", "nobody", "--out", tmp_path / "re.jsonl", *cpu, ok=False)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1
    done = run("report.py", tmp_path / "run", *cpu)
    assert "warning        the page has no pictures: " in done.stdout and told in done.stdout
    assert "0 pictures" in done.stdout and told in (tmp_path / "run" / "report.html").read_text()

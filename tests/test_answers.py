"""A judge's answers in words: how a reply is read, that it is the library's own, and what the steps make of it."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import showo_golden
import test_vlm
import torch
from conftest import DEMO, PROMPTS, ROOT, WORDS, build_janus, run, save_janus, spawn
from PIL import Image
from showo_golden import load as load_showo
from showo_golden import random_checkpoint
from transformers import AutoModelForImageTextToText, GenerationConfig

from analysis.probes import choose_question
from common.answers import PUBLISHED, QUESTION, read_reply
from common.command import BadInput
from common.records import PAIRS, SCORED, SFT, Tokens, read_rows, tokens_path, write_tokens
from common.writing import write_rows
from families import family, vlm
from families.janus import Janus
from families.judging import Reply, answered, digit_ids, read_reply_ids
from families.pretrained import CheckpointError
from model import load

# Reading a reply

READ = {
    1: (
        "The score is 1.",
        "the score is: 1",
        "score: 1",
        "score=1",
        "Score 1",
        "**1**",
        "1.",
        "1",
        "The score is **1**.",
        "The score is {1}.",
        "The score is\n1",
        "The score is 1.0.",
        "The score should be 1.",
        "The score is therefore 1.",
        "The answer is 1.",
        "The score is 1.The image shows it.",
        "The score is 1/1",
        "The score is $\\boxed{1}$.",
        "I would give a score of 1.",
        "The score for this image is 1.",
        "The image depicts a cat.\n\n**1**",
        "Answer: 1",
        "The score is 0. No, look again: the score is 1.",
        "Yes, the image depicts a cat.",
        " **Yes**",
        "No doubt about it. The score is 1.",
        "The image matches. Score 1.",
        "The score is a 1.",
        "The score given is 1.",
        "The score is <1>.",
        "The score is thus 1.",
        "_Yes_, a cat.",
        "Yes, there is exactly 1.",
        "The score is 1, and 0 objects are missing.",
    ),
    0: (
        "The score is 0.",
        "Score: 0",
        "0.",
        "The image shows two cats. The score is **0**.",
        "The score is 1. Or rather, the score is 0.",
        "Yes. The score is 0.",
        "No, this image does not depict a cat.",
        "NO",
        "no no no",
        "The score is 0. A score of 1 would need a blue circle.",
        "The score is 0 because a score of 1 requires all objects.",
        "Yes, a cat is shown, but not on a table. Score 0.",
        "Yes, but the score for the given image is 0.",
        "I would give a score of 0.",
    ),
    None: (
        "",
        " \n",
        "The image shows a cat.",
        "Nothing of it.",
        "yesterday",
        "The score is 10.",
        "The score is 0.5.",
        "The score is 1/10",
        "The score is 1 out of 10",
        "The score is -1",
        "The score is 1%",
        "The score is 1st",
        "The score is 01",
        "The score is 0 or 1.",
        "The score is {your score}.",
        "The score is not 1.",
        "The score is 1 if it describes the scene and 0 if it does not.",
        "The score is 0-1.",
        "The score is 0 to 1.",
        "The score is 0 and 1.",
        "The score is 1,5.",
        "Yes, but I would give this image a 0.",
        "No doubt: I would give it a 1.",
        "1. The image shows a dog.",
        "If it describes the scene, score 1; if it does not fully describe, score 0.",  # the question's own words
        "Да, на картинке красный круг.",
        "分数是1。",
        "النتيجة هي ١",
    ),
}


@pytest.mark.parametrize(("text", "expected"), [(text, expected) for expected, texts in READ.items() for text in texts])
def test_a_reply_is_the_last_score_it_states_else_its_leading_yes_or_no_else_unreadable(text, expected):
    assert read_reply(text) == expected


@pytest.mark.parametrize(
    "text", ["score " * 20_000, " " * 50_000, "\n" * 50_000 + "x", "The score is " + "1" * 50_000, "1 " * 30_000]
)
def test_reading_takes_time_that_grows_with_the_replys_length(text):
    import time

    before = time.process_time()
    read_reply(text)
    assert time.process_time() - before < 2  # quadratic in these: 15 s


# Writing one

QUESTIONS = [QUESTION.replace("{prompt}", text) for text in ("a red cube", "two big blue sphere and one small cone")]
MOST = 24


def pictures_of(policy, n: int = 4) -> torch.Tensor:
    side = policy.model.config.vision_config.image_size
    return torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def likelier_end(policy, seed: int) -> None:
    """Change the row of lm_head that is its end token's, so that some replies end, at different lengths."""
    with torch.no_grad():
        policy.head.weight[policy._ends[0]] = policy.head.weight.mean(0) + policy.head.weight[20 + seed] * 1.1


@pytest.fixture
def as_ids(monkeypatch):
    """What `reply` returns are tokens, the end token left out, instead of texts."""

    def cut(tokenizer, ids, ends):
        stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        return Reply(ids[:stop], stop < len(ids))

    monkeypatch.setattr(family, "read_reply_ids", cut)
    monkeypatch.setattr(vlm, "read_reply_ids", cut)


def library_reply(policy, picture: torch.Tensor, question: str) -> list[int]:
    """What transformers' own generate writes of one picture, to one question."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = policy.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = policy.processor(text=text, images=picture.numpy(), generation_mode="text", return_tensors="pt")
    made = policy.model.generate(**inputs, generation_mode="text", do_sample=False, max_new_tokens=MOST)
    return made[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_greedy_reply_is_transformers_own_token_for_token_and_ends_where_that_ends(as_ids):
    lengths = []
    for seed in range(6):
        policy = Janus(*build_janus(seed=seed, system_prompt=seed % 2 == 0))
        likelier_end(policy, seed)
        pictures = pictures_of(policy)
        found = policy.reply(pictures, [QUESTIONS] * 4, MOST, batch=3)
        for picture, row in zip(pictures, found, strict=True):
            for question, reply in zip(QUESTIONS, row, strict=True):
                expected = library_reply(policy, picture, question)
                assert reply.text == [token for token in expected if token not in policy._ends]
                assert reply.ended == (expected[-1] in policy._ends)
                lengths.append(len(reply.text))
    assert len(set(lengths)) > 8 and 10 < lengths.count(MOST) < 38  # 48 replies, of all lengths


def plain_logits(policy, codes: list[int], text: list[int]) -> torch.Tensor:
    """The next token's logits (V,) after a picture and a text: transformers' Phi, no cache, nothing side by side."""
    prefix = [policy.mmu, policy.soi, *(code + policy.branch.first_code for code in codes), policy.eoi]
    place = torch.arange(len(prefix) + len(text))
    mask = (place[:, None] >= place) | (place < len(prefix))  # causal, but for the prefix, which sees all of itself
    mask[: len(prefix), len(prefix) :] = False
    with torch.no_grad():
        return policy.model["showo"](torch.tensor([prefix + text]), attention_mask=mask[None, None]).logits[0, -1]


def plain_reply(policy, codes: list[int], question: str) -> list[int]:
    """The likeliest next token of the whole sequence, again and again."""
    asked, written = policy.question_ids(question)[1], []
    while len(written) < MOST and policy.eot not in written:
        written.append(int(plain_logits(policy, codes, asked + written).argmax()))
    return written


def test_show_os_greedy_reply_is_the_full_sequences_argmax(as_ids, tmp_path):
    lengths = []
    for seed in range(4):
        policy = load_showo(random_checkpoint(tmp_path / str(seed), seed=seed))
        with torch.no_grad():
            policy.head.bias[policy.eot] += 2 + 2 * (seed % 2)
        tokens = torch.randint(0, policy.codebook_size, (3, 4), generator=torch.Generator().manual_seed(seed))
        for codes, row in zip(tokens, policy.reply(tokens, [QUESTIONS] * 3, MOST, batch=2), strict=True):
            for question, reply in zip(QUESTIONS, row, strict=True):
                expected = plain_reply(policy, codes.tolist(), question)
                assert reply == (expected[:-1] if policy.eot in expected else expected, policy.eot in expected)
                lengths.append(len(reply.text))
    assert len(set(lengths)) > 4 and 0 < lengths.count(MOST) < 20  # of 24


def test_a_reply_does_not_depend_on_what_is_beside_it(as_ids, policy):
    """Neither on the batch, nor on the questions in its picture's row or another's, which differ in length."""
    pictures = pictures_of(policy)
    others = [[QUESTION.replace("{prompt}", text)] for text in PROMPTS[:4]]
    asked = [[QUESTIONS[0], *more] for more in others]
    together = policy.reply(pictures, asked, MOST, batch=4)
    for batch, rows in ((1, asked), (3, [row[:1] for row in asked]), (2, [[QUESTIONS[0], QUESTIONS[1]]] * 4)):
        for one, other in zip(together, policy.reply(pictures, rows, MOST, batch=batch), strict=True):
            assert one[0] == other[0]
    assert len({tuple(row[0].text) for row in together}) > 1


def test_a_reply_that_reaches_the_models_last_position_is_cut_there(as_ids, tiny):
    policy = load(tiny, device="cpu")
    pictures = pictures_of(policy, 2)
    policy._ends = []
    used = [sum(map(len, policy.question_ids(question))) for question in QUESTIONS]
    policy.llama.config.max_position_embeddings = max(used) + 3
    for row in policy.reply(pictures, [QUESTIONS] * 2, MOST):
        assert [len(reply.text) for reply in row] == [max(used) + 3 - n for n in used]
        assert not any(reply.ended for reply in row)


def test_a_reply_is_text_without_special_tokens_and_what_comes_after_its_end(policy):
    word = policy.tokenizer.convert_tokens_to_ids
    ids = [word("yes"), word("<pad>"), word("a"), word("<eos>"), word("no")]
    assert read_reply_ids(policy.tokenizer, ids, policy._ends) == Reply("yes a", True)
    assert read_reply_ids(policy.tokenizer, ids[:3], policy._ends) == Reply("yes a", False)
    assert read_reply_ids(policy.tokenizer, ids[3:], policy._ends) == Reply("", True)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A random tiny LLaVA that knows the words of a score."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_vlm, "WORDS", KNOWN)
        return vlm.load_judge(test_vlm.save_judge(tmp_path_factory.mktemp("llava") / "judge", test_vlm.build_llava), "cpu")


def plain_inputs(judge, picture: torch.Tensor, question: str, answer: str = ""):
    image = Image.fromarray(vlm.enlarged(picture.numpy()))
    return judge.processor(
        images=[[image]], text=[judge._chat(question) + answer], return_tensors="pt", add_special_tokens=False
    )


def test_another_judges_reply_is_its_librarys_one_picture_and_question_at_a_time(as_ids, llava, monkeypatch):
    pictures = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    model = AutoModelForImageTextToText.from_pretrained(llava.directory)
    longest = llava.reply(pictures, [QUESTIONS] * 3, MOST, batch=4)
    assert all(len(reply.text) == MOST and not reply.ended for row in longest for reply in row)
    end = longest[0][0].text[9]
    monkeypatch.setattr(llava, "_ends", [end])
    found = llava.reply(pictures, [QUESTIONS] * 3, MOST, batch=4)
    for picture, row in zip(pictures, found, strict=True):
        for question, reply in zip(QUESTIONS, row, strict=True):
            inputs = plain_inputs(llava, picture, question)
            made = model.generate(**inputs, max_new_tokens=MOST, do_sample=False, eos_token_id=end)
            expected = made[0, inputs["input_ids"].shape[1] :].tolist()
            assert reply == ([token for token in expected if token != end], end in expected)
    assert found[0][0].ended and found[0][0].text == longest[0][0].text[: longest[0][0].text.index(end)]


def test_generation_stops_at_the_end_token_and_not_after_the_last_one_allowed(llava, monkeypatch):
    """Tokens after the end are dropped anyhow: what is saved is time."""
    asked = []
    generate = llava.model.generate
    monkeypatch.setattr(llava.model, "generate", lambda **options: (asked.append(options), generate(**options))[1])
    llava.reply(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), [QUESTIONS[:1]], 3)
    end = GenerationConfig.from_pretrained(llava.directory).eos_token_id  # which goes before the tokenizer's
    assert asked[0]["eos_token_id"] == [end] and asked[0]["max_new_tokens"] == 3


# Beginning one

SCORE_WORDS = ["The", "score", "0", "1"]  # and "is"; beside the words that the tiny models know
KNOWN = [*WORDS, *SCORE_WORDS, *(["is"] if "is" not in WORDS else [])]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """The directory of a random tiny Janus that knows the words of a score."""
    return save_janus(tmp_path_factory.mktemp("scorer") / "tiny", words=KNOWN)


def test_p_of_1_after_the_begun_answer_is_that_of_one_plain_forward_pass(scorer):
    policy = load(scorer, device="cpu")
    pictures = pictures_of(policy)
    p_one, coverage = policy.judge(pictures, [QUESTIONS] * 4, batch=3, scored=True)
    one, zero = (policy.tokenizer.convert_tokens_to_ids(word) for word in "10")
    for b, picture in enumerate(pictures):
        for q, question in enumerate(QUESTIONS):
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            text = policy.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            inputs = policy.processor(
                text=f"{text} The score is", images=picture.numpy(), generation_mode="text", return_tensors="pt"
            )
            p = policy.model(**inputs).logits[0, -1].softmax(-1)
            assert p_one[b, q].item() == pytest.approx((p[one] / (p[one] + p[zero])).item(), abs=1e-5)
            assert coverage[b, q].item() == pytest.approx((p[one] + p[zero]).item(), abs=1e-5)
    assert p_one.std() > 0.01
    assert not torch.allclose(p_one, policy.judge(pictures, [QUESTIONS] * 4)[0], atol=0.01)


def test_p_of_1_in_show_o_is_that_of_the_full_sequence_with_the_begun_answer_behind_the_question(tmp_path, monkeypatch):
    monkeypatch.setattr(showo_golden, "WORDS", [*showo_golden.WORDS, "ĠThe", "Ġscore", "Ġis", "Ġ0", "Ġ1"])
    policy = load_showo(random_checkpoint(tmp_path / "showo", seed=5))
    tokens = torch.randint(0, policy.codebook_size, (3, 4), generator=torch.Generator().manual_seed(5))
    p_one, coverage = policy.judge(tokens, [QUESTIONS] * 3, batch=2, scored=True)
    begun = policy.tokenizer.convert_tokens_to_ids(["ĠThe", "Ġscore", "Ġis"])
    one, zero = policy.tokenizer.convert_tokens_to_ids(["Ġ1", "Ġ0"])
    for b, codes in enumerate(tokens.tolist()):
        for q, question in enumerate(QUESTIONS):
            p = plain_logits(policy, codes, policy.question_ids(question)[1] + begun).softmax(-1)
            assert p_one[b, q].item() == pytest.approx((p[one] / (p[one] + p[zero])).item(), abs=1e-5)
            assert coverage[b, q].item() == pytest.approx((p[one] + p[zero]).item(), abs=1e-5)
    assert p_one.std() > 0.01


def test_an_answer_begins_after_a_space_unless_the_template_ends_in_white_space():
    assert [answered(chat, "The") for chat in ("A:", "<|assistant|>\n", "A: ")] == ["A: The", "<|assistant|>\nThe", "A: The"]
    assert answered("A:", "") == "A:"


def test_another_judge_is_begun_for_as_well_whatever_the_padding(llava):
    pictures = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    p_one, coverage = llava.judge(pictures, [QUESTIONS] * 3, batch=4, scored=True)
    one, zero = (llava.tokenizer.convert_tokens_to_ids(word) for word in "10")
    model = AutoModelForImageTextToText.from_pretrained(llava.directory)
    for b, picture in enumerate(pictures):
        for q, question in enumerate(QUESTIONS):
            with torch.no_grad():
                p = model(**plain_inputs(llava, picture, question, " The score is")).logits[0, -1].softmax(-1)
            assert p_one[b, q].item() == pytest.approx((p[one] / (p[one] + p[zero])).item(), abs=1e-5)
            assert coverage[b, q].item() == pytest.approx((p[one] + p[zero]).item(), abs=1e-5)
    assert torch.equal(llava.judge(pictures, [QUESTIONS] * 3)[0], llava.judge(pictures, [QUESTIONS] * 3)[0])


def test_a_question_is_remembered_with_and_without_what_is_begun_of_its_answer(scorer, llava):
    for judge in (load(scorer, device="cpu"), llava):
        plain, begun, again = (judge.question_ids(QUESTIONS[0], scored=scored) for scored in (False, True, False))
        if judge is not llava:
            plain, begun, again = plain[1], begun[1], again[1]  # without the prefix
        assert again == plain == begun[: len(plain)] and judge.tokenizer.decode(begun[len(plain) :]) == "The score is"


def bpe(merges: list[tuple[str, str]], digits_alone: bool = False):
    """A byte-level BPE tokenizer of these merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(dict.fromkeys(words))}, merges))
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alone = [pre_tokenizers.Digits(individual_digits=True)] * digits_alone
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*alone, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def asked(tokenizer, answer: str) -> list[int]:
    return tokenizer(answered("Is it? Answer:", answer), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("tokenizer", "digits"),
    [
        (lambda: bpe([("Ġ", "1"), ("Ġ", "0")]), ["Ġ1", "Ġ0"]),  # as Phi's and GPT-2's: the space is the digit's
        (lambda: bpe([("Ġ", "1"), ("Ġ", "0")], digits_alone=True), ["1", "0"]),  # as DeepSeek's and Qwen's: it is not
    ],
)
def test_which_tokens_are_the_digits_is_what_the_tokenizer_makes_of_the_whole_answer(tokenizer, digits):
    tokenizer = tokenizer()
    ids = digit_ids(lambda answer: asked(tokenizer, answer), tokenizer, "it", torch.device("cpu"))
    assert [tokenizer.convert_ids_to_tokens(one.tolist()) for one in ids] == [[digit] for digit in digits]


@pytest.mark.parametrize(
    "merges",
    [
        [("Ġ", "1")],  # 0 is two tokens, and 1 is one
        [("s", "Ġ"), ("sĠ", "1"), ("sĠ", "0")],  # the digit has swallowed the end of the word before
    ],
)
def test_digits_that_are_no_tokens_of_their_own_are_refused(merges):
    tokenizer = bpe(merges)
    if len(merges) == 3:
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    with pytest.raises(CheckpointError, match="it: its tokenizer has no single tokens for 0 and 1 after 'The score is '"):
        digit_ids(lambda answer: asked(tokenizer, answer), tokenizer, "it", torch.device("cpu"))


# score.py


def write_prompts(directory: Path) -> Path:
    rows = [{"prompt": text, "category": "xy"[i % 2]} for i, text in enumerate(PROMPTS)]
    (directory / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory / "prompts.jsonl"


FLAGS = ("--candidates", 2, "--guidance", 1, "--device", "cpu", "--reply-tokens", 12)


@pytest.fixture(scope="module")
def replied(scorer, tmp_path_factory) -> Path:
    """A scored file of replies."""
    directory = tmp_path_factory.mktemp("replied")
    out = directory / "scored.jsonl"
    flags = ("--answer", "reply", "--question", QUESTION, "--foils", "both", "--readouts")
    done = run("score.py", "--model", scorer, "--prompts", write_prompts(directory), "--out", out, *FLAGS, *flags)
    (directory / "stdout.txt").write_text(done.stdout)
    return out


def rows_of(path: Path) -> list[dict]:
    return [row for _, row in read_rows(path, SCORED)]


def test_replies_are_kept_and_read_and_the_header_says_how_was_asked(replied, scorer):
    rows, header, policy = rows_of(replied), Tokens(replied).metadata, load(scorer, device="cpu")
    assert (header["answer"], header["reply_tokens"], header["questions"]) == ("reply", "12", json.dumps([QUESTION]))
    tokens = torch.from_numpy(Tokens(replied)[[row["row"] for row in rows]])
    texts = [[row[key] for key in ("prompt", "foil", "easy_foil")] for row in rows]
    replies = policy.reply(tokens, [[QUESTION.replace("{prompt}", text) for text in row] for row in texts], 12)
    for row, written in zip(rows, replies, strict=True):
        assert [row["reply"], row["reply_foil"], row["reply_easy_foil"]] == [reply.text for reply in written]
        assert row["replies_cut"] == sum(not reply.ended for reply in written)
        read = [read_reply(reply.text) for reply in written]
        assert [row[key] for key in ("p_yes", "p_yes_foil", "p_yes_easy_foil")] == [float(one == 1) for one in read]
        assert row["coverage"] == float(read[0] is not None)
    again = policy.judge(tokens, [[f"Is this a picture of {row['prompt']}?"] for row in rows])[0][:, 0]
    assert np.allclose([row["p_yes_again"] for row in rows], again, atol=1e-4)  # the second wording is read as ever
    assert all(row["caption"] < 0 for row in rows)


def test_unreadable_and_cut_replies_are_counted_per_category(replied):
    table = (replied.parent / "stdout.txt").read_text().splitlines()
    head = next(i for i, line in enumerate(table) if line.startswith("category"))
    assert table[head].split()[-4:] == ["unreadable", "of", "foils", "cut"]
    for line, category in zip(table[head + 1 :], ("x", "y", "all"), strict=False):
        rows = [row for row in rows_of(replied) if category in ("all", row["category"])]
        unreadable = [sum(read_reply(row[key]) is None for row in rows) for key in ("reply", "reply_foil", "reply_easy_foil")]
        expected = [
            category,
            str(len(rows)),
            str(unreadable[0]),
            str(sum(unreadable[1:])),
            str(sum(r["replies_cut"] for r in rows)),
        ]
        assert [*line.split()[:2], *line.split()[-3:]] == expected
        assert sum(row["replies_cut"] for row in rows) > 0


@pytest.mark.parametrize(("written", "readable"), [("", 0), ("Да, это он.", 0), ("The score is 1.", 1)])
def test_a_reply_of_nothing_or_in_another_script_is_a_rejection_that_is_counted_and_not_an_error(
    scorer, tmp_path, monkeypatch, written, readable
):
    monkeypatch.setattr(
        Janus, "reply", lambda self, pictures, questions, *_, **__: [[Reply(written, True)] * 2] * len(pictures)
    )
    out = tmp_path / "scored.jsonl"
    done = run("score.py", "--model", scorer, "--prompts", write_prompts(tmp_path), "--out", out, *FLAGS, "--answer", "reply")
    rows = rows_of(out)
    assert {(row["reply"], row["p_yes"], row["coverage"], row["replies_cut"]) for row in rows} == {
        (written, readable, readable, 0)
    }
    assert done.stdout.splitlines()[-2].split()[-3:] == [str(12 - 12 * readable)] * 2 + ["0"]
    assert json.loads(Tokens(out).metadata["questions"]) == [PUBLISHED]  # where no question is given


def test_score_begins_the_published_answer_and_rejudges_existing_pictures(replied, scorer, tmp_path):
    out = tmp_path / "again.jsonl"
    run("score.py", "--model", scorer, "--rejudge", replied, "--answer", "score", "--out", out, "--device", "cpu", "--readouts")
    rows, policy = rows_of(out), load(scorer, device="cpu")
    assert (Tokens(out).metadata["answer"], Tokens(out).metadata["questions"]) == ("score", json.dumps([PUBLISHED]))
    assert "reply_tokens" not in Tokens(out).metadata and not any("reply" in row for row in rows)
    tokens = torch.from_numpy(Tokens(out)[[row["row"] for row in rows]])
    questions = [[PUBLISHED.replace("{prompt}", row[key]) for key in ("prompt", "foil")] for row in rows]
    p_one, coverage = policy.judge(tokens, questions, scored=True)
    assert np.allclose([[row["p_yes"], row["p_yes_foil"]] for row in rows], p_one, atol=1e-4)
    assert np.allclose([row["coverage"] for row in rows], coverage[:, 0], atol=1e-4)
    assert [row["p_yes_again"] for row in rows] == pytest.approx([row["p_yes_again"] for row in rows_of(replied)], abs=1e-3)


def test_another_judge_writes_replies_about_existing_pictures(replied, llava, scorer, tmp_path):
    out = tmp_path / "judged.jsonl"
    flags = ("--judge", llava.directory, "--answer", "reply", "--question", QUESTION, "--reply-tokens", 5, "--device", "cpu")
    run("score.py", "--rejudge", replied, "--out", out, *flags)
    rows = rows_of(out)
    pictures = load(scorer, device="cpu").decode(torch.from_numpy(Tokens(out)[[row["row"] for row in rows[:2]]]))
    expected = llava.reply(pictures, [[QUESTION.replace("{prompt}", row["prompt"])] for row in rows[:2]], 5)
    assert [row["reply"] for row in rows[:2]] == [reply.text for (reply,) in expected]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--answer", "reply", "--question", "Is it good?"), "--question must hold {prompt}, found 'Is it good?'"),
        (("--answer", "reply", *["--question", "{prompt}?"] * 2), "--answer reply takes one --question, found 2"),
        (("--answer", "reply", "--reply-tokens", 0), "--reply-tokens must be at least 1, found 0"),
        (("--answer", "words"), "invalid choice: 'words'"),
        (("--answer", "score"), "its tokenizer has no single tokens for 0 and 1 after 'The score is '"),  # of the tiny Janus
    ],
)
def test_what_cannot_be_asked_is_one_line_and_nothing_is_written(tiny, tmp_path, flags, message):
    prompts = write_prompts(tmp_path)
    done = run(
        "score.py", "--model", tiny, "--prompts", prompts, "--out", tmp_path / "s.jsonl", "--device", "cpu", *flags, ok=False
    )
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [prompts]
    assert "prompts.jsonl:" not in done.stderr  # of no row


# What the other steps make of it


def judged_file(path: Path, p_yes: list[list[int]], answer: str | None, model: str = "m", **more) -> Path:
    """A scored file of a prompt a list, of replies where `answer` says so."""
    rows = [
        {"id": f"p{i}", "prompt": f"prompt {i}", "category": "c", "candidate": c, "p_yes": float(p), "coverage": 1.0}
        | {"foil": "f", "p_yes_foil": 0.0}
        for i, row in enumerate(p_yes)
        for c, p in enumerate(row)
    ]
    write_rows(path, [row | {"row": n} for n, row in enumerate(rows)])
    header = {
        "kind": "scored",
        "model": model,
        "model_hash": model,
        "codebook_size": "8",
        "image_tokens": "4",
        "threshold": "0.5",
    }
    header |= {"questions": '["{prompt}?"]', "seed": path.stem, "guidance": "1", "temperature": "1"}
    header |= ({"answer": answer} if answer else {}) | more
    write_tokens(tokens_path(path), np.arange(4 * len(rows)).reshape(-1, 4) % 8, header)
    return path


def test_of_several_ones_the_first_candidate_is_the_best_and_no_margin_parts_a_pair(tmp_path):
    scored = judged_file(tmp_path / "a.jsonl", [[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], "reply", reply_tokens="128")
    out = tmp_path / "out"
    run("make_pairs.py", "--scored", scored, "--out", out, "--margin", 1, "--per-prompt", 1)
    (pair,) = [row for _, row in read_rows(out / "pairs.jsonl", PAIRS)]
    pictures = Tokens(out / "pairs.jsonl")[[pair["chosen"], pair["rejected"]]]
    assert np.array_equal(pictures, Tokens(scored)[[1, 0]])
    taken = [row for _, row in read_rows(out / "sft.jsonl", SFT)]
    assert np.array_equal(Tokens(out / "sft.jsonl")[[row["row"] for row in taken]], Tokens(scored)[[1, 4]])
    header = Tokens(out / "sft.jsonl").metadata
    assert (header["answer"], header["reply_tokens"], header["separation"]) == ("reply", "128", "0.500000")


def test_replies_that_cannot_be_read_are_no_training_data(tmp_path):
    scored = judged_file(tmp_path / "a.jsonl", [[0, 1]], "reply")
    rows = [row | {"coverage": 0.0} for row in rows_of(scored)]
    write_rows(scored, rows)
    done = run("make_pairs.py", "--scored", scored, "--out", tmp_path / "out", ok=False)
    assert done.returncode == 3 and "the answers state no score, nor yes or no" in done.stderr


@pytest.mark.parametrize(
    ("first", "second", "refused"), [("reply", "yes-no", True), (None, "reply", True), (None, "yes-no", False)]
)
def test_files_of_different_forms_are_not_made_into_one_set(tmp_path, first, second, refused):
    files = [judged_file(tmp_path / f"{n}.jsonl", [[0, 1]], answer) for n, answer in enumerate((first, second))]
    done = run("make_pairs.py", "--scored", *files, "--out", tmp_path / "out", ok=False)
    assert done.returncode == (2 if refused else 0)
    if refused:
        assert f"answer is {second!r}, but" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", [{"answer": "yes-no"}, {"answer": "reply", "reply_tokens": "9"}])
def test_gate_and_diagnosis_refuse_to_compare_different_forms(tmp_path, other):
    p_yes = [[0, 1]] * 3
    base = judged_file(tmp_path / "base.jsonl", p_yes, "reply", reply_tokens="128", seed="0")
    after = judged_file(tmp_path / "after.jsonl", p_yes, model="n", **({"reply_tokens": "128", "seed": "0"} | other))
    done = run("diagnose.py", "--before", base, "--after", after, ok=False)
    key, value = ("answer", "yes-no") if other["answer"] == "yes-no" else ("reply_tokens", "9")
    assert done.returncode == 2 and f"{key} was" in done.stderr and f"now '{value}'" in done.stderr
    same = judged_file(tmp_path / "same.jsonl", p_yes, "reply", model="n", reply_tokens="128", seed="0")
    judged = {"judge": "n", "judge_hash": "n", "seed": "0"} | ({"reply_tokens": "128"} | other)
    rejudged = judged_file(tmp_path / "rejudged.jsonl", p_yes, model="m", **judged)
    done = run("diagnose.py", "--before", base, "--after", same, "--rejudged", rejudged, ok=False)
    assert done.returncode == 2 and "rejudged.jsonl: not made like" in done.stderr and f"now '{value}'" in done.stderr
    for path in (base, after, same, rejudged):
        rows = [
            row | {"p_yes_again": 0.5, "p_yes_foil_again": 0.1, "caption": -1.0, "caption_foil": -2.0} for row in rows_of(path)
        ]
        write_rows(path, rows)
        header = Tokens(path).metadata
        header = {"judge": header["model"], "judge_hash": header["model_hash"]} | header | {"readouts": "{prompt}!"}
        write_tokens(tokens_path(path), np.zeros((6, 4), np.int64), header)
    for files in ((base, after, rejudged), (base, same, rejudged)):
        done = run(
            "gate.py",
            *(word for pair in zip(("--base", "--after", "--rejudged"), files, strict=True) for word in pair),
            ok=False,
        )
        assert done.returncode == 2 and f": {key} is '{value}', but" in done.stderr


def test_dynamics_does_not_take_a_question_that_is_answered_in_words_for_one_of_yes_and_no(tmp_path):
    tokens = Tokens(judged_file(tmp_path / "a.jsonl", [[0, 1]], "reply"))
    with pytest.raises(BadInput, match="was judged with --answer reply, .*give --question"):
        choose_question(None, tokens)
    assert choose_question("{prompt}?", tokens) == ("{prompt}?", "--question")


def test_the_page_shows_what_was_written_beside_its_picture_and_of_foils(replied, scorer, tmp_path):
    run_directory = tmp_path / "run"
    for name in ("scored.jsonl", "scored.safetensors"):
        (run_directory / "round0").mkdir(parents=True, exist_ok=True)
        shutil.copy(replied.with_name(name), run_directory / "round0" / name.replace("scored", "heldout"))
    (run_directory / "settings.txt").write_text("METHOD=sft\n")
    path = run_directory / "round0" / "heldout.jsonl"
    long = "<b>It is a cube.</b> " * 30 + "The score is 1."
    rows = [row | {"reply": "" if i % 2 else long, "reply_foil": "النتيجة"} for i, row in enumerate(rows_of(path))]
    write_rows(path, rows)
    run("report.py", run_directory, "--device", "cpu")
    page = (run_directory / "report.html").read_text()
    figures = re.findall(r"<figure class=\"picture.*?</figure>", page)
    assert figures and "Below it what it wrote" in page and "by lot" in page and "surest" not in page and "0.98" not in page
    for figure in figures:
        assert not re.search(r"P\(yes\)|</b> \d", figure)  # 1 or 0, as the mark says
        assert ("</b> unreadable" in figure) == ("<i>nothing</i>" in figure)
        own, foil, easy = re.findall(r'<span class="reply">(.*?)</span>', figure)
        assert own == "<i>nothing</i>" or (own.endswith("The score is 1.</bdi>") and "<b>It" not in own and "…" in own)
        assert (
            foil.startswith("<i>of the foil <bdi>")
            and foil.endswith("<bdi>النتيجة</bdi>")
            and easy.startswith("<i>of the foil")
        )
    assert any("<i>nothing</i>" in figure for figure in figures) and any("The score is 1." in figure for figure in figures)


# The loop


@pytest.mark.thorough
def test_the_loop_judges_by_replies_throughout_and_says_so(warm, tmp_path):
    """One round of the tiny Janus; its replies to the short question begin with yes or no, though they do not end."""
    for name, every in (("train", 40), ("heldout", 16)):
        lines = (ROOT / "shapes" / f"prompts_{name}.jsonl").read_text().splitlines()
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines[::every]) + "\n")
    files = {"PROMPTS": tmp_path / "train.jsonl", "EVAL_PROMPTS": tmp_path / "heldout.jsonl", "OUT": tmp_path / "run"}
    environment = (
        os.environ | DEMO | {key: str(path) for key, path in files.items()} | {"PYTHON": str(warm), "OMP_NUM_THREADS": "1"}
    )
    environment |= {"ROUNDS": "1", "METHOD": "sft", "ANSWER": "reply", "SCORE_FLAGS": "--reply-tokens 2 --batch 256"}
    environment |= {"QUESTION": QUESTION}
    spawn(ROOT / "self_improve.sh", env=environment)
    out = tmp_path / "run"
    assert (out / "settings.txt").read_text().splitlines()[-1] == "ANSWER=reply"
    for name in ("round0/heldout", "round1/scored", "round1/heldout", "round1/rejudged"):
        assert Tokens(out / f"{name}.jsonl").metadata["answer"] == "reply", name
        assert {row["p_yes"] for row in rows_of(out / f"{name}.jsonl")} == {0.0, 1.0}
    assert Tokens(out / "round1" / "sft.jsonl").metadata["answer"] == "reply"
    assert json.loads((out / "round1" / "model" / "training" / "history.json").read_text())[-1]["answer"] == "reply"
    assert "to be answered in words, which were read" in (out / "round1" / "model" / "README.md").read_text()
    assert 'class="reply"' in (out / "report.html").read_text()
    done = spawn(ROOT / "self_improve.sh", env=environment | {"ANSWER": "yes-no"}, ok=False)
    assert done.returncode == 2 and "ANSWER=reply" in done.stderr
    done = spawn(ROOT / "self_improve.sh", env=environment | {"ANSWER": "words"}, ok=False)
    assert done.returncode == 2 and done.stderr == "ANSWER is yes-no, score or reply, found words\n"

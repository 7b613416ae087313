"""How a judge is asked about a picture, in which form it answers, and what the answers say of a row.

    yes-no    a short question; P(yes) against no at the first token of the answer
    score     the published question, the answer begun for the model (BEGUN); P(1) against 0 at the next token
    reply     the published question; the model writes a reply, which is read: p_yes is 1 or 0

`reply` is the judge of the paper (arXiv 2507.16663). `yes-no` asks less of a small model and tells near misses from plain ones;
`score` is the paper's judge in degrees, at the price of one pass. This file imports neither torch nor a model, so that
arguments are checked and replies are read without them.

Legend: B pictures, W wordings, X texts a picture: its prompt and its foils.
"""

import argparse
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from common.command import BadInput
from common.records import Row, stable_seed

QUESTION = "Does this image describe {prompt}?"
SECOND_QUESTION = "Is this a picture of {prompt}?"
PUBLISHED = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language. Does this image describe {prompt}? If it describes "
    "the scene, score 1; if it does not fully describe, score 0. Please answer in the following format: The score is {your "
    "score}."
)
BEGUN = "The score is "  # the published form of the answer, up to its digit
FORMS = {"yes-no": QUESTION, "score": PUBLISHED, "reply": PUBLISHED}  # form -> what is asked where nothing else is said

UNANSWERED = {"score": "are not 0 or 1", "reply": "state no score, nor yes or no"}
FORM = """yes-no: P(yes) at the first token of the answer; score: P(1) at the token after "The score is ", which is written
for the model; reply: as the paper, the model writes and what it wrote is read, so that P(yes) is 1 or 0 (default yes-no)"""


# ---------------------------------------------------------------------------------------------------------------------
# What a reply says

MARKUP = re.compile(r"[*_`'\"{}()<>\[\]“”‘’$]|\\boxed")  # about a score: **1**, `1`, {1}, <1>, $\boxed{1}$
# No digit of 10, 0.5, 0,5, 1/10, of "1 or 0" and "0-1", nor of a rule, "1 if it does"; 1/1, "1 out of 1" and 1.0 are whole.
WHOLE = r"(?:\.0+(?!\d))?(?:\s*(?:/|out\s+of)\s*1(?![\d/]|\.\d))?"
LEFT = r"(?![.,]?\d|\s*/|\s*out\s+of|\s*[-–]\s*\d|\s+(?:to|and)\s+[01]\b|\s+(?:or|if|when)\b|[^\W\d_]|%)"
DIGIT = rf"([01]){WHOLE}{LEFT}"
OF_WHAT = r"(?:\s+given)?(?:\s+(?:of|for|to)\s+(?:this|the|that|your|my)(?:\s+\w+){1,3}?)?"
IS = r"\s*(?:is|was|would\s+be|will\s+be|should\s+be|[:=])\s*[:=]?\s*(?:(?:therefore|thus|then|a)\s+)?"
ALONE = r"(?:\A|(?<=\n)|(?<=[.!?] )(?=(?:final )?score\b))"  # a line of nothing else, or a last sentence: "Score 1."
NAMED = r"(?:the\s+)?(?:final\s+)?(?:(?:score|answer)\b\s*[:=]?)?\s*"
STATED = re.compile(rf"\b(?:score|answer)\b{OF_WHAT}{IS}{DIGIT}|{ALONE}{NAMED}{DIGIT}[.!]?(?=\n|\Z)", re.IGNORECASE)
OFFERED = re.compile(rf"\bscore\s+of\s+{DIGIT}", re.IGNORECASE)  # what another score would take is said like this too
YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
BARE = re.compile(r"(?<![\w.,/–-])([01])[.!]?\Z")  # a last word that nothing above reads


def read_reply(text: str) -> int | None:
    """Whether a reply accepts the picture, 1 or 0; None for one that says neither.

    The last score that it states ("The score is 1.", "score: 0", "**1**" on a line of its own, ...), else a "score of 1", else
    the yes or no that it begins with, unless its last word is the other digit. Ours: the paper only says that replies are
    parsed.
    """
    lines = (" ".join(line.split()) for line in MARKUP.sub("", text).splitlines())
    text = "\n".join(line for line in lines if line)
    for form in (STATED, OFFERED):
        if found := list(form.finditer(text)):
            return int(next(filter(None, found[-1].groups())))
    said, last = YES_NO.match(text), BARE.search(text)
    if not said:
        return None
    accepted = int(said[1].casefold() == "yes")
    return None if last and int(last[1]) != accepted else accepted


# ---------------------------------------------------------------------------------------------------------------------
# Asking


def answer_form(header: dict[str, str]) -> str:
    """The form in which a file's pictures were judged, by its header; files from before there were several: yes-no."""
    return header.get("answer", "yes-no")


def name_form(header: dict[str, str]) -> dict[str, str]:
    """A header, or settings, that names its form of answer, also where it was written before there were several."""
    return header | {"answer": answer_form(header)}


def unanswered(form: str) -> str:
    """What a low coverage says of the answers."""
    return f"answers {UNANSWERED.get(form, 'are not yes or no')}"


def check_questions(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set --question to what its form asks where it is not given; exit with code 2 for questions that cannot be asked."""
    args.question = args.question or [FORMS[args.answer]]
    for flag, question in [*(("question", question) for question in args.question), ("second-question", args.second_question)]:
        if "{prompt}" not in question:
            parser.error(f"--{flag} must hold {{prompt}}, found {question!r}")
    if args.answer == "reply" and len(args.question) > 1:
        parser.error(f"--answer reply takes one --question, found {len(args.question)}: a reply is 1 or 0, and so is P(yes)")
    if args.reply_tokens < 1:
        parser.error(f"--reply-tokens must be at least 1, found {args.reply_tokens}")


def judged_how(args: argparse.Namespace) -> dict[str, str]:
    """What the header of a file says of how its pictures were judged, but for the questions."""
    return {"answer": args.answer} | ({"reply_tokens": str(args.reply_tokens)} if args.answer == "reply" else {})


def judge_batch(judge: Any, pictures: Any, rows: list[Row], args: argparse.Namespace, batch: int) -> None:
    """Judge each picture against its prompt and its foils; sets p_yes, coverage, p_yes_foil in `rows`, and what else is asked.

    pictures: image tokens or pixels. Several wordings are averaged. coverage is that of the questions about the own prompt. Of
    a form other than yes-no the second wording of --readouts and the captions are asked as ever, in a pass of their own.
    """
    captions = [[row["prompt"], row["foil"]] for row in rows]
    texts = captions
    if any("easy_foil" in row for row in rows):
        texts = [[*texts, row.get("easy_foil", row["foil"])] for texts, row in zip(captions, rows, strict=True)]
    wordings = args.question
    if args.readouts and args.answer == "yes-no":
        wordings = [*wordings, args.second_question]  # in the same pass

    def worded(wordings: list[str]) -> list[list[str]]:
        return [[wording.replace("{prompt}", text) for text in row for wording in wordings] for row in texts]

    again, logps = None, np.zeros(0)
    if args.answer == "reply":
        p_yes, coverage = write_replies(judge, pictures, rows, worded(wordings), args, batch)
    elif args.readouts and args.answer == "yes-no":
        p_yes, coverage, logps = arrays(judge.judge_with_captions(pictures, worded(wordings), captions, batch=batch))
    else:
        p_yes, coverage = arrays(judge.judge(pictures, worded(wordings), batch=batch, scored=args.answer == "score"))
    p_yes, coverage = (answer.reshape(len(rows), -1, len(wordings)) for answer in (p_yes, coverage))  # (B, X, W)
    n = len(args.question)
    if args.readouts and args.answer == "yes-no":
        again = p_yes[:, :, n]  # (B, X)
    elif args.readouts:
        again, _, logps = arrays(judge.judge_with_captions(pictures, worded([args.second_question]), captions, batch=batch))
    drawn = np.zeros(0)  # log p of the pictures, given prompt and given foil (B, 2)
    if args.readouts == "likelihood":
        seeds = [stable_seed("likelihood", row["id"], row["candidate"]) for row in rows]
        (drawn,) = arrays([judge.log_likelihoods(captions, pictures, seeds, batch)])
    means = p_yes[:, :, :n].mean(axis=2)
    for i, row in enumerate(rows):
        row["p_yes"], row["p_yes_foil"] = (round(float(value), 7) for value in means[i, :2])
        row["coverage"] = round(min(1.0, float(coverage[i, 0, :n].mean())), 7)
        if "easy_foil" in row:
            row["p_yes_easy_foil"] = round(float(means[i, 2]), 7)
        if again is not None:
            row["p_yes_again"], row["p_yes_foil_again"] = (round(float(value), 7) for value in again[i, :2])
            row["caption"], row["caption_foil"] = (round(min(0.0, float(value)), 5) for value in logps[i])
        if args.readouts == "likelihood":
            row["log_likelihood"], row["log_likelihood_foil"] = (round(min(0.0, float(value)), 5) for value in drawn[i])


def arrays(answers: Any) -> list[np.ndarray]:
    """A judge's tensors as float64 arrays; BadInput where one holds what is not a number."""
    found = [answer.double().cpu().numpy() for answer in answers]
    if not all(np.isfinite(answer).all() for answer in found):
        raise BadInput("the judge's answers are not numbers: the checkpoint's weights overflow")
    return found


def write_replies(
    judge: Any, pictures: Any, rows: list[Row], questions: list[list[str]], args: argparse.Namespace, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Have the judge write, put its words into the rows, and read them: p_yes and coverage (B, X), 0 or 1 each."""
    replies = judge.reply(pictures, questions, args.reply_tokens, batch=batch)
    for row, written in zip(rows, replies, strict=True):
        names = ("reply", "reply_foil", *["reply_easy_foil"] * ("easy_foil" in row))
        row |= {name: reply.text for name, reply in zip(names, written, strict=False)}
        row["replies_cut"] = sum(not reply.ended for reply in written[: len(names)])
    read = [[read_reply(reply.text) for reply in written] for written in replies]
    readable = [[one is not None for one in row] for row in read]
    return np.array([[one == 1 for one in row] for row in read], float), np.array(readable, float)


def reply_columns() -> dict[str, Callable[[list[Row]], int]]:
    """What the table of a file of replies also says of some rows: heading -> count.

    Replies about the own prompt, and about foils, that can be read as neither 1 nor 0, which count as 0; and those that were
    cut at --reply-tokens, or where the model's positions end, before the model ended them.
    """

    def unreadable(*names: str) -> Callable[[list[Row]], int]:
        return lambda rows: sum(read_reply(row[name]) is None for row in rows for name in names if name in row)

    foils = unreadable("reply_foil", "reply_easy_foil")
    return {"unreadable": unreadable("reply"), "of foils": foils, " cut": lambda rows: sum(row["replies_cut"] for row in rows)}

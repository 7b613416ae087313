"""report.py: the page's numbers, pictures and words, whatever the run lacks and whatever its prompts hold."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import HANGS_S, run, save_janus
from PIL import Image

from analysis import report, summary
from analysis.columns import Pictures
from analysis.galleries import Card, Gallery, make_galleries, stable_shuffle, within_budget
from analysis.page import (
    MAX_CHARACTERS,
    Line,
    bar_chart,
    downsample,
    escape,
    line_chart,
    nice_ticks,
    picture_style,
    quoted,
    rounded,
)
from analysis.pictures import data_uri, picture_key
from analysis.summary import HEADINGS, judge_rates, read_run, rejected_share, round_numbers, weak_generation
from common.records import SCORED, Tokens, read_rows, write_tokens
from common.writing import write_rows

EVIL = "<script>alert(\"x\")</script> & 'quote' <img src=http://x/y onerror=z> {prompt}"
CATEGORIES = ("color", "shape")
VOID = {"meta", "img", "br", "hr", "input", "link"}


# ---------------------------------------------------------------------------------------------------------------------
# A run


def write_judged(path: Path, model: Path, p_yes: dict[tuple[str, int], float], prompts: dict[str, str], seed: int) -> None:
    """A scored file with given verdicts and random pictures."""
    rows = [
        {"id": key, "prompt": prompts[key], "category": CATEGORIES[int(key[1:]) % 2], "candidate": candidate, "p_yes": value}
        | {"coverage": 0.99, "foil": "a foil", "p_yes_foil": round(value / 4, 6), "row": row}
        for row, ((key, candidate), value) in enumerate(p_yes.items())
    ]
    write_rows(path, rows)
    header = {"model": str(model), "model_hash": "0" * 16, "codebook_size": "24", "image_tokens": "4", "threshold": "0.5"}
    tokens = np.random.default_rng(seed).integers(0, 24, (len(rows), 4))
    write_tokens(path.with_suffix(".safetensors"), tokens, header | {"questions": '["Is it?"]', "seed": str(seed)})


def build_run(directory: Path, model: Path, method: str = "sft", prompt: str = "a red cube") -> Path:
    """Two rounds over 6 held-out and 6 training prompts, as self_improve.sh leaves them, with invented verdicts."""
    draw = np.random.default_rng(7)
    heldout = {f"h{i}": f"{prompt} {i}" for i in range(6)}
    training = {f"t{i}": f"{prompt} number {i}" for i in range(6)}
    directory.mkdir(parents=True)
    (directory / "settings.txt").write_text(f"MODEL={model}\nMETHOD={method}\nQUESTION=Is\\ it\\ {{prompt}}\\?\nSFT_FLAGS=''\n")
    for number in range(3):
        one = directory / f"round{number}"
        one.mkdir()
        verdicts = {(key, c): round(float(draw.random() ** (1.6 - 0.6 * number)), 6) for key in heldout for c in range(4)}
        write_judged(one / "heldout.jsonl", model, verdicts, heldout, seed=number)
        labels = [(key, c, int(value + draw.normal(0, 0.3) > 0.5)) for (key, c), value in verdicts.items()]
        write_rows(one / "labels.jsonl", ({"id": key, "candidate": c, "label": b, "source": "oracle"} for key, c, b in labels))
        if number:
            again = {key: round(float(draw.random()), 6) for key in verdicts}
            write_judged(one / "rejudged.jsonl", model, again, heldout, seed=0)
            scores = {(key, c): round(float(draw.random()), 6) for key in training for c in range(5)}
            if number == 1:  # t4 and t5 stay in the pool; what is over 0.5 is accepted
                scores |= {(key, c): 0.1 + 0.05 * c for key in ("t4", "t5") for c in range(5)}
            else:
                scores |= {("t4", c): 0.2 + 0.15 * c for c in range(5)} | {("t5", c): 0.3 for c in range(5)}
            write_judged(one / "scored.jsonl", model, scores, training, seed=10 + number)
            run("make_pairs.py", "--scored", one / "scored.jsonl", "--out", one)
            metrics = [{"step": i, "loss": 1 / (i + 1)} | ({"margin": 0.1 * i} if method == "dpo" else {}) for i in range(40)]
            (one / "model" / "training").mkdir(parents=True)
            write_rows(one / "model" / "training" / "metrics.jsonl", metrics)
            (one / "model" / "training" / "settings.json").write_text(json.dumps({"lr": 3e-4, "seed": number}))
    return directory


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """A finished run with its page. Nothing may write to it."""
    directory = build_run(tmp_path_factory.mktemp("run") / "demo", tiny)
    run("report.py", directory, "--device", "cpu")
    return directory


@pytest.fixture
def a_run(finished, tmp_path) -> Path:
    """A copy of the finished run, without its page."""
    copy = Path(shutil.copytree(finished, tmp_path / "demo"))
    (copy / "report.html").unlink()
    return copy


class Page(HTMLParser):
    """A page taken apart: its tags are balanced, its pictures decoded, its words by section."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: dict[str, str] = {"": ""}
        self.cards: dict[str, list[list]] = {}  # section -> cards, each [prompt, [(side, caption, picture), ...]]
        self.section = self.side = ""
        self.text = path.read_text()
        self.feed(self.text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append((tag, values))
        if tag == "section":
            self.section = values["id"]
            self.words[self.section], self.cards[self.section] = "", []
        if tag == "article":
            self.cards[self.section].append(["", []])
        if tag == "div" and values.get("class") == "side":
            self.side = ""
        if tag == "img":
            data = base64.b64decode(values["src"].split("base64,")[1])
            self.cards[self.section][-1][1].append([self.side, "", np.asarray(Image.open(io.BytesIO(data)))])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words[self.section] += data
        within = [tag for tag in self.open if tag != "bdi"]
        if within and within[-1] == "h4":
            self.side += data
        elif within[-2:] == ["article", "h3"]:
            self.cards[self.section][-1][0] += data
        elif "figcaption" in within and "article" in within:
            self.cards[self.section][-1][1][-1][1] += data


def decoded(policy, path: Path) -> dict[tuple[str, int], np.ndarray]:
    """The pictures of a scored file by (id, candidate), as the model itself decodes them."""
    import torch

    rows = [row for _, row in read_rows(path, SCORED)]
    pictures = policy.decode(torch.from_numpy(Tokens(path)[[row["row"] for row in rows]])).numpy()
    return {(row["id"], row["candidate"]): picture for row, picture in zip(rows, pictures, strict=True)}


def same(picture: np.ndarray, other: np.ndarray) -> bool:
    """Whether two pictures are one: the batch that it was decoded in may move a pixel by a level."""
    return picture.shape == other.shape and np.abs(picture.astype(int) - other).max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


def row_of(key: str, accepted: bool, label: bool | None = None) -> tuple:
    return key, accepted, np.nan if label is None else float(label)


def pictures_of(rows: list[tuple]) -> Pictures:
    ids, accepted, label = (np.array(column) for column in zip(*rows, strict=True))
    return Pictures({"id": ids}, accepted, label, None)


def test_the_nonunified_score_is_a_mean_over_prompts_not_pictures():
    rows = [row_of("a", False)] * 3 + [row_of("a", True)] + [row_of("b", True)] * 2
    score, low, high = rejected_share(pictures_of(rows))
    assert score == (0.75 + 0) / 2 and (low, high) == (0, 0.75)


def test_judge_rates_by_hand():
    rows = [row_of("a", True, True)] * 3 + [row_of("a", True, False)] + [row_of("b", False, False)] * 3 + [row_of("b", False)]
    rows += [row_of("c", False, True)]
    assert judge_rates(pictures_of(rows)) == {
        "judge_accuracy": 6 / 8,
        "false_positive_rate": 1 / 4,
        "false_negative_rate": 1 / 4,
    }
    assert weak_generation(pictures_of(rows)) == 3 / 4  # four of the five that it rejects have a label, one of which is right
    assert judge_rates(pictures_of([row_of("a", True)]))["judge_accuracy"] is None
    assert weak_generation(pictures_of([row_of("a", True, True)])) is None


@pytest.mark.parametrize(
    "low, high, least", [(0, 1, 0), (0, 10, 1), (0, 1, 1), (0.61, 0.64, 0), (-0.2, 3.7, 0), (2, 2, 0), (0, 0, 0)]
)
def test_ticks_enclose_the_values_at_even_round_steps(low, high, least):
    ticks = nice_ticks(low, high, least)
    steps = np.diff(ticks)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8 and np.allclose(steps, steps[0])
    assert steps[0] >= least and f"{steps[0]:.0e}"[0] in "125"


def test_a_thinned_curve_keeps_its_mean_and_its_places():
    assert downsample([1.0, 3.0, 5.0, 7.0, 9.0], 3) == [(0.5, 2.0), (2.5, 6.0), (4.0, 9.0)]
    assert downsample([1.0, 2.0], 10) == [(0.0, 1.0), (1.0, 2.0)]


def test_a_curve_is_drawn_where_its_numbers_say():
    line = Line("x", "model", [(0, 0.0), (1, 1.0), (2, 0.25)], [(0, 0.0, 0.5), (1, 1.0, 1.0), (2, 0.25, 0.25)])
    svg = line_chart([line], [(0, "a"), (2, "b")], [0, 0.5, 1], "said")
    left, right, top, bottom = 38, 340 - 46, 12, 190 - 30
    assert f'points="{left}.0,{bottom}.0 {(left + right) / 2},{top}.0 {right}.0,{bottom - (bottom - top) / 4}"' in svg
    assert f'points="{left}.0,{bottom}.0 {(left + right) / 2},{top}.0' in svg.split("<polygon ")[1]
    assert f"{left}.0,{(top + bottom) / 2}" in svg.split("<polygon ")[1]  # the interval's upper end at the first round
    assert re.findall(r'text-anchor="end">([^<]+)', svg) == ["0", "0.5", "1"] and ">0.250</text>" in svg


def test_values_that_are_close_are_written_apart():
    lines = [Line(name, "model", [(0, y)]) for name, y in (("a", 0.5), ("b", 0.51), ("c", 0.49))]
    heights = [float(y) for y in re.findall(r'class="value" x="[^"]+" y="([^"]+)"', line_chart(lines, [], [0, 1], ""))]
    assert len(heights) == 3 and min(np.diff(heights)) >= 13


def test_a_bar_is_as_long_as_its_value():
    svg = bar_chart([("color", [0.5, 0.25]), ("shape", [None, 1.0])], "model", "said")
    widths = [float(width) for width in re.findall(r'width="([^"]+)" height="11" fill="var\(--model\)"', svg)]
    assert widths == [147, 73.5, 0, 294] and ">–</text>" in svg
    assert re.findall(r'opacity="([^"]+)"', svg) == ["0.38", "1"] * 2  # pale before, full after


def test_the_shuffle_is_fixed_and_categories_take_turns():
    categories = {f"id{i}": "ab"[i >= 6] for i in range(8)}
    order = stable_shuffle(categories)
    assert sorted(order) == sorted(categories) and [categories[key] for key in order] == list("ababaaaa")
    assert stable_shuffle(dict(reversed(categories.items()))) == order


def test_the_pages_numbers_are_those_of_summary_py(a_run):
    """The same values in the file, and the same digits where people read them."""
    done = run("summary.py", a_run)
    rows = [json.loads(line) for line in (a_run / "summary.jsonl").read_text().splitlines()]
    shown = [key for key in HEADINGS if any(row[key] is not None for row in rows)]
    rounds = read_run(a_run)
    for one, before, row, line in zip(rounds, [None, *rounds], rows, done.stdout.splitlines()[2:], strict=False):
        numbers = round_numbers(one, before)
        assert all(numbers[key] == value for key, value in row.items() if key not in ("model", "n_prompts"))
        assert line.split() == [rounded(row[key]).replace("–", "-") for key in shown]
        assert numbers["low"] <= numbers["nonunified"] <= numbers["high"]
    assert len(rows) == 3 and rows[2]["recovered"] == 1 and rows[1]["discard"] == 2


def test_a_number_is_rounded_once(capsys):
    """374 of 512 are 0.73046875: 0.7305 in four digits, of which three would be 0.731."""
    summary.print_table([dict.fromkeys(HEADINGS) | {"accuracy": 374 / 512}])
    assert capsys.readouterr().out.split() == ["accuracy", "0.730"] and rounded(374 / 512) == "0.730"


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_the_page_needs_nothing_but_itself(finished):
    page = Page(finished / "report.html")
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object", "a", "form"} & {*names} and "@import" not in page.text
    assert all(values["src"].startswith("data:image/png;base64,") for tag, values in page.tags if tag == "img")
    assert "url(" not in page.text and "http://" not in page.text and "https://" not in page.text
    assert not [key for _, values in page.tags for key in values if key.startswith("on")]
    policy = next(values["content"] for _, values in page.tags if values.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:")
    assert "prefers-color-scheme: dark" in page.text and ("viewport", "width=device-width, initial-scale=1") in [
        (values.get("name"), values.get("content")) for _, values in page.tags
    ]


def test_whoever_does_not_see_the_page_is_told_what_is_on_it(finished):
    page = Page(finished / "report.html")
    alts = [values["alt"] for tag, values in page.tags if tag == "img"]
    assert alts and all(re.fullmatch(r"Drawing of: \u2068a red cube.*\u2069\. .* P\(yes\) \d\.\d\d.*", alt) for alt in alts)
    charts = [values for tag, values in page.tags if tag == "svg"]
    assert len(charts) == 7 and all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and max(np.diff(levels)) == 1  # no level is jumped
    assert "<details>" in page.text and page.text.count("<table") == 4


def test_the_headline_and_the_check_of_it_say_the_runs_numbers(finished):
    page = Page(finished / "report.html")
    numbers = [round_numbers(one, None) for one in read_run(finished)]
    first, last = (f"{100 * numbers[i]['nonunified']:.0f}\u00a0%" for i in (0, -1))
    said = f"This model rejected {first} of its own pictures. After 2 rounds of learning from that, it rejects {last}."
    assert said in page.words[""]
    assert "an independent judge (oracle) looked" in page.words[""] and "6 held-out prompts" in page.words[""]
    assert "trained on the pictures that it accepted" in page.words[""]
    for word in ("judge accuracy", f"{numbers[-1]['judge_accuracy']:.3f}", f"{numbers[0]['low']:.3f}", "Separation"):
        assert word in page.words["curves"]
    assert "Is it {prompt}?" in page.words["settings"] and "0.0003" in page.words["settings"]


def test_the_same_prompts_before_and_after_with_the_pictures_of_their_round(finished, policy):
    cards = Page(finished / "report.html").cards["before-after"]
    first, last = decoded(policy, finished / "round0" / "heldout.jsonl"), decoded(policy, finished / "round2" / "heldout.jsonl")
    assert sorted(prompt for prompt, _ in cards) == [f"a red cube {i}" for i in range(6)]
    for prompt, pictures in cards:
        key = f"h{prompt[-1]}"
        assert [side for side, _, _ in pictures] == ["before training"] * 4 + ["after round 2"] * 4
        for number, (_, _, picture) in enumerate(pictures):
            assert same(picture, (first, last)[number // 4][key, number % 4])


def captions(cards: list) -> list[list[tuple[str, str]]]:
    return [[(side, " ".join(caption.split())) for side, caption, _ in pictures] for _, pictures in cards]


def test_accepted_and_rejected_candidates_stand_apart_by_the_files_threshold(finished):
    page = Page(finished / "report.html")
    scored = [row for _, row in read_rows(finished / "round1" / "scored.jsonl", SCORED)]
    for (prompt, _), shown in zip(page.cards["candidates"], captions(page.cards["candidates"]), strict=True):
        values = [row["p_yes"] for row in scored if row["prompt"] == prompt]
        yes, no = sorted((v for v in values if v > 0.5), reverse=True), sorted(v for v in values if v <= 0.5)
        wanted = [(f"accepted, {len(yes)} of 5", f"✓ {v:.2f}") for v in yes]
        assert shown == wanted + [(f"rejected, {len(no)} of 5", f"✗ {v:.2f}") for v in no]
    verdicts = {row["prompt"]: {one["p_yes"] > 0.5 for one in scored if one["id"] == row["id"]} for row in scored}
    assert len(page.cards["candidates"]) == sum(len(both) == 2 for both in verdicts.values()) > 2


def test_pairs_and_what_left_the_discard_pool(finished, policy):
    page = Page(finished / "report.html")
    assert {tuple(side for side, _, _ in pictures) for _, pictures in page.cards["pairs"]} == {("chosen", "rejected")}
    assert all(yes[1].startswith("✓") and no[1].startswith("✗") for yes, no in captions(page.cards["pairs"]))
    n_pairs = len((finished / "round1" / "pairs.jsonl").read_text().splitlines())
    assert f"Shown: {n_pairs} of {n_pairs} pairs" in page.words["pairs"] and "DPO would train on these" in page.words["pairs"]
    [(prompt, pictures)] = page.cards["recovered"]
    assert prompt == "a red cube number 4" and captions(page.cards["recovered"]) == [
        [("round 1", "✗ 0.30"), ("round 2", "✓ 0.80")]
    ]
    for number, (_, _, picture) in zip((1, 2), pictures, strict=True):
        assert same(picture, decoded(policy, finished / f"round{number}" / "scored.jsonl")["t4", 4])


def test_false_positives_and_contradictions_are_the_surest_of_the_last_round(finished, policy):
    page, last = Page(finished / "report.html"), read_run(finished)[-1].heldout
    pictures = decoded(policy, finished / "round2" / "heldout.jsonl")
    wrong = sorted((row for row in last if row["p_yes"] > 0.5 and not row["label"]), key=lambda row: -row["p_yes"])
    rejected = sorted((row for row in last if row["p_yes"] <= 0.5), key=lambda row: row["p_yes"])
    assert wrong and rejected
    for name, rows in (("false-positives", wrong), ("contradictions", rejected)):
        best = list({row["id"]: row for row in reversed(rows)}.values())[::-1]  # the first of each prompt
        best.sort(key=lambda row: rows.index(row))
        assert [prompt for prompt, _ in page.cards[name]] == [row["prompt"] for row in best]
        for (_, [(_, _, shown)]), row in zip(page.cards[name], best, strict=True):
            assert same(shown, pictures[row["id"], row["candidate"]])
    assert all(
        caption == [("", caption[0][1])] and "wrong" in caption[0][1] for caption in captions(page.cards["false-positives"])
    )


def test_a_label_that_differs_from_the_verdict_is_set_apart(finished):
    caption = r'class="picture (yes|no)"><img[^>]*><figcaption>[^/]*</b> [\d.]+ <span class="(label|label odd)">(right|wrong)'
    found = re.findall(caption, (finished / "report.html").read_text())
    assert len({*found}) == 4
    assert all((kind == "label odd") == ((verdict == "yes") != (word == "right")) for verdict, kind, word in found)


def test_the_page_shows_whose_fault_it_is_at_each_level(finished, tiny, tmp_path, monkeypatch):
    """Counts of the held-out pictures of the first and the last round; no section where no category has a level."""
    assert "levels" not in Page(finished / "report.html").words
    monkeypatch.setitem(globals(), "CATEGORIES", ("texture", "<b>counting"))
    directory = build_run(tmp_path / "levels", tiny)
    report.main(report.parse_args([str(directory)]))
    words = Page(directory / "report.html").words["levels"]
    for number in (0, 2):
        heldout = [row for row in read_run(directory)[number].heldout if row["category"] == "texture"]
        rejected = sum(not row["accepted"] for row in heldout)
        assert f"({rejected}/{len(heldout)})" in words
        wrong = sum(not row["accepted"] and not row["label"] for row in heldout)
        assert f"({wrong}/{rejected})" in words
    assert "Weak generation" in words and "No level: <b>counting (" in words and "medium" in words


def test_the_labels_of_a_run_may_be_another_models_scored_file(a_run, tiny):
    """As score.py --rejudge --judge writes it; refused is one of the model that drew, and one that does not answer."""
    heldout, labels = a_run / "round0" / "heldout.jsonl", a_run / "round0" / "labels.jsonl"
    right = {(row["id"], row["candidate"]): row["label"] for row in map(json.loads, labels.open())}
    rows = [json.loads(line) for line in heldout.open()]
    write_rows(labels, [row | {"p_yes": 0.9 if right[row["id"], row["candidate"]] else 0.2} for row in rows])
    tokens = Tokens(heldout)

    def judged_by(hash: str) -> None:
        write_tokens(labels.with_suffix(".safetensors"), tokens[:], tokens.metadata | {"judge": "qwen", "judge_hash": hash})

    judged_by("1" * 16)
    first = read_run(a_run)[0]
    assert first.label_source == "qwen"
    assert first.heldout.label.tolist() == [float(right[row["id"], row["candidate"]]) for row in rows]
    judged_by(tokens.metadata["model_hash"])
    done = run("report.py", a_run, ok=False)
    assert done.returncode == 2 and "judged by qwen, which drew these pictures: not independent" in done.stderr
    judged_by("1" * 16)
    write_rows(labels, [row | {"coverage": 0.2} for row in rows])
    done = run("report.py", a_run, ok=False)
    assert done.returncode == 2 and "coverage is 0.200, under 0.5: qwen says neither" in done.stderr


def test_dpo_shows_its_loss_and_margin_in_the_order_of_the_rounds(tiny, tmp_path):
    directory = build_run(tmp_path / "dpo", tiny, "dpo")
    run("report.py", directory, "--device", "cpu")
    page = Page(directory / "report.html")
    assert (
        "DPO loss" in page.words["curves"] and "DPO margin" in page.words["curves"] and "SFT loss" not in page.words["curves"]
    )
    margin = next(values["aria-label"] for tag, values in page.tags if tag == "svg" and "margin" in values["aria-label"])
    assert margin == "DPO margin over 80 steps, from 0.050 to 3.850"  # means of two steps
    assert "DPO trained on these" in page.words["pairs"] and "prefer a picture" in page.words[""]


# ---------------------------------------------------------------------------------------------------------------------
# Whatever the prompts hold


def test_nothing_that_a_run_quotes_becomes_markup(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "CATEGORIES", (EVIL, "</style></svg>"))
    directory = build_run(tmp_path / "<b>evil & co", tiny, prompt=EVIL)
    (directory / "settings.txt").write_text(f"MODEL='{EVIL}\nQUESTION={EVIL}\n")
    for labels in directory.glob("round*/labels.jsonl"):
        labels.write_text(labels.read_text().replace("oracle", "<i>&"))
    run("report.py", directory, "--device", "cpu")
    page = Page(directory / "report.html")
    assert "script" not in [tag for tag, _ in page.tags] and not [
        key for _, values in page.tags for key in values if key[:2] == "on"
    ]
    assert all(values["src"].startswith("data:image/png") for tag, values in page.tags if tag == "img")
    assert [prompt[: len(EVIL)] for prompt, _ in page.cards["before-after"]] == [EVIL] * 6
    assert next(values for tag, values in page.tags if tag == "img")["alt"].startswith(f"Drawing of: \u2068{EVIL} ")
    assert "(<i>&)" in page.words[""] and "<b>evil & co" in page.words[""]
    assert EVIL[:39] + "…" in page.words["categories"] and EVIL in page.words["settings"]


def test_a_very_long_prompt_is_cut_on_the_page(tiny, tmp_path):
    directory = build_run(tmp_path / "long", tiny, prompt="word " * 20000)
    run("report.py", directory, "--device", "cpu")
    page = Page(directory / "report.html")
    assert len(page.text) < 500_000 and all(len(prompt) == MAX_CHARACTERS for prompt, _ in page.cards["before-after"])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def test_tiny_pictures_are_exact_and_enlarged_in_whole_steps(finished):
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    uri = data_uri(noise)
    assert uri.startswith("data:image/png")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))), noise)
    assert "--side: 96px" in picture_style(48) and "pixelated" in picture_style(48)
    assert "--side: 96px" in picture_style(32) and "pixelated" in (finished / "report.html").read_text()
    assert "pixelated" not in picture_style(384)


def test_large_pictures_are_scaled_down_and_take_the_smaller_format():
    noise, flat = np.random.default_rng(0).integers(0, 256, (384, 384, 3), np.uint8), np.zeros((384, 384, 3), np.uint8)
    assert data_uri(noise).startswith("data:image/jpeg") and data_uri(flat).startswith("data:image/png")
    for picture in (noise, flat):
        assert Image.open(io.BytesIO(base64.b64decode(data_uri(picture).split(",")[1]))).size == (320, 320)


def gallery(*sizes: int) -> Gallery:
    return Gallery("g", "t", "w", [Card(str(size), [("", [{"size": size}])]) for size in sizes], 9, "u", "n")


@pytest.mark.parametrize("budget, left", [(100, [3, 2]), (8, [2, 2]), (7, [2, 1]), (3, [1, 1]), (2, [1, 0]), (0, [0, 0])])
def test_the_budget_takes_last_cards_first_and_is_never_exceeded(budget, left):
    kept = within_budget([gallery(1, 3, 5), gallery(2, 2)], lambda row: row["size"], budget)
    assert [len(one.cards) for one in kept] == left


def test_a_page_over_its_budget_shows_less_and_says_so(a_run, monkeypatch):
    monkeypatch.setattr(report, "PICTURE_BYTES", 20_000)
    done = run("report.py", a_run, "--device", "cpu")
    page = Page(a_run / "report.html")
    size = sum(len(values["src"]) for tag, values in page.tags if tag == "img")
    shown = len(page.cards["before-after"])
    assert 0 < shown < 6 and 0 < size <= 20_000 and f"Shown: {shown} of 6 held-out prompts" in page.words["before-after"]
    assert re.search(r"page +2 rounds, \d+ pictures, 0\.\d\d MB", done.stdout)


def test_384_pixel_pictures_keep_the_page_under_5_mb(finished, tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (384, 384, 3), np.uint8)
    uri = data_uri(noise)  # the worst case: noise does not compress
    rounds = read_run(finished)
    galleries = within_budget(make_galleries(rounds, tiny=False), lambda row: len(uri), report.PICTURE_BYTES)
    uris = {picture_key(row): uri for one in galleries for card in one.cards for row in card.pictures()}
    page = report.make_page(finished, rounds, galleries, uris, 384, "")
    assert 3_000_000 < len(page.encode()) < 5_000_000 and all(one.cards for one in galleries)


# ---------------------------------------------------------------------------------------------------------------------
# What a run may lack


@pytest.mark.parametrize(
    "gone",
    [
        ("round1", "round2"),
        ("round2",),
        ("round2/heldout.jsonl", "round2/labels.jsonl", "round2/model"),
        ("settings.txt", "round1/model", "round2/model"),
        ("round1/rejudged.jsonl", "round2/rejudged.jsonl"),
        ("round1/pairs.jsonl", "round2/pairs.jsonl", "round1/sft.jsonl"),
        ("round1/scored.jsonl", "round1/discard.jsonl"),
        ("round0/labels.jsonl", "round1/labels.jsonl", "round2/labels.jsonl"),
    ],
    ids=lambda gone: gone[0].replace("/", "-"),
)
def test_a_run_that_lacks_something_still_gives_a_page(a_run, gone):
    for name in gone:
        path = a_run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run("report.py", a_run, "--device", "cpu")
    page = Page(a_run / "report.html")
    assert page.cards["before-after"] and page.cards["contradictions"] and page.words["curves"]
    assert ("false-positives" in page.cards) == ((a_run / "round0" / "labels.jsonl").exists())
    if gone[0] == "round1":
        assert "This model rejects" in page.words[""] and {side for _, s in page.cards["before-after"] for side, _, _ in s} == {
            "before training"
        }
    if gone[0] == "round0/labels.jsonl":
        assert "No independent judge looked" in page.words[""] and "Accuracy" not in page.words["categories"]


def test_without_a_model_the_page_says_loudly_that_it_has_no_pictures(a_run, tiny, tmp_path):
    gone = tmp_path / "gone"
    for path in a_run.glob("round*/*.safetensors"):
        tokens = Tokens(path)
        write_tokens(path, tokens[:], tokens.metadata | {"model": str(gone)})
    done = run("report.py", a_run, "--device", "cpu")
    page = Page(a_run / "report.html")
    assert "warning" in done.stdout and str(gone) in done.stdout
    assert "This page has no pictures:" in page.words[""] and "img" not in [tag for tag, _ in page.tags]
    assert "Shown: none of 6" in page.words["before-after"] and page.words["curves"]
    run("report.py", a_run, "--device", "cpu", "--model", tiny)
    assert Page(a_run / "report.html").cards["before-after"] and "no pictures" not in (a_run / "report.html").read_text()


def test_a_model_in_the_run_draws_what_a_model_that_is_gone_drew(a_run, tiny, tmp_path):
    for path in a_run.glob("round*/*.safetensors"):
        tokens = Tokens(path)
        write_tokens(path, tokens[:], tokens.metadata | {"model": str(tmp_path / "gone")})
    shutil.copytree(tiny, a_run / "round2" / "model", dirs_exist_ok=True)  # round1/model is not a checkpoint
    assert "warning" not in run("report.py", a_run, "--device", "cpu").stdout
    assert len(Page(a_run / "report.html").cards["before-after"]) == 6


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def edit(name: str, change):
    """A change of one JSONL file of the run, given its lines."""

    def changed(directory: Path) -> None:
        path = directory / name
        path.write_text("".join(line + "\n" for line in change(path.read_text().splitlines())))

    return changed


def remove(name: str):
    return lambda directory: (directory / name).unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (remove("round0/heldout.jsonl"), "holds no finished round (no round0/heldout.jsonl)"),
        (remove("round1/scored.safetensors"), "round1/scored.safetensors: not found"),
        (edit("round1/labels.jsonl", lambda lines: lines[1:]), "round1/heldout.jsonl:1: candidate 0 of id 'h0' has no label"),
        (
            edit("round1/labels.jsonl", lambda lines: [*lines, lines[0]]),
            "round1/labels.jsonl:25: candidate 0 of id 'h0' is given twice",
        ),
        (
            edit("round2/scored.jsonl", lambda lines: [*lines, lines[3]]),
            "round2/scored.jsonl:31: candidate 3 of id 't0' is given twice",
        ),
        (edit("round1/heldout.jsonl", lambda lines: []), "round1/heldout.jsonl: holds no scored candidate"),
        (
            edit("round1/pairs.jsonl", lambda lines: [lines[0].replace('"chosen": 0', '"chosen": 99')]),
            "chosen is 99, but pairs.safetensors has",
        ),
        (edit("round1/model/training/metrics.jsonl", lambda lines: ['{"loss": 1}']), "metrics.jsonl:1: key 'step' is missing"),
        (edit("round1/model/training/settings.json", lambda lines: ["{"]), "settings.json: not JSON"),
        (lambda directory: (directory / "round1").rename(directory / "round3"), "round1: is not there, but round3 is"),
        (lambda directory: shutil.rmtree(directory / "round1"), "round1: is not there, but round2 is"),
        (lambda directory: (directory / "round3").symlink_to("nowhere"), "round3: is not a directory"),
        (lambda directory: (directory / "round3").write_text(""), "round3: is not a directory"),
    ],
)
def test_a_damaged_run_is_one_line_and_no_page(a_run, damage, message):
    damage(a_run)
    done = run("report.py", a_run, ok=False)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (a_run / "report.html").exists()


def test_a_threshold_that_is_none_is_refused(a_run):
    tokens = Tokens(a_run / "round1" / "scored.jsonl")
    write_tokens(tokens.path, tokens[:], tokens.metadata | {"threshold": "nan"})
    done = run("report.py", a_run, ok=False)
    assert (
        done.returncode == 2
        and "scored.safetensors: metadata threshold must be a number from 0 to 1, found 'nan'" in done.stderr
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--out", "/dev/null/page.html"), "--out /dev/null/page.html: Not a directory"),
        (("--batch", 0), "--batch must be at least 1, found 0"),
        (("--model", "no/such"), "no/such"),
    ],
)
def test_arguments_that_cannot_work_are_one_line_and_no_page(a_run, monkeypatch, flags, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = run("report.py", a_run, *flags, ok=False)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (a_run / "report.html").exists()


def test_a_model_whose_tokens_mean_something_else_is_refused(a_run, tmp_path):
    other = save_janus(tmp_path / "other", image_tokens_side=1)
    done = run("report.py", a_run, "--model", other, ok=False)
    assert done.returncode == 2 and "holds pictures of 4 tokens of a codebook of 24" in done.stderr


def test_the_page_is_whole_or_not_there(a_run, monkeypatch):
    monkeypatch.setattr("common.writing.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    done = run("report.py", a_run, "--device", "cpu", ok=False)
    assert done.returncode == 1 and "report.html: No space left on device" in done.stderr
    assert not [*a_run.glob("*report*")] and not [*a_run.glob(".*")]


def test_the_last_line_is_the_page(finished, tmp_path):
    done = run("report.py", finished, "--out", tmp_path / "page.html", "--device", "cpu")
    assert done.stdout.splitlines()[-1] == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == (finished / "report.html").read_text()  # the same run, the same page


# ---------------------------------------------------------------------------------------------------------------------
# Names that are written from right to left, or hold what no page shows


RIGHT_TO_LEFT = {
    "Hebrew": "שופט עצמאי",
    "Arabic and a number": "قاضي 7",
    "an open bracket": "(שופט",
    "a percentage": "50 % שופט",
}
CONTROLS = {
    "an override": "\u202eoracle",
    "an isolate that is closed": "שופט\u2069\u202e.",
    "embeddings": "\u202b\u202aembedded\u202c",
    "the end of a paragraph": "שופט\u2029א",
    "an escape of terminals": "a\x1b[31mb\x9b0mc\x7f",
    "a byte-order mark": "\ufefforacle\uffff",
}
# The characters of a paragraph outside of what is quoted that stand before one that they should follow, of all paragraphs.
MOVED = """
let moved = 0, seen = 0;
for (const paragraph of document.querySelectorAll('p, h1, h3, td, th')) {
  let last = null;
  const walker = document.createTreeWalker(paragraph, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (node.parentElement.closest('[data-quoted]')) continue;
    for (let i = 0; i < node.length; i++) {
      const range = document.createRange();
      range.setStart(node, i); range.setEnd(node, i + 1);
      const box = range.getBoundingClientRect();
      if (!box.width || !node.data[i].trim()) continue;
      seen++;
      if (last && Math.abs(box.top - last.top) < 9 && box.left < last.left) moved++;
      last = box;
    }
  }
}
document.title = `moved ${moved} of ${seen}`;
"""


def displaced(browser: str, page: str, where: Path) -> int:
    """How many characters around what a page quotes a browser shows in another place than they were written."""
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)  # it forbids the script that looks
    where.write_text(page.replace("</body>", f"<script>{MOVED}</script></body>"))
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={where.parent}/profile",
    )
    done = subprocess.run([browser, *flags, "--dump-dom", where.as_uri()], capture_output=True, text=True, timeout=HANGS_S)
    moved, seen = re.search(r"<title>moved (\d+) of (\d+)</title>", done.stdout).groups()
    assert int(seen) > 1000
    return int(moved)


@pytest.fixture(scope="module")
def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
    return next(filter(None, map(shutil.which, names)), None) or pytest.skip(f"none of {', '.join(names)} is installed")


def quote(directory: Path, name: str, monkeypatch, tiny: Path) -> str:
    """The page of a run in which everybody who is quoted has this name."""
    monkeypatch.setitem(globals(), "CATEGORIES", (name, f"{name} 2"))
    directory = build_run(directory, tiny, prompt=name)
    for labels in directory.glob("round*/labels.jsonl"):
        labels.write_text(labels.read_text().replace('"oracle"', json.dumps(name)))
    run("report.py", directory, "--device", "cpu")
    return (directory / "report.html").read_text()


@pytest.mark.parametrize("name", [RIGHT_TO_LEFT["a percentage"], *CONTROLS.values()][:3])
def test_no_name_moves_the_words_and_percentages_around_it(tiny, tmp_path, monkeypatch, browser, name):
    page = quote(tmp_path / "run", name, monkeypatch, tiny)
    marked = page.replace("<bdi>", "<bdi data-quoted>")
    assert displaced(browser, marked, tmp_path / "page.html") == 0
    turned = marked.replace("<bdi data-quoted>", "<bdi data-quoted>\u202e")
    assert displaced(browser, turned, tmp_path / "turned.html") == 0
    spans = turned.replace("<bdi data-quoted>", "<span data-quoted>").replace("</bdi>", "</span>")
    assert displaced(browser, spans, tmp_path / "spans.html") > 0  # or the test would see nothing


@pytest.mark.parametrize("name", [RIGHT_TO_LEFT["a percentage"], *CONTROLS.values()], ids=["a percentage", *CONTROLS])
def test_every_quoted_name_is_isolated_and_holds_no_control_character(tiny, tmp_path, monkeypatch, name):
    page = quote(tmp_path / "run", name, monkeypatch, tiny)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066\u2067\ufeff\uffff]", page)
    assert page.count("\u2068") == page.count("\u2069") and not re.search("\u2069[^\u2068]*\u2069", page)
    shown = escape(name)
    outside = re.sub(r"<bdi>[^<]*</bdi>|\u2068[^\u2069]*\u2069", "", page)
    assert f"({quoted(name)})" in page and shown not in outside
    assert page.count(f"({quoted(name)}) looked at the same pictures") == 1

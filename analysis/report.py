"""One page that shows what happened in a run: numbers, curves and pictures in a single HTML file.

Reads   RUN_DIR/settings.txt and RUN_DIR/round*/: heldout, labels, rejudged, scored, sft, pairs, discard (.jsonl, tokens beside
        them) and model*/training/{settings.json,metrics.jsonl}; of an unfinished run what is there
Writes  RUN_DIR/report.html: under 5 MB, needs neither network nor scripts, light or dark as the reader's system is

    python analysis/report.py runs/demo

Pictures are decoded from their tokens by a model that the files name or that lies in the run: the decoder never trains, so
any round's draws all rounds' pictures. Where there is no model the page is made without pictures and says so. Which prompts
are shown is drawn by lot (a hash of the id), except where a section says that it shows the worst.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can be started from anywhere
from analysis.galleries import Gallery, group_by_prompt, make_galleries, stage, within_budget
from analysis.levels import make_survey
from analysis.page import (
    Line,
    bar_chart,
    chart_figure,
    document,
    downsample,
    escape,
    isolated,
    levels_section,
    line_chart,
    nice_ticks,
    percent,
    picture_figure,
    quoted,
    rounded,
    section,
    table,
)
from analysis.pictures import TINY_SIDE, PictureKey, add_replies, data_uris, find_decoder, picture_key, picture_side
from analysis.summary import Round, accuracy, mean, methods, read_run, read_settings, rejected_shares, round_numbers
from common.command import BadInput, Parser, printable, run_script
from common.outputs import check_outputs
from common.ranks import Ranks
from common.records import Row, Tokens
from common.writing import whole_file

PAGE_BYTES = 5_000_000
PICTURE_BYTES = 4_200_000  # of the page, in base64; the rest is text
MAX_POINTS = 75  # of a training curve, each the mean of a stretch of steps


# ---------------------------------------------------------------------------------------------------------------------
# The words


def describe_change(before: float, after: float) -> str:
    """A change in words; less than a point is none."""
    if abs(after - before) < 0.01:
        return f"stayed at {percent(after)}"
    return f"{'rose' if after > before else 'fell'} from {percent(before)} to {percent(after)}"


def headline(first: Row, last: Row) -> str:
    """The run in one or two sentences."""
    if first is last:
        return f"This model rejects {percent(first['nonunified'])} of its own pictures."
    count = f"{last['round']} rounds" if last["round"] > 1 else "one round"
    return (
        f"This model rejected {percent(first['nonunified'])} of its own pictures. "
        f"After {count} of learning from that, it rejects {percent(last['nonunified'])}."
    )


def introduction(rounds: list[Round]) -> str:
    """What a reader has to know who has not read the paper."""
    trained = {
        "": "trained on its own verdicts",
        "sft": "trained on the pictures that it accepted",
        "dpo": "trained to prefer a picture that it accepted to one that it rejected",
        "dpo sft": "trained on the pictures that it accepted, then to prefer them to those that it rejected",
    }[" ".join(sorted(methods(rounds)))]
    n_prompts = len(group_by_prompt(rounds[0].heldout))
    return (
        "<p>One model does two things here: it <b>draws</b> pictures from prompts, and it <b>looks</b> at pictures and answers "
        "questions about them. Asked whether its own picture shows what the prompt wanted, it often says no. The share of such "
        "pictures is its <b>nonunified score</b>: the model contradicts itself.</p>"
        f"<p>Each round it draws several pictures a prompt, judges every one itself, and is {trained}. No person and no other "
        f"model tells it what is right. The scores below are of {n_prompts:,} held-out prompts that it "
        "is never trained on.</p>"
    )


def credibility(numbers: list[Row], first: Row, last: Row, source: str) -> str:
    """Whether to believe the score: a judge that says yes to everything has a score of 0."""
    if first is last:
        return "<p>Nothing has been trained and drawn yet: this is where the run starts.</p>"
    separation = (
        "Its separation, how much surer it says yes to a picture's own prompt than to a wrong one, went from "
        f"{rounded(first['separation'])} to {rounded(last['separation'])}; a judge that says yes to everything would be at 0."
    )
    question = "<p><b>Is the change real?</b> A score also falls when the judge grows lax"
    if first["accuracy"] is None or last["accuracy"] is None:
        self_check = "No independent judge looked, so look yourself, and at the check that needs no labels."
        return f"{question}. {self_check} {separation}</p>"
    judge = [row["judge_accuracy"] for row in numbers if row["judge_accuracy"] is not None]
    judge_change = describe_change(judge[0], judge[-1])
    judging = f"Of its own verdicts, on one fixed set of pictures, the share that is right {judge_change}."
    return (
        f"{question}, so an independent judge ({quoted(source)}) looked at the same pictures. The share that it calls right "
        f"{describe_change(first['accuracy'], last['accuracy'])}. {judging if len(judge) > 1 else ''} {separation}</p>"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The curves and their numbers


HEADINGS = {  # column of a round's numbers -> its heading in the table behind the curves
    "round": "round",
    "nonunified": "nonunified",
    "low": "95 % from",
    "high": "to",
    "separation": "separation",
    "accuracy": "accuracy",
    "judge_accuracy": "judge accuracy",
    "false_positive_rate": "false positives",
    "false_negative_rate": "false negatives",
    "discard": "discard pool",
    "recovered": "recovered",
    "n_sft": "SFT pictures",
    "n_pairs": "pairs",
}


def tiles(numbers: list[Row]) -> str:
    """The few numbers that matter, first and last."""
    parts = []
    for key, name, note in (
        ("nonunified", "nonunified score", "own pictures rejected; lower is better"),
        ("accuracy", "accuracy", "pictures that the independent judge calls right"),
        ("judge_accuracy", "judge accuracy", "verdicts that are right, on one fixed set"),
        ("separation", "separation", "own prompt against a wrong one; higher is better"),
        ("discard", "discard pool", "prompts with no accepted picture"),
    ):
        known = [row for row in numbers if row[key] is not None]
        if not known:
            continue
        was = f'<span class="was">{rounded(known[0][key])} →</span> ' if len(known) > 1 else ""
        if key == "nonunified":
            note += f" (95 % interval {rounded(known[-1]['low'])} to {rounded(known[-1]['high'])})"
        parts.append(f"<div><dt>{name}</dt><dd>{was}<b>{rounded(known[-1][key])}</b><small>{note}</small></dd></div>")
    return f'<dl class="tiles">{"".join(parts)}</dl>'


def round_chart(numbers: list[Row], title: str, keys: dict[str, tuple[str, str]], caption: str) -> str:
    """Some columns of the rounds' numbers as curves, "" where no round knows them. keys: column -> (name, colour)."""
    lines = []
    for key, (name, color) in keys.items():
        known = [row for row in numbers if row[key] is not None]
        band = [(row["round"], row["low"], row["high"]) for row in known if key == "nonunified"]
        if known:
            lines.append(Line(name, color, [(row["round"], row[key]) for row in known], band))
    if not lines:
        return ""
    values = [y for line in lines for _, y in line.points]
    counts = "discard" in keys
    y_ticks = nice_ticks(min(0, *values), max(*values, 1), 1 if counts else 0)
    labels = [(row["round"], f"round {row['round']}" if row["round"] else "base") for row in numbers]
    changes = "; ".join(f"{line.name} from {rounded(line.points[0][1])} to {rounded(line.points[-1][1])}" for line in lines)
    description = f"{title} over the rounds: {changes}"
    return chart_figure(title, line_chart(lines, labels[:: math.ceil(len(labels) / 4)], y_ticks, description), caption, lines)


def training_chart(rounds: list[Round], title: str, kind: str, key: str, caption: str) -> str:
    """One logged number over the steps of all rounds' SFT or DPO, one after the other; "" where none was logged."""
    lines, labels, start = [], [], 0
    trained = [(one.number, made.metrics) for one in rounds for made in one.training if made.method == kind]
    for number, metrics in trained:
        values = [float(row[key]) for row in metrics if type(row.get(key)) in (int, float) and abs(row[key]) < 1e30]
        if values:
            points = downsample(values, max(10, MAX_POINTS // len(trained)))
            lines.append(Line("", "model", [(start + x, y) for x, y in points]))
            labels.append((start + len(values) / 2, f"round {number}"))
            start += len(values)
    if not lines:
        return ""
    lines[-1] = lines[-1]._replace(name=title)
    values = [y for line in lines for _, y in line.points]
    description = f"{title} over {start} steps, from {rounded(values[0])} to {rounded(values[-1])}"
    chart = line_chart(lines, labels[:: math.ceil(len(labels) / 4)], nice_ticks(min(values), max(values)), description)
    return chart_figure(title, chart, caption)


def curves_section(numbers: list[Row], rounds: list[Round]) -> str:
    """The curves over rounds and steps, and their numbers."""
    drawing, judging = ("its drawing", "other"), ("its judging", "model")
    charts = [
        round_chart(numbers, title, keys, caption)
        for title, keys, caption in (
            (
                "Nonunified score",
                {"nonunified": ("nonunified", "model")},
                "Share of held-out pictures that the model itself rejects, with its 95 % interval. It should fall.",
            ),
            (
                "Accuracy and judge accuracy",
                {"judge_accuracy": judging, "accuracy": drawing},
                "By the independent judge: how often the drawings are right, and how often the model's verdicts are. Drawing "
                "should rise; judging must not fall, or the score means less and less.",
            ),
            (
                "Separation",
                {"separation": ("separation", "model")},
                "Mean P(yes) for a picture's own prompt less that for a foil, a wrong one. At 0 the judge does not look.",
            ),
            (
                "Discard pool",
                {"discard": ("prompts", "model")},
                "Training prompts with no accepted candidate. They come back next round; the pool should shrink.",
            ),
        )
    ]
    sft = "-log p of the accepted pictures, per image token. It should fall within a round."
    dpo = "It starts at ln 2 = 0.693, where the policy still is its reference, and should fall."
    margin = "Reward of the chosen less that of the rejected picture. It starts at 0 and should grow."
    charts.append(training_chart(rounds, "SFT loss", "sft", "loss", sft))
    charts.append(training_chart(rounds, "DPO loss", "dpo", "loss", dpo))
    charts.append(training_chart(rounds, "DPO margin", "dpo", "margin", margin))
    rows = [[rounded(row[key]) for key in HEADINGS] for row in numbers]
    body = "<p>A point a round; base is the model before training.</p>"
    body += f'<div class="charts">{"".join(charts)}</div>'
    body += table(list(HEADINGS.values()), rows, "The numbers behind the curves")
    return section("curves", "Round by round", body)


def categories_section(rounds: list[Round]) -> str:
    """Bars by category, before and after, and their numbers."""
    drawn = [one for one in rounds if one.heldout]
    sides = [drawn[0], drawn[-1]][: len(drawn)]
    names = list(dict.fromkeys(name for one in sides for name in one.heldout.columns["category"]))
    rejected: list[tuple[str, list[float | None]]] = []
    right: list[tuple[str, list[float | None]]] = []
    for name in names[:200]:
        groups = [one.heldout.take(one.heldout.columns["category"] == name) for one in sides]
        rejected.append((name, [mean(rejected_shares(group)) for group in groups]))
        right.append((name, [accuracy(group) for group in groups]))
    when = f"Pale: before training. Full: {stage(sides[-1])}. " if len(sides) > 1 else ""
    more = f" The first 16 of {len(names)} categories." if len(names) > 16 else ""
    charts, both = [], (("Nonunified score", rejected, "model", "Shorter"), ("Accuracy", right, "other", "Longer"))
    for title, bars, color, better in both:
        if any(value is not None for _, values in bars for value in values):
            chart = bar_chart(bars[:16], color, f"{title} by category; the numbers are in the table below")
            charts.append(chart_figure(title, chart, f"{when}{better} is better.{more}"))
    ends = ["before", "after"][: len(sides)]
    headings = ["category", *(f"nonunified {end}" for end in ends), *(f"accuracy {end}" for end in ends)]
    rows = [[name, *map(rounded, values + accuracies)] for (name, values), (_, accuracies) in zip(rejected, right, strict=True)]
    body = f'<p>Where it helped, and where it did not.</p><div class="charts">{"".join(charts)}</div>'
    return section("categories", "By category", body + table(headings, rows, "The numbers behind the bars"))


# ---------------------------------------------------------------------------------------------------------------------
# The pictures


def gallery_section(gallery: Gallery, uris: dict[PictureKey, str]) -> str:
    """A gallery as HTML; without pictures only its words."""
    if not gallery.n_found:
        return section(gallery.name, gallery.title, f"<p>{gallery.if_empty}</p>")
    cards = []
    for card in gallery.cards if uris else []:
        sides = "".join(
            f'<div class="side">{f"<h4>{escape(title)}</h4>" if title else ""}<div class="strip">'
            f"{''.join(picture_figure(row, uris[picture_key(row)]) for row in rows)}</div></div>"
            for title, rows in card.sides
        )
        cards.append(f'<article><h3>{quoted(card.prompt)}</h3><div class="sides">{sides}</div></article>')
    body = f"<p>{gallery.text}</p>"
    body += f'<p class="count">Shown: {len(cards) or "none"} of {gallery.n_found:,} {gallery.unit}.</p>'
    return section(gallery.name, gallery.title, f'{body}<div class="cards {gallery.name}">{"".join(cards)}</div>')


# ---------------------------------------------------------------------------------------------------------------------
# The page


def settings_section(settings: list[tuple[str, str]], rounds: list[Round]) -> str:
    """How the run was made: the loop's variables, what the tensor files' headers say, the trainings' flags."""
    header = rounds[0].heldout[0]["tokens"].metadata
    wanted = "model model_hash answer questions threshold guidance temperature steps image_tokens versions".split()
    rows = settings + [(f"base pictures: {key}", header[key]) for key in wanted if header.get(key)]
    listed = "".join(f'<tr><th scope="row">{quoted(name)}</th><td>{quoted(value)}</td></tr>' for name, value in rows)
    body = f'<div class="scroll" tabindex="0"><table class="settings">{listed}</table></div>'
    runs = [(f"round {one.number} {made.name}", made.settings, len(made.metrics)) for one in rounds for made in one.training]
    if runs:
        keys = sorted({key for _, flags, _ in runs for key in flags})
        lines = [[name, str(steps), *(json.dumps(flags.get(key)).strip('"') for key in keys)] for name, flags, steps in runs]
        body += table(["training", "steps", *keys], lines, "The trainings' settings")
    return section("settings", "Settings", body)


def make_page(
    run: Path, rounds: list[Round], galleries: list[Gallery], uris: dict[PictureKey, str], side: int, reason: str
) -> str:
    """The whole page. side: of the pictures, in pixels. reason: why there are no pictures, "" where there are."""
    numbers = [round_numbers(one, before) for one, before in zip(rounds, [None, *rounds[:-1]], strict=True)]
    drawn = [row for row in numbers if row["nonunified"] is not None]
    first, last = drawn[0], drawn[-1]
    source = next((one.label_source for one in rounds if one.label_source), "")
    name = run.resolve().name
    missing = f"<b>This page has no pictures:</b> {quoted(reason)}. Give report.py a --model."
    warning = f'<p class="warning" role="alert">{missing}</p>' if reason else ""
    shown = [gallery_section(gallery, uris) for gallery in galleries]
    replied = any('class="reply"' in text for text in shown)
    reading = (
        '<p class="reading"><b>Reading the pictures.</b> <span class="yes">✓ 0.98</span>: the model accepts its own picture, '
        'with P(yes) = 0.98. <span class="no">✗ 0.03</span>: it rejects it.'
    )
    if replied:
        reading = (
            '<p class="reading"><b>Reading the pictures.</b> <span class="yes">✓</span>: the model accepts its own picture. '
            '<span class="no">✗</span>: it rejects it, or its reply is <i>unreadable</i>, neither yes nor no. Below it what it '
            "wrote when it was asked about the prompt, and about a foil, a wrong prompt."
        )
    if source:
        reading += " <i>right</i> or <i>wrong</i> is the independent judge's word, in colour where the two disagree."
    ends = [one for one in rounds if one.heldout]
    seen = [(stage(one), one.heldout) for one in (*ends[:1], *ends[1:][-1:])]
    surveys = [(when, make_survey(x.columns["id"], x.columns["category"], x.accepted, x.label)) for when, x in seen]
    body = [
        f'<header><p class="eyebrow">nonunified · report of {quoted(name)}</p>{warning}<h1>{headline(first, last)}</h1>',
        f'<div class="lead">{introduction(rounds)}{credibility(numbers, first, last, source)}</div>{tiles(numbers)}</header>',
        f"<main>{'' if reason else reading + '</p>'}{shown[0]}",
        curves_section(numbers, rounds),
        categories_section(rounds),
        levels_section(surveys),
        *shown[1:],
        settings_section(read_settings(run / "settings.txt"), rounds),
        "</main>",
    ]
    return document(f"nonunified: {isolated(name)}", "\n".join(body), side)


# ---------------------------------------------------------------------------------------------------------------------
# Command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="the directory that self_improve.sh wrote (its OUT)")
    parser.add_argument("--out", type=Path, help="page to write (default: RUN_DIR/report.html)")
    parser.add_argument("--model", help="checkpoint that decodes the pictures (default: one that the run's files name)")
    parser.add_argument("--batch", type=int, default=16, help="pictures decoded at a time (default 16)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error(f"--batch must be at least 1, found {args.batch}")
    args.out = args.out or args.run / "report.html"
    return args


def token_files(rounds: list[Round]) -> list[Tokens]:
    """The files that hold the pictures which the page may show."""
    pictures = [some for one in rounds for some in (one.heldout, one.scored, *one.pairs)]
    return list({some.tokens.path: some.tokens for some in pictures if some and some.tokens}.values())


def main(args: argparse.Namespace) -> None:
    ranks = Ranks()
    if ranks.world > 1:
        raise BadInput("report.py is one process; start it without torchrun")
    check_outputs([], {args.out: "report"})  # nothing that is read is a page
    rounds = read_run(args.run)
    files = token_files(rounds)
    policy, reason = find_decoder(files, args.run, args.model, args.device, ranks)
    side = picture_side(policy, rounds[0].heldout[0]) if policy else 0
    galleries = make_galleries(rounds, tiny=side <= TINY_SIDE)
    uris: dict[PictureKey, str] = {}
    if policy:
        rows = [row for gallery in galleries for card in gallery.cards for row in card.pictures()]
        add_replies(rows)
        uris = data_uris(policy, rows, args.batch)
        galleries = within_budget(galleries, lambda row: len(uris[picture_key(row)]), PICTURE_BYTES)
    else:
        print(f"warning        the page has no pictures: {printable(reason)}; give --model")

    page = make_page(args.run, rounds, galleries, uris, side, reason)
    if (size := len(page.encode())) > PAGE_BYTES:
        raise BadInput(f"{args.run}: its settings and tables make a page of {size} bytes, more than {PAGE_BYTES}")
    for tokens in files:
        tokens.check_unchanged()
    with whole_file(args.out, "w") as file:
        file.write(page)
    print(f"page           {len(rounds) - 1} rounds, {page.count('<img ')} pictures, {size / 1e6:.2f} MB")
    print(printable(args.out))


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))

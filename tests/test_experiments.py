"""The experiments: what spoils data, the numbers of a row, the tables, and one experiment from the shell."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import ROOT, run, spawn

sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "benchmarks")]
import kernel
import measure
import real_size
import tables

from common.records import LABELS, PAIRS, SCORED, SFT, Tokens, read_rows, write_tokens
from common.writing import write_rows
from experiments import law, runs

P_YES = {"a": [0.9, 0.2, 0.7, 0.1], "b": [0.6, 0.4, 0.3, 0.8], "c": [0.05, 0.15, 0.25, 0.35]}
METADATA = {"model": "M", "model_hash": "0" * 16, "codebook_size": "99", "image_tokens": "2", "threshold": "0.5"}


@pytest.fixture
def scored(tmp_path):
    """Three prompts of four candidates; a picture's tokens are its row number, twice."""
    rows = []
    for name, values in P_YES.items():
        for candidate, p_yes in enumerate(values):
            row = {"id": name, "prompt": f"prompt {name}", "category": "color", "candidate": candidate, "p_yes": p_yes}
            rows.append(row | {"coverage": 1.0, "foil": "another", "p_yes_foil": 0.02, "row": len(rows)})
    write_rows(tmp_path / "scored.jsonl", rows)
    write_tokens(tmp_path / "scored.safetensors", np.repeat(np.arange(len(rows))[:, None], 2, axis=1), METADATA)
    return tmp_path / "scored.jsonl"


def varied(kind, amount, file, out, columns, *flags, seed=0):
    """The rows that vary.py writes, each with its picture's tokens as the row it came from."""
    run("vary.py", kind, amount, file, "--out", out, "--seed", seed, *flags)
    tokens = Tokens(out)
    assert tokens.metadata.items() >= METADATA.items() and tokens.metadata["varied"] == f"{kind} {amount:g}"
    return [row for _, row in read_rows(out, columns)], tokens[:][:, 0].tolist()


def test_fewer_candidates_are_the_first_of_each_prompt(scored, tmp_path):
    rows, pictures = varied("candidates", 2, scored, tmp_path / "few" / "scored.jsonl", SCORED)
    assert [(row["id"], row["candidate"]) for row in rows] == [(name, n) for name in "abc" for n in (0, 1)]
    assert pictures == [0, 1, 4, 5, 8, 9] and [row["row"] for row in rows] == list(range(6))


def test_half_of_the_prompts_are_drawn_by_lot_with_all_their_candidates(scored, tmp_path):
    kept = set()
    for seed in range(6):
        rows, _ = varied("prompts", 0.34, scored, tmp_path / f"some{seed}" / "scored.jsonl", SCORED, seed=seed)
        assert [row["candidate"] for row in rows] == [0, 1, 2, 3] and len({row["id"] for row in rows}) == 1
        kept |= {row["id"] for row in rows}
    assert kept == {*"abc"}


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_a_noisy_judge_turns_its_verdicts_round_and_nothing_else(scored, tmp_path, share):
    n = 400
    rows = [row | {"id": f"{row['id']}{copy}"} for copy in range(n // 4) for _, row in read_rows(scored, SCORED)]
    rows = [row | {"p_yes_foil": 0.9 if number % 3 else 0.02, "row": number} for number, row in enumerate(rows)]
    write_rows(tmp_path / "many.jsonl", rows)
    write_tokens(tmp_path / "many.safetensors", np.zeros((len(rows), 2), int), METADATA)
    noisy, _ = varied("noise", share, tmp_path / "many.jsonl", tmp_path / "noisy" / "scored.jsonl", SCORED)
    for column in ("p_yes", "p_yes_foil"):
        turned = np.mean([(old[column] > 0.5) != (new[column] > 0.5) for old, new in zip(rows, noisy, strict=True)])
        assert abs(turned - share) < 4 * (share * (1 - share) / len(rows)) ** 0.5 + 1e-9
        assert {row[column] for row in noisy} <= {row[column] for row in rows}
    unchanged = ("p_yes", "p_yes_foil", "row")
    assert all(
        {k: v for k, v in old.items() if k not in unchanged} == {k: v for k, v in new.items() if k not in unchanged}
        for old, new in zip(rows, noisy, strict=True)
    )


def test_the_oracles_verdicts_take_the_place_of_wrong_ones_and_of_no_other(scored, tmp_path):
    before = [row for _, row in read_rows(scored, SCORED)]
    labels = [{"id": row["id"], "candidate": row["candidate"], "label": row["row"] % 3 // 2, "source": "o"} for row in before]
    write_rows(tmp_path / "labels.jsonl", labels)
    rows, _ = varied("truth", 0, scored, tmp_path / "true" / "scored.jsonl", SCORED, "--labels", tmp_path / "labels.jsonl")
    assert [row["p_yes"] > 0.5 for row in rows] == [bool(label["label"]) for label in labels]
    kept = [new["p_yes"] == old["p_yes"] for old, new in zip(before, rows)]
    assert kept == [(row["p_yes"] > 0.5) == bool(label["label"]) for row, label in zip(before, labels)] and 2 < sum(kept) < 10
    assert [row | {"p_yes": 0} for row in rows] == [row | {"p_yes": 0} for row in before]  # foils' verdicts are as they were
    done = run("vary.py", "truth", 0, scored, "--out", tmp_path / "none" / "scored.jsonl", ok=False)
    assert done.returncode == 2 and "truth, which needs them" in done.stderr


def test_a_judge_that_says_yes_is_refused_before_training(scored, tmp_path):
    rows, _ = varied("yes", 0, scored, tmp_path / "yes" / "scored.jsonl", SCORED)
    assert all(row["p_yes"] > 0.99 and row["p_yes_foil"] > 0.99 for row in rows)
    done = run("make_pairs.py", "--scored", tmp_path / "yes" / "scored.jsonl", "--out", tmp_path / "yes", ok=False)
    assert done.returncode == 3 and "accepted" in done.stderr


def test_rejected_pictures_come_worst_first_and_without_accepted_ones(scored, tmp_path):
    rows, pictures = varied("rejected", 2, scored, tmp_path / "worst" / "sft.jsonl", SFT)
    assert [row["p_yes"] for row in rows] == [0.1, 0.2, 0.3, 0.4, 0.05, 0.15]
    assert pictures == [3, 1, 6, 5, 8, 9]


def test_pictures_by_lot_are_different_ones_of_their_prompt(scored, tmp_path):
    rows, pictures = varied("lot", 3, scored, tmp_path / "lot" / "sft.jsonl", SFT)
    assert [row["id"] for row in rows] == list("aaabbbccc") and len(set(pictures)) == 9
    assert [picture // 4 for picture in pictures] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert varied("lot", 3, scored, tmp_path / "again" / "sft.jsonl", SFT)[1] == pictures
    assert varied("lot", 3, scored, tmp_path / "other" / "sft.jsonl", SFT, seed=1)[1] != pictures


@pytest.mark.parametrize("share", [0, 1])
def test_inverting_pairs_exchanges_chosen_and_rejected(scored, tmp_path, share):
    run("make_pairs.py", "--scored", scored, "--out", tmp_path / "data", "--pairs-per-prompt", 2)
    before = [row for _, row in read_rows(tmp_path / "data" / "pairs.jsonl", PAIRS)]
    after, _ = varied("invert", share, tmp_path / "data" / "pairs.jsonl", tmp_path / "bad" / "pairs.jsonl", PAIRS)
    assert len(before) == 4
    for old, new in zip(before, after, strict=True):
        exchanged = new["chosen"] == old["rejected"] and new["p_yes_rejected"] == old["p_yes_chosen"]
        assert exchanged if share else old == new


def test_nothing_left_is_refused(scored, tmp_path):
    done = run("vary.py", "candidates", 0, scored, "--out", tmp_path / "none" / "scored.jsonl", ok=False)
    assert done.returncode == 2 and "leaves no row" in done.stderr and not (tmp_path / "none" / "scored.jsonl").exists()


# ---------------------------------------------------------------------------------------------------------------------
# A row, and the tables


def test_the_counts_of_a_level_and_their_shares_by_hand(scored, tmp_path):
    """The oracle calls every other picture right; the levels are T2I-CompBench's, as two of the prompts are."""
    rows = [
        row | {"category": {"a": "texture", "b": "complex", "c": "color"}[row["id"]]} for _, row in read_rows(scored, SCORED)
    ]
    write_rows(tmp_path / "heldout.jsonl", rows)
    write_tokens(tmp_path / "heldout.safetensors", np.zeros((len(rows), 2), int), METADATA)
    labels = [{"id": row["id"], "candidate": row["candidate"], "label": row["candidate"] % 2, "source": "o"} for row in rows]
    write_rows(tmp_path / "labels.jsonl", labels)
    found = measure.level_rows(tmp_path)
    assert list(found) == ["medium", "texture", "complex"]
    # a: 0.9 0.2 0.7 0.1; b: 0.6 0.4 0.3 0.8; right: 0 1 0 1
    assert found["texture"] == {"pictures": 4, "right": 2, "rejected": 2, "weak": 0, "judged_right": 0}
    assert found["medium"] == {"pictures": 8, "right": 4, "rejected": 4, "weak": 1, "judged_right": 2}
    assert tables.share("weak", "rejected")([found["medium"]] * 2) == "0.25 (2/8)"
    assert tables.share("weak", "rejected", interval=True)([found["medium"]] * 2) == "0.250 (2/8), 0.071 to 0.591"
    assert tables.share("weak", "rejected")([{"weak": 0, "rejected": 0}]) == "-"


def test_a_judges_numbers_by_hand():
    base = {"right": [1, 1, 0, 0], "p_yes": [0.9, 0.3, 0.6, 0.01]}
    seen = {"p_yes": [0.8, 0.7, 0.4, 0.02], "caption": [2.0, 1, 0, 1], "caption_foil": [0.0, 1, 1, 0]}
    base, seen = ({key: np.array(values, float) for key, values in it.items()} for it in (base, seen))
    base |= {"right": base["right"].astype(bool), "accepted": base["p_yes"] > 0.5}
    seen |= {"accepted": seen["p_yes"] > 0.5}
    found = measure.judge_numbers(base, seen)
    assert (found["judge_accuracy"], found["false_positive_rate"], found["false_negative_rate"]) == (1, 0, 0)
    assert (found["wins"], found["disagreements"], found["caption_margin"]) == (2, 2, 0.5)
    margins = np.log([0.8 / 0.2, 0.7 / 0.3, 0.6 / 0.4, 0.98 / 0.02])
    assert found["margin"] == pytest.approx(margins.mean())
    assert found["border_margin"] == pytest.approx(margins[1:3].mean())  # 0.9 itself is not between
    itself = measure.judge_numbers(base, base | {"caption": seen["caption"], "caption_foil": seen["caption_foil"]})
    assert (itself["judge_accuracy"], itself["disagreements"], itself["border_accuracy"]) == (0.5, 0, 0)


def test_a_row_says_what_the_law_needs_and_who_made_it(scored, tmp_path):
    """By category a, t and f of the own pictures; of data the share of right ones, found by their tokens."""
    base = tmp_path / "base"
    base.mkdir()
    for name in ("scored", "heldout"):
        (base / f"{name}.jsonl").write_text(
            scored.read_text().replace(
                '"id": "c", "prompt": "prompt c", "category": "color"', '"id": "c", "prompt": "prompt c", "category": "shape"'
            )
        )
        (base / f"{name}.safetensors").write_bytes(scored.with_suffix(".safetensors").read_bytes())
    truth = {"a": (1, 1, 0, 0), "b": (1, 0, 1, 0), "c": (0, 0, 0, 1)}
    labels = [{"id": i, "candidate": n, "label": x, "source": "o"} for i, all_ in truth.items() for n, x in enumerate(all_)]
    for name in ("labels", "scored-labels"):
        write_rows(base / f"{name}.jsonl", labels)
    own = measure.read_pictures(base / "heldout.jsonl", base / "labels.jsonl")
    assert measure.by_category(own) == {
        "color": {"pictures": 8, "accuracy": 0.5, "accepted_right": 0.5, "accepted_wrong": 0.5},
        "shape": {"pictures": 4, "accuracy": 0.25, "accepted_right": 0.0, "accepted_wrong": 0.0},
    }
    run("make_pairs.py", "--scored", base / "scored.jsonl", "--out", tmp_path / "data", "--per-prompt", 1)
    run("measure.py", "--data", "--base", base, "--dir", tmp_path / "data", "--name", "data", "--family", "janus", "--seed", 0)
    (row,) = tables.read_results(tmp_path / "data")
    assert row.pop("commit") == measure.commit() and row.pop("versions") is None
    assert measure.commit() is None or re.fullmatch(r"[0-9a-f]{12}\+?", measure.commit())
    counts = {"drawn": 12, "sft": 2, "pairs": 2, "drawn_right": round(5 / 12, 5), "sft_right": 0.5, "chosen_right": 0.5}
    of = row.pop("categories")
    assert row == {"name": "data", "family": "janus", "seed": 0} | counts | {"rejected_right": 0.5}
    assert of["color"] == {key: row[key] for key in of["color"]} | {"drawn": 8, "drawn_right": 0.5}
    nothing = {"sft_right": None, "chosen_right": None, "rejected_right": None}
    assert of["shape"] == {"drawn": 4, "sft": 0, "pairs": 0, "drawn_right": 0.25} | nothing


def test_a_prompts_gain_is_told_by_whose_data_it_had(scored, tmp_path):
    """Before, of four pictures each, a has 2 right ones, b 2, c 1; after, all of a's, 3 of b's and none of c's."""
    base, after = tmp_path / "base", tmp_path / "after"
    before = {"a": (1, 1, 0, 0), "b": (1, 0, 1, 0), "c": (0, 0, 0, 1)}
    for at, name, truth in (
        (base, "scored8", before),
        (after, "drawn", {"a": (1, 1, 1, 1), "b": (1, 1, 1, 0), "c": (0, 0, 0, 0)}),
    ):
        at.mkdir()
        (at / f"{name}.jsonl").write_bytes(scored.read_bytes())
        (at / f"{name}.safetensors").write_bytes(scored.with_suffix(".safetensors").read_bytes())
        labels = [{"id": i, "candidate": n, "label": x, "source": "o"} for i, all_ in truth.items() for n, x in enumerate(all_)]
        write_rows(at / f"{name}-labels.jsonl", labels)
    run("make_pairs.py", "--scored", scored, "--out", tmp_path / "data")  # c has no accepted picture, and no pair
    rows = [
        row | ({"p_yes_chosen": 0.1, "p_yes_rejected": 0.9} if row["id"] == "b" else {})
        for _, row in read_rows(tmp_path / "data" / "pairs.jsonl", PAIRS)
    ]
    write_rows(tmp_path / "data" / "pairs.jsonl", rows)
    found = measure.prompt_numbers(base, after, tmp_path / "data" / "pairs.jsonl")["groups"]
    one = {"prompts": 1, "error": None}
    assert found == {
        "own": one | {"before": 0.5, "gain": 0.5},
        "turned": one | {"before": 0.5, "gain": 0.25},
        "others": one | {"before": 0.25, "gain": -0.25},
    }
    varied("prompts", 0.67, scored, tmp_path / "data" / "scored.jsonl", SCORED, seed=1)  # whose turn it was, data or not
    kept = {row["id"] for _, row in read_rows(tmp_path / "data" / "scored.jsonl", SCORED)}
    found = measure.prompt_numbers(base, after, tmp_path / "data" / "pairs.jsonl")["groups"]
    gains = {"a": 0.5, "b": 0.25, "c": -0.25}
    assert found["own"]["prompts"] == 2 and found["own"]["gain"] == pytest.approx(np.mean([gains[name] for name in kept]))
    assert found["own"]["error"] == pytest.approx(abs(np.subtract(*(gains[name] for name in kept))) / 2)
    assert found["others"] == one | {"before": 0.5 if kept != {*"ab"} else 0.25, "gain": gains[({*"abc"} - kept).pop()]}


def test_what_the_gate_does_not_read_is_counted_by_hand(scored, tmp_path):
    """Of twelve pictures four are accepted; the base's judge says otherwise of a's first and, near its border, of b's last."""
    rows = [row for _, row in read_rows(scored, SCORED)]
    foils = {"a": "two prompts a", "b": "prompt c", "c": "prompt d"}
    rows = [row | {"foil": foils[row["id"]], "p_yes_foil": 0.6 if row["candidate"] == 0 else 0.1} for row in rows]
    write_rows(tmp_path / "heldout.jsonl", rows)
    (tmp_path / "heldout.safetensors").write_bytes(scored.with_suffix(".safetensors").read_bytes())
    foils = {"number": [1, 2], "other words": [1, 2]}  # accepted for both, accepted
    assert measure.second_numbers(tmp_path) == {"pictures": 12, "foils": foils}
    said = {("a", 0): 0.05, ("b", 3): 0.45, ("c", 1): 0.02}  # the last agrees, and is no longer near the border
    write_rows(
        tmp_path / "seconded.jsonl", [row | {"p_yes": said.get((row["id"], row["candidate"]), row["p_yes"])} for row in rows]
    )
    (tmp_path / "seconded.safetensors").write_bytes(scored.with_suffix(".safetensors").read_bytes())
    near = 8  # all but a's first and last, at 0.05 and 0.1, and c's first two, at 0.05 and 0.02
    numbers = {"differ": 2, "near": near, "differ_near": 1}
    assert measure.second_numbers(tmp_path) == {"pictures": 12, "foils": foils} | numbers


def test_cells():
    rows = [{"x": 0.5, "wins": 3, "disagreements": 4, "stopped": 1}, {"x": 0.7, "wins": 0, "disagreements": 1, "stopped": 0}]
    rows = [row | {"least_loss": None} for row in rows]
    assert tables.spread("x")(rows) == "0.600 ± 0.141" and tables.spread("x", 1)(rows[:1]) == "0.5"
    assert tables.spread("y")(rows) == "-" and tables.spread("y")([{"y": None}, {"y": 1.0}]) == "1.000"
    assert tables.win_rate(rows) == "0.60 (3/5)" and tables.win_rate([{"wins": 0, "disagreements": 0}]) == "-"
    assert tables.stopped(rows) == "1 of 2" and tables.stopped([{}, {"stopped": 1}]) == "-"  # by the rule before
    assert tables.stopped([{"refused": 1}] * 3) == "3 of 3, before training"


def test_marked_tables_are_made_anew_and_the_rest_stays(tmp_path):
    row = {"family": "janus", "seed": 0, "accuracy": 0.5}
    write_rows(tmp_path / "rows.jsonl", [row | {"name": "base"}, row | {"name": "sft-drawing", "accuracy": 0.75}])
    (tmp_path / "text.md").write_text("before\n<!-- table scope -->\nold\n<!-- end -->\nafter\n")
    run("tables.py", tmp_path / "rows.jsonl", "--into", tmp_path / "text.md")
    text = (tmp_path / "text.md").read_text()
    assert text.startswith("before\n<!-- table scope -->\n| tiny Janus |") and text.endswith("<!-- end -->\nafter\n")
    assert "| SFT, and what draws (seeds 0) | 0.750 |" in text and "old" not in text
    others = [
        row | {"name": name, "family": f"janus-{base}"}
        for base in ("seed1", "blind")
        for name in ("base", "sft-drawing", "dpo-drawing")
    ]
    write_rows(tmp_path / "rows.jsonl", [row | {"name": "sft-drawing"}, *others])
    run("tables.py", tmp_path / "rows.jsonl", "--into", tmp_path / "text.md")
    text = (tmp_path / "text.md").read_text()  # a base made as the shipped one, not one that is another on purpose
    assert "| tiny Janus |" in text and "| tiny Janus, seed1 |" in text and "blind" not in text
    (tmp_path / "text.md").write_text("<!-- table nothing -->\n<!-- end -->\n")
    done = run("tables.py", tmp_path / "rows.jsonl", "--into", tmp_path / "text.md", ok=False)
    assert done.returncode == 2 and "'nothing'" in done.stderr


def test_the_learning_dynamics_are_a_row_for_each_kind_of_probe(tmp_path):
    numbers = (
        "delta_g",
        "delta_u",
        "delta_margin",
        "cosine",
        "cosine_foil",
        "g_rises",
        "u_rises",
        "sign_agreement",
        "spearman",
    )
    found = {key: {"value": 0.25, "low": 0.0, "high": 0.5} for key in numbers}
    kinds = {"rejected": {"n_probes": 3} | found, "random": {"n_probes": 2} | found | {"spearman": None}}
    (tmp_path / "dynamics.json").write_text(json.dumps({"kinds": kinds}))
    run("kernel.py", "--dir", tmp_path, "--name", "dynamics-dpo", "--family", "showo", "--seed", 1)
    rows = tables.read_results(tmp_path)
    assert [(row["name"], row["probes"]) for row in rows] == [("dynamics-dpo-random", 2), ("dynamics-dpo-rejected", 3)]
    text = tables.tables("dynamics", rows)
    assert "| DPO, rejected (seeds 1) | 0.2500 | 0.2500 | 0.25 | 0.25 | 0.25 | 0.25 |" in text
    assert "| DPO, other prompts (seeds 1) | 0.2500 | 0.2500 | 0.25 | 0.25 | 0.25 | - |" in text and "SFT" not in text


def test_the_numbers_of_proposition_1_are_rows_of_their_own(tmp_path):
    found = {key: {"value": 0.25, "low": 0.0, "high": 0.5} for key in kernel.BAYES}
    kinds = {"matching": {"n_probes": 3} | found, "random": {"n_probes": 2} | found | {"spearman_u_bayes": None}}
    (tmp_path / "dynamics.json").write_text(json.dumps({"kinds": kinds}))
    for name in ("bayes-sft", "descent0.1"):
        run("kernel.py", "--dir", tmp_path, "--bayes-name", name, "--family", "janus", "--seed", 0)
        rows = tables.read_results(tmp_path)
        assert [row["name"] for row in rows] == [f"{name}-matching", f"{name}-random"]
        table = {"bayes-sft": "kernel", "descent0.1": "descent"}[name]
        text = tables.tables(table, rows)
        line = {
            "kernel": "| SFT, other prompts (seeds 0) | 0.250 |",
            "descent": "| rate 0.1, other prompts (seeds 0) | 0.2500 |",
        }
        assert line[table] in text
    assert tables.tables("dynamics", rows) == ""


def test_a_judge_that_draws_is_measured_on_the_bases_pictures(tmp_path):
    """Of the base's pictures the new judge rejects one false positive, of which log p fell, and keeps one, of which it rose."""
    labels = [{"id": "a", "candidate": i, "label": int(i < 2), "source": "oracle"} for i in range(4)]
    for where, name, p_yes, own in (
        ("base", "heldout", (0.9, 0.2, 0.8, 0.7), (-1, -2, -3, -4)),
        ("new", "rejudged", (0.9, 0.8, 0.1, 0.6), (-2, -1, -5, -3)),
        ("new", "heldout", (0.9, 0.9, 0.9, 0.9), (-1, -1, -1, -1)),
    ):
        directory = tmp_path / where
        directory.mkdir(exist_ok=True)
        row = {"id": "a", "prompt": "p", "category": "c", "coverage": 1.0, "foil": "f", "p_yes_foil": 0.1}
        row |= {"p_yes_again": 0.5, "p_yes_foil_again": 0.5, "caption": -1, "caption_foil": -2, "log_likelihood_foil": -3.5}
        changing = [{"candidate": i, "row": i, "p_yes": p, "log_likelihood": own[i]} for i, p in enumerate(p_yes)]
        write_rows(directory / f"{name}.jsonl", [row | it for it in changing])
        write_tokens(directory / f"{name}.safetensors", np.zeros((4, 2), int), METADATA)
        write_rows(directory / "labels.jsonl", labels)
    flags = ("--base", tmp_path / "base", "--dir", tmp_path / "new", "--family", "janus", "--seed", 0, "--likelihood")
    run("measure.py", *flags, "--name", "likelihood-sft")
    (row,) = tables.read_results(tmp_path)
    assert (row["likelihood_accuracy"], row["likelihood_false_positive_rate"]) == (0.75, 0.5)
    assert (row["ranking_accuracy"], row["likelihood_ranking_accuracy"], row["own_likelihood_margin"]) == (1, 1, 2.5)
    counts = {key: row[key] for name in ("corrected", "stayed", "true_positives") for key in (name, f"{name}_fell")}
    assert [*counts.values()] == [1, 1, 1, 0, 1, 1]
    assert "| SFT (seeds 0) | 1.00 (1/1) | 0.00 (0/1) | 1.00 (1/1) |" in tables.tables("corrected", [row])
    assert "refused" not in row and "near_misses" not in row
    write_tokens(tmp_path / "sft.safetensors", np.zeros((1, 2), int), METADATA | {"forced": "separation 0.01 is under 0.05"})
    run("measure.py", *flags, "--name", "likelihood-sft", "--trained-on", tmp_path / "sft.jsonl")
    assert tables.read_results(tmp_path)[0]["refused"] == 1  # by make_pairs.py, before it was trained on


def test_what_the_gates_stopped_is_counted_by_kind():
    janus = [
        {"name": "sft", "stopped": 0, "least_loss": 0.01},
        {"name": "dpo-n4", "stopped": 1, "least_loss": None},
        {"name": "dpo", "stopped": 0, "undecided": 1, "least_loss": -0.01},
        {"name": "dpo-n16", "stopped": 1},  # by the rule before
        {"name": "sft-yes", "refused": 1},
        {"name": "base"},
    ]
    rows = [row | {"family": "janus"} for row in janus]
    rows.append({"name": "dpo-replay-3", "family": "showo", "stopped": 0, "least_loss": 0.0})
    lines = {line.split(" | ")[0]: line for line in tables.tables("stops", rows).splitlines()}
    assert lines["| good: first rounds at the usual rate"].endswith("| 1 of 3, 1 undecided | - |")
    assert lines["| good: second and third rounds"].endswith("| - | 0 of 1 |")
    assert lines["| bad: a judge that says yes to everything"].endswith("| 1 of 1, before training | - |")


def test_the_gates_are_tried_on_other_bases_and_a_loop_counts_once(tmp_path):
    """One of two loops is stopped in its second round, one in none; of the good runs one is undecided."""
    told = {
        "a": [("dpo-lr5-1", 0, 1), ("dpo-lr5-2", 1, 0), ("sft", 0, 1)],
        "b": [("dpo-lr5-1", 0, 0), ("dpo-lr5-2", 0, 1), ("sft", 0, 0)],
    }
    rows = [
        {"family": f"janus-{base}", "name": name, "seed": 0, "stopped": stopped, "least_loss": 0.0}
        | ({"undecided": 1} if undecided else {})
        for base, some in told.items()
        for name, stopped, undecided in some
    ]
    rows += [row | {"family": "janus", "stopped": 1} for row in rows]  # the shipped base is none of them
    lines = tables.tables("trial", rows + [{"family": "showo-a", "name": "sft-yes", "seed": 0, "refused": 1}]).splitlines()[2:]
    assert [line.split(" | ")[1:] for line in lines] == [
        ["1", "1", "0", "0", "1.000, 0.207 to 1.000 |"],
        ["2", "1", "1", "0", "0.500, 0.095 to 0.905 |"],
        ["2", "0", "1", "1", "0.000, 0.000 to 0.658 |"],
    ]


def test_each_base_is_a_line_with_what_a_round_gains(tmp_path):
    numbers = {"accuracy": 0.4, "judge_accuracy": 0.9, "false_positive_rate": 0.1}
    rows = [numbers | {"family": family, "name": "base", "seed": 0} for family in ("janus-blind-side", "janus-seed1", "janus")]
    rows += [
        numbers | {"family": "janus-seed1", "name": "sft", "seed": seed, "accuracy": 0.65} for seed in (0, 1)
    ]  # 1: no base
    lines = tables.tables("bases", rows).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| tiny Janus", "| tiny Janus, blind-side", "| tiny Janus, seed1"]
    assert lines[2].endswith("| 0.400 | 0.900 | 0.100 | +0.250, 0.900 | - | - | - |") and lines[0].endswith("| - | - | - | - |")


def test_other_read_outs_stand_by_kind_of_run_from_least_to_most():
    rows = [{"family": "janus", "name": "second-base", "seed": 0, "pictures": 8, "foils": {"number": [1, 4]}}]
    for name, near, differ, both in (("sft", 1, 2, 1), ("dpo", 3, 4, 2), ("sft-n4", 2, 2, 4), ("sft-lr10", 4, 6, 3)):
        row = {"family": "janus", "name": f"second-{name}", "seed": 0, "pictures": 8, "differ": differ, "differ_near": near}
        rows.append(row | {"near": 4, "foils": {"number": [both, 4], "color": [0, 4]}})
    rows.append(rows[-1] | {"family": "janus-blind-side"})  # another base
    rows.append(rows[-1] | {"family": "showo"})  # whose own is not there
    rows.append(rows[1] | {"name": "second-dpo-n4", "foils": {}, "near": 0, "differ_near": 0, "differ": 2})  # accepts nothing
    lines = tables.tables("second", rows).splitlines()[2:]
    assert [line.split(" | ")[1:] for line in lines] == [
        ["1", "1.000, 1.000, 1.000", "0.750, 0.750, 0.750", "0.125, 0.125, 0.125 |"],
        ["4", "0.250, 0.500, 0.750", "0.250, 0.250, 0.500", "-0.125, 0.000, 0.250 |"],
    ]


def test_a_drift_is_shown_beside_the_base_that_is_not_blind():
    def rows_of(family, name, share, both):
        misses = {key: {"share": share if key == "side" else 0.0, "accepted": None} for key in ("shape", "side", "number")}
        of = {"family": family, "seed": 0}
        return [
            of | {"name": name, "near_misses": misses},
            of | {"name": f"second-{name}", "foils": {"left or right": [both, 10], "number": [0, 9]}},
        ]

    rows = rows_of("janus", "base", 0.02, 0) + rows_of("janus", "sft", 0.01, 1)
    assert tables.tables("drift", rows).count("\n") == 1  # nobody is blind
    rows += rows_of("janus-blind-side", "base", 0.02, 9) + rows_of("janus-blind-side", "dpo--no-replay-3", 0.05, 10)
    rows.append({"family": "janus-blind-side", "name": "sft", "seed": 0, "near_misses": {}})
    assert tables.tables("drift", rows).splitlines()[2:] == [
        "| tiny Janus: side | 0.020, 0/10 | 0.010, 1/10 | - | - | - |",
        "| tiny Janus, blind-side: side | 0.020, 9/10 | - | - | - | 0.050, 10/10 |",
    ]


def test_what_own_data_add_is_a_difference_with_its_error():
    group = {"prompts": 9, "before": 0.4, "error": 0.03}
    rows = [
        {
            "family": "janus",
            "name": "prompts-sft-half",
            "seed": seed,
            "groups": {"own": group | {"gain": own}, "others": group | {"gain": 0.1, "error": 0.04}},
        }
        for seed, own in ((0, 0.3), (1, 0.5))
    ]
    turned = {"own": group | {"gain": 0.2}, "others": group | {"gain": 0.0}, "turned": group | {"gain": -0.1}}
    rows.append({"family": "janus-twin", "name": "prompts-dpo-invert0.5", "seed": 0, "groups": turned})
    lines = tables.tables("prompts", rows).splitlines()[2:]
    assert [line.split(" | ", 1)[1] for line in lines] == [
        f"+0.400 | +0.100 | - | +0.300 ± {2**0.5 * 0.05 / 2:.3f} |",
        "+0.200 | - | -0.100 | +0.300 ± 0.042 |",
    ]


def test_near_misses_are_counted_by_attribute_and_by_what_the_judge_says_of_them():
    own = {"misses": np.array(["side", "", "side", "number"]), "accepted": np.array([True, True, False, False])}
    assert measure.near_misses(own) == {
        "shape": {"share": 0.0, "accepted": None},
        "side": {"share": 0.5, "accepted": 0.5},
        "number": {"share": 0.25, "accepted": 0.0},
    }


def test_a_kind_of_run_on_another_base_is_shown_with_all_that_differ_in_their_data_alone():
    kinds = ["plain", "candidates: 2, 4, 16", "blind: candidates: 2, 4, 16", "blind: plain", "blind: 3 x the rate", "round 2"]
    shown = [
        "plain",
        "candidates: 2, 4, 16",
        *["another base, blind"] * 2,
        "another base, blind: other settings, later rounds",
        "round 2",
    ]
    assert [law.of_base(kind) for kind in kinds] == shown


def test_of_a_run_that_was_measured_again_the_last_row_counts(tmp_path):
    rows = [{"family": "janus", "name": "sft", "seed": seed, "accuracy": x} for seed, x in ((0, 0.1), (1, 0.2), (0, 0.3))]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert [(row["seed"], row["accuracy"]) for row in tables.read_results(tmp_path / "rows.jsonl")] == [(0, 0.3), (1, 0.2)]


def test_a_run_that_is_measured_again_is_appended_and_keeps_its_guided_numbers_alone(tmp_path):
    results, runs_ = tmp_path / "results.jsonl", tmp_path / "runs" / "sft"
    runs_.mkdir(parents=True)
    old = {"family": "janus", "name": "sft", "seed": 0, "accuracy": 0.1, "guided_accuracy": 0.6, "undecided": 1}
    write_rows(results, [old])
    new = {"family": "janus", "name": "sft", "seed": 0, "accuracy": 0.3}
    (runs_ / "row.json").write_text(json.dumps(new))
    for _ in range(2):  # the second time nothing is new
        run("tables.py", tmp_path / "runs", "--results", results, "--table", "short")
        assert [json.loads(line) for line in results.read_text().splitlines()] == [old, new | {"guided_accuracy": 0.6}]


@pytest.mark.parametrize("file", ["README.md", "docs/results.md", "docs/bad-data.md"])
def test_the_published_tables_are_those_of_the_published_rows(file):
    text = (ROOT / file).read_text()
    assert "<!-- table " in text
    assert tables.fill(text, tables.read_results(ROOT / "experiments" / "results.jsonl")) == text


# ---------------------------------------------------------------------------------------------------------------------
# The law


def lawful_rows(k: float, c: float, families=("janus",)) -> list[dict]:
    """Rows of a base (a = 0.4, t = 0.9, f = 0.1) and of runs that gain k (advantage) - c to the last digit, two seeds."""
    rows = []
    for family in families:
        for seed in (0, 1):
            base = {"family": family, "seed": seed, "accuracy": 0.4, "nonunified": 0.58, "weak_generation": 0.54 / 0.58}
            rows.append(base | {"name": "base"})
            for name in (
                "sft",
                "sft-n4",
                "sft-noise0.2",
                "sft-lot",
                "sft-rejected",
                "sft-lr3",
                "dpo",
                "dpo-noise0.4",
                "dpo-invert1",
            ):
                advantage = runs.by_rule(runs.condition(name), runs.Judge(0.4, 0.9, 0.1))
                rows.append(base | {"name": name, "accuracy": 0.4 + k * advantage - c})
    return rows


def test_the_advantage_of_a_runs_data_by_hand():
    judge = runs.Judge(0.4, 0.9, 0.1)
    accepted, rejected = 0.36 / 0.42, 0.04 / 0.58
    assert runs.own_judge([{"accuracy": 0.4, "nonunified": 0.58, "weak_generation": 0.54 / 0.58}]) == pytest.approx(judge)
    turned = 0.4 * (0.9 * 0.8 + 0.1 * 0.2) / (0.4 * 0.74 + 0.6 * 0.26)  # t = 0.74, f = 0.26
    for name, advantage in {
        "sft": accepted - 0.4,
        "sft-drawing": accepted - 0.4,
        "sft-noise0.2": turned - 0.4,
        "sft-lot": 0,
        "sft-rejected": rejected - 0.4,
        "dpo": accepted - rejected,
        "dpo-invert0.5": 0,
        "dpo-invert1": rejected - accepted,
        "sft-truth": 0.6,
        "dpo-truth": 1,
    }.items():
        assert runs.by_rule(runs.condition(name), judge) == pytest.approx(advantage), name
    # a later round: by the a, t and f that the round before ended with; the base's pictures again: less what is drawn by now
    now = runs.Judge(0.7, 0.9, 0.1)
    kind, advantage = runs.later_round(runs.ROUND.fullmatch("sft-replay-2"), now, judge)
    assert (kind, advantage) == ("round 2", pytest.approx(0.63 / 0.66 - 0.7))
    kind, advantage = runs.later_round(runs.ROUND.fullmatch("sft-once-2"), now, judge)
    assert (kind, advantage) == ("the same pictures again", pytest.approx(accepted - 0.7))
    assert runs.later_round(runs.ROUND.fullmatch("dpo-paper-3"), now, judge)[0] == "curricula, round 3"
    kind, advantage = runs.later_round(runs.ROUND.fullmatch("sft-truth-2"), now, judge)
    assert (kind, advantage) == ("rounds by the oracle's verdicts", pytest.approx(0.3))
    kind, advantage = runs.later_round(runs.ROUND.fullmatch("sft-rejected-2"), now, judge)
    assert (kind, advantage) == ("rounds on rejected pictures", pytest.approx(0.07 / 0.34 - 0.7))
    kind, advantage = runs.later_round(runs.ROUND.fullmatch("dpo-invert1-3"), now, judge)
    assert (kind, advantage) == ("rounds of inverted pairs", pytest.approx(0.07 / 0.34 - 0.63 / 0.66))
    measured = {"base": 0.4, "sft-truth": 0.6, "sft-truth-2": 0.7, "sft-truth-3": 0.72}  # the first round has no number
    measured |= {"dpo-invert1": 0.3, "dpo-invert1-2": 0.1}
    rows = [{"family": "janus", "seed": 0, "name": name, "accuracy": a} for name, a in measured.items()]
    found, _ = runs.read_runs([row | {"nonunified": 0.5, "weak_generation": 0.8} for row in rows])
    assert [(run.before, round(run.gain, 6)) for run in found] == [
        (0.4, 0.2),
        (0.6, 0.1),
        (0.7, 0.02),
        (0.4, -0.1),
        (0.3, -0.2),
    ]


def test_a_law_that_holds_is_found_and_foretells_kinds_left_out():
    rows = lawful_rows(0.5, 0.05)
    lines, said = law.foretell(runs.read_runs(rows)[0])
    for line in lines.values():
        assert (line.k, line.c) == (pytest.approx(0.5), pytest.approx(0.05)) and line.spread == pytest.approx(0, abs=1e-9)
    assert all(abs(it.error) < 1e-9 for it in said) and len(said) == 18
    assert {it.run.kind for it in said if not it.fitted} == {"3 x the rate"}
    found = law.constants(rows)["families"]["janus"]
    assert found["sft"] == {"k": 0.5, "c": 0.05, "spread": 0.0, "runs": 10, "counted": 0} and found["dpo"]["runs"] == 6
    bent = [row | {"accuracy": 0.7} if row["name"] == "sft-lot" else row for row in rows]  # one kind that does not obey
    (lot, *_) = [it for it in law.foretell(runs.read_runs(bent)[0])[1] if it.run.kind == "pictures by lot"]
    assert lot.gain == pytest.approx(-0.05) and not lot.within


def test_categories_are_taken_from_their_own_base_and_each_has_its_own_k():
    def numbers(**accuracies):
        return {name: {"accuracy": a, "accepted_right": 0.9, "accepted_wrong": 0.1} for name, a in accuracies.items()}

    rows = lawful_rows(0.5, 0.05, ("janus",))
    of = {"family": "janus", "seed": 0}
    rows.append(of | {"name": "likelihood-base", "categories": numbers(c=0.4, s=0.4, empty=1.0)})
    rows.append(of | {"name": "likelihood-sft", "categories": numbers(c=0.5, s=0.8, empty=1.0)})
    rows.append(of | {"name": "sft-rejected", "accuracy": 0.2, "categories": numbers(c=0.5, s=0.1, empty=0.9)})
    rows.append(of | {"name": "sft-paper-2", "accuracy": 0.2, "categories": numbers(c=0.5)})  # a later round
    rows.append(of | {"name": "sft-lr10", "accuracy": 0.2, "categories": numbers(c=0.5)})
    for name in ("likelihood-base", "sft-rejected"):
        rows.append(of | {"family": "janus-blind", "name": name, "accuracy": 0.2, "categories": numbers(c=0.5)})
    rows.append(of | {"name": "sft-n4", "seed": 1, "accuracy": 0.2, "categories": numbers(c=0.5)})  # whose base is not known
    rows.append(
        of
        | {
            "name": "data",
            "categories": {"c": {"drawn_right": 0.3, "sft_right": 0.6, "chosen_right": 0.7, "rejected_right": 0.1}},
        }
    )
    accepted, rejected = 0.36 / 0.42, 0.04 / 0.58
    found = {(part.name, part.category): (part.advantage, part.gain) for part in runs.by_category(rows)}
    assert found == {  # nor other settings, nor other bases
        ("sft", "c"): pytest.approx((0.3, 0.1)),  # counted in its data
        ("sft", "s"): pytest.approx((accepted - 0.4, 0.4)),
        ("sft", "empty"): pytest.approx((0, 0)),
        ("sft-rejected", "c"): pytest.approx((rejected - 0.4, 0.1)),
        ("sft-rejected", "s"): pytest.approx((rejected - 0.4, -0.3)),
        ("sft-rejected", "empty"): pytest.approx((0, -0.1)),
    }
    lines = {line.split(" | ")[0]: line.split(" | ")[1:] for line in law.categories_table(rows).splitlines()[2:]}
    x, y = np.array([accepted - 0.4, rejected - 0.4]), np.array([0.4 + 0.05, -0.3 + 0.05])
    line = law.foretell(runs.read_runs(rows)[0])[0]["janus", "sft"]
    off = np.sqrt(np.mean((line.k * x - line.c - np.array([0.4, -0.3])) ** 2))
    expected = ["2", f"{x @ (y + line.c - 0.05) / (x @ x):.2f}", "2 of 2", f"{off:.3f}", f"{accepted - 0.4:+.3f}", "+0.400 |"]
    assert lines["| tiny Janus, SFT: s"] == expected and lines["| tiny Janus, SFT: c"][2] == "1 of 2"
    assert lines["| tiny Janus, SFT: empty"][1] == "-"


def test_other_bases_are_foretold_and_not_fitted_data_rows_count_and_unknown_names_are_told(tmp_path):
    rows = lawful_rows(0.5, 0.05, ("janus", "janus-blind"))
    of = {"c": {"drawn_right": 0.3, "sft_right": 0.6}, "s": {"drawn_right": 0.5, "sft_right": 0.4}}
    of |= {"n": {"drawn_right": 0.5, "sft_right": 0.6}, "x": {"drawn_right": 0.5, "sft_right": None}}  # 0.3, -0.1, 0.1, none
    rows.append({"family": "janus-blind", "seed": 0, "name": "data-n4", "categories": of})
    rows.append({"family": "janus", "seed": 0, "name": "sft-new", "accuracy": 0.5})
    rows.append({"family": "showo", "seed": 0, "name": "sft", "accuracy": 0.5})  # without its base
    found, unplaced = runs.read_runs(rows)
    assert unplaced == ["janus sft-new", "showo sft"]
    lines, said = law.foretell(found)
    assert [run.name for run in found if run.counted] == ["sft-n4"] * 2
    assert lines["janus", "sft"].n_runs == 10 and {it.run.family for it in said if it.fitted} == {"janus"}
    blind = {it.run.name: it for it in said if it.run.family == "janus-blind"}
    assert blind["sft-n4"].run.kind == "blind: candidates: 2, 4, 16" and blind["sft-n4"].run.advantage == pytest.approx(0.3 / 4)
    assert blind["sft"].run.advantage == pytest.approx(0.36 / 0.42 - 0.4)
    write_rows(tmp_path / "rows.jsonl", rows)
    done = run("law.py", tmp_path / "rows.jsonl", "--constants", tmp_path / "law.json")
    assert "not placed, and left out: janus sft-new, showo sft" in done.stdout
    write_rows(tmp_path / "rows.jsonl", rows[-1:])
    done = run("law.py", tmp_path / "rows.jsonl", "--constants", tmp_path / "none.json", ok=False)
    assert done.returncode == 2 and "nothing to fit" in done.stderr and not (tmp_path / "none.json").exists()


def test_a_cost_of_the_bases_own_mends_what_the_shipped_law_says_of_it():
    """k = 0.5 everywhere, c = 0.05 on the shipped base and 0.2 on one that was stopped early."""
    rows = lawful_rows(0.5, 0.05) + lawful_rows(0.5, 0.2, ("janus-early300",))
    half = {"family": "janus-early300", "name": "dpo-invert0.5", "accuracy": 0.4 - 0.2}  # an advantage of nothing
    rows += [next(row for row in rows if row["family"] == half["family"]) | half | {"seed": seed} for seed in (0, 1)]
    found = runs.read_runs(rows)[0]
    pairs = law.with_own_c(law.foretell(found)[0], found)
    by_law, own = zip(*pairs, strict=True)
    assert {it.run.family for it in by_law} == {"janus-early300"} and {it.run.method for it in by_law} == {"sft", "dpo"}
    assert not {it.run.name for it in by_law} & {"sft-lot", "dpo-invert0.5"}  # what c was read off
    assert all(it.error == pytest.approx(0.15) for it in by_law) and all(it.error == pytest.approx(0) for it in own)
    assert law.constants(rows)["families"]["janus"]["sft"]["spread"] == pytest.approx(0.15)  # off on other bases, not on kinds
    bent = [row | {"accuracy": 0.7} if row["name"] == "sft-lot" else row for row in lawful_rows(0.5, 0.05)]
    bent += lawful_rows(0.5, 0.05, ("janus-a",))
    line = law.foretell(runs.read_runs(bent)[0])[0]["janus", "sft"]
    assert law.constants(bent)["families"]["janus"]["sft"]["spread"] == round(line.spread, 4) > 0.1  # kinds are further off
    assert "| tiny Janus, SFT, stopped early |" in law.table(rows) and law.costs_table(lawful_rows(0.5, 0.05)).count("\n") == 1


def test_forecasts_of_other_bases_stand_beside_what_was_gained(tmp_path):
    """Of two rounds one is in the interval; "worth it" was right and "not worth it" wrong; a third has no run."""
    rows = lawful_rows(0.5, 0.05, ("janus", "janus-a", "janus-b"))
    gained = {(run.family, run.name, run.seed): run.gain for run in runs.read_runs(rows)[0]}
    gain = gained["janus-a", "sft", 0]

    def told(family, verdict, low, high, name="forecast", off=0.0):
        gains = {"janus": [gain + off, low, high], "showo": [0, 0, 0]}
        said = {"verdict": verdict, "advantage": 0.3, "gains": gains}
        return {"family": family, "name": name, "seed": 0, "labels": 564, "sft": said, "dpo": said}

    rows.append(told("janus-a", "worth it", gain - 0.01, gain + 0.01))
    rows.append(told("janus-b", "not worth it", gain + 0.01, gain + 0.02, off=0.015))
    rows += [told("janus", "worth it", 0, 1), told("janus-a", "in doubt", 0, 1, "forecast-truth")]  # the shipped one; no run
    truth = {"family": "janus-b", "name": "sft-truth", "seed": 0, "accuracy": 0.6, "nonunified": 0.5, "weak_generation": 1}
    unknown = told("janus-b", "unknown", None, None, "forecast-truth")
    unknown["sft"] = unknown["sft"] | {"gains": {"janus": [None, None, None]}}
    assert [it.measured for it in law.read_forecasts([*rows, truth, unknown])][-1] == pytest.approx(0.2)
    assert law.forecasts_table([*rows, truth, unknown]) == law.forecasts_table(rows)  # nothing was foretold
    said = [it for it in law.read_forecasts(rows) if it.method == "sft"]
    assert [(it.verdict, it.measured) for it in said] == [("worth it", gain), ("not worth it", gained["janus-b", "sft", 0])]
    (line,) = [line for line in law.forecasts_table(rows).splitlines() if "SFT" in line]
    assert line == "| tiny Janus, SFT | 2 | 564 | 0.011 | 1 of 2 | 1 of 1 | 0 of 1 | 0 |"
    write_rows(tmp_path / "rows.jsonl", rows)
    assert "not placed" not in run("law.py", tmp_path / "rows.jsonl").stdout


def test_the_published_figure_and_constants_are_those_of_the_published_rows(tmp_path):
    """The table is among the published tables above."""
    run(
        "law.py", ROOT / "experiments" / "results.jsonl", "--figure", tmp_path / "law.svg", "--constants", tmp_path / "law.json"
    )
    assert (tmp_path / "law.svg").read_text() == (ROOT / "docs" / "law.svg").read_text()
    assert (tmp_path / "law.json").read_text() == (ROOT / "analysis" / "law.json").read_text()
    drawn = ElementTree.fromstring((tmp_path / "law.svg").read_text())
    shapes = [it for it in drawn if it.tag.rpartition("}")[2] in ("circle", "rect")]
    found, _ = runs.read_runs(tables.read_results(ROOT / "experiments" / "results.jsonl"))
    lines, said = law.foretell(found)
    assert len(shapes) == len(said) + 3 + 2 * len(lines)  # a point for each base, and the legend
    assert {run.family for run in {*found} - {it.run for it in said}} <= {"tar"}  # too few kinds to leave one out
    low, high = (round(100 * end(line.spread for line in lines.values())) for end in (min, max))
    assert f"{low} to {high} points (root mean square)" in (ROOT / "README.md").read_text()
    text = (ROOT / "docs" / "results.md").read_text()
    assert (
        f"{low} to {high} points (root mean square; one run by {100 * max(abs(it.error) for it in said if it.fitted):.0f})"
        in text
    )
    for method in law.METHODS:
        some = [it for it in said if it.fitted and it.run.method == method]
        assert f"{law.within(some)} " in text and f" {law.right_where_sure(some)}" in text
    assert f"{law.within([it for it in said if it.fitted])} runs" in text


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark of a GPU, without one


def test_a_stage_that_fails_is_told_and_the_next_runs_and_one_without_time_is_skipped(tmp_path):
    from findings import Report

    def fails(report):
        report.tell("before", 1.0)
        raise ValueError("why")

    report = Report(tmp_path, 100, "cpu", tiny=False)
    report.run("first", fails, 1)
    report.run("second", lambda report: report.tell("speed", 3.0, "images/s", 4.0, "floor", (0.65, math.inf)), 1)
    report.run("third", lambda report: report.tell("speed", 2.0, "images/s", 4.0, "floor", (0.65, math.inf)), 1)
    report.run("long", fails, 1000)
    rows = [json.loads(line) for line in (tmp_path / "findings.jsonl").read_text().splitlines()]
    (failed,) = (row for row in rows if "failed" in row)
    assert failed["stage"] == "first" and failed["failed"] == "failed: ValueError: why" and "fails" in failed["frames"][-1]
    found = {row["stage"]: (row["ratio"], row["reached"]) for row in rows if "what" in row}
    assert found == {"first": (None, None), "second": (0.75, True), "third": (0.5, False)}
    table = (tmp_path / "table.md").read_text()
    assert "| second | speed | 3 images/s | 4 images/s (floor) | 0.75 | >= 0.65 | reached |" in table
    assert "| 0.5 | >= 0.65 | **missed** |" in table
    assert "- first: failed: ValueError: why\n- long: skipped: about 1000 s" in table


@pytest.mark.thorough
def test_every_stage_of_the_gpu_benchmark_runs_at_tiny_size(tmp_path):
    done = spawn(sys.executable, "benchmarks/gpu.py", "--tiny", env=os.environ | {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"})
    rows = [json.loads(line) for line in (tmp_path / "findings.jsonl").read_text().splitlines()]
    source = (ROOT / "benchmarks" / "gpu.py").read_text().partition("for name, stage, seconds in (")[2]
    stages = re.findall(r'^        \("([^"]+)", ', source, flags=re.M)
    assert [row["stage"] for row in rows if row.get("ended") == "ran"] == stages and len(stages) == 18
    assert not [row for row in rows if "failed" in row or "skipped" in row]
    assert {row["stage"] for row in rows if "what" in row} == set(stages)  # each found something
    compiled = [row for row in rows if row.get("of") == "compiled"]
    assert len(compiled) == 2 and all(row["tokens_equal"] == 1 for row in compiled)  # transformers' loop draws as ours
    table = (tmp_path / "table.md").read_text()
    assert "Every stage ran." in table and "| kernel | launches | us |" in table and "tiny sizes" in table
    assert table in done.stdout and done.stdout.splitlines()[-1] == str(tmp_path / "table.md")
    assert "a step of tiny, 2 at a time" in (tmp_path / "profiles.txt").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# One experiment, as it is typed


def few_prompts(warm, tmp_path):
    """The environment of an experiment on a few of the prompts, in two steps of training."""
    for name, every in (("train", 40), ("heldout", 16)):
        lines = (ROOT / "shapes" / f"prompts_{name}.jsonl").read_text().splitlines()
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines[::every]) + "\n")
    files = {"PROMPTS": "train.jsonl", "HELDOUT": "heldout.jsonl", "OUT": "runs"}
    environment = os.environ | {key: str(tmp_path / name) for key, name in files.items()}
    return environment | {"PYTHON": str(warm), "COLD": "1", "SEEDS": "1", "STEPS": "2", "FAMILY": "janus"}


KINDS = {
    "answers": (
        ["answers-yes-no", "answers-reply-short", "answers-reply-published"],
        ["| P(yes) of the short question (seeds 1) | 1.000 |", "| replies to the paper's question (seeds 1) | 0."],
    ),
    "levels": (["levels-numeracy", "levels-one object", "levels-two objects"], ["| one object (seeds 1) |"]),
    "likelihood": (
        ["base", "likelihood-base", "likelihood-dpo-invert1", "likelihood-sft", "likelihood-sft-rejected", "sft-rejected"],
        ["| SFT on rejected pictures (seeds 1) |", "likelihood: right"],
    ),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", KINDS)
def test_each_experiment_ends_with_its_rows_and_its_table(warm, tmp_path, name):
    done = spawn(ROOT / "experiments" / f"{name}.sh", env=few_prompts(warm, tmp_path))
    rows = {row["name"]: row for row in (json.loads(path.read_text()) for path in (tmp_path / "runs").rglob("row.json"))}
    wanted, told = KINDS[name]
    assert {*wanted} <= rows.keys() and all((row["family"], row["seed"]) == ("janus", 1) for row in rows.values())
    assert all(words in done.stdout for words in told), done.stdout[-3000:]


@pytest.mark.thorough
def test_an_experiment_runs_from_the_shell_on_another_base_and_goes_on(warm, tmp_path):
    shutil.copytree(ROOT / "shapes" / "base", tmp_path / "twin")
    environment = few_prompts(warm, tmp_path) | {"BASE": str(tmp_path / "twin")}
    done = spawn(ROOT / "experiments" / "prompts.sh", env=environment)
    ended = time.time()
    seed = tmp_path / "runs" / "janus-twin" / "seed1"
    rows = {row["name"]: row for row in (json.loads(path.read_text()) for path in seed.rglob("row.json"))}
    trained = ["sft-half", "dpo-half", "dpo-invert0.5"]
    assert rows.keys() == {"base", *trained, *(f"prompts-{name}" for name in trained)}
    assert {(row["family"], row["seed"]) for row in rows.values()} == {("janus-twin", 1)}
    labels = [row for _, row in read_rows(seed / "sft-half" / "labels.jsonl", LABELS)]
    accuracy = np.mean([it["label"] for it in labels])
    assert rows["sft-half"]["pictures"] == len(labels) == 32 and rows["sft-half"]["accuracy"] == pytest.approx(
        accuracy, abs=1e-5
    )
    assert Tokens(seed / "base" / "heldout.jsonl").metadata["model"] == str(tmp_path / "twin")

    prompts = [row["id"] for _, row in read_rows(seed / "base" / "scored8.jsonl", SCORED)][::8]
    halves = rows["prompts-sft-half"]["groups"]
    assert halves.keys() == {"own", "others"} and sum(it["prompts"] for it in halves.values()) == len(prompts) == 15
    assert {row["id"] for _, row in read_rows(seed / "base" / "half" / "sft.jsonl", SFT)} <= {*prompts}
    assert rows["prompts-dpo-invert0.5"]["groups"]["turned"]["prompts"] > 0
    table = done.stdout[done.stdout.index("| tiny Janus, twin: SFT on half of the prompts (1 seed) |") :]
    assert f"| {halves['own']['gain']:+.3f} | {halves['others']['gain']:+.3f} | - |" in table
    again = spawn(ROOT / "experiments" / "prompts.sh", env=environment).stdout
    assert again.endswith(table)
    assert max(path.stat().st_mtime for path in seed.rglob("heldout.jsonl")) < ended  # nothing was drawn again

    done = spawn(ROOT / "experiments" / "scope.sh", env=environment)  # a table of each family's, from the same pictures
    rows = {row["name"]: row for row in (json.loads(path.read_text()) for path in seed.rglob("row.json"))}
    assert rows.keys() >= {"base", "sft", "dpo", "sft-drawing", "dpo-drawing"}
    table = done.stdout[done.stdout.index("| tiny Janus, twin |") :]
    assert f"| base (seeds 1) | {rows['base']['accuracy']:.3f}" in table
    assert max(path.stat().st_mtime for path in (seed / "base").rglob("scored.jsonl")) < ended

    told = 'source experiments/common.sh; dir=$OUT/$FAMILY/seed1 base=$dir/base; foretell forecast "$base/scored8.jsonl" 1'
    spawn("bash", "-c", f'{told}; second "$base" base 1; second "$dir/sft-half" sft-half 1', env=environment)
    rows = {row["name"]: row for row in (json.loads(path.read_text()) for path in seed.rglob("row.json"))}
    said = json.loads((seed / "base" / "forecast" / "forecast.json").read_text())["forecast"]["dpo"]["all"]
    assert rows["forecast"]["labels"] == 15 and rows["forecast"]["dpo"]["verdict"] == said["verdict"]
    assert rows["forecast"]["dpo"]["gains"]["showo"] == pytest.approx(
        [said["gains"]["showo"][key] for key in ("gain", "low", "high")], abs=1e-5
    )
    assert rows["second-base"].keys() & {"differ", "foils"} == {"foils"} and rows["second-sft-half"]["pictures"] == 32
    heard = Tokens(seed / "sft-half" / "seconded.jsonl").metadata
    assert heard["judge"] == str(tmp_path / "twin") and heard["model"] == str(seed / "sft-half" / "model")
    drawn = Tokens(seed / "sft-half" / "drawn.jsonl").metadata  # with the base's noise
    assert drawn["seed"] == Tokens(seed / "base" / "scored8.jsonl").metadata["seed"] == "2"


# The round at real size


def test_a_steps_memory_disk_and_failure_are_those_of_its_command(tmp_path, capsys):
    written = tmp_path / "made"
    code = f"kept = bytearray(2**28); open({str(written)!r}, 'wb').write(kept[: 2**20])"
    command = [sys.executable, real_size.__file__, "step", tmp_path, "big", sys.executable, "-c", code]
    subprocess.run(command, check=True, stdout=subprocess.PIPE)  # a process begins with the peak of the one that made it
    row = json.loads((tmp_path / "steps.jsonl").read_text())
    assert 2**28 < row["peak_bytes"] < 1.5 * 2**28 and row["left_bytes"] == 2**20 and row["step"] == "big"
    assert real_size.step(tmp_path, "bad", [sys.executable, "-c", "raise SystemExit('what went wrong')"]) == 1
    assert "exit code 1" in capsys.readouterr().out and len((tmp_path / "steps.jsonl").read_text().splitlines()) == 1


def test_the_threshold_lies_between_the_pictures_that_are_furthest_apart(tmp_path):
    rows = [{"id": "a", "p_yes": 0.5}, {"id": "b", "p_yes": 0.2}, {"id": "a", "p_yes": 0.6}, {"id": "b", "p_yes": 0.4}]
    (tmp_path / "scored.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert real_size.threshold(tmp_path / "scored.jsonl") == pytest.approx(0.3)


@pytest.mark.thorough
def test_a_round_at_tiny_size_is_measured_step_by_step(tmp_path):
    environment = os.environ | {"GEOMETRY": "tiny", "DEVICE": "cpu", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = spawn(ROOT / "benchmarks" / "real_size.sh", tmp_path, env=environment)
    rows = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == ["build", "score", "pairs", "sft", "dpo"]
    assert all(row["peak_bytes"] > 1e7 and row["seconds"] > 0 for row in rows)
    stored = (tmp_path / "base" / "model.safetensors").stat().st_size
    for name in ("sft", "dpo"):  # in float32, what the table promises
        assert (tmp_path / name / "model.safetensors").stat().st_size == pytest.approx(2 * stored, rel=0.01)
        assert re.search(rf"\| {name} \|.*\| (\d\.\d\d) \| \1 \|$", done.stdout, flags=re.M), done.stdout

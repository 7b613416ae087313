"""score.py: the score by hand, foils, chunks, rejudging, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import PROMPTS, run
from safetensors.torch import load_file

import score
from common.chunks import Chunks, refuse_foreign
from common.command import BadInput
from common.prompts import add_foils, text_check
from common.ranks import Ranks
from common.records import SCORED, Tokens, read_rows, tokens_path
from families.family import PromptError

PIXEL = 1e-3  # another batch rounds a sum differently, and now and then a pixel on the edge of two uint8 values with it
FLAGS = ("--candidates", 6, "--guidance", 2, "--chunk", 4, "--device", "cpu")


def rows_of(path) -> list[dict]:
    return [row for _, row in read_rows(path, SCORED)]


def test_a_run_that_began_before_there_were_forms_of_answers_goes_on(tmp_path):
    work = [{"id": str(i), "prompt": "p", "category": "c", "candidate": 0, "foil": "f"} for i in range(3)]
    header = {"kind": "scored", "work": "0123456789abcdef", "model": "m", "codebook_size": "8", "image_tokens": "4"}
    made = []

    def make(rows, advance):
        if len(made) == 2 and "interrupt" not in made:
            made.append("interrupt")
            raise KeyboardInterrupt
        made.append(rows[0]["id"])
        return [row | {"p_yes": 0.5, "coverage": 1.0, "p_yes_foil": 0.5} for row in rows], np.ones((len(rows), 4), int)

    begun = Chunks(tmp_path / "scored.jsonl", work, 1, header, Ranks())
    with pytest.raises(KeyboardInterrupt):
        begun.run(make, False, 1, 8)
    begun._lock.close()  # as the end of its process does
    Chunks(tmp_path / "scored.jsonl", work, 1, header | {"answer": "yes-no"}, Ranks()).run(make, False, 1, 8)
    assert made == ["0", "1", "interrupt", "2"] and len(rows_of(tmp_path / "scored.jsonl")) == 3
    with pytest.raises(BadInput, match="answer was 'yes-no', now 'reply'"):
        Chunks(tmp_path / "scored.jsonl", work, 1, header | {"answer": "reply"}, Ranks()).run(make, False, 1, 8)


# The score


def test_score_is_the_mean_over_prompts_of_the_rejected_share():
    p_yes = np.array([0.9, 0.1, 0.2, 0.3, 0.5])
    prompt = np.array(["a", "a", "b", "b", "b"])
    value = score.nonunified_score(p_yes, prompt, threshold=0.5)
    assert value == pytest.approx((1 / 2 + 3 / 3) / 2)  # P(yes) of exactly 0.5 is not above 0.5
    assert score.rejected_shares(p_yes, prompt, 0.5).tolist() == [1 / 2, 1.0]


def test_interval_is_over_prompts_not_pictures():
    generator = np.random.default_rng(0)
    per_prompt = generator.random(400)
    prompt = np.repeat(np.arange(400), 5)
    p_yes = np.where(np.repeat(per_prompt < 0.3, 5), 0.1, 0.9)  # candidates of a prompt are all alike
    value = score.nonunified_score(p_yes, prompt, 0.5)
    low, high = score.bootstrap_interval(score.rejected_shares(p_yes, prompt, 0.5))
    error = 1.96 * (value * (1 - value) / 400) ** 0.5  # binomial over prompts
    assert high - low == pytest.approx(2 * error, rel=0.15)


def test_a_foil_must_be_drawable_where_it_is_to_be_drawn():
    class Model:
        def prompt_ids(self, prompt):
            if "yellow" in prompt:
                raise PromptError(f"prompt {prompt!r} cannot be drawn")

        def question_ids(self, question, scored=False):
            pass

    row = {"prompt": "a red cube", "foil": "a yellow cube"}
    text_check(Model(), Model(), ["{prompt}?"])(row)
    with pytest.raises(PromptError, match="'a yellow cube' cannot be drawn"):
        text_check(Model(), Model(), ["{prompt}?"], drawn=("prompt", "foil"))(row)


def test_separation_is_zero_for_a_judge_that_says_yes_to_everything():
    assert score.separation(np.ones(5), np.ones(5)) == 0
    assert score.separation(np.array([0.9, 0.7]), np.array([0.1, 0.3])) == pytest.approx(0.6)


# Foils


def test_a_foil_is_the_rows_own_else_another_prompt_of_its_category():
    prompts = [{"id": f"{c}{i}", "prompt": f"{c} {i}", "category": c} for c in "ab" for i in range(5)]
    prompts[0]["foil"] = "one attribute changed"
    add_foils(prompts, seed=0)
    assert prompts[0]["foil"] == "one attribute changed"
    for prompt in prompts[1:]:
        assert prompt["foil"] != prompt["prompt"] and prompt["foil"].startswith(prompt["category"])
    again = [{key: prompt[key] for key in ("id", "prompt", "category")} for prompt in reversed(prompts)]
    add_foils(again, seed=0)
    assert {p["id"]: p["foil"] for p in again[:-1]} == {p["id"]: p["foil"] for p in prompts[1:]}  # whatever the order


def test_a_prompt_alone_in_its_category_gets_a_foil_from_another_and_alone_in_the_world_is_refused():
    pair = [{"id": "1", "prompt": "x", "category": "a"}, {"id": "2", "prompt": "y", "category": "b"}]
    add_foils(pair, seed=0)
    assert [prompt["foil"] for prompt in pair] == ["y", "x"]
    with pytest.raises(BadInput, match="needs a foil"):
        add_foils([{"id": "1", "prompt": "x", "category": "a"}], seed=0)


# The command


def test_rows_point_at_the_tokens_that_were_judged(scored, policy):
    rows, tokens = rows_of(scored), Tokens(scored)
    assert [row["row"] for row in rows] == list(range(len(PROMPTS) * 6)) and tokens.rows == len(rows)
    assert [row["candidate"] for row in rows] == list(range(6)) * len(PROMPTS)
    pick = rows[::7]
    pictures = policy.decode(torch.from_numpy(tokens[[row["row"] for row in pick]]))
    asked = [[f"Does this image describe {row[key]}?" for key in ("prompt", "foil")] for row in pick]
    p_yes, coverage = policy.judge(pictures, asked)
    assert np.allclose(p_yes[:, 0], [row["p_yes"] for row in pick], atol=PIXEL)
    assert np.allclose(p_yes[:, 1], [row["p_yes_foil"] for row in pick], atol=PIXEL)
    assert np.allclose(coverage[:, 0], [row["coverage"] for row in pick], atol=PIXEL)


def test_the_header_names_who_drew_and_how(scored, tiny, policy):
    metadata = Tokens(scored).metadata
    assert metadata["model"] == str(tiny) and metadata["model_hash"] == policy.identity()["model_hash"]
    assert (metadata["seed"], metadata["guidance"], metadata["temperature"]) == ("0", "2.0", "1.0")
    assert json.loads(metadata["questions"]) == [score.QUESTION] and "torch" in metadata["versions"]
    assert load_file(tokens_path(scored))["tokens"].shape == (36, 4)  # the safetensors library reads the streamed file


def test_pictures_do_not_depend_on_chunk_batch_or_the_other_prompts(scored, tiny, tmp_path):
    (tmp_path / "color_train.txt").write_text("\n".join(reversed(PROMPTS[1:])))
    run("score.py", "--model", tiny, "--prompts", tmp_path / "color_train.txt", "--out", tmp_path / "s.jsonl",
        "--candidates", 3, "--guidance", 2, "--chunk", 1, "--batch", 2, "--device", "cpu")  # fmt: skip
    before, tokens = Tokens(scored), Tokens(tmp_path / "s.jsonl")
    place = {(row["id"], row["candidate"]): row["row"] for row in rows_of(scored)}
    rows = rows_of(tmp_path / "s.jsonl")
    assert len(rows) == 15
    assert np.array_equal(tokens[:], before[[place[row["id"], row["candidate"]] for row in rows]])


def test_an_interrupted_run_continues_to_the_same_bytes(scored, tiny, tmp_path, monkeypatch):
    out, done = tmp_path / "scored.jsonl", []
    write = score.Chunks.write

    def write_one_then_die(self, *args):
        if done:
            raise KeyboardInterrupt
        done.append(write(self, *args))

    flags = ("--model", tiny, "--prompts", scored.with_name("color_train.txt"), "--out", out, *FLAGS)
    monkeypatch.setattr(score.Chunks, "write", write_one_then_die)
    assert run("score.py", *flags, ok=False).returncode == 130
    assert not out.exists() and (tmp_path / "scored.jsonl.chunks" / "000000.jsonl").is_file()
    monkeypatch.setattr(score.Chunks, "write", write)
    run("score.py", *flags)
    for path, expected in ((out, scored), (tokens_path(out), tokens_path(scored))):
        assert path.read_bytes() == expected.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scored.jsonl", "scored.safetensors"]


def test_the_same_command_again_only_reports_and_another_is_refused(scored, tiny):
    flags = ("--model", tiny, "--prompts", scored.with_name("color_train.txt"), "--out", scored, *FLAGS)
    before = scored.read_bytes()
    assert "already scored" in run("score.py", *flags).stdout
    done = run("score.py", *flags, "--seed", 5, ok=False)
    assert done.returncode == 2 and "seed was '0', now '5'" in done.stderr and len(done.stderr.splitlines()) == 1
    assert scored.read_bytes() == before


def test_rejudging_keeps_pictures_and_who_drew_them(scored, tiny, tmp_path):
    from conftest import save_janus

    other = save_janus(tmp_path / "other", seed=4)
    run("score.py", "--model", other, "--rejudge", scored, "--out", tmp_path / "re.jsonl", "--device", "cpu")
    old, new = rows_of(scored), rows_of(tmp_path / "re.jsonl")
    same = ("id", "prompt", "category", "candidate", "foil", "row")
    assert [[row[key] for key in same] for row in old] == [[row[key] for key in same] for row in new]
    assert [row["p_yes"] for row in old] != [row["p_yes"] for row in new]
    assert np.array_equal(Tokens(scored)[:], Tokens(tmp_path / "re.jsonl")[:])
    metadata = Tokens(tmp_path / "re.jsonl").metadata
    assert metadata["model"] == str(tiny) and metadata["judge"] == str(other) and metadata["guidance"] == "2.0"


def test_rejudging_with_the_model_itself_changes_no_answer(scored, tiny, tmp_path):
    run("score.py", "--model", tiny, "--rejudge", scored, "--out", tmp_path / "re.jsonl", "--device", "cpu")
    for old, new in zip(rows_of(scored), rows_of(tmp_path / "re.jsonl"), strict=True):
        assert new["p_yes"] == pytest.approx(old["p_yes"], abs=PIXEL)


def test_several_questions_are_averaged(scored, tiny, tmp_path):
    wordings = ("Does this image describe {prompt}?", "Is this a picture of {prompt}?")
    answers = []
    for name, questions in {"a": wordings[:1], "b": wordings[1:], "ab": wordings}.items():
        flags = [flag for question in questions for flag in ("--question", question)]
        out = tmp_path / f"{name}.jsonl"
        run("score.py", "--model", tiny, "--rejudge", scored, "--out", out, "--device", "cpu", *flags)
        answers.append([row["p_yes"] for row in rows_of(out)])
    assert np.allclose(answers[2], (np.array(answers[0]) + answers[1]) / 2, atol=1e-5)
    assert not np.allclose(answers[0], answers[1], atol=1e-3)


def test_published_files_are_read_and_duplicates_counted(tiny, tmp_path):
    (tmp_path / "shape_val.txt").write_bytes(b"a red cube\r\na cone\r\na red cube")
    rows = [{"prompt": "two cone", "tag": "counting"}, {"prompt": "one cube", "tag": "counting"}]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = [tmp_path / "shape_val.txt", tmp_path / "evaluation_metadata.jsonl"]
    done = run(
        "score.py", "--model", tiny, "--prompts", *files, "--out", tmp_path / "s.jsonl", "--candidates", 1, "--device", "cpu"
    )
    assert "prompts        4 (1 duplicates dropped)" in done.stdout
    assert [row["category"] for row in rows_of(tmp_path / "s.jsonl")] == ["shape", "shape", "counting", "counting"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--candidates", 0), "--candidates must be at least 1, found 0"),
        (("--guidance", -1), "--guidance must be at least 0, found -1.0"),
        (("--temperature", "nan"), "--temperature must be at least 0, found nan"),
        (("--threshold", 1), "--threshold must lie between 0 and 1, found 1.0"),
        (("--question", "Is it good?"), "--question must hold {prompt}, found 'Is it good?'"),
        (("--candidate", 3), "unrecognized arguments"),  # no abbreviated flags
    ],
)
def test_arguments_that_cannot_work_are_named(tiny, scored, tmp_path, flags, message):
    prompts = scored.with_name("color_train.txt")
    done = run("score.py", "--model", tiny, "--prompts", prompts, "--out", tmp_path / "s.jsonl", *flags, ok=False)
    assert done.returncode == 2 and message in done.stderr and not list(tmp_path.iterdir())


def test_bad_input_is_one_line_and_writes_nothing(tiny, scored, tmp_path):
    for path in (scored, tokens_path(scored)):
        shutil.copy(path, tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    twice = scored.read_text().splitlines()
    (tmp_path / "twice.jsonl").write_text("\n".join([*twice, twice[0]]))
    shutil.copy(tokens_path(scored), tmp_path / "twice.safetensors")
    broken = json.loads(twice[1]) | {"p_yes": "high"}
    (tmp_path / "typed.jsonl").write_text("\n".join([twice[0], json.dumps(broken)]))
    shutil.copy(tokens_path(scored), tmp_path / "typed.safetensors")
    (tmp_path / "special.txt").write_text("a <boi> cube\na cone\n")
    before = sorted(path.name for path in tmp_path.iterdir())
    model = ("--model", tiny, "--device", "cpu")
    cases = [
        ((*model, "--prompts", tmp_path / "empty.txt"), "empty.txt: holds no prompt"),
        ((*model, "--prompts", tmp_path / "none.txt"), "none.txt: cannot be read: No such file"),
        ((*model, "--prompts", tmp_path / "special.txt"), "spells a special token"),
        ((*model, "--rejudge", tmp_path / "twice.jsonl"), "twice.jsonl:37: candidate 0 of"),
        ((*model, "--rejudge", tmp_path / "typed.jsonl"), 'typed.jsonl:2: p_yes must be a number from 0 to 1, found "high"'),
        (("--model", tmp_path / "no_model", "--prompts", scored.with_name("color_train.txt")), "no_model: no such directory"),
    ]
    for flags, message in cases:
        done = run("score.py", *flags, "--out", tmp_path / "out.jsonl", ok=False)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    done = run(
        "score.py", *model, "--prompts", tmp_path / "special.txt", "--out", tmp_path / "empty.txt" / "out.jsonl", ok=False
    )
    assert done.returncode == 2 and "Not a directory" in done.stderr


# What a long run shows


def test_the_bar_moves_while_a_batch_is_drawn_and_ends_at_all_pictures(tiny, scored, tmp_path, monkeypatch):
    from common import chunks

    moves = []  # (pictures so far, chunks written so far)

    class Bar:
        def __init__(self, total, unit, shown, done):
            self.n, self.total = done, total

        def update(self, pictures):
            self.n += pictures
            moves.append((self.n, len(list(tmp_path.glob("*.chunks/*.safetensors")))))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            assert self.n == self.total == 36

    monkeypatch.setattr(chunks, "progress_bar", Bar)
    prompts = scored.with_name("color_train.txt")
    run("score.py", "--model", tiny, "--prompts", prompts, "--out", tmp_path / "s.jsonl", "--candidates", 6, "--device", "cpu")
    first = [n for n, written in moves if not written]
    assert len(first) > 3 and 0 < first[0] < 12 and first == sorted(first)  # 4 tokens a picture, none of the chunks done
    assert moves[-1][0] == 36


def test_a_speed_under_one_is_told_in_seconds_a_picture():
    from common.chunks import speed

    assert (speed(30, 10.0), speed(4, 720.0)) == ("3.0 pictures/s", "180.0 s a picture")


def test_where_stderr_is_no_terminal_the_bar_is_lines_and_not_more_than_one_in_30_seconds(monkeypatch):
    import io

    from common.command import progress_bar

    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with progress_bar(1000, "picture", name="drawing") as bar:
        for _ in range(1000):
            bar.update()
    shown = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue() and len(shown) == 2
    assert shown[0].startswith("drawing:   0.0%") and "1000/1000" in shown[1]


# Prompts that are too long

LONG = {name: " ".join([name] * 600) for name in ("red", "blue", "green")}  # of a word each; the tiny model has 512 positions
LIMIT = "tokens with its picture; the model has 512 positions"


def test_the_first_prompt_that_is_too_long_is_named_by_its_line_with_the_number_of_others_and_the_limit(tiny, tmp_path):
    files = tmp_path / "a.txt", tmp_path / "b.jsonl"
    files[0].write_text(f"a red cube\n{LONG['red']}\n{LONG['blue']}\na cone\n")
    files[1].write_text("\n" + json.dumps({"prompt": LONG["green"]}) + '\n{"prompt": "a cone"}\n')
    command = ("score.py", "--model", tiny, "--out", tmp_path / "s.jsonl", "--device", "cpu", "--prompts")
    for given, place, more in (
        (files, f"{files[0]}:2: prompt 'red red", "2 more prompts are too long"),
        (files[::-1], f"{files[1]}:2: prompt 'green green", "2 more prompts are too long"),
        (files[:1], f"{files[0]}:2: prompt 'red red", "1 more prompt is too long"),
        (files[1:], f"{files[1]}:2: prompt 'green green", "no other is"),
    ):
        done = run(*command, *given, ok=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "s.jsonl").exists()
        assert place in done.stderr and f"{LIMIT}; {more}; --skip-long leaves them out" in done.stderr


@pytest.mark.parametrize("foils", ["hard", "easy", "both"])
def test_skip_long_leaves_them_out_and_counts_them_in_table_and_header(tiny, tmp_path, foils):
    rows = [{"prompt": text, "category": category} for text, category in (
        ("a red cube", "x"), (LONG["red"], "x"), ("a cone", "x"), (LONG["blue"], "y"), ("a sphere", "z"))]  # fmt: skip
    rows.append({"prompt": "one cone", "category": "z", "foil": LONG["green"]})  # cannot be asked
    (tmp_path / "a.json").write_text(json.dumps(rows))
    command = ("score.py", "--model", tiny, "--device", "cpu", "--candidates", 2, "--foils", foils, "--skip-long")
    done = run(*command, "--prompts", tmp_path / "a.json", "--out", tmp_path / "s.jsonl")
    drawn = rows_of(tmp_path / "s.jsonl")
    assert [row["prompt"] for row in drawn[::2]] == ["a red cube", "a cone", "a sphere"]
    assert not {row["foil"] for row in drawn} & set(LONG.values())
    assert Tokens(tmp_path / "s.jsonl").metadata["too_long"] == "3"
    assert "too long       3 prompts left out" in done.stdout
    table = done.stdout[done.stdout.index("category") :].splitlines()
    assert table[0].split()[-2:] == ["too", "long"]
    assert [(line.split()[0], line.split()[1], line.split()[-1]) for line in (table[1], table[3], table[4])] == [
        ("x", "4", "1"),
        ("z", "2", "1"),
        ("all", "6", "3"),
    ]
    assert table[2].split() == ["y", "0", "all", "1", "prompts", "are", "too", "long"]
    again = run(*command, "--prompts", tmp_path / "a.json", "--out", tmp_path / "s.jsonl")  # the same command: it is there
    assert "already scored" in again.stdout
    flags = ("--model", tiny, "--out", tmp_path / "r.jsonl", "--device", "cpu", "--skip-long")
    judged = run("score.py", "--rejudge", tmp_path / "s.jsonl", *flags)
    assert "too long       0 prompts left out" in judged.stdout and len(rows_of(tmp_path / "r.jsonl")) == 6


def test_without_prompts_that_are_too_long_skip_long_changes_nothing_but_the_header(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(PROMPTS))
    for name, flags in (("a", ()), ("b", ("--skip-long",))):
        run("score.py", "--model", tiny, "--prompts", tmp_path / "a.txt", "--out", tmp_path / f"{name}.jsonl", *FLAGS, *flags)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    metadata = [Tokens(tmp_path / f"{name}.jsonl").metadata for name in "ab"]
    assert metadata[0] | {"too_long": "0"} == metadata[1]


@pytest.mark.parametrize("prompts", [[LONG["red"]], list(LONG.values())])
def test_where_all_are_too_long_skip_long_says_so(tiny, tmp_path, prompts):
    (tmp_path / "a.txt").write_text("\n".join(prompts))
    flags = ("--prompts", tmp_path / "a.txt", "--out", tmp_path / "s.jsonl", "--device", "cpu", "--skip-long")
    done = run("score.py", "--model", tiny, *flags, ok=False)
    assert done.returncode == 2 and f"{tmp_path}/a.txt:1: prompt 'red red" in done.stderr and "leaves nothing" in done.stderr


def test_category_is_of_all_prompts_and_goes_with_prompts(tiny, scored, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a cone", "category": "x"}\n{"prompt": "a cube", "category": "y"}\n')
    flags = ("--model", tiny, "--out", tmp_path / "s.jsonl", "--device", "cpu", "--category", "mine")
    run("score.py", "--prompts", tmp_path / "a.jsonl", "--candidates", 1, *flags)
    assert {row["category"] for row in rows_of(tmp_path / "s.jsonl")} == {"mine"}
    assert run("score.py", "--rejudge", scored, *flags, ok=False).returncode == 2


def test_chunks_that_are_taken_away_while_they_are_looked_at_are_no_strangers(tmp_path, monkeypatch):
    """Another process has just joined them: its settings.json goes last, and was looked for after that."""
    chunk = tmp_path / "000000.safetensors"
    chunk.touch()
    monkeypatch.setattr("common.chunks.recognised", lambda path, marks: chunk.unlink(missing_ok=True))
    refuse_foreign(tmp_path)
    chunk.touch()
    monkeypatch.setattr("common.chunks.recognised", lambda path, marks: False)
    with pytest.raises(BadInput, match=f"{chunk.name}: is none of the chunks"):
        refuse_foreign(tmp_path)

"""The files between the steps: what is refused and how, what is written, and the two numbers with fixed values."""

import json
import math
import os
import shutil
import struct
import sys

import numpy as np
import pytest
from conftest import ROOT, spawn
from safetensors import safe_open
from safetensors.numpy import save_file

from common import records, stats, writing
from common.command import BadInput

METADATA = {"model": "m", "model_hash": "abc", "codebook_size": "16", "image_tokens": "4"}
ROW = {"id": "a", "prompt": "a red cube", "category": "color", "candidate": 0, "p_yes": 0.5, "coverage": 1.0}
ROW |= {"foil": "a blue cube", "p_yes_foil": 0.1, "row": 0}


def scored_line(**changes) -> str:
    return json.dumps(ROW | changes)


# ---------------------------------------------------------------------------------------------------------------------
# JSONL

MALFORMED = {
    "not JSON": ("{'id': 1}", "not JSON"),
    "cut short": (scored_line()[:-1], "not JSON"),
    "two values": (scored_line() + scored_line(), "not JSON"),
    "an array": ("[1, 2]", "expected a JSON object, found list"),
    "null": ("null", "expected a JSON object, found NoneType"),
    "missing key": (json.dumps({key: value for key, value in ROW.items() if key != "foil"}), "key 'foil' is missing"),
    "key given twice": (scored_line()[:-1] + ', "row": 1}', "a key is given twice"),
    "number for text": (scored_line(prompt=3), "prompt must be a non-empty string, found 3"),
    "null for text": (scored_line(id=None), "id must be a non-empty string, found null"),
    "blank text": (scored_line(category=" \t"), "category must be a non-empty string"),
    "bool for integer": (scored_line(row=True), "row must be an integer of at least 0, found true"),
    "float for integer": (scored_line(candidate=1.0), "candidate must be an integer of at least 0, found 1.0"),
    "text for integer": (scored_line(row="1"), "row must be an integer"),
    "negative": (scored_line(row=-1), "row must be an integer of at least 0, found -1"),
    "integer beyond 2**53": (scored_line(row=2**53), "row must be an integer"),
    "bool for number": (scored_line(p_yes=False), "p_yes must be a number from 0 to 1, found false"),
    "over 1": (scored_line(p_yes=1.0000001), "p_yes must be a number from 0 to 1"),
    "NaN": (scored_line(p_yes=math.nan), "NaN is not JSON"),
    "infinity": (scored_line(coverage=-math.inf), "-Infinity is not JSON"),
    "overflow to infinity": (
        scored_line().replace('"p_yes": 0.5', '"p_yes": 1e999'),
        "1e999 is larger than any number that is kept",
    ),
    "nested deeply": ("[" * 100_000, "nested too deeply"),
    "nested deeply in a key nobody reads": (scored_line()[:-1] + ', "x": ' + "[" * 10**5, "nested too deeply"),
    "5000 digits": (scored_line().replace('"row": 0', '"row": ' + "9" * 5000), "not JSON"),
    "half a surrogate pair": (scored_line(prompt="a \ud83d cube"), "holds half of a surrogate pair"),
}


@pytest.mark.parametrize(("line", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_row_is_refused_with_file_and_line(tmp_path, line, message):
    path = tmp_path / "scored.jsonl"
    path.write_text(f"{scored_line()}\n\n{line}\n")
    rows = records.read_rows(path, records.SCORED)
    assert next(rows) == (1, ROW)
    with pytest.raises(BadInput) as refusal:
        next(rows)
    assert str(refusal.value).startswith(f"{path}:3: ") and message in str(refusal.value)
    assert len(str(refusal.value)) < len(str(path)) + 300  # a report, not a copy of the data


def test_invalid_utf8_is_refused_with_line_and_byte(tmp_path):
    path = tmp_path / "scored.jsonl"
    path.write_bytes(scored_line().encode() + b'\n{"id": "\xe9"}\n')
    with pytest.raises(BadInput, match=r"scored\.jsonl:2: not UTF-8 \(byte 9 of the line\)"):
        list(records.read_rows(path, records.SCORED))


def test_a_line_without_end_is_refused_before_it_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "scored.jsonl"
    path.write_text(scored_line() + "\n" + "x" * 5000)
    with pytest.raises(BadInput, match=r":2: line is longer than 1000 bytes"):
        list(records.read_rows(path, records.SCORED))


@pytest.mark.parametrize("name", ["missing.jsonl", "directory", ""])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    with pytest.raises(BadInput, match="cannot be read"):
        list(records.read_rows(name, records.SCORED))


def test_a_label_is_0_or_1_and_no_bool(tmp_path):
    path = tmp_path / "labels.jsonl"
    row = {"id": "a", "candidate": 0, "label": 1, "source": "oracle"}
    for label, good in ((0, True), (1, True), (True, False), (2, False), ("1", False), (None, False)):
        path.write_text(json.dumps(row | {"label": label}))
        if good:
            assert next(iter(records.read_rows(path, records.LABELS)))[1]["label"] == label
        else:
            with pytest.raises(BadInput, match="label must be 0 or 1"):
                list(records.read_rows(path, records.LABELS))


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [ROW | {"prompt": text} for text in ("ein blauer Würfel", "赤い球", '🟥\u2028 \x85 \\ " \0 tab\t', "line\nbreak")]
    assert writing.write_rows(tmp_path / "scored.jsonl", rows) == 4
    assert [row for _, row in records.read_rows(tmp_path / "scored.jsonl", records.SCORED)] == rows


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def tensor_file(path, header: dict | bytes, data: bytes) -> None:
    """A safetensors file by hand, right or wrong."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_the_token_writer_writes_what_the_safetensors_library_reads(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 2**16, (1000, 7))
    metadata = METADATA | {"codebook_size": "65536", "note": 'quotes " and ünïcode'}
    with writing.whole_file(tmp_path / "a.safetensors") as file:
        writer = records.TokenWriter(file, 1000, 7, metadata)
        for start in range(0, 1000, 300):
            writer.write(tokens[start : start + 300])
        writer.close()
    with safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert file.metadata() == metadata
        assert np.array_equal(file.get_tensor("tokens"), tokens) and file.get_tensor("tokens").dtype == np.uint16


def test_tokens_reads_what_the_safetensors_library_writes(tmp_path):
    tokens = np.random.default_rng(1).integers(0, 16, (50, 4)).astype(np.uint16)
    save_file({"tokens": tokens}, tmp_path / "a.safetensors", metadata=METADATA)
    found = records.Tokens(tmp_path / "a.jsonl")
    assert (found.rows, found.length, found.codebook_size, found.metadata) == (50, 4, 16, METADATA)
    for rows in ([3], [49, 0, 7, 7], slice(10, 20), np.array([5, 1]), []):
        assert np.array_equal(found[rows], tokens[rows]) and found[rows].dtype == np.int64


def test_no_rows_are_a_file_too(tmp_path):
    records.write_tokens(tmp_path / "a.safetensors", np.empty((0, 4), int), METADATA)
    tokens = records.Tokens(tmp_path / "a.jsonl")
    assert tokens.rows == 0 and tokens[[]].shape == (0, 4)


def test_rows_that_were_announced_and_never_written_are_our_fault_and_leave_no_file(tmp_path):
    with pytest.raises(AssertionError, match="2 of 3 rows"), writing.whole_file(tmp_path / "a.safetensors") as file:
        writer = records.TokenWriter(file, 3, 4, METADATA)
        writer.write(np.zeros((1, 4), int))
        writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [0, 7, 8, 40, -1])
def test_a_truncated_tensor_file_is_refused(tmp_path, kept):
    path = tmp_path / "a.safetensors"
    records.write_tokens(path, np.zeros((10, 4), int), METADATA)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BadInput, match=r"a\.safetensors: not a readable safetensors file"):
        records.Tokens(tmp_path / "a.jsonl")


def header(dtype="U16", shape=(2, 4), end=16, name="tokens", metadata=METADATA) -> dict:
    return {"__metadata__": metadata, name: {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


@pytest.mark.parametrize(
    ("head", "data", "message"),
    [
        (header(dtype="I16"), bytes(16), r"must be uint16 \(rows, image tokens\), found I16 \(2, 4\)"),
        (header(dtype="F32", end=32), bytes(32), "must be uint16"),
        (header(shape=(8,)), bytes(16), r"must be uint16 .*\(8,\)"),
        (header(shape=(2, 2, 2)), bytes(16), "must be uint16"),
        (header(shape=(8, 0), end=0), b"", "must be uint16"),
        (header(name="weights"), bytes(16), "expected the one tensor 'tokens', found"),
        (header(shape=(2, 400)), bytes(16), "not a readable safetensors file"),
        (header(), bytes(20), "not a readable safetensors file"),
        (header(metadata={}), bytes(16), "codebook_size must be a positive integer, found ''"),
        (header(metadata={"codebook_size": "-5"}), bytes(16), "codebook_size must be a positive integer, found '-5'"),
        (b"\xff\xff not json", bytes(16), "not a readable safetensors file"),
    ],
)
def test_a_tensor_file_of_another_kind_is_refused(tmp_path, head, data, message):
    tensor_file(tmp_path / "a.safetensors", head, data)
    with pytest.raises(BadInput, match=message):
        records.Tokens(tmp_path / "a.jsonl")


def test_an_absurd_header_length_is_refused_without_reading_it(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(BadInput, match="not a readable safetensors file"):
        records.Tokens(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "", "/"])
def test_missing_tokens_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="not found|not the name of a file"):
        records.Tokens(name)


def test_a_token_outside_the_codebook_is_refused_when_its_row_is_read(tmp_path):
    tokens = np.zeros((5, 4), int)
    tokens[3, 2] = 16
    records.write_tokens(tmp_path / "a.safetensors", tokens, METADATA)
    found = records.Tokens(tmp_path / "a.jsonl")
    assert found[[0, 1, 2, 4]].max() == 0
    with pytest.raises(BadInput, match="token 16 is outside the codebook of 16"):
        found[[3]]


def test_a_row_outside_the_tokens_is_refused_with_both_numbers(tmp_path):
    records.write_tokens(tmp_path / "pairs.safetensors", np.zeros((800, 4), int), METADATA)
    tokens = records.Tokens(tmp_path / "pairs.jsonl")
    tokens.check_row(799, "pairs.jsonl:17")
    with pytest.raises(BadInput, match=r"^pairs.jsonl:17: chosen is 800, but pairs.safetensors has 800 rows$"):
        tokens.check_row(800, "pairs.jsonl:17", "chosen")


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, before):
    path = tmp_path / "scored.jsonl"
    if before is not None:
        path.write_bytes(before)

    def rows():
        yield ROW
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writing.write_rows(path, rows())
    with pytest.raises(ValueError, match="JSON compliant"):
        writing.write_rows(path, [ROW, ROW | {"p_yes": math.nan}])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({} if before is None else {path.name: before})


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "a.json"
    with writing.whole_file(path, "w") as file:
        file.write("x" * 10**6)
        assert not path.exists()
    assert path.read_text() == "x" * 10**6 and list(tmp_path.iterdir()) == [path]


def test_a_temporary_file_taken_for_abandoned_before_its_lock_is_made_again(tmp_path, monkeypatch):
    path, locks = tmp_path / "a.json", []
    flock = writing.fcntl.flock

    def late(file, how):
        if not locks and how == writing.fcntl.LOCK_EX:
            locks.append(file.name)
            writing.remove_abandoned(path)  # another writer comes in between
            assert not os.path.exists(file.name)
        flock(file, how)

    monkeypatch.setattr(writing.fcntl, "flock", late)
    writing.write_json(path, {"a": 1})
    assert locks and json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_only_temporary_files_of_dead_writers_are_removed(tmp_path):
    path = tmp_path / "a.json"
    kept = [".a.json.backup.tmp", ".a.json.tmp", ".b.json.0123456789abcdef.tmp", "a.json.0123456789abcdef.tmp", ".a.json.123"]
    for name in (*kept, ".a.json.0123456789abcdef.tmp", ".a.json.4711.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".a.json.12.tmp").mkdir()
    with writing.whole_file(path, "w") as living:
        writing.remove_abandoned(path)
        assert os.path.exists(living.name)
    assert {file.name for file in tmp_path.iterdir()} == {"a.json", ".a.json.12.tmp", *kept}


def test_a_name_of_the_greatest_length_can_be_written(tmp_path):
    for name in ("x" * 255, "é" * 127):
        writing.write_json(tmp_path / name, 1)
        assert (tmp_path / name).read_text() == "1\n"


def test_an_error_in_peoples_data_is_one_line_and_its_exit_code_and_ours_a_traceback():
    code = "import sys; from common import command; sys.exit(command.run_script(lambda _: (_ for _ in ()).throw({}), None))"
    for error, expected in (("command.BadInput('a\\nb')", 2), ("command.QualityRefusal('a\\nb')", 3)):
        done = spawn(sys.executable, "-c", code.format(error), ok=False)
        assert (done.returncode, done.stderr) == (expected, "-c: a b\n")
    done = spawn(sys.executable, "-c", code.format("KeyError('x')"), ok=False)
    assert done.returncode == 1 and "Traceback" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_stable_seeds_never_change():
    """Published runs name their seeds: another value would draw other pictures."""
    assert records.stable_seed("sample", 0, "color-9f967626aa") == 2415750082942573984
    assert records.stable_seed("a", "b") != records.stable_seed("ab") != records.stable_seed("a", "b", 0)
    assert 0 <= records.stable_seed("é", 10**30) < 2**63


def test_the_bootstrap_of_constant_data_is_the_constant():
    assert stats.bootstrap_interval(np.full(50, 0.25)) == (0.25, 0.25)
    assert stats.bootstrap_interval(np.array([0.5])) == (0.5, 0.5)
    assert all(math.isnan(bound) for bound in stats.bootstrap_interval(np.array([])))


@pytest.mark.parametrize("resamples", [2000, 2050])
def test_the_bootstrap_of_many_values_is_the_normal_approximation(resamples):
    values = np.random.default_rng(3).random(2000) < 0.3
    low, high = stats.bootstrap_interval(values, resamples=resamples)
    error = values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


# ---------------------------------------------------------------------------------------------------------------------
# Input that changes under a running command


def overwrite(path, keep_time: bool) -> None:
    """Change the last two bytes of a file in place."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    with open(path, "r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x03\x00" if path.suffix == ".safetensors" else b" \n")
    os.utime(path, ns=times if keep_time else (0, 0))


def shrink(path) -> None:
    os.truncate(path, path.stat().st_size - 3)


def replace(path) -> None:
    """Another file with the same content, size and time."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    os.replace(other, path)


CHANGES = {
    "overwritten": lambda path: overwrite(path, keep_time=False),
    "overwritten, its time set back": lambda path: overwrite(path, keep_time=True),
    "shrunk": shrink,
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n\n"),
    "touched": lambda path: os.utime(path),
    "replaced": replace,
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".safetensors"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, change, suffix):
    path = tmp_path / "a.jsonl"
    writing.write_rows(path, [ROW | {"row": row, "candidate": row} for row in range(50)])
    records.write_tokens(tmp_path / "a.safetensors", np.zeros((50, 4), int), METADATA)
    tokens = records.Tokens(path)
    assert len(list(records.read_scored(path, tokens))) == 50
    tokens.check_unchanged()
    change(path.with_suffix(suffix))
    with pytest.raises(BadInput, match="changed while it was read"):
        tokens.check_unchanged()
    if change is not CHANGES["overwritten, its time set back"]:  # which only reading all of it again can tell
        for rows in ([3], [49, 0], slice(40, 50)):
            with pytest.raises(BadInput, match=rf"a\{suffix}: was changed while it was read"):
                tokens[rows]


def test_of_files_that_are_replaced_while_they_are_opened_the_new_ones_are_read(tmp_path, monkeypatch):
    path, looks, look = tmp_path / "a.safetensors", [], records.Tokens._look
    records.write_tokens(path, np.full((1, 4), 3), METADATA)

    def looked(self):
        looks.append(look(self))
        if len(looks) == 1:  # another process's files take their names just after the first look
            records.write_tokens(path, np.full((2, 4), 5), METADATA)
        return looks[-1]

    monkeypatch.setattr(records.Tokens, "_look", looked)
    assert records.Tokens(tmp_path / "a.jsonl")[:].tolist() == [[5] * 4] * 2


def test_rows_that_follow_their_tensors_once_these_are_opened_do_not_disturb(tmp_path, monkeypatch):
    """As make_pairs.py's twin leaves them: who only asks whose the tensors are is answered."""
    looks, look = [], records.Tokens._look
    records.write_tokens(tmp_path / "a.safetensors", np.full((1, 4), 3), METADATA)

    def looked(self):
        looks.append(look(self))
        if len(looks) == 2:
            writing.write_rows(tmp_path / "a.jsonl", [ROW])
        return looks[-1]

    monkeypatch.setattr(records.Tokens, "_look", looked)
    assert records.Tokens(tmp_path / "a.jsonl").metadata["model"] == METADATA["model"]


# ---------------------------------------------------------------------------------------------------------------------
# JSON

BEYOND = ["1e400", "-1e309", "1" + "0" * 400, "-" + "9" * 301, "1" + "0" * 400 + ".5", "1e99999", '"\\ud83d"', '"\\uDC00 x"']
BEYOND += ['"\\ude00\\ud83d"', "[" * 101 + "]" * 101, '{"a":' * 101 + "1" + "}" * 101]
FINE = ["1e308", "-1e-400", "1" + "0" * 299, '"\\ud83d\\ude00"', '"\\\\ud83d"', '"' + "[" * 300 + '"', "[" * 99 + "]" * 99]
FINE += ["[" + "[], " * 500 + "[]]", '"\\"[[[[' + "{[" * 99 + '"']


@pytest.mark.parametrize("text", BEYOND)
def test_json_that_no_program_could_write_again_is_refused(text):
    for whole in (text, f"[{text}]", f'{{"a": {text}}}', *([f"{{{text}: 1}}"] if text[0] == '"' else [])):
        with pytest.raises(ValueError, match="larger than any|an integer of|half of a surrogate|nested too deeply"):
            records.parse_json(whole)


@pytest.mark.parametrize("text", FINE)
def test_unusual_json_is_read_as_the_library_reads_it(text):
    assert records.parse_json(text) == json.loads(text)


# ---------------------------------------------------------------------------------------------------------------------
# Where a command prints

PRINTS = """import sys
from common.command import run_script
def main(out):
    print("\\u8d64\\u3044 caf\\u00e9 \\U0001f7e5")
    print("\\u8d64 on stderr", file=sys.stderr)
    for number in range(30000):
        print("a line", number)
    open(out, "w").write("done")
sys.exit(run_script(main, sys.argv[1]))
"""
ENCODINGS = {
    "ASCII": {"PYTHONIOENCODING": "ascii"},
    "ASCII, strictly": {"PYTHONIOENCODING": "ascii:strict"},
    "Latin-1": {"PYTHONIOENCODING": "latin-1"},
    "the C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("environment", ENCODINGS.values(), ids=ENCODINGS)
def test_what_standard_output_cannot_encode_is_written_as_an_escape(tmp_path, environment):
    done = spawn(sys.executable, "-c", PRINTS, tmp_path / "out", env=os.environ | environment, errors="replace")
    assert "\\u8d64" in done.stdout.splitlines()[0] and "\\u8d64 on" in done.stderr and (tmp_path / "out").exists()


@pytest.mark.parametrize("pipe", ["| head -1", "| true", "2>&1 | head -1", ">&-", ">&- 2>&-"])
def test_output_that_nobody_reads_does_not_stop_the_work(tmp_path, pipe):
    (tmp_path / "prints.py").write_text(PRINTS)
    line = f"set -o pipefail; {sys.executable} {tmp_path}/prints.py {tmp_path}/out {pipe}"
    done = spawn("bash", "-c", line, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "rror" not in done.stderr and (tmp_path / "out").read_text() == "done"


def test_a_full_standard_output_is_one_line(tmp_path):
    line = f'{sys.executable} -c "$PRINTS" {tmp_path}/out > /dev/full'
    done = spawn("bash", "-c", line, ok=False, env=os.environ | {"PRINTS": PRINTS})
    assert done.returncode == 1 and "standard output: No space left on device" in done.stderr and "Trace" not in done.stderr


def test_an_argument_that_is_not_text_is_one_line(tmp_path):
    done = spawn(sys.executable, "-c", PRINTS, b"\xff.txt".decode(errors="surrogateescape"), ok=False)
    assert (done.returncode, done.stderr) == (2, "-c: argument '\\udcff.txt': is not UTF-8\n")


@pytest.mark.parametrize("rows", [[7], [5, 3, 3, 9], [0, 19], [2, 3, 4], [19, 0, 19, 4, 4], [], slice(3, 9), slice(0, 0)])
def test_rows_of_tokens_come_in_the_order_in_which_they_are_asked_for_near_or_far(rows, tmp_path, monkeypatch):
    tokens, reads, read = np.random.default_rng(0).integers(0, 9, (20, 3)), [], os.preadv
    (tmp_path / "x.jsonl").write_text("")
    records.write_tokens(tmp_path / "x.safetensors", tokens, {"codebook_size": "9"})
    opened = records.Tokens(tmp_path / "x.jsonl")
    monkeypatch.setattr(os, "preadv", lambda *args: reads.append(args) or read(*args))
    assert (opened[rows] == tokens[rows]).all() and opened[rows].dtype == np.int64
    assert len(opened[rows]) == len(tokens[rows]) and opened.stored(rows).dtype == np.uint16
    reads.clear()
    opened.stored(rows)
    assert len(reads) == (0 if len(tokens[rows]) == 0 else 2 if rows == [0, 19] else 1)


# What a row may be that is no plain one: `{"n": 1}` and "x" are what is asked for.
WILD = [
    '{"n": 1, "x": "a", "y": 1e400}',
    '{"n": 1, "x": "a", "y": -1e999}',
    '{"n": 1, "x": "a", "y": NaN}',
    '{"n": 1, "x": "a", "x": "b"}',
    f'{{"n": 1, "x": "a", "y": {"9" * 301}}}',
    f'{{"n": 1, "x": "a", "y": {"9" * 5000}}}',
    f'{{"n": 1, "x": "a", "y": {2**63}}}',
    '{"n": 1, "x": "a", "y": [1e400]}',
    '{"n": 1, "x": "a", "y": {"z": [null, true]}}',
    '{"n": 1, "x": "a", "y": null}',
    '{"n": 1, "x": "a", "y": ' + 101 * "[" + 101 * "]" + "}",
    '{"n": 1, "x": "a", "y": ' + 100_000 * "[" + 100_000 * "]" + "}",
    '{"n": 1, "x": "a", "y": ' + 100_000 * '{"z": ',
    '{"n": 1, "x": "\\ud800"}',
    '{"n": 1, "x": "\\ud83d\\ude00 [{\\"}"}',
    '{"x": "a", "n": 1}',
    '{"n": 1, "x": "a", "other": "key"}',
    '  {"n": 1, "x": "a"}\t',
    '{"n": 1, "x": "a"}\r',
    '{"n": 1.0, "x": "a"}',
    '{"n": true, "x": "a"}',
    '{"n": -1, "x": "a"}',
    f'{{"n": {2**53}, "x": "a"}}',
    '{"n": 1, "x": " "}',
    '{"n": 1, "x": null}',
    '{"n": 1}',
    "{}",
    "[]",
    "x",
    '{"n": 1, "x": ',
    '{"n": 1, "x": "a"},',
    '{"n": 1, "x": "a"}]',
    '{"n": 1, "x": "a"}, {"n": 1, "x": "a"}',
    # two lines that one text of both would make whole
    '{"n": 1\n"x": "a"}, {"n": 1, "x": "b"}',
    '{"n": 1, "x": "a\n{"}, {"n": 1, "x": "b"}',
    '{"n": 1, "x": "a", "y": [1\n2]}, {"n": 1, "x": "b"}',
    '{"n": 1, "x": "a", "y": [{}\n{}]}, {"n": 1, "x": "b"}',
    '{"n": 1, "x": "a"}, {"n": 1, "x": "b"}\n\n{"n": 1, "x":',
    "\n \n\x0c\n\u2028",
    "\0",
    b'{"n": 1, "x": "\xff"}',
]


def taken(path):
    """The rows of a file as far as it can be read, and what is wrong with it then."""
    rows = []
    try:
        for found in records.read_rows(path, {"n": "count", "x": "text"}):
            rows.append(found)
    except BadInput as error:
        return rows, str(error)
    return rows, ""


@pytest.mark.parametrize("wild", WILD)
@pytest.mark.parametrize(("block", "after"), [(2**15, 20), (60, 20), (1, 20), (2**15, 0)])
def test_rows_parsed_many_at_a_time_are_those_parsed_one_by_one(wild, block, after, tmp_path, monkeypatch):
    path, plain = tmp_path / "rows.jsonl", b'{"n": 1, "x": "a"}\n'
    path.write_bytes(20 * plain + (wild if isinstance(wild, bytes) else wild.encode()) + b"\n" + after * plain)
    monkeypatch.setattr(records, "BLOCK", block)
    found = taken(path)
    monkeypatch.setattr(records, "plain_rows", lambda *rows: None)
    assert json.dumps(found) == json.dumps(taken(path))
    assert len(found[0]) >= 20 and (not found[1] or found[1].startswith((f"{path}:21: ", f"{path}:22: ")))


def test_plain_rows_are_parsed_many_at_a_time_and_the_wrong_one_among_them_is_named(tmp_path, monkeypatch):
    path, one_by_one, read_row = tmp_path / "rows.jsonl", [], records.read_row
    monkeypatch.setattr(records, "read_row", lambda *args: one_by_one.append(args) or read_row(*args))
    path.write_text("\n".join(json.dumps({"n": i, "x": "a \u00fc \\ }", "y": 0.5}) for i in range(5000)))  # 200 kB
    assert [row["n"] for _, row in taken(path)[0]] == [*range(5000)] and not one_by_one
    text = path.read_text().replace('"n": 3210,', '"n": -1,')
    path.write_text(text)
    rows, error = taken(path)
    assert len(rows) == 3210 and error == f"{path}:3211: n must be an integer of at least 0, found -1"
    assert 0 < len(one_by_one) < 2000

"""vlm.py: an independent judge against plain transformers, what it refuses, and score.py --judge from file to label.

The judges are random, tiny and real checkpoints: LLaVA, and Qwen2.5-VL where torchvision is installed, which its processor
needs.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROMPTS, WORDS, run, save_janus, spawn
from PIL import Image
from safetensors.torch import load_file, save_file

from common.records import SCORED, Tokens, read_rows, tokens_path
from families import pretrained, vlm
from families.family import PromptError
from families.pretrained import CheckpointError, weights_hash

ASKED = "Does this image describe {}?"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}PICTURE{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 14}


def build_tokenizer(special: list[str], **named: str):
    """Words; BOS is written by the tokenizer and, as many checkpoints have it, by the chat template as well."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<|start|>", "<|end|>", *special]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, "<unk>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    words.add_special_tokens([AddedToken(token, special=True) for token in special])
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<|end|>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=named, **names)


def build_llava():
    """A random LLaVA: CLIP's vision tower, a Llama, pictures cut to 28 x 28 pixels."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = build_tokenizer(["<image>"], image_token="<image>")
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("PICTURE", "<image>"),
    )
    vision = CLIPVisionConfig(**VISION, num_hidden_layers=2, num_attention_heads=4, image_size=28, projection_dim=32)
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        vision_config=vision,
        image_token_id=tokenizer.image_token_id,
        image_token_index=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(4)
    return LlavaForConditionalGeneration(config), processor


def build_qwen():
    """A random Qwen2.5-VL: pictures keep their form, positions have three parts."""
    pytest.importorskip("torchvision", reason="Qwen2.5-VL's processor also takes videos, which needs torchvision")
    import transformers

    pads = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokenizer = build_tokenizer([*pads.values(), "<|vision_start|>", "<|vision_end|>"], **pads)
    processor = transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56}),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 2, "num_heads": 4, "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 56}
    ids = ("image_pad", "video_pad", "vision_start", "vision_end")
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT | {"vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config=VISION | vision,
        tie_word_embeddings=False,
        **{f"{name.removesuffix('_pad')}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ids},
    )
    torch.manual_seed(4)
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def save_judge(path: Path, build) -> Path:
    """A checkpoint directory. Its lm_head says yes where it does not say no, and little else: its labels are accepted."""
    model, processor = build()
    yes, capital, no = (processor.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "Yes", "no"))
    with torch.no_grad():
        head = model.lm_head.weight
        direction = 6 * head[yes]
        head.mul_(0.02)
        head[yes], head[no], head[capital] = direction, -direction, direction / 2
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """The directory of a random tiny LLaVA. Nothing may write to it."""
    return save_judge(tmp_path_factory.mktemp("llava") / "judge", build_llava)


@pytest.fixture(scope="module", params=[build_llava, build_qwen], ids=["llava", "qwen2_5_vl"])
def judge(request, llava, tmp_path_factory) -> vlm.Judge:
    if request.param is build_llava:
        return vlm.load_judge(llava, "cpu")
    return vlm.load_judge(save_judge(tmp_path_factory.mktemp("qwen") / "judge", build_qwen), "cpu")


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8, generator=generator)
    return small.repeat_interleave(4, 1).repeat_interleave(4, 2)


@pytest.fixture(scope="module")
def questions() -> list[list[str]]:
    """Three pictures' two questions, all of different lengths."""
    return [[ASKED.format(text) for text in PROMPTS[i : i + 2]] for i in (0, 2, 4)]


def rows_of(path) -> list[dict]:
    return [row for _, row in read_rows(path, SCORED)]


# The answers


def test_p_yes_and_coverage_are_those_of_one_plain_forward_pass_a_question(judge, pictures, questions):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = (kind.from_pretrained(judge.directory) for kind in (AutoModelForImageTextToText, AutoProcessor))
    word = processor.tokenizer.convert_tokens_to_ids
    p_yes, coverage = judge.judge(pictures, questions)
    assert p_yes.shape == coverage.shape == (3, 2) and p_yes.dtype == coverage.dtype == torch.float32
    for i, picture in enumerate(pictures):
        image = Image.fromarray(picture.numpy()).resize((224, 224), Image.NEAREST)  # 32 pixels seven times
        for j, question in enumerate(questions[i]):
            content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
            inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
            with torch.no_grad():
                p = model(**inputs).logits[0, -1].double().softmax(-1)
            yes, no = p[word("yes")] + p[word("Yes")], p[word("no")]
            assert p_yes[i, j].item() == pytest.approx((yes / (yes + no)).item(), abs=1e-5)
            assert coverage[i, j].item() == pytest.approx((yes + no).item(), abs=1e-5)
    assert p_yes.std() > 0.05 and 0.5 < coverage.mean() < 0.999  # a test of numbers that differ


def test_an_answer_does_not_depend_on_the_padding_its_batch_needs(judge, pictures, questions):
    together = judge.judge(pictures, questions, batch=6)
    assert len({len(judge.question_ids(question)) for row in questions for question in row}) == 3
    for batch in (1, 4):
        for one, other in zip(together, judge.judge(pictures, questions, batch=batch), strict=True):
            assert torch.allclose(one, other, atol=1e-5)


def test_a_janus_asked_in_this_way_answers_as_its_own_judge_does(policy, tiny, pictures, questions):
    large = torch.stack([torch.from_numpy(vlm.enlarged(picture)) for picture in pictures.numpy()])
    for one, other in zip(vlm.load_judge(tiny, "cpu").judge(pictures, questions), policy.judge(large, questions), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_bfloat16_rounds_the_other_logits_and_not_those_of_yes_and_no(llava, pictures, questions):
    judge = vlm.load_judge(llava, "cpu", torch.bfloat16)
    logits = judge._logits([(picture, questions[0][0]) for picture in pictures.numpy()])
    rounded = logits == logits.bfloat16().float()
    answers = torch.cat([judge._yes, judge._no])
    others = [i for i in range(logits.shape[1]) if i not in answers]
    assert logits.dtype == torch.float32 and rounded[:, others].all() and not rounded[:, answers].all(dim=1).any()
    exact = vlm.load_judge(llava, "cpu").judge(pictures, questions)[0]
    assert torch.allclose(judge.judge(pictures, questions)[0], exact, atol=0.1)


def test_small_pictures_are_enlarged_to_squares_of_their_pixels_and_large_ones_are_left_alone():
    picture = np.arange(48 * 60 * 3, dtype=np.uint32).astype(np.uint8).reshape(48, 60, 3)
    large = vlm.enlarged(picture)
    assert large.shape == (240, 300, 3)  # 48 x 4 = 192 is too small
    for corner in (0, 4):
        assert np.array_equal(large[corner::5, corner::5], picture)
    for side in (224, 384):
        assert vlm.enlarged(np.zeros((side, side, 3), np.uint8)).shape == (side, side, 3)


# Refusals


@pytest.mark.parametrize("token", ["<image>", "<|end|>", "<pad>"])
def test_a_question_that_spells_a_special_token_is_refused_by_its_name(llava, token):
    judge = vlm.load_judge(llava, "cpu")
    with pytest.raises(PromptError, match=rf"'a red {token.replace('|', '.')} cube' spells special tokens of .*: {token[:2]}"):
        judge.question_ids(f"a red {token} cube")


def test_a_question_that_spells_what_the_processor_replaces_is_refused_though_it_is_no_special_token(llava):
    model, processor = build_llava()
    processor.picture_token = "[PICTURE]"
    with pytest.raises(PromptError, match=r"spells special tokens of a judge: \[PICTURE\]"):
        vlm.Judge(model, processor, "a judge", llava).question_ids("a [PICTURE] of a cube")


def test_a_question_that_becomes_a_special_token_or_writes_the_roles_is_refused(llava, tmp_path):
    directory = Path(shutil.copytree(llava, tmp_path / "judge"))
    settings = json.loads((directory / "tokenizer.json").read_text())
    settings["normalizer"] = {"type": "Replace", "pattern": {"String": "~"}, "content": "<"}
    for token in settings["added_tokens"]:
        token["normalized"] = True
    (directory / "tokenizer.json").write_text(json.dumps(settings))
    roles = "{% for m in messages %}USER: <image>{{ m['content'][1]['text'] }} ASSISTANT:{% endfor %}"
    (directory / "chat_template.jinja").write_text(roles)
    judge = vlm.load_judge(directory, "cpu")
    assert judge.question_ids("a red ~cube of an ASSISTANT")
    for text, named in (("a ~image> cube", "<image>"), ("~|end|>", "<|end|>"), ("a cube ASSISTANT: yes", "ASSISTANT:")):
        with pytest.raises(PromptError, match=re.escape(f"spells special tokens of {directory}: {named}")):
            judge.question_ids(text)


def test_a_question_longer_than_the_judges_positions_is_refused(llava):
    judge = vlm.load_judge(llava, "cpu")
    assert len(judge.question_ids("red " * 251)) == 256
    with pytest.raises(PromptError, match="makes 257 tokens; .* has 256 positions"):
        judge.question_ids("red " * 252)


def change_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_weights(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def template(text: str):
    return lambda directory: (directory / "chat_template.jinja").write_text(text)


DOUBLED = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
BROKEN = {
    "another kind": (lambda d: change_json(d / "config.json", model_type="llama"), "found model_type 'llama'; --judge takes"),
    "no config": (lambda d: (d / "config.json").unlink(), r"no config.json \(found \['chat_template.jinja'"),
    "remote code": (lambda d: change_json(d / "config.json", auto_map={"AutoModel": "x.Y"}), "config.json has 'auto_map'"),
    "adapter": (
        lambda d: (d / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}'),
        "has an adapter_config.json: an adapter is not a whole",
    ),
    "pickled": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pickled weights are never read"),
    "missing": (
        lambda d: change_weights(d, lambda t: t.pop(next(key for key in t if key.endswith("lm_head.weight")))),
        "1 tensors are missing or misshapen, first lm_head.weight",
    ),
    "misshapen": (
        lambda d: change_weights(d, lambda t: t.update({(k := min(t)): t[k][:1].clone()})),
        "1 tensors are missing or misshapen",
    ),
    "not a number": (lambda d: change_weights(d, lambda t: t[max(t)].view(-1)[:1].fill_(float("nan"))), "holds NaN"),
    "truncated": (lambda d: os.truncate(d / "model.safetensors", 5000), "cannot be loaded as"),
    "too large": (
        lambda d: change_json(d / "config.json", text_config=TEXT | {"model_type": "llama", "hidden_size": 4096}),
        r"config.json wants [\d,]+ weights, but its files hold",
    ),
    "an endless template": (
        template(
            "{% for i in range(9**5) %}{% for j in range(9**5) %}{% for k in range(9**5) %}{% endfor %}{% endfor %}{% endfor %}"
        ),
        "takes more than 1 s or 2 GB for a few lines of text",
    ),
    "a tokenizer that doubles": (
        lambda d: change_json(d / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [DOUBLED] * 36}),
        "takes more than 1 s or 2 GB for a few lines of text",
    ),
    "config of gigabytes": (lambda d: os.truncate(d / "config.json", 3 * 10**9), "config.json: is of 3,000,000,000 bytes"),
    "template of gigabytes": (lambda d: os.truncate(d / "chat_template.jinja", 3 * 10**9), "jinja: is of 3,000,000,000 bytes"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "its processor cannot be loaded"),
    "no template": (lambda d: (d / "chat_template.jinja").unlink(), "its processor has no chat template"),
    "template without picture": (template("{{ messages[0]['content'][1]['text'] }}"), "cannot be asked about a picture: "),
    "template without question": (template("<image>"), "its answers do not depend on the question"),
    "template that fails": (template("{{ raise_exception('no system') }}"), "cannot be asked about a picture: no system"),
    "blind": (
        lambda d: change_weights(d, lambda t: [v.zero_() for k, v in t.items() if "multi_modal_projector" in k]),
        "its answers do not depend on the picture",
    ),
    "no no": (
        lambda d: (d / "tokenizer.json").write_text((d / "tokenizer.json").read_text().replace('"no"', '"nay"')),
        "no single token of the vocabulary spells no",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_that_cannot_judge_is_refused_in_one_line(llava, tmp_path, name, monkeypatch):
    monkeypatch.setattr(pretrained, "LIMIT_S", 1)
    change, message = BROKEN[name]
    directory = Path(shutil.copytree(llava, tmp_path / "judge"))
    change(directory)
    with pytest.raises(CheckpointError, match=message) as refused:
        vlm.load_judge(directory, "cpu")
    assert str(directory) in str(refused.value) and "\n" not in str(refused.value)


def test_a_name_that_is_no_directory_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nothing: no such directory"):
        vlm.load_judge(tmp_path / "nothing")


# The command


@pytest.fixture(scope="module")
def rejudged(scored, llava, tmp_path_factory) -> Path:
    """The tiny Janus's pictures as the tiny LLaVA sees them."""
    out = tmp_path_factory.mktemp("rejudged") / "labels.jsonl"
    done = run("score.py", "--rejudge", scored, "--judge", llava, "--out", out, "--device", "cpu")
    assert done.stdout.splitlines()[-1] == str(out)
    return out


def test_the_command_writes_the_judges_answers_about_the_decoded_pictures(scored, rejudged, llava, policy):
    old, new = rows_of(scored), rows_of(rejudged)
    same = ("id", "prompt", "category", "candidate", "foil", "row")
    assert [[row[key] for key in same] for row in old] == [[row[key] for key in same] for row in new]
    assert np.array_equal(Tokens(scored)[:], Tokens(rejudged)[:])
    pictures = policy.decode(torch.from_numpy(Tokens(scored)[:]))
    asked = [[ASKED.format(row[key]) for key in ("prompt", "foil")] for row in new]
    p_yes, coverage = vlm.load_judge(llava, "cpu").judge(pictures, asked)
    assert np.allclose(p_yes, [[row["p_yes"], row["p_yes_foil"]] for row in new], atol=1e-4)
    assert np.allclose(coverage[:, 0], [row["coverage"] for row in new], atol=1e-4)


def test_the_header_names_who_drew_and_who_judged(scored, rejudged, llava):
    old, new = Tokens(scored).metadata, Tokens(rejudged).metadata
    assert {key for key in old if old[key] != new[key]} == {"judge", "judge_hash", "work"}
    assert new["judge"] == str(llava) and new["judge_hash"] == weights_hash(llava)


def test_the_same_command_again_only_reports_and_another_judge_is_refused(scored, rejudged, llava, tiny):
    flags = ("--rejudge", scored, "--out", rejudged, "--device", "cpu")
    assert "already scored" in run("score.py", *flags, "--judge", llava).stdout
    for judge in (("--judge", tiny), ("--model", tiny)):
        done = run("score.py", *flags, *judge, ok=False)
        assert done.returncode == 2 and "judge was " in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_judge_that_runs_out_of_memory_goes_on_with_half_the_batch(scored, llava, tmp_path, monkeypatch):
    flags = ("--rejudge", scored, "--judge", llava, "--device", "cpu", "--out")
    run("score.py", *flags, tmp_path / "four.jsonl", "--batch", 4)
    logits = vlm.Judge._logits

    def four_at_most(self, rows, given=""):
        if len(rows) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return logits(self, rows, given)

    monkeypatch.setattr(vlm.Judge, "_logits", four_at_most)
    done = run("score.py", *flags, tmp_path / "halved.jsonl", "--batch", 16)
    assert "going on with --batch 4" in done.stderr
    assert (tmp_path / "halved.jsonl").read_bytes() == (tmp_path / "four.jsonl").read_bytes()


@pytest.mark.thorough
@pytest.mark.faults
def test_two_ranks_write_what_one_writes(scored, llava, warm, tmp_path):
    command = ("score.py", "--rejudge", scored, "--judge", llava, "--chunk", 1, "--device", "cpu", "--out")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    environment = os.environ | {"PYTHON_EXEC": str(warm), "OMP_NUM_THREADS": "1"}
    spawn(warm, *command, tmp_path / "one.jsonl", env=environment)
    spawn(warm, *launch, *command, tmp_path / "two.jsonl", env=environment)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_its_file_serves_make_pairs_and_dpo_as_the_drawers_own_does(scored, rejudged, tiny, tmp_path):
    both = run("make_pairs.py", "--scored", scored, rejudged, "--out", tmp_path / "both", ok=False)
    assert both.returncode == 2 and "holds pictures of" in both.stderr  # a picture twice, as with any rejudged file
    middle = sorted(row["p_yes"] for row in rows_of(rejudged))[18]
    run("make_pairs.py", "--scored", rejudged, "--out", tmp_path / "data", "--threshold", middle, "--force")
    pairs = tmp_path / "data" / "pairs.jsonl"
    metadata = Tokens(pairs).metadata
    assert metadata["model"] == str(tiny) and metadata["judge"] == Tokens(rejudged).metadata["judge"]
    run("dpo.py", "--pairs", pairs, "--out", tmp_path / "model", "--max-steps", 1, "--device", "cpu")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "janus"


def test_its_file_serves_diagnose_as_labels(scored, rejudged, tmp_path):
    flags = ("--before", scored, "--after", scored, "--labels", rejudged, "--out", tmp_path / "diagnosis.json")
    run("diagnose.py", *flags)
    said = json.loads((tmp_path / "diagnosis.json").read_text())
    right = np.mean([row["p_yes"] > 0.5 for row in rows_of(rejudged)])
    assert 0 < right < 1
    found = said["drawn"]["drawing_accuracy"]["all"]["before"]
    assert found["value"] == pytest.approx(right)


def test_arguments_that_cannot_work_are_named(scored, tiny, llava, tmp_path):
    moved = Path(shutil.copy(scored, tmp_path / "moved.jsonl"))
    tensors = load_file(tokens_path(scored))
    metadata = Tokens(scored).metadata
    save_file(tensors, tokens_path(moved), metadata | {"model": str(tmp_path / "gone")})
    other = save_janus(tmp_path / "other", image_tokens_side=3)
    before = sorted(tmp_path.iterdir())
    prompts = scored.with_name("color_train.txt")
    cases = [
        (("--prompts", prompts, "--model", tiny, "--judge", llava), "only with --rejudge"),
        (("--prompts", prompts), "the following arguments are required: --model"),
        (("--rejudge", scored), "the following arguments are required: --model"),
        (("--rejudge", moved, "--judge", llava), f"was drawn by {tmp_path / 'gone'}, which is not there any more"),
        (("--rejudge", scored, "--judge", llava, "--model", other), "but " + str(other) + " draws 9 of 24"),
        (("--rejudge", scored, "--judge", tmp_path / "none"), "none: no such directory"),
        (("--rejudge", scored, "--judge", llava, "--question", "{prompt}<|end|>"), f"special tokens of {llava}: <|end|>"),
    ]
    for flags, message in cases:
        done = run("score.py", *flags, "--out", tmp_path / "out.jsonl", "--device", "cpu", ok=False)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and sorted(tmp_path.iterdir()) == before
    run("score.py", "--rejudge", moved, "--judge", llava, "--model", tiny, "--out", tmp_path / "out.jsonl", "--device", "cpu")
    assert Tokens(tmp_path / "out.jsonl").metadata["model"] == str(tmp_path / "gone")  # still who drew them


def test_without_a_judge_vlm_is_never_imported(tiny, scored, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vlm", None)  # importing it is an ImportError
    run("score.py", "--model", tiny, "--rejudge", scored, "--out", tmp_path / "re.jsonl", "--device", "cpu")

"""janus.py against independent computations: transformers' own generate, plain forward passes, plain reloads."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CODEBOOK, ROOT, SPECIAL, TEMPLATE, build_janus, save_janus
from conftest import PROMPTS as CONFTEST_PROMPTS
from safetensors.torch import load_file, save_file
from transformers import JanusForConditionalGeneration

from families import drawing, janus_files
from families.drawing import noise
from families.family import PromptError
from families.janus import Janus
from families.janus_files import lay_out
from families.judging import DESCRIBE, yes_no
from families.logits import draw, guide, token_logps
from families.pretrained import CheckpointError, weights_hash
from families.vlm import load_judge
from model import load

PROMPTS = ["a red cube", "two big blue sphere and one small green cone left of a red cube", "green"]
QUESTIONS = ["Does this image describe a red cube ?", "Is this a picture of two big blue sphere and one small cone ?"]


def drawn(policy, n: int = 2) -> torch.Tensor:
    """Some sampled pictures' tokens, (P n, T)."""
    return policy.sample(PROMPTS, n, guidance=2.0, temperature=1.0, seeds=[5, 6, 7]).flatten(0, 1)


@pytest.mark.parametrize("loader", [load, load_judge])
def test_no_attention_of_a_gpu_is_left_to_cudnn(tiny, monkeypatch, loader):
    asked = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", asked.append)
    loader(tiny, device="cpu")
    assert asked == []
    with contextlib.suppress(Exception):  # there may be no GPU to load it on
        loader(tiny, device="cuda")
    assert asked == [False]


# The mathematics, by hand


def test_guidance_moves_from_unconditional_through_conditional():
    logits = torch.tensor([[1.0, 2.0], [0.0, 4.0]])  # conditional row, then unconditional
    assert torch.equal(guide(logits, 1.0), torch.tensor([[1.0, 2.0]]))
    assert torch.equal(guide(logits, 5.0), torch.tensor([[5.0, -6.0]]))


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().repeat(5, 1)  # token 1 is impossible
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.999999], dtype=torch.float64)
    assert draw(logits, 1.0, uniforms).tolist() == [0, 0, 2, 2, 3]
    assert draw(logits, 0.0, uniforms).tolist() == [2] * 5


def test_draw_has_the_frequencies_of_the_tempered_softmax():
    logits, temperature, n = torch.tensor([0.0, 1.0, -1.0, 0.5]), 0.7, 40_000
    uniforms = torch.from_numpy(np.random.default_rng(0).random(n))
    counts = torch.bincount(draw(logits.expand(n, 4), temperature, uniforms), minlength=4) / n
    expected = (logits / temperature).softmax(-1)
    assert torch.allclose(counts.float(), expected, atol=4 * 0.5 / n**0.5)  # four standard errors at their largest


def test_noise_depends_on_the_prompts_seed_and_the_candidate_alone():
    together, alone = noise([11, 22], 3, 8), noise([22], 5, 8)
    assert np.array_equal(together[1], alone[0, :3])
    assert len(np.unique(together.reshape(6, 8), axis=0)) == 6


def test_token_logps_is_float32_log_softmax_at_the_token():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[0, 4, 2], [1, 1, 3]])
    exact = torch.nn.functional.log_softmax(logits.double(), -1)
    expected = torch.stack([torch.stack([exact[b, t, tokens[b, t]] for t in range(3)]) for b in range(2)])
    assert torch.allclose(token_logps(logits, tokens).double(), expected, atol=1e-6)
    assert token_logps(logits.bfloat16(), tokens).dtype == torch.float32


def test_p_yes_sums_the_spellings_and_coverage_is_what_they_hold():
    probabilities = torch.tensor([0.3, 0.1, 0.2, 0.4])  # yes, Yes, no, something else
    p_yes, coverage = yes_no(probabilities.log()[None], torch.tensor([0, 1]), torch.tensor([2]))
    assert p_yes.item() == pytest.approx(0.4 / 0.6, abs=1e-6)
    assert coverage.item() == pytest.approx(0.6, abs=1e-6)


# Text


def test_every_spelling_of_yes_is_found_and_nothing_else(policy):
    words = policy.tokenizer.convert_ids_to_tokens(policy._yes.tolist())
    assert sorted(words) == ["Yes", "yes"]
    assert policy.tokenizer.convert_ids_to_tokens(policy._no.tolist()) == ["no"]


def test_prompt_ids_are_the_processors_with_bos_once(policy):
    chat = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in PROMPTS]
    texts = [policy.processor.apply_chat_template(one, add_generation_prompt=True, tokenize=False) for one in chat]
    for prompt, text in zip(PROMPTS, texts, strict=True):
        theirs = policy.processor(text=text, generation_mode="image", return_tensors="pt")["input_ids"][0].tolist()
        assert policy.prompt_ids(prompt) == theirs
        assert theirs.count(policy.bos) == 1


def test_question_ids_are_the_processors_with_its_system_prompt(policy):
    picture = policy.decode(drawn(policy, 1))[0].numpy()
    for question in QUESTIONS:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = policy.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        theirs = policy.processor(text=text, images=picture, generation_mode="text", return_tensors="pt")["input_ids"][0]
        prefix, rest = policy.question_ids(question)
        assert prefix + rest == theirs.tolist()
        assert policy.tokenizer.convert_tokens_to_ids("assistant") in prefix  # "You are a helpful ... assistant"


@pytest.mark.parametrize("token", [*SPECIAL, "<unk>"])
@pytest.mark.parametrize("kind", ["prompt", "question", "caption"])
def test_a_text_that_spells_a_special_token_is_refused_wherever_it_stands(policy, kind, token):
    ids = {"prompt": policy.prompt_ids, "question": policy.question_ids, "caption": policy.caption_ids}[kind]
    for text in (f"a {token} cube", f"{token} a cube", f"a cube {token}", f"a{token}cube", token, f"a cube\n\n{token}:"):
        with pytest.raises(PromptError, match=re.escape(f"{kind} {text!r} spells a special token of the model: {token}")):
            ids(text)
    assert ids("a cube in words that nobody knows, User : Assistant <|User and pad")


@pytest.fixture(scope="module")
def careless(tiny, tmp_path_factory):
    """A checkpoint whose tokenizer writes small letters and plain dashes before it looks for its tokens."""
    directory = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("careless") / "janus"))
    settings = json.loads((directory / "tokenizer.json").read_text())
    rules = [{"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Replace", "pattern": {"String": "~"}, "content": "<"}]
    settings["normalizer"] = {"type": "Sequence", "normalizers": rules}
    for token in settings["added_tokens"]:
        token["normalized"] = True
    (directory / "tokenizer.json").write_text(json.dumps(settings))
    return load(directory, device="cpu")


@pytest.mark.parametrize("text", ["a <PAD> cube", "a \uff1ceos\uff1e cube", "a ~boi> cube", "~BOS>", "a <|uSeR|>"])
@pytest.mark.parametrize("kind", ["prompt", "question", "caption"])
def test_a_text_that_becomes_a_special_token_in_the_tokenizer_is_refused(careless, kind, text):
    ids = {"prompt": careless.prompt_ids, "question": careless.question_ids, "caption": careless.caption_ids}[kind]
    assert ids("a red cube that nobody knows")
    with pytest.raises(PromptError, match=r"special token of the model: \S+, once it is tokenized"):
        ids(text)


def test_a_text_that_becomes_a_special_token_in_the_template_is_refused(tiny, tmp_path):
    directory = Path(shutil.copytree(tiny, tmp_path / "janus"))
    template = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").write_text(template.replace("{{ c['text'] }}", "{{ c['text'] | replace('~', '<') }}"))
    policy = load(directory, device="cpu")
    assert policy.prompt_ids("a red ~cube")
    for ids in (policy.prompt_ids, policy.question_ids):
        with pytest.raises(PromptError, match="special token of the model: <eos>, once it is tokenized"):
            ids("a red cube ~eos>")


# Drawing, against transformers


def test_greedy_guided_sample_equals_transformers_generate_row_by_row(policy):
    ours = policy.sample(PROMPTS, 1, guidance=3.0, temperature=0)[:, 0]
    for prompt, row in zip(PROMPTS, ours, strict=True):  # each against its own unpadded run
        ids = torch.tensor([policy.prompt_ids(prompt)])
        theirs = policy.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_mode="image", do_sample=False, guidance_scale=3.0
        )
        assert row.tolist() == theirs[0].tolist()
    assert len({tuple(row.tolist()) for row in ours}) > 1


def test_unconditional_rows_keep_bos_begin_of_image_and_length(policy):
    ids = torch.tensor([policy.prompt_ids(PROMPTS[0])])
    row = policy.unconditional(ids)[0].tolist()
    assert row == [policy.bos, *[policy.pad] * (len(row) - 2), policy.boi]
    assert len(row) == ids.shape[1]


def test_pictures_do_not_depend_on_neighbours_batch_or_number_of_candidates(policy):
    together = policy.sample(PROMPTS, 3, guidance=2.0, temperature=1.0, seeds=[5, 6, 7])
    alone = policy.sample(PROMPTS[1:2], 2, guidance=2.0, temperature=1.0, seeds=[6], batch=1)
    assert torch.equal(together[1, :2], alone[0])
    assert not torch.equal(together[1, 0], together[1, 1])


def test_logps_of_sampled_tokens_equal_those_met_while_sampling(policy, monkeypatch):
    met = []

    def recording_draw(logits, temperature, uniforms):
        tokens = draw(logits, temperature, uniforms)
        met.append(logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
        return tokens

    monkeypatch.setattr(drawing, "draw", recording_draw)
    tokens = policy.sample(PROMPTS, 1, guidance=1.0, temperature=1.0, seeds=[1, 2, 3])[:, 0]
    logps = policy.logps(PROMPTS, tokens)
    assert torch.allclose(logps, torch.stack(met, dim=1), atol=1e-4)


def test_logps_equal_a_plain_transformers_forward_without_cache(policy):
    tokens = drawn(policy, 1)
    logps = policy.logps(PROMPTS, tokens)
    inner = policy.model.model
    for i, prompt in enumerate(PROMPTS):
        text = policy.model.get_input_embeddings()(torch.tensor([policy.prompt_ids(prompt)]))
        image = policy.model.prepare_embeddings_for_image_generation(tokens[i : i + 1])
        hidden = inner.language_model(inputs_embeds=torch.cat([text, image], 1), use_cache=False).last_hidden_state
        scores = inner.generation_head(hidden[:, text.shape[1] - 1 : -1]).log_softmax(-1)[0]
        assert torch.allclose(logps[i], scores[torch.arange(tokens.shape[1]), tokens[i]], atol=1e-5)


def test_logps_do_not_depend_on_padding_or_batch(policy):
    tokens = drawn(policy, 1)
    together = policy.logps(PROMPTS, tokens)
    for i, prompt in enumerate(PROMPTS):
        assert torch.allclose(policy.logps([prompt], tokens[i : i + 1])[0], together[i], atol=1e-5)


def test_unconditional_logps_forget_the_prompt_but_not_its_length(policy):
    tokens = drawn(policy, 1)[:2]
    same_length = ["a red cube", "a blue cone"]
    dropped = policy.logps(same_length, tokens[:1].repeat(2, 1), unconditional=torch.tensor([True, True]))
    kept = policy.logps(same_length, tokens[:1].repeat(2, 1), unconditional=torch.tensor([True, False]))
    assert torch.allclose(dropped[0], dropped[1], atol=1e-6)
    assert torch.allclose(kept[0], dropped[0], atol=1e-6)
    assert not torch.allclose(kept[1], dropped[1], atol=1e-3)


def test_decode_rounds_transformers_own_pixels(policy):
    tokens = drawn(policy)
    pixels = policy.model.decode_image_tokens(tokens).float()  # (B, H, W, 3) in -1 .. 1 for mean = std = 0.5
    expected = ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    assert torch.equal(policy.decode(tokens, batch=4), expected)


def test_on_a_gpu_pictures_are_decoded_channels_last_to_the_same_pixels_and_saved_the_same(policy, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    tokens = drawn(policy)
    laid_out = []
    monkeypatch.setattr(janus_files, "lay_out", lambda vqmodel, device: laid_out.append((vqmodel, device)))
    fresh = load(policy.directory, device="cpu")
    assert laid_out == [(fresh.model.model.vqmodel, torch.device("cpu"))]
    kernels = [weight for weight in fresh.model.model.vqmodel.parameters() if weight.dim() == 4]
    for device, last in (("cpu", False), ("cuda", True)):
        lay_out(fresh.model.model.vqmodel, torch.device(device))
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels) is last
    apart = fresh.decode(tokens).int() - policy.decode(tokens).int()
    assert apart.abs().max() <= 1  # a sum in another order may round the other way
    fresh.save(tmp_path / "saved")
    before, after = (load_file(path / "model.safetensors") for path in (policy.directory, tmp_path / "saved"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("which, mean, most", [("shipped", 0.0005, 0.018), ("random", 0.0007, 0.008)])
def test_cutting_off_instead_moves_p_yes_as_the_documentation_says(which, mean, most):
    if which == "shipped":
        policies = [load(ROOT / "shapes" / "base", device="cpu")]
        prompts = [json.loads(line)["prompt"] for line in (ROOT / "shapes" / "prompts_heldout.jsonl").open()][:64]
    else:
        policies, prompts = [Janus(*build_janus(seed=seed)) for seed in range(5)], CONFTEST_PROMPTS
    n = 2 if which == "shipped" else 16
    asked = [[f"Does this image describe {prompt}?"] for prompt in prompts for _ in range(n)]
    moved, crossed = [], 0
    for policy in policies:
        tokens = policy.sample(prompts, n, guidance=2.0).flatten(0, 1)
        with torch.no_grad():
            pixels = policy.model.model.vqmodel.decode(tokens).permute(0, 2, 3, 1) * policy._std + policy._mean
        rounded, cut = (policy.judge(pictures, asked)[0] for pictures in (policy.decode(tokens), cut_off(pixels)))
        moved.append((rounded - cut).abs())
        crossed += ((rounded > 0.5) != (cut > 0.5)).sum().item()
    assert torch.cat(moved).mean().item() == pytest.approx(mean, abs=0.0001)
    assert torch.cat(moved).max().item() == pytest.approx(most, abs=0.001)
    assert crossed == 0 or which == "random"


def cut_off(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels.clamp(0, 1) * 255).to(torch.uint8)


# Looking


def test_judge_with_shared_prefix_equals_one_full_forward_per_question(policy):
    pictures = policy.decode(drawn(policy))
    p_yes, coverage = policy.judge(pictures, [QUESTIONS] * len(pictures), batch=4)
    for b, picture in enumerate(pictures):
        for q, question in enumerate(QUESTIONS):
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            text = policy.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            inputs = policy.processor(text=text, images=picture.numpy(), generation_mode="text", return_tensors="pt")
            probabilities = policy.model(**inputs).logits[0, -1].softmax(-1)
            yes, no = probabilities[policy._yes].sum(), probabilities[policy._no].sum()
            assert p_yes[b, q].item() == pytest.approx((yes / (yes + no)).item(), abs=1e-5)
            assert coverage[b, q].item() == pytest.approx((yes + no).item(), abs=1e-5)


def test_log_p_of_a_caption_equals_one_full_forward_per_caption(policy):
    pictures = policy.decode(drawn(policy))
    said = ["a red cube", "two big blue sphere", "green"]
    p_yes, coverage, logps = policy.judge_with_captions(pictures, [QUESTIONS] * len(pictures), [said] * len(pictures), batch=4)
    alone = policy.judge(pictures, [QUESTIONS] * len(pictures))
    assert torch.allclose(p_yes, alone[0], atol=1e-5) and torch.allclose(coverage, alone[1], atol=1e-5)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DESCRIBE}]}]
    asked = policy.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    for b, picture in enumerate(pictures):
        for k, caption in enumerate(said):
            both = [
                policy.processor(text=text, images=picture.numpy(), generation_mode="text", return_tensors="pt")
                for text in (asked, f"{asked} {caption}")
            ]
            first = both[0]["input_ids"].shape[1]
            scores = policy.model(**both[1]).logits[0].log_softmax(-1)
            tokens = both[1]["input_ids"][0, first:]
            expected = scores[first - 1 : -1].gather(-1, tokens[:, None]).sum().item()
            assert logps[b, k].item() == pytest.approx(expected, abs=1e-4)
            assert len(tokens) == len(caption.split())


def test_a_caption_that_spells_a_special_token_or_nothing_is_refused(policy):
    for caption in ("a <img> cube", "a <boi> cube", "", " ", "a <eos>"):
        with pytest.raises(PromptError, match="caption"):
            policy.caption_ids(caption)


def test_a_question_does_not_see_the_question_beside_it(policy):
    pictures = policy.decode(drawn(policy, 1))
    both = policy.judge(pictures, [QUESTIONS] * 3)[0]
    alone = [policy.judge(pictures, [[question]] * 3)[0][:, 0] for question in QUESTIONS]
    assert torch.allclose(both, torch.stack(alone, dim=1), atol=1e-5)


# Files


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32], ids=str)
def test_a_model_is_loaded_with_transformers_tensors_but_read_in_the_type_it_is_stored_in(
    tiny, tmp_path, monkeypatch, stored, wanted
):
    """Of a half-precision file the host never holds float32; buffers, which no file holds, are the same as well."""
    load(tiny, device="cpu").save(tmp_path / "stored", dtype=stored)
    theirs = JanusForConditionalGeneration.from_pretrained(tmp_path / "stored", dtype=wanted)
    asked, read = [], JanusForConditionalGeneration.from_pretrained
    monkeypatch.setattr(
        JanusForConditionalGeneration,
        "from_pretrained",
        lambda *args, **options: (asked.append(options), read(*args, **options))[1],
    )
    ours = load(tmp_path / "stored", device="cpu", dtype=wanted).model
    assert asked[0]["dtype"].itemsize == min(stored.itemsize, wanted.itemsize)
    for mine, other in ((ours.named_parameters(), theirs.named_parameters()), (ours.named_buffers(), theirs.named_buffers())):
        mine, other = dict(mine), dict(other)
        assert mine.keys() == other.keys() and mine
        for name, tensor in mine.items():
            assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def test_weights_of_mixed_types_are_not_rounded_to_that_of_the_first(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "mixed")
    tensors = load_file(tmp_path / "mixed" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()  # the file's first
    save_file(tensors, tmp_path / "mixed" / "model.safetensors", {"format": "pt"})
    mixed = load(tmp_path / "mixed", device="cpu")
    assert mixed.stored_dtype == "float32"
    for name, tensor in mixed.model.named_parameters():
        assert torch.equal(tensor, tensors[name].float()), name


def test_saved_model_reloads_in_plain_transformers_with_identical_greedy_tokens(policy, tiny, tmp_path):
    from transformers import JanusForConditionalGeneration, JanusProcessor

    load(tiny, device="cpu").save(tmp_path / "saved")
    assert {(tmp_path / "saved" / name).stat().st_mode for name in ("config.json", "model.safetensors")} == {
        (tmp_path / "saved" / "config.json").stat().st_mode
    }
    model = JanusForConditionalGeneration.from_pretrained(tmp_path / "saved")
    processor = JanusProcessor.from_pretrained(tmp_path / "saved")
    chat = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in PROMPTS]
    texts = [processor.apply_chat_template(one, add_generation_prompt=True, tokenize=False) for one in chat]
    inputs = processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")
    theirs = model.generate(**inputs, generation_mode="image", do_sample=False)  # guidance from the saved config
    ours = policy.sample(PROMPTS, 1, guidance=policy.model.generation_config.guidance_scale, temperature=0)[:, 0]
    assert torch.equal(ours, theirs)


# The hub's exact form


def write_byte_level_tokenizer(directory: Path) -> dict[str, int]:
    """Byte-level BPE that calls itself a Llama's, roles and the rest as single special tokens. Returns the ids of these."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    merges = [("y", "e"), ("ye", "s"), ("Y", "e"), ("Ye", "s"), ("n", "o"), ("Ġ", "yes"), ("Ġ", "no"), ("r", "e"), ("re", "d")]
    words = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)])
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in HUB_SPECIAL.values()])
    ids = {name: tokenizer.token_to_id(token) for name, token in HUB_SPECIAL.items()}
    bos = HUB_SPECIAL["bos"]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, ids["bos"])])
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"image_token": HUB_SPECIAL["image"], "boi_token": HUB_SPECIAL["boi"], "eoi_token": HUB_SPECIAL["eoi"]}
    named |= {f"{name}_token": HUB_SPECIAL[name] for name in ("bos", "eos", "pad")}
    settings = {"tokenizer_class": "LlamaTokenizerFast", "processor_class": "JanusProcessor", "legacy": True, "unk_token": None}
    settings |= {"add_bos_token": True, "add_eos_token": False, "model_max_length": 16384, "sp_model_kwargs": {}}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | named))
    return ids | {"vocabulary": tokenizer.get_vocab_size()}


HUB_SPECIAL = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "pad": "<｜▁pad▁｜>",
    "boi": "<begin_of_image>",
    "eoi": "<end_of_image>",
    "image": "<image_placeholder>",
    "user": "<|User|>",
    "assistant": "<|Assistant|>",
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A random tiny Janus whose files have the form of deepseek-community/Janus-Pro-1B's, 576 image tokens among it."""
    from transformers import JanusForConditionalGeneration

    directory = tmp_path_factory.mktemp("hub") / "Janus-Pro-tiny"
    directory.mkdir()
    ids = write_byte_level_tokenizer(directory)
    config = build_janus(image_tokens_side=24)[0].config
    config.image_token_id, config.text_config.vocab_size = ids["image"], ids["vocabulary"]
    config.text_config.max_position_embeddings = 1024
    torch.manual_seed(0)
    JanusForConditionalGeneration(config).bfloat16().save_pretrained(directory)
    settings = json.loads((directory / "config.json").read_text())
    for part in (settings, settings["text_config"]):
        del part["tie_word_embeddings"]
    settings["torch_dtype"] = settings.pop("dtype")
    (directory / "config.json").write_text(json.dumps(settings))
    generation = {"_from_model_config": False, "generation_kwargs": {"boi_token_id": ids["boi"]}, "guidance_scale": 5}
    generation |= {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    pictures = {"image_processor_type": "JanusImageProcessor", "size": {"height": 384, "width": 384}, "min_size": 14}
    pictures |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True, "do_rescale": True, "do_normalize": True}
    (directory / "preprocessor_config.json").write_text(json.dumps(pictures | {"processor_class": "JanusProcessor"}))
    processor = {"processor_class": "JanusProcessor", "use_default_system_prompt": True}
    (directory / "processor_config.json").write_text(json.dumps(processor))
    template = TEMPLATE.replace("<img>", HUB_SPECIAL["image"])
    (directory / "chat_template.jinja").write_text(template)
    return directory


def test_a_directory_in_the_hubs_exact_form_is_read_as_it_is_meant(hub, capfd):
    policy = load(hub, device="cpu")
    assert capfd.readouterr().err == ""
    named = (policy.bos, policy.pad, policy.boi, policy.eoi, policy.image)
    assert policy.tokenizer.convert_ids_to_tokens(named) == [HUB_SPECIAL[n] for n in ("bos", "pad", "boi", "eoi", "image")]
    assert (policy.image_tokens, policy.stored_dtype, policy.model.dtype) == (576, "bfloat16", torch.float32)
    words = [HUB_SPECIAL["bos"], HUB_SPECIAL["user"], *":Ġa", "Ġ", "red", *"Ġ12,ĠÃ¨Ċ", HUB_SPECIAL["assistant"], ":"]
    assert policy.tokenizer.convert_ids_to_tokens(policy.prompt_ids("a red 12, è")) == [*words, HUB_SPECIAL["boi"]]
    prefix, rest = policy.question_ids("red?")
    assert prefix.count(policy.image) == 576 and prefix[-1] == policy.eoi
    assert policy.tokenizer.decode(prefix[1:20]).startswith("You are a helpful")
    assert policy.tokenizer.decode(rest) == f"\nred?\n{HUB_SPECIAL['assistant']}:"
    for token in HUB_SPECIAL.values():
        for ids in (policy.prompt_ids, policy.question_ids, policy.caption_ids):
            with pytest.raises(PromptError, match=re.escape(token)):
                ids(f"a {token} cube")


def test_a_directory_in_the_hubs_exact_form_draws_judges_trains_and_is_saved_for_plain_transformers(hub, tmp_path):
    from transformers import JanusForConditionalGeneration, JanusProcessor

    policy = load(hub, device="cpu")
    drawn = policy.sample(["a red cube"], 1, guidance=5.0, temperature=0)[:, 0]
    before = policy.judge(drawn, [["red?"]])
    parameters = policy.trainable_parameters()
    loss = -policy.logps(["a red cube"], drawn).mean()
    loss.backward()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter -= 0.1 * parameter.grad
    policy.save(tmp_path / "saved")
    policy = load(tmp_path / "saved", device="cpu")
    assert -policy.logps(["a red cube"], drawn).mean() < loss
    assert (policy.judge(drawn, [["red?"]])[0] - before[0]).abs() > 1e-6

    for plain, ours in ((hub, drawn), (tmp_path / "saved", policy.sample(["a red cube"], 1, temperature=0)[:, 0])):
        model = JanusForConditionalGeneration.from_pretrained(plain, dtype=torch.float32)
        processor = JanusProcessor.from_pretrained(plain)
        chat = [{"role": "user", "content": [{"type": "text", "text": "a red cube"}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], generation_mode="image", return_tensors="pt")
        assert torch.equal(model.generate(**inputs, generation_mode="image", do_sample=False), ours)
    assert torch.equal(model.lm_head.weight, policy.model.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


# Two tensors or one


def retied(source: Path, path: Path, equal: bool = False, **keys: bool | None) -> Path:
    """A copy of a checkpoint with other words in config.json about tying: top, text (None: no such key); equal tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, path)
    settings = json.loads((path / "config.json").read_text())
    for part, value in ((settings, keys["top"]), (settings["text_config"], keys["text"])):
        part.pop("tie_word_embeddings", None)
        part |= {} if value is None else {"tie_word_embeddings": value}
    (path / "config.json").write_text(json.dumps(settings))
    tensors = load_file(path / "model.safetensors")
    if equal:
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("top", [None, True, False])
@pytest.mark.parametrize("text", [None, True, False])
def test_two_tensors_are_saved_as_two_whatever_the_file_said(tiny, tmp_path, capsys, top, text):
    policy = load(retied(tiny, tmp_path / "read", top=top, text=text), device="cpu")
    assert capsys.readouterr().err == ""
    policy.save(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert settings["tie_word_embeddings"] is settings["text_config"]["tie_word_embeddings"] is False
    again = load(tmp_path / "saved", device="cpu")
    assert torch.equal(again.model.lm_head.weight, load(tiny, device="cpu").model.lm_head.weight)


@pytest.mark.parametrize("top", [None, True, False])
@pytest.mark.parametrize("text", [None, False])
def test_a_head_that_the_conversion_lost_is_told_in_one_line_after_saving_too(tiny, tmp_path, capsys, top, text):
    ruined = load(retied(tiny, tmp_path / "ruined", equal=True, top=top, text=text), device="cpu")
    ruined.save(tmp_path / "saved")
    load(tmp_path / "saved", device="cpu")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    for line, name in zip(told, ("ruined", "saved"), strict=True):
        assert re.fullmatch(rf"warning +\S+{name}: its lm_head is its token embedding, .*", line)


def test_a_language_model_that_says_itself_that_it_is_tied_is_believed(tiny, tmp_path, capsys):
    policy = load(retied(tiny, tmp_path / "tied", equal=True, top=True, text=True), device="cpu")
    policy.save(tmp_path / "saved")
    load(tmp_path / "saved", device="cpu")
    assert capsys.readouterr().err == ""
    settings = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert settings["tie_word_embeddings"] is settings["text_config"]["tie_word_embeddings"] is True


def test_a_checkpoint_without_generation_config_is_saved_with_all_that_generate_needs(tiny, tmp_path):
    from transformers import JanusForConditionalGeneration

    shutil.copytree(tiny, tmp_path / "bare")
    (tmp_path / "bare" / "generation_config.json").unlink()
    bare = load(tmp_path / "bare", device="cpu")
    bare.save(tmp_path / "saved")
    ids = torch.tensor([bare.prompt_ids(PROMPTS[0])])
    theirs = JanusForConditionalGeneration.from_pretrained(tmp_path / "saved").generate(
        ids, attention_mask=torch.ones_like(ids), generation_mode="image", do_sample=False, guidance_scale=3.0
    )
    assert torch.equal(bare.sample(PROMPTS[:1], 1, guidance=3.0, temperature=0)[0], theirs)


def test_weights_hash_tells_weights_apart_and_ignores_where_they_lie(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "copy")
    assert weights_hash(tiny) == weights_hash(tmp_path / "copy")
    assert weights_hash(tiny) != weights_hash(save_janus(tmp_path / "other", seed=1))


def test_trainable_parameters_are_the_decoder_layers_and_final_norm(tiny):
    fresh = load(tiny, device="cpu")
    trained = fresh.trainable_parameters()
    assert {name.split(".")[2] for name in trained} == {"layers", "norm"}
    frozen = {name for name, p in fresh.model.named_parameters() if not p.requires_grad}
    assert frozen | trained.keys() == {name for name, _ in fresh.model.named_parameters()}
    wider = fresh.trainable_parameters("drawing")
    assert {name.split(".")[1] for name in wider.keys() - trained.keys()} == {
        "generation_embeddings",
        "generation_aligner",
        "generation_head",
    }


def damaged(tiny, path, **config):
    shutil.copytree(tiny, path)
    settings = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(settings))
    return path


def test_what_is_not_a_janus_is_named_with_what_is_supported(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").write_text("")
    no_weights = damaged(tiny, tmp_path / "no_weights")
    (no_weights / "model.safetensors").unlink()
    cases = {
        "no such directory": tmp_path / "nowhere",
        "is a file": tmp_path / "a_file",
        "no config.json": tmp_path / "empty",
        "vision_config is of class None, but a Janus that draws codes has 'CLIPVisionTower'": damaged(
            tiny, tmp_path / "remote", model_type="multi_modality"
        ),
        "'llama'.*supported is": damaged(tiny, tmp_path / "text", model_type="llama"),
        "no safetensors weights": no_weights,
    }
    for message, path in cases.items():
        with pytest.raises(CheckpointError, match=message):
            load(path)


def test_missing_nan_and_truncated_weights_are_refused(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny / "model.safetensors")
    name = "model.language_model.norm.weight"
    missing = damaged(tiny, tmp_path / "missing")
    save_file({k: v for k, v in weights.items() if k != name}, missing / "model.safetensors", {"format": "pt"})
    poisoned = damaged(tiny, tmp_path / "nan")
    save_file(weights | {name: weights[name] * float("nan")}, poisoned / "model.safetensors", {"format": "pt"})
    torn = damaged(tiny, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:5000])
    for path, message in ((missing, "missing"), (poisoned, "NaN"), (torn, "cannot be loaded")):
        with pytest.raises(CheckpointError, match=message):
            load(path, device="cpu")


def test_a_name_that_is_neither_here_nor_on_the_hub_is_one_error(monkeypatch):
    import huggingface_hub

    class NoNetwork(Exception):
        pass

    def fail(*args, **kwargs):
        raise NoNetwork

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="nobody/nothing: neither a directory here nor to be had from the hub: NoNetwork"):
        load("nobody/nothing")


def test_the_stored_type_is_read_from_the_weights_whatever_the_config_calls_it(tiny, tmp_path):
    half = load(tiny, device="cpu")
    half.save(tmp_path / "half", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")  # as older checkpoints have it
    (tmp_path / "half" / "config.json").write_text(json.dumps(config))
    assert load(tmp_path / "half", device="cpu").stored_dtype == "bfloat16"


def test_codebook_and_token_count_come_from_the_checkpoint(policy):
    assert (policy.codebook_size, policy.image_tokens) == (CODEBOOK, 4)


def test_a_checkpoint_may_name_an_attention_of_torch_but_no_kernel_of_the_hub():
    from families.pretrained import foreign_keys

    assert foreign_keys({"text_config": {"_attn_implementation": "sdpa", "attn_implementation": None}}) == set()
    assert foreign_keys({"text_config": {"attn_implementation": "nobody/kernels"}}) == {"attn_implementation"}
    assert foreign_keys({"list": [{"auto_map": {}}], "quantization_config": None}) == {"auto_map", "quantization_config"}

"""showo.py against the original classes' golden values, plain forward passes, and whole enumerations of a tiny model."""

import itertools
import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from check_showo import main as check_golden
from safetensors.torch import load_file, save_file
from showo_golden import build, golden_checkpoint, load, random_checkpoint, write_tokenizer
from transformers.activations import ACT2FN

from families import magvit, pretrained, showo, showo_drawing, showo_files
from families.family import PromptError, pad_left
from families.judging import DESCRIBE
from families.pretrained import CheckpointError, weights_hash

HERE = Path(__file__).parent
PROMPTS = ["a red cube", "a green sphere cube cone", "red"]
QUESTIONS = ["Does this image describe a red cube?", "Does this image describe a sphere?"]


@pytest.fixture(scope="module")
def golden_path(tmp_path_factory):
    """The golden weights as a checkpoint directory: 16 codes of 6 bits a picture. Nothing may write to it."""
    stored = load_file(HERE / "golden.safetensors")  # floats as bfloat16, exactly
    tensors = {key: value.float() if value.is_floating_point() else value for key, value in stored.items()}
    lm, vq = ({key[len(p) :]: value for key, value in tensors.items() if key.startswith(p)} for p in ("showo/", "vq/"))
    cfg = json.loads((HERE / "golden.json").read_text())
    return golden_checkpoint(tmp_path_factory.mktemp("golden") / "golden", cfg, lm, vq)


@pytest.fixture(scope="module")
def policy(golden_path):
    """The golden model. Tests may not change its weights."""
    return load(golden_path)


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """A random model of 4 codes of 2 bits a picture: 256 pictures, all of which can be gone through."""
    return load(random_checkpoint(tmp_path_factory.mktemp("micro") / "micro"))


def drawn(policy, n: int = 2) -> torch.Tensor:
    """Some sampled pictures' tokens, (P n, T)."""
    return policy.sample(PROMPTS, n, guidance=2.0, seeds=[5, 6, 7]).flatten(0, 1)


def plain_logits(policy, prompt_row: list[int], tokens: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) of codes (B, T) by one forward of transformers' class: no cache, padded and counted as Show-o does."""
    text = torch.tensor([[policy.pad] * (showo.MAX_TEXT + 1 - len(prompt_row)) + prompt_row])
    n_text, n_image = text.shape[1], tokens.shape[1] + 2
    image = torch.tensor([[policy.soi, *row, policy.eoi] for row in (tokens + policy.pad + 10).tolist()])
    allowed = torch.zeros(n_text + n_image, n_text + n_image)
    start = n_text - len(prompt_row)
    for i in range(n_text + n_image):
        first, last = (start, n_text + n_image) if i >= n_text else (start, i + 1) if i >= start else (0, i + 1)
        allowed[i, first:last] = 1
    ids = torch.cat([text.expand(len(image), -1), image], dim=1)
    logits = policy.model["showo"](ids, attention_mask=allowed.bool().expand(len(ids), 1, -1, -1)).logits
    return logits[:, n_text + 1 : -1, policy.pad + 10 : policy.pad + 10 + policy.codebook_size]


# Against the original


def test_every_golden_value_of_the_original_classes_is_met(capsys):
    assert check_golden(build) == 0, capsys.readouterr().out
    assert "39 ok, 0 failed, 0 skipped" in capsys.readouterr().out


def test_the_real_geometry_has_the_published_number_of_parameters_and_keys():
    with torch.device("meta"):
        phi, vq = showo_files.PhiForCausalLM(showo_files.phi_config({}, 58498)), magvit.MagViT()
    assert sum(p.numel() for p in phi.parameters()) == 1_448_176_770 and len(phi.state_dict()) == 437
    assert sum(p.numel() for p in vq.parameters()) == 95_387_004 and len(vq.state_dict()) == 382
    shapes = {key: list(value.shape) for key, value in vq.state_dict().items()}
    assert magvit.levels_of(shapes, "encoder.down") == ((128, 4), (256, 3), (256, 4), (512, 3), (512, 4))
    assert magvit.levels_of(shapes, "decoder.up") == ((128, 4), (128, 4), (256, 3), (256, 4), (512, 3))
    for size in (256, 512):
        codes = vq.encode(torch.empty(1, 3, size, size, device="meta"))
        assert codes.shape == (1, (size // 16) ** 2) and vq.decode(codes).shape == (1, 3, size, size)
    assert {layer.eps for layer in vq.modules() if isinstance(layer, torch.nn.GroupNorm)} == {1e-6}
    assert {layer.eps for layer in phi.modules() if isinstance(layer, torch.nn.LayerNorm)} == {1e-5}
    assert phi.config.rope_parameters["rope_theta"] == 10000 and phi.model.layers[0].self_attn.rotary_ndims == 32


def test_phis_config_decides_its_shape_and_never_the_query_norms():
    config = showo_files.phi_config(
        {"rope_theta": 5000.0, "partial_rotary_factor": 0.25, "qk_layernorm": False, "vocab_size": 9}, 70
    )
    assert (config.qk_layernorm, config.vocab_size, config.tie_word_embeddings) == (True, 70, False)
    assert (config.rope_parameters["rope_theta"], config.rope_parameters["partial_rotary_factor"]) == (5000.0, 0.25)


def test_special_tokens_take_the_documented_ids_after_a_text_vocabulary_of_the_real_size(tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json", 50295, 50256)
    tokenizer = showo_files.read_tokenizer(tmp_path, 50295)
    assert len(tokenizer) == 50305
    names = ["<|endoftext|>", "[PAD]", "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>"]
    names += ["<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [50256, *range(50295, 50305)]


# The mathematics, by hand


def test_the_cosine_schedule_rounds_as_float32_does():
    assert showo_drawing.mask_counts(256, 4) == [236, 181, 97, -1]  # 256 cos(pi/8), cos(pi/4), cos(3 pi/8), and just below 0
    assert showo_drawing.mask_counts(256, 12)[7] == 127  # 256 cos(pi/3): 128 in float64
    assert showo_drawing.mask_counts(1024, 18)[11] == 511


def test_the_temperature_falls_as_a_product_to_0():
    assert showo_drawing.temperatures(2.0, 4) == pytest.approx([1.5, 0.75, 0.1875, 0.0])
    of_50 = showo_drawing.temperatures(1.0, 50)
    assert of_50[11] == pytest.approx(0.181, abs=0.03) and of_50[24] == pytest.approx(0.0003, abs=1e-4)


def test_gumbel_noise_is_finite_and_has_its_distribution():
    assert torch.isfinite(showo_drawing.gumbel(torch.tensor([0.0, 1.0, 0.5]))).all()
    values = showo_drawing.gumbel(torch.from_numpy(np.random.default_rng(0).random(40_000)))
    for x in (-1.0, 0.0, 1.0):
        assert (values < x).double().mean().item() == pytest.approx(math.exp(-math.exp(-x)), abs=0.01)


def test_mask_predict_keeps_the_confident_and_leaves_what_was_known():
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]])
    seen = []

    def predict(tokens):
        seen.append(tokens[0].tolist())
        return probabilities.log()[None]

    start = torch.tensor([[2, 2, 2, 0]])  # 2 is the mask
    codes = showo_drawing.mask_predict(
        predict, start, 4, 0.0, lambda logits, step: logits.argmax(-1), lambda step: torch.full((1, 4), 1e3)
    )
    assert codes.tolist() == [[0, 0, 1, 0]]
    assert seen == [[2, 2, 2, 0], [0, 2, 2, 0], [0, 2, 1, 0], [0, 2, 1, 0]]  # one a step; the last is masked to the end


def test_text_is_causal_and_blind_to_the_picture_which_sees_all_but_padding():
    mask = showo_drawing.drawing_mask(torch.tensor([[False, True, True]]), 2)[0].int().tolist()
    assert mask == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 1, 1, 1, 1]]


def test_questions_see_the_prefix_and_themselves():
    mask = showo_drawing.looking_mask(2, 2, 2, torch.device("cpu")).int().tolist()
    assert mask[:2] == [[1, 1, 0, 0, 0, 0]] * 2
    assert mask[2:] == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 1, 1]]


# Text


def test_prompts_become_task_start_text_end(policy):
    names = policy.tokenizer.convert_ids_to_tokens(policy.prompt_ids("a red cube"))
    assert names == ["<|t2i|>", "<|endoftext|>", "a", "Ġred", "Ġcube", "<|endoftext|>"]


def test_questions_have_the_form_of_inference_with_start_and_line_break(policy):
    prefix, rest = policy.question_ids(QUESTIONS[0])
    assert prefix == [policy.mmu, policy.soi, *[policy.mask] * 16, policy.eoi]
    words = "<|endoftext|> USER : Ġ Ċ Does Ġthis Ġimage Ġdescribe Ġa Ġred Ġcube ? ĠASSISTANT :".split()
    assert policy.tokenizer.convert_ids_to_tokens(rest) == words


@pytest.mark.parametrize("token", [*showo_files.SPECIAL, showo_files.TEXT_END, "USER:", "ASSISTANT:"])
@pytest.mark.parametrize("kind", ["prompt", "question", "caption"])
def test_texts_that_spell_a_special_token_or_a_role_are_refused_wherever_it_stands(policy, kind, token):
    ids = {"prompt": policy.prompt_ids, "question": policy.question_ids, "caption": policy.caption_ids}[kind]
    for text in (f"a {token} cube", f"{token} a cube", f"a cube {token}", f"a{token}cube", token):
        with pytest.raises(PromptError, match=re.escape(f"{kind} {text!r} spells a special token of the model: {token}")):
            ids(text)
    assert ids("a user of the cube, an ASSISTANT, <|t2 and [pad]")


def test_texts_that_become_a_special_token_in_the_tokenizer_are_refused(golden_path, tmp_path):
    shutil.copytree(golden_path, tmp_path / "careless")
    file = tmp_path / "careless" / "phi-1_5" / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["normalizer"] = {"type": "Replace", "pattern": {"String": "~"}, "content": "<|"}
    settings["added_tokens"] = [token | {"normalized": True} for token in settings["added_tokens"]]
    file.write_text(json.dumps(settings))
    policy = load(tmp_path / "careless")
    for ids in (policy.prompt_ids, policy.question_ids, policy.caption_ids):
        assert ids("a red ~cube")
        for text in ("a ~t2i|> cube", "~endoftext|>"):
            with pytest.raises(PromptError, match=r"special token of the model: <\S+>, once it is tokenized"):
                ids(text)


def test_prompts_with_too_many_tokens_are_refused(policy):
    assert len(policy.prompt_ids("a" + " red" * 125)) == showo.MAX_TEXT + 1
    with pytest.raises(PromptError, match="127 tokens; the model reads at most 126"):
        policy.prompt_ids("a" + " red" * 126)
    with pytest.raises(PromptError, match="256 positions"):
        policy.question_ids("a" + " red" * 240)


def test_every_spelling_of_yes_is_found_and_nothing_else(policy):
    assert sorted(policy.tokenizer.convert_ids_to_tokens(policy._yes.tolist())) == ["Yes", "ĠYes", "Ġyes"]
    assert sorted(policy.tokenizer.convert_ids_to_tokens(policy._no.tolist())) == ["No", "ĠNo", "Ġno"]


# Drawing


def test_greedy_guided_sample_equals_uncached_forward_passes_picture_by_picture(policy):
    ours = policy.sample(PROMPTS, 1, guidance=3.0, temperature=0)[:, 0]
    counts = [math.floor(16 * torch.cos(torch.tensor(s / 16) * (torch.pi / 2))) for s in range(1, 17)]
    for prompt, found in zip(PROMPTS, ours, strict=True):
        tokens = torch.full((16,), policy.codebook_size)
        for count in counts:
            rows = policy.prompt_ids(prompt), policy.prompt_ids("")
            conditional, empty = (plain_logits(policy, row, tokens[None])[0] for row in rows)
            confidence, codes = (3 * conditional - 2 * empty).log_softmax(-1).max(-1)  # Show-o's g = 2
            unknown = tokens == policy.codebook_size
            codes = torch.where(unknown, codes, tokens)
            n_masked = max(1, min(count, int(unknown.sum()) - 1))
            tokens = codes.clone()
            tokens[confidence.where(unknown, math.inf).argsort()[:n_masked]] = policy.codebook_size
        assert found.tolist() == codes.tolist()
    assert len({tuple(row.tolist()) for row in ours}) > 1


def test_pictures_do_not_depend_on_neighbours_batch_or_number_of_candidates(policy):
    together = policy.sample(PROMPTS, 3, guidance=2.0, seeds=[5, 6, 7])
    alone = policy.sample(PROMPTS[1:2], 2, guidance=2.0, seeds=[6], batch=1)
    assert torch.equal(together[1, :2], alone[0])
    assert not torch.equal(together[1, 0], together[1, 1])


def test_guidance_1_is_the_conditional_model_alone(policy, monkeypatch):
    plain = policy.sample(PROMPTS, 1, guidance=1.0)
    assert torch.equal(policy.sample(PROMPTS, 1, guidance=1.0 + 1e-7), plain)
    monkeypatch.setattr(showo, "guide", None)
    assert torch.equal(policy.sample(PROMPTS, 1, guidance=1.0), plain)


def test_codes_drawn_in_pieces_are_those_drawn_at_once(policy, monkeypatch):
    whole = policy.sample(PROMPTS, 2)
    monkeypatch.setattr(showo, "DRAWS_AT_ONCE", 7)
    assert torch.equal(policy.sample(PROMPTS, 2), whole)


def test_a_bit_is_1_where_the_number_is_positive_the_first_bit_counting_most():
    assert magvit.codes_of(torch.tensor([[2.0, -1.0, 0.1], [0.0, -0.0, 3.0]])).tolist() == [5, 1]
    assert magvit.bits_of(torch.tensor([5, 1]), 3).tolist() == [[1, -1, 1], [-1, -1, 1]]


def test_decode_cuts_off_the_clamped_pixels(policy):
    tokens = drawn(policy)
    pixels = policy.model["magvitv2"].decode(tokens).permute(0, 2, 3, 1)
    expected = np.floor(((pixels.detach().double() + 1) / 2).clamp(0, 1).numpy() * 255)
    found = policy.decode(tokens, batch=4)
    assert found.dtype == torch.uint8 and found.shape == (6, 16, 16, 3)
    assert np.abs(found.numpy() - expected).max() <= 1 and (found.numpy() == expected).mean() > 0.999
    assert len(found.unique()) > 20


def test_pictures_of_another_size_are_scaled_and_cut_as_by_pillow(policy):
    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    scaled = np.asarray(Image.fromarray(picture).resize((24, 16), Image.BICUBIC))[:, 4:20].astype(float)
    seen = []
    hook = policy.model["magvitv2"].encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    policy.encode(torch.from_numpy(picture)[None])
    hook.remove()
    pixels = ((seen[0][0].permute(1, 2, 0) + 1) * 127.5).numpy()
    assert np.abs(pixels - scaled).max() < 1.5 and np.abs(pixels - scaled).mean() < 0.5  # Pillow rounds twice
    assert np.abs(pixels - pixels.round()).max() < 1e-4  # whole numbers, as of a picture file


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("more", range(12))
def test_the_middle_that_is_cut_out_is_torchvisions(policy, more, wide):
    """int(round((length - side) / 2.0)) of torchvision's center_crop: 3, 7 and 11 pixels more leave two, four and six out."""
    stripes = torch.arange(16 + more, dtype=torch.uint8)[:, None, None].expand(-1, 16, 3)
    seen = []
    hook = policy.model["magvitv2"].encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    policy.encode((stripes.transpose(0, 1) if wide else stripes)[None])
    hook.remove()
    left_out = [0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6][more]
    assert round(((seen[0][0, 0, 0, 0] + 1) * 127.5).item()) == left_out


def test_encode_reads_pixels_from_minus_1_to_1(policy):
    picture = torch.randint(0, 256, (1, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = (picture.double() / 255 - 0.5) / 0.5
    values = policy.model["magvitv2"].encoder(pixels.permute(0, 3, 1, 2).float())[0]  # (6, 4, 4)
    codes = sum((values[bit] > 0).long() * 2 ** (5 - bit) for bit in range(6))
    assert policy.encode(picture)[0].tolist() == codes.flatten().tolist()


def test_encode_never_rounds_to_tf32(policy, monkeypatch):
    seen = []
    vq = policy.model["magvitv2"]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    hook = vq.encoder.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    vq.encode(torch.zeros(1, 3, 16, 16))
    hook.remove()
    assert seen == [False] and torch.backends.cudnn.allow_tf32


# Looking


def test_judge_equals_one_full_forward_per_question_over_the_tokens_themselves(policy):
    tokens = drawn(policy)
    p_yes, coverage = policy.judge(tokens, [QUESTIONS] * len(tokens), batch=4)
    vocabulary = policy.tokenizer.get_vocab()
    yes, no = ([vocabulary[w] for w in words.split()] for words in ("Yes ĠYes Ġyes", "No ĠNo Ġno"))
    for b, q in itertools.product(range(len(tokens)), range(2)):
        image = [policy.mmu, policy.soi, *(tokens[b] + policy.pad + 10).tolist(), policy.eoi]
        ids = torch.tensor([image + policy.question_ids(QUESTIONS[q])[1]])
        allowed = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
        allowed[:, : len(image)] = True
        probabilities = policy.model["showo"](ids, attention_mask=allowed[None, None]).logits[0, -1].softmax(-1)
        p, n = probabilities[yes].sum(), probabilities[no].sum()
        assert p_yes[b, q].item() == pytest.approx((p / (p + n)).item(), abs=1e-5)
        assert coverage[b, q].item() == pytest.approx((p + n).item(), abs=1e-6)
    assert p_yes.std() > 1e-3


def test_log_p_of_a_caption_equals_one_full_forward_over_its_answer_to_describe(policy):
    tokens, said = drawn(policy), ["a red cube", "green", "a sphere cone"]
    logps = policy.judge_with_captions(tokens, [QUESTIONS] * len(tokens), [said] * len(tokens), batch=4)[2]
    vocabulary = policy.tokenizer.get_vocab()
    spelled = {"a red cube": "Ġa Ġred Ġcube", "green": "Ġgreen", "a sphere cone": "Ġa Ġsphere <unk>"}
    for b, k in itertools.product(range(len(tokens)), range(3)):
        image = [policy.mmu, policy.soi, *(tokens[b] + policy.pad + 10).tolist(), policy.eoi]
        answer = [vocabulary[word] for word in spelled[said[k]].split()]
        asked = image + policy.question_ids(DESCRIBE)[1]
        ids = torch.tensor([asked + answer])
        allowed = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
        allowed[:, : len(image)] = True
        scores = policy.model["showo"](ids, attention_mask=allowed[None, None]).logits[0].log_softmax(-1)
        expected = sum(scores[len(asked) - 1 + i, token] for i, token in enumerate(answer))
        assert logps[b, k].item() == pytest.approx(expected.item(), abs=1e-4)


def test_a_caption_that_spells_a_special_token_nothing_or_too_much_is_refused(policy):
    for caption in ("a <|soi|> cube", "", "  ", "cube <|endoftext|>"):
        with pytest.raises(PromptError, match="caption"):
            policy.caption_ids(caption)
    with pytest.raises(PromptError, match="caption.*256 positions"):
        policy.caption_ids("a" + " red" * 240)


def test_on_a_gpu_the_gelu_is_one_kernel_of_the_same_function_and_the_golden_values_hold(golden_path, policy, monkeypatch):
    """On a CPU it is the original's own, to the last bit."""
    assert showo_files.phi_config({}, 100).hidden_act == showo_files.phi_config({}, 100, "cpu").hidden_act == "gelu_new"
    assert showo_files.phi_config({}, 100, "cuda").hidden_act == "gelu_pytorch_tanh"
    assert showo_files.phi_config({"hidden_act": "gelu"}, 100, "cuda").hidden_act == "gelu"
    x = torch.linspace(-12, 12, 100_001)
    assert (ACT2FN["gelu_pytorch_tanh"](x) - ACT2FN["gelu_new"](x)).abs().max() < 1e-6
    make = showo_files.phi_config
    monkeypatch.setattr(showo_files, "phi_config", lambda shape, n, device="cuda": make(shape, n, "cuda"))
    fused = load(golden_path)
    assert {type(layer.mlp.activation_fn) for layer in fused.language_model.layers} == {type(ACT2FN["gelu_pytorch_tanh"])}
    assert check_golden(build) == 0
    tokens = torch.zeros(2, policy.image_tokens, dtype=torch.int64)
    assert torch.allclose(fused.logps(PROMPTS[:2], tokens), policy.logps(PROMPTS[:2], tokens), atol=1e-4)


def test_activation_bytes_are_what_the_backward_pass_keeps_of_all_draws(tmp_path, monkeypatch):
    """As a GPU runs it: GELU in one kernel, and layer norms in float32, which a CPU's autocast leaves as they are."""
    make = showo_files.phi_config
    monkeypatch.setattr(showo_files, "phi_config", lambda shape, n, device="cuda": make(shape, n, "cuda"))
    wide = load(random_checkpoint(tmp_path / "wide", side=12, width=128, mlp=352, layers=4))
    wide.mask_draws = 3
    wide.trainable_parameters()
    weights = {parameter.untyped_storage().data_ptr() for parameter in wide.model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            kept[place] = tensor  # held, so that no address is given twice
        return tensor

    layer_norm, in_float32 = torch.nn.functional.layer_norm, lambda x, *rest: layer_norm(x.float(), *rest)
    monkeypatch.setattr(torch.nn.functional, "layer_norm", in_float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        wide.logps(PROMPTS[:2], torch.zeros(2, 144, dtype=torch.int64))
    matrices = [parameter for parameter in wide.language_model.layers.parameters() if parameter.dim() == 2]
    copies = 2 * sum(parameter.numel() for parameter in matrices)  # in bfloat16
    counted = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) - copies
    length = max(len(wide.prompt_ids(prompt)) for prompt in PROMPTS[:2]) + 146
    assert counted == pytest.approx(2 * wide.activation_bytes * length / (64 + 144), rel=0.15)


def test_pixels_are_judged_by_the_codes_that_the_encoder_reads_in_them(policy):
    pictures = policy.decode(drawn(policy, 1))
    codes = policy.encode(pictures)
    asked = [QUESTIONS] * 3
    assert torch.equal(policy.judge(pictures, asked)[0], policy.judge(codes, asked)[0])
    assert not torch.equal(codes, drawn(policy, 1))  # what was drawn is not what is read


def test_a_question_does_not_see_the_question_beside_it(policy):
    tokens = drawn(policy, 1)
    both = policy.judge(tokens, [QUESTIONS] * 3)[0]
    alone = [policy.judge(tokens, [[question]] * 3)[0][:, 0] for question in QUESTIONS]
    assert torch.allclose(both, torch.stack(alone, dim=1), atol=1e-6)


# Log-probs: the bound by enumeration


@pytest.fixture(scope="module")
def world(micro):
    """Everything about one prompt of the micro model, in float64: p(code | what is known) for each of 5^4 states of a picture,
    from plain forwards; for each of the 256 pictures the exact bound, and p over all 24 orders."""
    double = load(micro.directory)
    double.model.double()
    states = list(itertools.product(range(5), repeat=4))  # 4 is the mask
    with torch.no_grad():
        logits = plain_logits(double, double.prompt_ids(PROMPTS[0]), torch.tensor(states))
    table = dict(zip(states, logits.log_softmax(-1).numpy(), strict=True))
    pictures = list(itertools.product(range(4), repeat=4))

    def hidden(picture, masked):
        return tuple(4 if i in masked else code for i, code in enumerate(picture))

    bounds, by_order = [], []
    for picture in pictures:
        bound = 0.0
        for k in range(1, 5):
            for masked in itertools.combinations(range(4), k):
                logps = table[hidden(picture, masked)]
                bound += sum(logps[i, picture[i]] for i in masked) / (k * math.comb(4, k))  # E_k is 1/T, E_M 1/C(T, k)
        bounds.append(bound)
        orders = itertools.permutations(range(4))
        by_order.append(
            [sum(table[hidden(picture, order[n:])][i, picture[i]] for n, i in enumerate(order)) for order in orders]
        )
    return SimpleNamespace(table=table, pictures=torch.tensor(pictures), bounds=np.array(bounds), by_order=np.array(by_order))


def test_the_bound_is_the_mean_over_orders_and_below_a_proper_likelihood(world):
    exact = np.log(np.exp(world.by_order).mean(axis=1))  # p(x), orders drawn evenly
    assert np.exp(exact).sum() == pytest.approx(1, abs=1e-9)
    assert np.allclose(world.bounds, world.by_order.mean(axis=1), atol=1e-9)
    assert (world.bounds <= exact).all() and (exact - world.bounds).max() > 1e-2


def test_the_estimate_converges_to_the_exact_bound_for_any_number_of_draws(micro, world, monkeypatch):
    n = 600
    for picture, draws in ((17, 1), (17, 3), (200, 8)):
        monkeypatch.setattr(micro, "mask_draws", draws)
        with torch.no_grad():
            terms = micro.logps([PROMPTS[0]] * n, world.pictures[picture : picture + 1].repeat(n, 1), seeds=list(range(n)))
        estimates = terms.sum(dim=-1).double()
        error = estimates.std() / n**0.5
        assert abs(estimates.mean() - world.bounds[picture]) < 4 * error, (draws, estimates.mean(), world.bounds[picture])
        assert error < 0.02 * abs(world.bounds[picture])


def test_as_many_draws_as_tokens_mask_every_number_once(world):
    assert (np.sort(showo_drawing.mask_draws([3, 4], 4, 4).sum(-1), axis=-1) == [[1, 2, 3, 4]] * 2).all()
    counts = showo_drawing.mask_draws(list(range(4000)), 2, 16).sum(-1)  # (4000, 2)
    assert (counts[:, 0] <= 8).all() and (counts[:, 1] > 8).all()
    assert np.abs(np.bincount(counts.flatten(), minlength=17)[1:] / 8000 - 1 / 16).max() < 0.01
    positions = showo_drawing.mask_draws(list(range(4000)), 1, 4)[:, 0].mean(axis=0)
    assert np.abs(positions - 0.625).max() < 0.035  # (1 + 2 + 3 + 4) / 16


def test_variance_falls_faster_than_1_over_the_draws_and_as_the_docstring_says(world):
    logps = torch.from_numpy(np.random.default_rng(0).normal(-6, 2, 256)).float()
    predicted = logps.var() * 256 * (math.log(256) - 0.4)
    estimates = showo_drawing.bound_terms(
        logps.expand(3000, 8, 256), torch.from_numpy(showo_drawing.mask_draws(list(range(3000)), 8, 256))
    )
    assert estimates.sum(-1).var().item() == pytest.approx(predicted.item() / 8, rel=0.15)
    picture = world.pictures[17]

    def variance(draws):  # the micro model, by its table
        masks = showo_drawing.mask_draws(list(range(3000)), draws, 4)
        states = np.where(masks, 4, picture.numpy())  # (3000, K, 4)
        logps = {state: world.table[state][np.arange(4), picture] for state in set(map(tuple, states.reshape(-1, 4).tolist()))}
        rows = torch.tensor(np.array([logps[tuple(state)] for state in states.reshape(-1, 4).tolist()]))
        return showo_drawing.bound_terms(rows.view(masks.shape), torch.from_numpy(masks)).sum(-1).var().item()

    assert variance(4) < 0.95 * variance(1) / 4  # measured with 1, 2, 4, 8 draws: 4.80, 2.02, 0.96, 0.49


def test_policy_and_reference_with_the_same_seeds_share_their_noise(policy, golden_path):
    moved = load(golden_path)
    generator = torch.Generator().manual_seed(0)
    for parameter in moved.trainable_parameters().values():
        parameter.data += 0.01 * parameter.std().nan_to_num() * torch.randn(parameter.shape, generator=generator)
    n = 48
    tokens = drawn(policy, 1)[:1].repeat(n, 1)
    with torch.no_grad():
        one, same, other = (
            model.logps(PROMPTS[:1] * n, tokens, seeds=seeds).sum(-1)
            for model, seeds in ((policy, range(n)), (moved, range(n)), (moved, range(n, 2 * n)))
        )
    assert (one - same).abs().max() > 1e-4
    assert (one - same).var() < 0.01 * (one - other).var()


def test_terms_depend_on_the_rows_own_seed_prompt_and_tokens_alone(policy):
    tokens = drawn(policy, 1)
    together = policy.logps(PROMPTS, tokens, seeds=[1, 2, 3])
    for i, prompt in enumerate(PROMPTS):
        assert torch.allclose(policy.logps([prompt], tokens[i : i + 1], seeds=[i + 1])[0], together[i], atol=1e-4)
    assert not torch.allclose(policy.logps(PROMPTS, tokens, seeds=[1, 2, 4])[2], together[2], atol=1e-2)


def test_without_seeds_all_rows_share_one_fixed_draw(policy):
    tokens = drawn(policy, 1)[:1].repeat(3, 1)
    terms = policy.logps(["red"] * 3, tokens)
    assert torch.allclose(terms, terms[:1].expand(3, -1), atol=1e-5)
    assert torch.equal(policy.logps(["red"] * 3, tokens), terms)
    assert ((terms == 0) == (terms[:1] == 0)).all()


def test_unconditional_rows_see_the_empty_prompt(policy):
    tokens = drawn(policy, 1)
    dropped = policy.logps(PROMPTS, tokens, unconditional=torch.tensor([True, False, True]))
    empty, kept = policy.logps([""] * 3, tokens), policy.logps(PROMPTS, tokens)
    assert torch.allclose(dropped[[0, 2]], empty[[0, 2]], atol=1e-4)
    assert torch.allclose(dropped[1], kept[1], atol=1e-4)
    assert not torch.allclose(kept[0], empty[0], atol=1e-2)


def test_log_probs_are_float32_and_normal_over_the_codes_in_bfloat16_too(golden_path):
    half = showo.load_showo(golden_path, "golden", torch.device("cpu"), torch.bfloat16)
    assert half.language_model.embed_tokens.weight.dtype == torch.bfloat16
    assert half.model["magvitv2"].decoder.conv_in.weight.dtype == torch.float32
    tokens = torch.arange(64)[:, None].repeat(1, 16)  # every code at every place
    ids, real = pad_left([half.prompt_ids("red")] * 64, half.pad, half.device)
    with torch.no_grad():
        logps = half.branch(ids, real, tokens, torch.ones(64, 1, 16, dtype=torch.bool))  # all masked: the same input
    assert logps.dtype == torch.float32
    assert torch.allclose(logps.exp().sum(0), torch.ones(16), atol=1e-5)
    assert half._predictor(half._prefill(ids, real), real, 2.0)(tokens[:32]).dtype == torch.float32


def test_gradients_reach_the_trained_weights_and_recomputation_changes_none(golden_path):
    gradients = []
    for checkpointing in (False, True):
        fresh = load(golden_path)
        trained = fresh.trainable_parameters()
        fresh.language_model.train()
        if checkpointing:
            inner = fresh.language_model  # the method's name changed in transformers 5
            enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        fresh.logps(PROMPTS, drawn(fresh, 1), seeds=[1, 2, 3]).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in trained.items()})
        assert all(p.grad is None for name, p in fresh.model.named_parameters() if name not in trained)
    assert all(value.abs().max() > 0 for name, value in gradients[0].items() if not name.endswith("k_proj.bias"))
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-4) for name in gradients[0])


def test_sampling_one_code_a_step_in_random_order_has_the_exact_distribution(micro, world, monkeypatch):
    monkeypatch.setattr(micro, "steps", 4)
    n = 6000
    tokens = micro.sample(PROMPTS[:1], n, guidance=1.0, temperature=1e6, batch=n)[0]  # all Gumbel: the order is even
    found = torch.bincount((tokens * torch.tensor([64, 16, 4, 1])).sum(-1), minlength=256) / n
    expected = np.exp(world.by_order).mean(axis=1)
    by_chance = 0.5 * np.sqrt(2 * expected * (1 - expected) / (np.pi * n)).sum()  # mean total variation of n true draws
    assert 0.5 * np.abs(found.numpy() - expected).sum() < 1.25 * by_chance


# Files


def test_trainable_parameters_are_the_decoder_layers_and_final_norm_or_also_the_two_tables(golden_path):
    fresh = load(golden_path)
    trained = fresh.trainable_parameters()
    assert {name.split(".")[2] for name in trained} == {"layers", "final_layernorm"}
    assert {name for name, p in fresh.model.named_parameters() if p.requires_grad} == trained.keys()
    wider = fresh.trainable_parameters("drawing")
    added = {"showo.model.embed_tokens.weight", "showo.lm_head.weight", "showo.lm_head.bias"}
    assert wider.keys() - trained.keys() == added


def test_a_trained_model_saved_loads_back_with_the_originals_names_and_files(golden_path, tmp_path):
    fresh = load(golden_path)
    trained = fresh.trainable_parameters()
    (-fresh.logps(PROMPTS, drawn(fresh, 1)).mean()).backward()
    for parameter in trained.values():
        parameter.data -= 1e-3 * parameter.grad
    before = fresh.identity()
    expected = fresh.sample(PROMPTS, 2), fresh.logps(PROMPTS, drawn(fresh, 1))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "old").write_text("replaced")
    fresh.save(tmp_path / "saved")
    names = sorted(str(file.relative_to(tmp_path / "saved")) for file in (tmp_path / "saved").rglob("*") if file.is_file())
    assert names == [
        "config.json",
        "magvitv2/pytorch_model.safetensors",
        "phi-1_5/config.json",
        "phi-1_5/tokenizer.json",
        "pytorch_model.safetensors",
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]
    for file in (showo_files.WEIGHTS, f"magvitv2/{showo_files.WEIGHTS}"):
        old, new = load_file(golden_path / file), load_file(tmp_path / "saved" / file)
        assert {k: (v.shape, v.dtype) for k, v in old.items()} == {k: (v.shape, v.dtype) for k, v in new.items()}
    assert (tmp_path / "saved" / "phi-1_5" / "config.json").read_bytes() == (
        golden_path / "phi-1_5" / "config.json"
    ).read_bytes()
    again = load(tmp_path / "saved")
    assert torch.equal(again.sample(PROMPTS, 2), expected[0])
    assert torch.equal(again.logps(PROMPTS, drawn(again, 1)), expected[1])
    assert again.identity() == fresh.identity() != before
    assert again.identity()["model_hash"] == weights_hash(tmp_path / "saved")
    assert (again.identity()["codebook_size"], again.identity()["image_tokens"]) == ("64", "16")
    again.save(tmp_path / "half", dtype=torch.bfloat16)
    half = load(tmp_path / "half")
    assert half.stored_dtype == "bfloat16"
    assert load_file(tmp_path / "half" / "magvitv2" / showo_files.WEIGHTS)["decoder.conv_in.weight"].dtype == torch.float32
    assert torch.equal(half.decode(expected[0].flatten(0, 1)), fresh.decode(expected[0].flatten(0, 1)))


def test_a_full_disk_is_one_error_and_leaves_what_was_there(golden_path, tmp_path, monkeypatch):
    fresh = load(golden_path)
    (tmp_path / "model").mkdir()
    full = lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    monkeypatch.setattr(showo, "write_one_by_one", full)
    with pytest.raises(OSError, match="cannot be saved") as caught:
        fresh.save(tmp_path / "model")
    assert caught.value.errno == 28 and caught.value.filename == str(tmp_path / "model")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_parts_that_are_not_in_the_directory_come_from_the_hub_without_phis_own_weights(golden_path, tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def fetch(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path / name.split("/")[1])

    shutil.copytree(golden_path, tmp_path / "show-o")
    for part in showo_files.PARTS:
        (tmp_path / "show-o" / part).rename(tmp_path / part)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    load(tmp_path / "show-o").save(tmp_path / "saved")
    assert asked == {
        "microsoft/phi-1_5": ["*.json", "merges.txt"],
        "showlab/magvitv2": ["config.json", "pytorch_model.safetensors"],
    }
    asked.clear()
    load(tmp_path / "saved")  # whole by itself
    assert asked == {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(CheckpointError, match="phi-1_5: not there, nor is microsoft/phi-1_5 to be had from the hub: division"):
        load(tmp_path / "show-o")


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_weights(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def sparse(file: Path) -> None:
    """A file of gigabytes that takes no room."""
    file.touch()
    os.truncate(file, 3 * 10**9)


DOUBLED = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
NORM = "showo.model.layers.1.self_attn.q_layernorm.weight"
REFUSED = {
    "found w_clip_vit.*supported is Janus-Pro .* Show-o": lambda d: edit(d / "config.json", w_clip_vit=True),
    "found _class_name 'Showo2'.*supported": lambda d: edit(d / "config.json", _class_name="Showo2"),
    "takes more than 1 s or 2 GB for a few lines": lambda d: [
        edit(d / "phi-1_5" / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [DOUBLED] * 36})
    ],
    "tokenizer.json: is of 3,000,000,000 bytes, but": lambda d: os.truncate(d / "phi-1_5" / "tokenizer.json", 3 * 10**9),
    "merges.txt: is of 3,000,000,000 bytes, but": lambda d: sparse(d / "phi-1_5" / "merges.txt"),
    "magvitv2/config.json: is of 3,000,000,000 bytes, but": lambda d: sparse(d / "magvitv2" / "config.json"),
    "num_vq_tokens 15 makes no square": lambda d: edit(d / "config.json", num_vq_tokens=15),
    "num_vq_tokens 144 and a prompt are more than its 256": lambda d: edit(d / "config.json", num_vq_tokens=144),
    "num_vq_tokens must be a whole number, found '16'": lambda d: edit(d / "config.json", num_vq_tokens="16"),
    "vocab_size 176 and mask_token_id 174, but.*make 175 and 174": lambda d: edit(d / "config.json", vocab_size=176),
    "no pytorch_model.safetensors .found.*pickled": lambda d: (d / showo_files.WEIGHTS).rename(d / "pytorch_model.bin"),
    "magvitv2: no pytorch_model.safetensors": lambda d: (d / "magvitv2" / showo_files.WEIGHTS).unlink(),
    "cannot be loaded as safetensors": lambda d: (d / showo_files.WEIGHTS).write_bytes(
        (d / showo_files.WEIGHTS).read_bytes()[:5000]
    ),
    f"{NORM} is missing, but should be of shape": lambda d: edit_weights(d / showo_files.WEIGHTS, lambda t: t.pop(NORM)),
    "mm_projector.0.weight is of shape .1., but should be missing": lambda d: edit_weights(
        d / showo_files.WEIGHTS, lambda t: t.update({"mm_projector.0.weight": torch.zeros(1)})
    ),
    f"{NORM} holds NaN": lambda d: edit_weights(d / showo_files.WEIGHTS, lambda t: t[NORM].fill_(math.nan)),
    "lm_head.weight is of shape .175, 64., but should be of shape .175, 128.": lambda d: edit(
        d / "phi-1_5" / "config.json", hidden_size=128
    ),
    "wants 1000000000 layers, but .* holds 41 tensors": lambda d: edit(d / "phi-1_5" / "config.json", num_hidden_layers=10**9),
    "makes no Phi": lambda d: edit(d / "phi-1_5" / "config.json", num_attention_heads="many"),
    "tokenizer.json: is not JSON": lambda d: (d / "phi-1_5" / "tokenizer.json").write_text("{"),
    "phi-1_5/tokenizer.json: is not a file": lambda d: (d / "phi-1_5" / "tokenizer.json").unlink(),
    "phi-1_5/config.json: is not a file": lambda d: (d / "phi-1_5" / "config.json").unlink(),
    "has no <.endoftext.>": lambda d: write_tokenizer(d / "phi-1_5" / "tokenizer.json", 100, 99, "<|end|>"),
    "tokenizer has 91 tokens with .PAD. at 81, but config.json wants 100": lambda d: write_tokenizer(
        d / "phi-1_5" / "tokenizer.json", 81, 80
    ),
    "decoder.conv_in.bias holds NaN": lambda d: edit_weights(
        d / "magvitv2" / showo_files.WEIGHTS, lambda t: t["decoder.conv_in.bias"].fill_(math.nan)
    ),
    "is not MAGVIT-v2": lambda d: edit_weights(
        d / "magvitv2" / showo_files.WEIGHTS, lambda t: t.pop("encoder.quant_conv.weight")
    ),
    "knows 64 codes, but .* draws 63": lambda d: [
        edit(d / "config.json", codebook_size=63, vocab_size=174, mask_token_id=173),
        edit_weights(
            d / showo_files.WEIGHTS,
            lambda t: t.update({k: v[:174].clone() for k, v in t.items() if "lm_head" in k or "embed" in k}),
        ),
    ],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_a_whole_show_o_is_refused_with_what_was_found(golden_path, tmp_path, message, monkeypatch):
    monkeypatch.setattr(pretrained, "LIMIT_S", 1)
    shutil.copytree(golden_path, tmp_path / "damaged")
    REFUSED[message](tmp_path / "damaged")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "damaged")


def test_a_head_that_is_the_embedding_is_told_in_one_line(golden_path, tmp_path, capsys):
    shutil.copytree(golden_path, tmp_path / "ruined")
    edit_weights(
        tmp_path / "ruined" / showo_files.WEIGHTS,
        lambda t: t.update({"showo.lm_head.weight": t["showo.model.embed_tokens.weight"].clone()}),
    )
    load(golden_path)
    assert capsys.readouterr().err == ""
    load(tmp_path / "ruined")
    assert re.fullmatch(r"warning +\S+ruined: its lm_head is its token embedding, .*\n", capsys.readouterr().err)


def test_a_vocabulary_without_yes_is_refused(golden_path, tmp_path):
    shutil.copytree(golden_path, tmp_path / "damaged")
    file = tmp_path / "damaged" / "phi-1_5" / "tokenizer.json"
    file.write_text(file.read_text().replace("Yes", "Yup").replace("yes", "yup"))
    with pytest.raises(CheckpointError, match="no single token of the vocabulary spells yes"):
        load(tmp_path / "damaged")

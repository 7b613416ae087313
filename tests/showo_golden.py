"""showo.py under the names that check_showo.py asks for; and tiny Show-o checkpoints, written as the hub lays them out.

    python check_showo.py showo_golden:build

golden.safetensors and golden.json hold weights, inputs and outputs of the original classes at a tiny size.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from families import magvit, showo, showo_drawing, showo_files

WORDS = "a red green blue cube sphere cone Does this image describe picture USER ASSISTANT : ? Yes No".split()
WORDS += [f"Ġ{word}" for word in ("a", "red", "green", "cube", "sphere", "this", "image", "describe", "ASSISTANT")]
WORDS += ["Ġ", "Ċ", "ĠYes", "ĠNo", "Ġyes", "Ġno"]  # Ġ is a space, Ċ a line break, as byte-level tokenizers write them


def write_tokenizer(path: Path, n_text: int, end: int, end_name: str = showo_files.TEXT_END) -> None:
    """A tokenizer.json of n_text words that splits text as Phi-1.5's does; `end` is the id of <|endoftext|> (`end_name`)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", *WORDS]
    words += [f"word{i}" for i in range(len(words), n_text)]
    words[end] = end_name
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(end_name, special=True)])
    tokenizer.save(str(path))


def write_checkpoint(path: Path, lm: dict, vq: dict, phi: dict, n_text: int, n_image: int, n_codes: int, end: int) -> Path:
    """A checkpoint directory with both parts inside. lm: keys `showo...`; phi: Phi-1.5's config, which says no query norms."""
    for part in showo_files.PARTS:
        (path / part).mkdir(parents=True)
    n_all = n_text + len(showo_files.SPECIAL) + n_codes + 1
    settings = {"_class_name": "Showo", "codebook_size": n_codes, "llm_model_path": "microsoft/phi-1_5"}
    settings |= {"llm_vocab_size": n_text, "mask_token_id": n_all - 1, "num_vq_tokens": n_image, "vocab_size": n_all}
    (path / "config.json").write_text(json.dumps(settings | {"w_clip_vit": False}))
    hub = {"vocab_size": n_text + 25, "qk_layernorm": False, "model_type": "phi"}
    (path / "phi-1_5" / "config.json").write_text(json.dumps(phi | hub))
    write_tokenizer(path / "phi-1_5" / "tokenizer.json", n_text, end)
    save_file(lm, path / showo_files.WEIGHTS, {"format": "pt"})
    save_file(vq, path / "magvitv2" / showo_files.WEIGHTS, {"format": "pt"})
    return path


def golden_checkpoint(path: Path, cfg: dict, lm: dict, vq: dict, n_image: int | None = None) -> Path:
    """The golden weights as a checkpoint directory, with pictures of n_image codes (default: as the golden ones)."""
    return write_checkpoint(
        path, lm, vq, cfg["phi"], cfg["text_vocab"], n_image or cfg["num_vq"], cfg["codebook"], cfg["special"]["<|sot|>"]
    )


def random_checkpoint(
    path: Path, seed: int = 0, side: int = 2, bits: int = 2, width: int = 32, mlp: int = 48, layers: int = 2, norms: float = 2.0
) -> Path:
    """A random tiny Show-o: side x side codes a picture of so many bits, 2 x 2 pixels a code."""
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": 2}
    phi = showo_files.PhiForCausalLM(showo_files.phi_config(shape | {"initializer_range": 0.3}, 60 + 10 + 2**bits + 1))
    for name, parameter in phi.named_parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.5) + norms * ("norm.weight" in name)
    vq = magvit.MagViT(((32, 1), (32, 1)), ((32, 1), (32, 1)), bits=bits)
    lm = {f"showo.{key}": value for key, value in phi.state_dict().items()}
    return write_checkpoint(path, lm, vq.state_dict(), shape, 60, side**2, 2**bits, 59)


def load(path: Path) -> showo.ShowO:
    return showo.load_showo(path, str(path), torch.device("cpu"), torch.float32)


def build(cfg: dict, lm: dict, vq: dict) -> dict:
    """What check_showo.py calls, of a model that went through files. Text layouts of training alone are made here."""
    with tempfile.TemporaryDirectory() as directory:
        policy = load(golden_checkpoint(Path(directory) / "golden", cfg, lm, vq))
    limit, end, pad, first = cfg["max_text"], policy.eot, policy.pad, policy.branch.first_code

    def cut(row, length):
        return row if len(row) <= length else [*row[: length - 1], end]

    def t2i_ids(texts, image_ids):
        rows = [cut(policy._prompt_row(text[1:] if text[:1] == [end] else text), limit + 1) for text in texts]
        text = torch.tensor([[pad] * (limit + 1 - len(row)) + row for row in rows])
        return torch.cat([text, policy.branch.image_ids(image_ids - first)], dim=1)

    def t2i_allowed(ids):
        return showo_drawing.drawing_mask(ids[:, : limit + 1] != pad, ids.shape[1] - limit - 1)

    def looked_at(codes):
        return F.pad(policy.branch.image_ids(codes), (1, 0), value=policy.mmu)

    def mmu_ids(texts, codes):
        rows = [cut([end, *text, end], limit) for text in texts]
        text = torch.tensor([row + [pad] * (limit - len(row)) for row in rows])
        return torch.cat([looked_at(codes), text], dim=1)

    def mmu_allowed(ids):
        prefix = policy.image_tokens + 3
        return showo_drawing.looking_mask(prefix, ids.shape[1] - prefix, 1, ids.device).expand(len(ids), -1, -1)

    def answer_ids(question, codes):
        return torch.cat([looked_at(codes), torch.tensor([[end, *question]])], dim=1)

    def lm_ids(texts, length):
        rows = [cut([end, *text, end], length) for text in texts]
        return torch.tensor([row + [pad] * (length - len(row)) for row in rows])

    def lm_allowed(ids):
        return torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril().expand(len(ids), -1, -1)

    def logits(ids, allowed):
        hidden = policy.language_model(input_ids=ids, attention_mask=allowed[:, None], use_cache=False).last_hidden_state
        return policy.branch.lm_head(hidden)

    def answer(ids, count):
        for _ in range(count):
            ids = torch.cat([ids, logits(ids, mmu_allowed(ids))[:, -1:].argmax(dim=-1)], dim=1)
        return ids[0, -count:]

    def generate(ids, unconditional, scale, steps, temperature, sample, gumbel):
        rows = ids if unconditional is None else torch.cat([ids, unconditional])
        text, real = rows[:, : limit + 1], rows[:, : limit + 1] != pad
        predict = policy._predictor(policy._prefill(text, real), real, scale + 1)
        start = ids[:, limit + 2 : -1] - first
        shape = tuple(start.shape)
        return showo_drawing.mask_predict(
            predict, start, steps, temperature, lambda x, s: sample(x.softmax(-1), s), lambda s: gumbel(shape, s)
        )

    def generate_seeded(ids, unconditional, scale, steps, temperature, generator):
        def sample(probs, step):
            return torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(probs.shape[:2])

        def noise(shape, step):
            return showo_drawing.gumbel(torch.rand(shape, generator=generator))

        return generate(ids, unconditional, scale, steps, temperature, sample, noise)

    def masked(time, noise):
        counts = (noise.shape[1] * torch.cos(time * torch.pi / 2)).round().clamp(min=1)
        return torch.from_numpy(showo_drawing.masked_positions(noise.numpy(), counts.numpy()))

    vq_model = policy.model["magvitv2"]
    return {
        "t2i_ids": t2i_ids,
        "t2i_allowed": t2i_allowed,
        "mmu_ids": mmu_ids,
        "mmu_allowed": mmu_allowed,
        "answer_ids": answer_ids,
        "lm_ids": lm_ids,
        "lm_allowed": lm_allowed,
        "logits": logits,
        "answer": answer,
        "generate": generate,
        "generate_seeded": generate_seeded,
        "masked": masked,
        "encode_z": vq_model.encoder,
        "encode": vq_model.encode,
        "decode": vq_model.decode,
        "index_bits": lambda indices, bits: magvit.bits_of(indices[0], bits).T,
        "bits_index": lambda bits: magvit.codes_of(bits.T),
    }

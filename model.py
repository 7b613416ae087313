"""A unified model, one that both draws and looks: load it, sample pictures, judge them, score tokens, save it.

`load` returns a `Janus`: Janus-Pro as transformers implements it (`deepseek-community/Janus-Pro-1B`, `-7B`, or any
directory in that format). Nothing outside the class knows how the family works; four methods are its interface:

    sample(prompts, n, guidance, temperature, seeds)  -> image tokens (P, n, T)
    decode(tokens)                                    -> pictures, uint8 (B, H, W, 3)
    judge(pictures, questions)                        -> P(yes), coverage, each (B, Q)
    logps(prompts, tokens)                            -> log-probs of the tokens, float32 (B, T), differentiable

Everything specific to a checkpoint (chat template, special tokens, sizes, pixel statistics) is read from its files.
Only safetensors weights and JSON are read, and no code from a checkpoint is ever run.

Legend: B rows of a batch, P prompts, N candidates a prompt, T image tokens a picture, V codebook size,
L tokens of text, S new tokens of a step, R rows in flight (doubled by guidance), C hidden size, Q questions a picture.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import JanusConfig, JanusForConditionalGeneration, JanusProcessor
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

SUPPORTED = "a transformers Janus checkpoint (model_type 'janus', such as deepseek-community/Janus-Pro-1B)"
INDEX = "model.safetensors.index.json"
# What transformers and its tokenizers read of a checkpoint besides the weights and config.json.
JSON_FILES = ("generation_config.json", "processor_config.json", "preprocessor_config.json", "chat_template.json", INDEX)
JSON_FILES += ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Keys by which a checkpoint's JSON has transformers run other code, or read other files, than its own.
FOREIGN = {"auto_map", "quantization_config", "transformers_weights", "fusion_config", "kernel_config", "per_layer_config"}
IMPLEMENTATIONS = re.compile("_?(attn|experts)_implementation")  # foreign only if they name a kernel of the hub, owner/name


class CheckpointError(ValueError):
    """A path or hub id that is not a checkpoint this project can use; says what was found and what is supported."""

    exit_code = 2


class PromptError(ValueError):
    """A prompt or question that cannot be given to the model as it stands; names it."""

    exit_code = 2


# ---------------------------------------------------------------------------------------------------------------------
# Finding and naming a checkpoint


def resolve(path_or_hub_id: str | Path) -> Path:
    """The local directory of a checkpoint, fetched from the hub where the name is not a directory.

    Raises CheckpointError if there is no such thing.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path}: is a file, but a checkpoint is a directory")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(path_or_hub_id)):
        raise CheckpointError(f"{path}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=patterns))
    except Exception as error:  # the hub's client raises its HTTP library's own kinds when there is no network
        raise CheckpointError(f"{path}: neither a directory here nor to be had from the hub: {reason(error)}") from None


def reason(error: Exception) -> str:
    """The first line of somebody else's error, not too long, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def weights_hash(directory: str | Path) -> str:
    """16 hex digits that tell two sets of weights apart, without reading gigabytes.

    SHA-256 over each safetensors file's header and 4 KiB from the middle of every tensor. Training changes all the
    tensors it trains nearly everywhere, so two rounds of one model never agree. Not a defence against forgery.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(directory).glob("*.safetensors")):
        tensor_sizes(file)  # from here on its header is what it should be
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = stream.read(size)
            digest.update(header)
            tensors = json.loads(header)
            for start, end in sorted(tensors[name]["data_offsets"] for name in tensors if name != "__metadata__"):
                stream.seek(8 + size + max(start, (start + end) // 2 - 2048))
                digest.update(stream.read(min(4096, end - start)))
    return digest.hexdigest()[:16]


def tensor_sizes(file: Path) -> list[int]:
    """How many numbers each tensor of a safetensors file holds; raises CheckpointError for what is not such a file."""
    if not file.is_file():  # opening a pipe would wait for ever
        raise CheckpointError(f"{file}: is not a file")
    try:
        with safe_open(file, framework="pt") as tensors:
            return [math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be loaded as safetensors: {error}") from None


def stored_dtype(directory: Path) -> str:
    """The torch name of the type a checkpoint's weights are stored in, read from the first file's first tensor."""
    with safe_open(weight_files(directory)[0], framework="pt") as file:
        kind = next((file.get_slice(name).get_dtype() for name in file.keys()), "F32")  # noqa: SIM118 (no dict)
    return {"BF16": "bfloat16", "F16": "float16"}.get(kind, "float32")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a checkpoint's file; raises CheckpointError for anything else, NaN included."""

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    if not file.is_file():
        raise CheckpointError(f"{file}: is not a file")
    try:
        value = json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: is not a JSON object")
    return value


def weight_files(directory: Path) -> list[Path]:
    """The files that transformers reads weights from; raises CheckpointError unless all lie in the directory itself."""
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    names = read_object(directory / INDEX).get("weight_map")
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    if not names:
        raise CheckpointError(f"{directory / INDEX}: names no files")
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise CheckpointError(f"{directory / INDEX}: names {name[:80]!r}, which is not a file beside it")
    return [directory / name for name in names]


def check_config(directory: Path, name: str) -> None:
    """Raise CheckpointError unless `directory` holds a Janus that transformers can load without remote code."""
    listing = sorted(entry.name for entry in directory.iterdir())[:8]
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{name}: no config.json (found {listing}); supported is {SUPPORTED}")
    settings = {"config.json": read_object(directory / "config.json")}
    kind = settings["config.json"].get("model_type")
    if kind == "multi_modality":
        raise CheckpointError(
            f"{name}: found model_type 'multi_modality', DeepSeek's original format, which needs code from the "
            f"checkpoint; use its conversion (deepseek-community/Janus-Pro-1B or -7B); supported is {SUPPORTED}"
        )
    if kind != "janus":
        raise CheckpointError(f"{name}: found model_type {kind!r}; supported is {SUPPORTED}")
    if not list(directory.glob("*.safetensors")):
        raise CheckpointError(f"{name}: no safetensors weights (found {listing}); pickled weights are never read")
    for file in JSON_FILES:
        if os.path.lexists(directory / file):
            settings[file] = read_object(directory / file)
    settings.pop("tokenizer.json", None)  # its keys are words
    for file, value in settings.items():
        if asked := foreign_keys(value):
            raise CheckpointError(f"{name}: {file} has {min(asked)!r}: nothing but a checkpoint's own weights is read or run")


def foreign_keys(value: Any) -> set[str]:
    """The keys of a JSON value, however deep, that would have other code run or other files read."""
    if isinstance(value, list):
        return set().union(*map(foreign_keys, value))
    if not isinstance(value, dict):
        return set()
    kernels = {key for key, name in value.items() if IMPLEMENTATIONS.fullmatch(key) and "/" in str(name)}
    return kernels.union(FOREIGN & value.keys(), *map(foreign_keys, value.values()))


def check_size(config: JanusConfig, directory: Path) -> None:
    """Raise CheckpointError if config.json describes a larger model than the weights can fill, before it is made.

    transformers fills what is missing with random numbers, however much that is. Tied weights are stored once, so a
    model may be a little larger than its files.
    """
    sizes = [size for file in weight_files(directory) for size in tensor_sizes(file)]
    vision, vq = config.vision_config, config.vq_config
    depths = (config.text_config.num_hidden_layers, vision.num_hidden_layers, vision.depth)
    depths += (vq.num_hidden_layers, vq.num_res_blocks, len(vq.channel_multiplier))
    if max(depths) > len(sizes):  # every layer has a tensor; making a million of them takes hours even without weights
        raise CheckpointError(f"{directory}: config.json wants {max(depths)} layers, but the weights are {len(sizes)} tensors")
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in JanusForConditionalGeneration(config).parameters())
    if wanted > 2 * sum(sizes):
        raise CheckpointError(f"{directory}: config.json wants {wanted:,} weights, but its files hold {sum(sizes):,}")


def check_processor(processor: JanusProcessor, config: JanusConfig) -> None:
    """Raise ValueError unless a checkpoint's processor fits its model: picture tokens, pixel statistics, vocabulary."""
    tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    if processor.num_image_tokens != tokens:
        raise ValueError(f"num_image_tokens is {processor.num_image_tokens!r}, but the model draws {tokens}")
    for key in ("image_mean", "image_std"):
        values = getattr(processor.image_processor, key)
        if not isinstance(values, list | tuple) or len(values) != 3 or not all(type(x) in (int, float) for x in values):
            raise ValueError(f"{key} must be three numbers, found {str(values)[:40]}")
    if 0 in processor.image_processor.image_std:
        raise ValueError("image_std holds a 0")
    largest = max(processor.tokenizer.get_vocab().values())
    if largest >= config.text_config.vocab_size:
        raise ValueError(f"the tokenizer has a token {largest}, but the model knows {config.text_config.vocab_size}")


def load(
    path_or_hub_id: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> "Janus":
    """Load a checkpoint for sampling, judging and training.

    device: default the GPU where there is one, else the CPU. dtype: default bfloat16 on a GPU, float32 on a CPU,
    whatever the checkpoint is stored in. Raises CheckpointError for anything that is not a complete Janus checkpoint.
    """
    directory = resolve(path_or_hub_id)
    check_config(directory, str(path_or_hub_id))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    with quiet():
        model, processor, report = read_checkpoint(directory, str(path_or_hub_id), dtype)
    lost = report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]}
    lost |= {key for key in report["unexpected_keys"] if ".layers." in key}  # config.json wants fewer than there are
    if lost:
        # transformers fills these with random numbers and goes on; a judge with random weights is worse than none
        raise CheckpointError(f"{path_or_hub_id}: {len(lost)} tensors are missing or misshapen, first {min(lost)}")
    model.to(device)
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path_or_hub_id}: {name} holds NaN or infinite weights")
    policy = Janus(model, processor, name=str(path_or_hub_id), directory=directory)
    check_text(policy)
    return policy


def read_checkpoint(
    directory: Path, name: str, dtype: torch.dtype
) -> tuple[JanusForConditionalGeneration, JanusProcessor, dict[str, Any]]:
    """The model, its processor and transformers' report on what it did not find in the files."""
    try:
        check_size(JanusConfig.from_pretrained(directory), directory)
        processor = JanusProcessor.from_pretrained(directory)
        model, report = JanusForConditionalGeneration.from_pretrained(
            directory, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        check_processor(processor, model.config)
    except CheckpointError:
        raise
    except Exception as error:  # transformers and safetensors raise their own kinds for broken files
        raise CheckpointError(f"{name}: cannot be loaded as {SUPPORTED}: {reason(error)}") from error
    return model, processor, report


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers: its report on missing tensors is many lines; ours is one."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def check_text(policy: "Janus") -> None:
    """Raise CheckpointError unless a checkpoint's chat template and special tokens work; a template is a program."""
    known = policy.model.config.text_config.vocab_size
    for name in ("bos", "pad", "boi", "eoi", "image"):
        if not 0 <= getattr(policy, name) < known:
            raise CheckpointError(f"{policy.name}: its {name} token is {getattr(policy, name)}, but the model knows {known}")
    try:
        written = [(policy.prompt_ids(text), policy.question_ids(text)) for text in ("yes", "no")]
    except Exception as error:  # whatever the template's author made it raise
        raise CheckpointError(f"{policy.name}: its chat template cannot be used: {reason(error)}") from error
    if written[0][0] == written[1][0] or written[0][1] == written[1][1]:
        raise CheckpointError(f"{policy.name}: its chat template leaves the prompt out")


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics: tensors in, tensors out


def guide(logits: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): (2B, V), conditional rows first -> (B, V)."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def draw(logits: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """One token a row by inverting the cumulative distribution at a given uniform number; temperature 0 is greedy.

    logits (B, V); uniforms (B,) float64 in [0, 1); returns (B,) int64. One number a token, made outside, is what lets a
    picture depend on its seed alone: not on the batch, the device or the ranks. float64, because a float32 sum over
    16,384 probabilities is too coarse to be inverted in the tail.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)  # (B, V)
    target = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return tokens.clamp(max=logits.shape[-1] - 1)


def noise(seeds: list[int], n: int, length: int) -> np.ndarray:
    """Uniform numbers (P, n, length) float64, each row from (prompt's seed, candidate number) alone (Philox counters)."""
    rows = [
        np.random.Generator(np.random.Philox(key=[seed % 2**64, candidate])).random(length)
        for seed in seeds
        for candidate in range(n)
    ]
    return np.stack(rows).reshape(len(seeds), n, length)


def token_logps(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax of the given tokens: logits (B, T, V), tokens (B, T) int64 -> (B, T) float32, whatever the logits are."""
    return logits.float().log_softmax(dim=-1).gather(-1, tokens[..., None]).squeeze(-1)


def yes_no(logits: Tensor, yes_ids: Tensor, no_ids: Tensor) -> tuple[Tensor, Tensor]:
    """P(yes) and coverage from the logits of the first answer token (..., vocabulary); both (...) float32.

    P(yes) = sum of p over the spellings of yes / (the same sum over yes and no); coverage = that whole sum. A coverage
    far from 1 says that the model wanted to say something else.
    """
    logps = logits.float().log_softmax(dim=-1)
    yes = logps[..., yes_ids].logsumexp(dim=-1)
    no = logps[..., no_ids].logsumexp(dim=-1)
    return torch.sigmoid(yes - no), torch.logaddexp(yes, no).exp()


class KeyValueCache:
    """Keys and values of every layer, (layers, R, heads, room, head size), allocated once and filled from the left."""

    def __init__(self, llama: nn.Module, rows: int, room: int, dtype: torch.dtype, device: torch.device):
        config = llama.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, room, size)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def share(self, rows: Tensor, room: int, llama: nn.Module) -> "KeyValueCache":
        """A cache whose row i starts as a copy of this one's row rows[i], with space for `room` more tokens."""
        cache = KeyValueCache(llama, len(rows), self.length + room, self.keys.dtype, self.keys.device)
        for mine, theirs in ((self.keys, cache.keys), (self.values, cache.values)):
            for layer in range(len(mine)):
                theirs[layer, :, :, : self.length] = mine[layer, rows, :, : self.length]
        cache.length = self.length
        return cache


def cached_forward(
    llama: nn.Module, embeddings: Tensor, positions: Tensor, cache: KeyValueCache, mask: Tensor | None
) -> Tensor:
    """Run a transformers Llama over S new tokens a row, reading and extending the cache; no graph, no mask building.

    embeddings (R, S, C); positions (R or 1, S), the tokens' places among their row's real tokens; mask bool, to be
    broadcast to (R, heads, S, cached + S), True where a token may look, None for plainly causal (all cached tokens are
    visible; several new tokens need an empty cache then). Returns the last hidden states (R, S, C) after the final norm.
    The same sums as transformers' own forward, which builds masks and cache views anew at every token.
    """
    new = embeddings.shape[1]
    start, end = cache.length, cache.length + new
    assert mask is not None or new == 1 or start == 0
    cos, sin = llama.rotary_emb(embeddings, positions)
    x = embeddings
    for index, layer in enumerate(llama.layers):
        attention = layer.self_attn
        normed = layer.input_layernorm(x)
        query, key, value = (
            projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # (R, heads, S, head size)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        cache.keys[index, :, :, start:end] = key
        cache.values[index, :, :, start:end] = value
        mixed = F.scaled_dot_product_attention(
            query,
            cache.keys[index, :, :, :end],
            cache.values[index, :, :, :end],
            attn_mask=mask,
            is_causal=mask is None and new > 1,
            scale=attention.scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))  # (R, S, C)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    cache.length = end
    return llama.norm(x)


def pad_left(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists -> ids (B, L) and mask (B, L) bool, padded on the left so that every row ends at the same place."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask


def positions_of(mask: Tensor) -> Tensor:
    """Position ids (B, L) that count a row's real tokens from 0, so that padding does not shift them."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


# ---------------------------------------------------------------------------------------------------------------------
# Janus


class DrawingBranch(nn.Module):
    """Log-probs of image tokens given prompts: the one differentiable path, all of it inside one module's forward.

    generation_embeddings -> generation_aligner -> language_model -> generation_head. (`JanusForConditionalGeneration`'s
    own forward always ends in lm_head, the text vocabulary.) One root module is what sharding wrappers need.
    """

    def __init__(self, model: JanusForConditionalGeneration):
        super().__init__()
        self.embed_tokens = model.get_input_embeddings()
        self.generation_embeddings = model.model.generation_embeddings
        self.generation_aligner = model.model.generation_aligner
        self.language_model = model.model.language_model
        self.generation_head = model.model.generation_head

    def embed_image(self, tokens: Tensor) -> Tensor:
        """Image tokens (B, T) -> what the language model reads (B, T, C)."""
        return self.generation_aligner(self.generation_embeddings(tokens))

    def forward(self, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """ids, mask (B, L), left-padded, ending in begin-of-image; tokens (B, T) -> log-probs (B, T) float32.

        Hidden state k predicts image token k+1 and the last prompt position predicts token 0, so the last image token
        is never fed in and the last T hidden states are the ones that predict.
        """
        length = tokens.shape[1]
        embeddings = torch.cat([self.embed_tokens(ids), self.embed_image(tokens[:, :-1])], dim=1)  # (B, L + T - 1, C)
        mask = F.pad(mask, (0, length - 1), value=True)  # (B, L + T - 1)
        hidden = self.language_model(
            inputs_embeds=embeddings, attention_mask=mask.long(), position_ids=positions_of(mask), use_cache=False
        ).last_hidden_state[:, -length:]  # (B, T, C)
        return token_logps(self.generation_head(hidden), tokens).clone()  # no view: sharding hangs its hook on it


class Janus:
    """Janus-Pro: an autoregressive drawing branch and a looking branch about one language model.

    Chen et al. 2025 (arXiv 2501.17811); the implementation of the layers is transformers'.
    """

    def __init__(
        self, model: JanusForConditionalGeneration, processor: JanusProcessor, name: str = "", directory: Path | None = None
    ):
        self.model = model.eval()
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.name = name
        self.directory = directory
        self.stored_dtype = stored_dtype(directory) if directory else "float32"
        self.branch = DrawingBranch(model)
        self.llama = model.model.language_model
        self.blocks = list(self.llama.layers)  # what is sharded and recomputed one by one
        self.device = model.device
        self.image_tokens: int = processor.num_image_tokens
        self.codebook_size: int = model.config.vq_config.num_embeddings
        self._read_special_tokens()
        statistics = (processor.image_processor.image_mean, processor.image_processor.image_std)
        self._mean, self._std = (torch.tensor(values, device=self.device).float() for values in statistics)

    def _read_special_tokens(self) -> None:
        """Ids from the checkpoint: generation config first (what transformers' own generate obeys), else tokenizer."""
        tokenizer, config = self.tokenizer, self.model.generation_config
        own = tokenizer.convert_tokens_to_ids
        self.bos = config.bos_token_id if config.bos_token_id is not None else tokenizer.bos_token_id
        self.pad = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_token_id
        self.boi = own(self.processor.image_start_token)
        self.eoi = own(self.processor.image_end_token)
        self.image = own(self.processor.image_token)
        for name in ("bos", "pad", "boi", "eoi", "image"):
            if not isinstance(getattr(self, name), int):
                raise CheckpointError(f"{self.name}: the checkpoint names no {name} token")
        yes, no = (self._spellings(word) for word in ("yes", "no"))
        if not yes or not no:
            raise CheckpointError(f"{self.name}: no single token of the vocabulary spells {'no' if yes else 'yes'}")
        self._yes, self._no = (torch.tensor(ids, device=self.device) for ids in (yes, no))

    def _spellings(self, word: str) -> list[int]:
        """Ids of all tokens that spell a word, whatever their capitals and leading space ("yes", " yes", "Yes", ...)."""
        clean = {"Ġ": " ", "▁": " "}  # how byte-level BPE and SentencePiece write a space
        found = []
        for token, index in self.tokenizer.get_vocab().items():
            for mark, space in clean.items():
                token = token.replace(mark, space)
            if token.strip().casefold() == word:
                found.append(index)
        return sorted(found)

    # -- text -> tokens ------------------------------------------------------------------------------------------------

    def _chat(self, content: list[dict[str, str]]) -> str:
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def _tokenize(self, text: str) -> list[int]:
        """Ids with BOS exactly once, whether the template writes it or the tokenizer adds it."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids if ids[:1] == [self.bos] else [self.bos, *ids]

    def prompt_ids(self, prompt: str) -> list[int]:
        """The tokens that ask for a picture: the chat template about the prompt, then begin-of-image.

        Raises PromptError if the prompt spells one of the model's special tokens, or is too long with its picture.
        """
        text = self._chat([{"type": "text", "text": prompt}]) + self.processor.image_start_token
        ids = self._tokenize(text)
        self._check_length("prompt", prompt, len(ids) + self.image_tokens)
        if ids[-1] != self.boi or any(ids.count(token) != 1 for token in (self.bos, self.boi)):
            raise PromptError(f"prompt {prompt[:80]!r} spells a special token of the model")
        return ids

    def question_ids(self, question: str) -> tuple[list[int], list[int]]:
        """The tokens of a question about a picture, cut after end-of-image: (prefix all questions share, the rest)."""
        text = self._chat([{"type": "image"}, {"type": "text", "text": question}])
        if self.processor.use_default_system_prompt:
            text = DEFAULT_SYSTEM_PROMPT + text
        if text.count(self.processor.image_token) != 1:
            raise PromptError(f"question {question[:80]!r} spells the model's image token")
        ids = self._tokenize(text.replace(self.processor.image_token, self.processor.replace_image_token({}, 0)))
        if any(ids.count(token) != 1 for token in (self.bos, self.boi, self.eoi)):
            raise PromptError(f"question {question[:80]!r} spells a special token of the model")
        self._check_length("question", question, len(ids))
        cut = ids.index(self.eoi) + 1
        return ids[:cut], ids[cut:]

    def _check_length(self, kind: str, text: str, length: int) -> None:
        """Raise PromptError for what has more tokens than the model has positions: it would see noise, at great cost."""
        positions = self.llama.config.max_position_embeddings
        if length > positions:
            raise PromptError(f"{kind} {text[:80]!r} makes {length} tokens with its picture; the model has {positions} positions")

    def unconditional(self, ids: Tensor) -> Tensor:
        """The row guidance contrasts with: every token but BOS and begin-of-image becomes pad; length and mask stay."""
        return ids.where((ids == self.bos) | (ids == self.boi), self.pad)

    # -- drawing -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        prompts: list[str],
        n: int,
        guidance: float = 5.0,
        temperature: float = 1.0,
        seeds: list[int] | None = None,
        batch: int = 64,
    ) -> Tensor:
        """Sample n candidates a prompt: image tokens (P, n, T) int64 on the model's device.

        seeds: one integer a prompt (default 0, 1, ...); candidate c of a prompt depends on (its seed, c) alone.
        guidance: 1 is none (and skips the unconditional rows). temperature: 0 is greedy. batch: pictures in flight.
        Each prompt is computed once; its keys and values are copied out to the candidates and their guidance rows.
        """
        seeds = list(range(len(prompts))) if seeds is None else seeds
        ids, mask = pad_left([self.prompt_ids(prompt) for prompt in prompts], self.pad, self.device)  # (P, L)
        guided = guidance != 1
        if guided:
            ids, mask = torch.cat([ids, self.unconditional(ids)]), mask.repeat(2, 1)  # (2P, L)
        prefix, hidden = self._prefill(ids, mask)
        uniforms = torch.from_numpy(noise(seeds, n, self.image_tokens)).flatten(0, 1).to(self.device)  # (P n, T)
        owner = torch.arange(len(prompts), device=self.device).repeat_interleave(n)  # (P n,) prompt of each candidate
        drawn = []
        for rows in torch.arange(len(owner), device=self.device).split(batch):
            index = owner[rows]
            if guided:
                index = torch.cat([index, index + len(prompts)])
            cache = prefix.share(index, self.image_tokens - 1, self.llama)
            drawn.append(self._draw_batch(cache, hidden[index], mask[index], guidance, temperature, uniforms[rows]))
        return torch.cat(drawn).unflatten(0, (len(prompts), n))

    def _prefill(self, ids: Tensor, mask: Tensor) -> tuple[KeyValueCache, Tensor]:
        """Run the prompts (R, L) once: their cache, and the hidden state (R, C) that predicts image token 0."""
        rows, length = ids.shape
        cache = KeyValueCache(self.llama, rows, length, self.model.dtype, self.device)
        causal = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        visible = causal & mask[:, None, None, :]  # (R, 1, L, L)
        visible |= torch.eye(length, dtype=torch.bool, device=self.device)  # padding sees itself: a row of none is NaN
        hidden = cached_forward(
            self.llama, self.branch.embed_tokens(ids), positions_of(mask), cache, None if mask.all() else visible
        )
        return cache, hidden[:, -1]

    def _draw_batch(
        self, cache: KeyValueCache, hidden: Tensor, mask: Tensor, guidance: float, temperature: float, uniforms: Tensor
    ) -> Tensor:
        """Decode one batch token by token: hidden (R, C), mask (R, L), uniforms (B, T) -> tokens (B, T)."""
        guided = len(hidden) != len(uniforms)
        position = mask.sum(dim=-1, keepdim=True)  # (R, 1)
        seen = None if mask.all() else F.pad(mask, (0, self.image_tokens), value=True)[:, None, None]  # (R, 1, 1, L + T)
        tokens = torch.empty(uniforms.shape, dtype=torch.int64, device=self.device)
        for step in range(self.image_tokens):
            logits = self.branch.generation_head(hidden).float()  # (R, V)
            tokens[:, step] = draw(guide(logits, guidance) if guided else logits, temperature, uniforms[:, step])
            if step + 1 == self.image_tokens:
                break
            embedding = self.branch.embed_image(tokens[:, step : step + 1])  # (B, 1, C)
            if guided:
                embedding = embedding.repeat(2, 1, 1)  # (R, 1, C)
            visible = None if seen is None else seen[..., : cache.length + 1]
            hidden = cached_forward(self.llama, embedding, position + step, cache, visible)[:, -1]
        return tokens

    @torch.no_grad()
    def decode(self, tokens: Tensor, batch: int = 16) -> Tensor:
        """Image tokens (B, T) -> pictures (B, H, W, 3) uint8, clamped and rounded: what people see is what is judged."""
        pictures = []
        for block in tokens.split(batch):
            pixels = self.model.model.vqmodel.decode(block).permute(0, 2, 3, 1).float()  # (b, H, W, 3)
            pixels = pixels * self._std + self._mean
            pictures.append((pixels.clamp(0, 1) * 255).round().to(torch.uint8))
        return torch.cat(pictures)

    # -- looking -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def judge(self, pictures: Tensor, questions: list[list[str]], batch: int = 32) -> tuple[Tensor, Tensor]:
        """Answer Q yes/no questions about each of B pictures: P(yes) and coverage, each (B, Q) float32.

        pictures uint8 (B, H, W, 3); questions: B lists of Q. The picture and all text before it run once; its questions
        follow side by side in one pass, each seeing the picture and itself only.
        """
        answers = [
            self._judge_batch(pictures[start : start + batch].to(self.device), questions[start : start + batch])
            for start in range(0, len(pictures), batch)
        ]
        p_yes, coverage = (torch.cat(parts) for parts in zip(*answers, strict=True))
        return p_yes, coverage

    def _judge_batch(self, pictures: Tensor, questions: list[list[str]]) -> tuple[Tensor, Tensor]:
        n_questions = len(questions[0])
        split = [self.question_ids(question) for row in questions for question in row]
        prefix = split[0][0]  # the same for all: no padding, plainly causal
        suffixes = [suffix for _, suffix in split]
        width = max(map(len, suffixes))
        text = torch.tensor([ids + [self.pad] * (width - len(ids)) for ids in suffixes], device=self.device)  # (B Q, S)
        last = torch.tensor([len(ids) - 1 for ids in suffixes], device=self.device)  # (B Q,)
        cache = self._see(pictures, prefix, room=n_questions * width)
        text = text.view(len(pictures), n_questions * width)
        positions = torch.arange(width, device=self.device).repeat(n_questions)[None] + cache.length  # (1, Q S)
        mask = self._side_by_side(n_questions, width, cache.length)
        hidden = cached_forward(self.llama, self.branch.embed_tokens(text), positions, cache, mask)
        hidden = hidden.view(len(suffixes), width, -1)[torch.arange(len(suffixes), device=self.device), last]  # (B Q, C)
        p_yes, coverage = yes_no(self.model.lm_head(hidden), self._yes, self._no)
        return p_yes.view(-1, n_questions), coverage.view(-1, n_questions)

    def _side_by_side(self, n_questions: int, width: int, before: int) -> Tensor:
        """Mask (Q S, before + Q S): the shared prefix, and what came before in the same question."""
        place = torch.arange(n_questions * width, device=self.device)
        own = (place[:, None] // width == place // width) & (place[:, None] >= place)
        return F.pad(own, (before, 0), value=True)

    def _see(self, pictures: Tensor, prefix: list[int], room: int) -> KeyValueCache:
        """Run the shared prefix, pictures (B, H, W, 3) included, and return its cache with `room` tokens to spare."""
        ids = torch.tensor(prefix, device=self.device)
        embeddings = self.branch.embed_tokens(ids).repeat(len(pictures), 1, 1)  # (B, L, C)
        features = self.model.model.aligner(self.model.model.vision_model(self._pixels(pictures)).last_hidden_state)
        embeddings[:, ids == self.image] = features.to(embeddings.dtype)
        cache = KeyValueCache(self.llama, len(pictures), len(prefix) + room, self.model.dtype, self.device)
        cached_forward(self.llama, embeddings, torch.arange(len(prefix), device=self.device)[None], cache, None)
        return cache

    def _pixels(self, pictures: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> what the vision tower reads (B, 3, size, size), with the checkpoint's statistics."""
        size = self.model.config.vision_config.image_size
        if pictures.shape[1:3] != (size, size):  # another model's pictures: resized as the checkpoint's processor does
            pixels = self.processor.image_processor(list(pictures.permute(0, 3, 1, 2).cpu()), return_tensors="pt")
            return pixels["pixel_values"].to(self.device, self.model.dtype)
        pixels = (pictures.float() / 255 - self._mean) / self._std
        return pixels.permute(0, 3, 1, 2).to(self.model.dtype)

    # -- training ------------------------------------------------------------------------------------------------------

    def logps(
        self, prompts: list[str], tokens: Tensor, seeds: list[int] | None = None, unconditional: Tensor | None = None
    ) -> Tensor:
        """log p(token | prompt, tokens before it) of B pictures: (B, T) float32, differentiable.

        tokens (B, T) int64. One teacher-forced pass with plain conditional logits: no guidance, no temperature, a
        float32 log-softmax. unconditional: (B,) bool, rows that see the unconditional prompt instead of their own
        (caption dropout). seeds are for families whose log-probs are estimates; here they change nothing.
        """
        ids, mask = pad_left([self.prompt_ids(prompt) for prompt in prompts], self.pad, self.device)
        if unconditional is not None:
            ids = torch.where(unconditional.to(self.device)[:, None], self.unconditional(ids), ids)
        return self.branch(ids, mask, tokens.to(self.device))

    def trainable_parameters(self, scope: str = "language_model") -> dict[str, nn.Parameter]:
        """Name -> parameter of what training changes; all others are frozen (`requires_grad` False).

        scope "language_model": the decoder layers and the final norm, the paper's best choice. "drawing": those and the
        image-token embeddings, their aligner and the generation head. The token embedding, lm_head, vision tower,
        understanding aligner and VQ model never train.
        """
        prefixes = {
            "language_model": ("model.language_model.layers.", "model.language_model.norm."),
            "drawing": ("model.language_model.layers.", "model.language_model.norm.", "model.generation_"),
        }[scope]
        trained = {}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith(prefixes))
            if parameter.requires_grad:
                trained[name] = parameter
        return trained

    # -- files ---------------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, str]:
        """What the files between the steps say about this model: name, hash of its weights, codebook, image tokens."""
        assert self.directory is not None, "a model that was never loaded or saved has no identity"
        return {
            "model": absolute_name(self.name),
            "model_hash": weights_hash(self.directory),
            "codebook_size": str(self.codebook_size),
            "image_tokens": str(self.image_tokens),
        }

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a directory that plain transformers loads and generates with; it appears whole or not at all.

        dtype: default as it was stored. The live model is cast to it, so save is the last thing done with a model in
        training. Shards of at most 5 GB. An existing directory at `path` is replaced. A full disk is an OSError.
        """
        path = Path(path)
        dtype = dtype or getattr(torch, self.stored_dtype)
        generation = self.model.generation_config  # what plain generate needs, also where it was not in a file before
        generation.bos_token_id, generation.pad_token_id = self.bos, self.pad
        generation.generation_kwargs = {"boi_token_id": self.boi}
        generation._from_model_config = False  # or transformers leaves generation_kwargs out
        temporary, replaced = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
        try:
            for tensor in (*self.model.parameters(), *self.model.buffers()):  # one by one: sharded layers refuse .to()
                tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data
            self.model.save_pretrained(temporary, max_shard_size="5GB")
            self.processor.save_pretrained(temporary)
            umask = os.umask(0)
            os.umask(umask)
            for file in temporary.iterdir():
                file.chmod(0o666 & ~umask)  # the safetensors library leaves its files to their owner alone
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
            descriptor = os.open(temporary, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            if path.exists():  # moved aside first: a half-deleted model must not lie under its name
                os.replace(path, replaced)
            os.replace(temporary, path)
        except (SafetensorError, OSError) as error:
            full = "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
            code = errno.ENOSPC if full else getattr(error, "errno", None) or errno.EIO
            raise OSError(code, f"the model cannot be saved: {error}", str(path)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if path.exists():
                shutil.rmtree(replaced, ignore_errors=True)
        self.name, self.directory, self.stored_dtype = str(path), path, str(dtype).removeprefix("torch.")


def absolute_name(path_or_hub_id: str) -> str:
    """A model's name that holds from any working directory: absolute for a directory, as it is for a hub id."""
    return str(Path(path_or_hub_id).resolve()) if Path(path_or_hub_id).is_dir() else path_or_hub_id

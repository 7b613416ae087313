"""A unified model, one that both draws and looks: load it, sample pictures, judge them, score tokens, save it.

`load` tells the families apart by config.json and is the only place that knows both: `Janus`, here, is Janus-Pro as
transformers implements it (`deepseek-community/Janus-Pro-1B`, `-7B`, or any directory in that format); `ShowO`, in showo.py,
is `showlab/show-o` and what was saved from it. Nothing outside the two classes knows how a family works. Their interface:

    sample(prompts, n, guidance, temperature, seeds)  -> image tokens (P, n, T)
    decode(tokens)                                    -> pictures, uint8 (B, H, W, 3)
    judge(tokens or pictures, questions)              -> P(yes), coverage, each (B, Q); look(): and log p(caption)
    answer_logps(tokens or pictures, questions)       -> log P(yes), log P(no), coverage, each (B,), differentiable
    logps(prompts, tokens, seeds)                     -> log-probs of the tokens, float32 (B, T), differentiable

and, for the scripts that train and score: exact_logps (whether `logps` are log-probs or estimates, made from seeds),
steps and draws (see `load`), image_tokens, codebook_size, device, model, branch and blocks (what trains, what is sharded),
prompt_ids, question_ids, caption_ids, trainable_parameters, recompute_activations, activation_bytes, drawing_batch,
release_memory, identity, save.

Everything specific to a checkpoint (chat template, special tokens, sizes, pixel statistics) is read from its files.
Only safetensors weights and JSON are read, and no code from a checkpoint is ever run.

Legend: B rows of a batch, P prompts, N candidates a prompt, T image tokens a picture, V codebook size,
L tokens of text, S new tokens of a step, R rows in flight (doubled by guidance), C hidden size, Q questions a picture.
"""

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import JanusConfig, JanusForConditionalGeneration, JanusProcessor
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from llama import KeyValueCache, Llama
from lora import adapters, merge_adapters
from pretrained import (
    SUPPORTED,
    CheckpointError,
    absolute_name,
    check_config,
    read_object,
    reason,
    resolve,
    stored_dtype,
    tensor_sizes,
    weight_files,
    weights_hash,
)
from ranks import memory
from records import whole_directory

if TYPE_CHECKING:
    from showo import ShowO

DESCRIBE = "Describe this image."
MOST_LOGITS = 2**26  # of image tokens at a time in training: 256 MB in float32
READ_STEP = 64  # a recorded decode step reads the cache up to the next multiple of this
MOST_AT_ONCE = 256  # pictures in flight: beyond it, reading the cache is all of the time and more of them gain nothing
PROMPT_STEP = 32  # prompts are filled up to a multiple of this where steps are recorded, so that shapes come back


class PromptError(ValueError):
    """A prompt or question that cannot be given to the model as it stands; names it."""

    exit_code = 2


# ---------------------------------------------------------------------------------------------------------------------
# Loading a checkpoint


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
    path_or_hub_id: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    steps: int | None = None,
    draws: int | None = None,
) -> "Janus | ShowO":
    """Load a checkpoint for sampling, judging and training.

    device: default the GPU where there is one, else the CPU. dtype: default bfloat16 on a GPU, float32 on a CPU,
    whatever the checkpoint is stored in. steps: passes that a picture is drawn in; draws: random masks that the log-probs of
    a picture are estimated from; default the family's own. Raises CheckpointError for anything that is not a complete
    checkpoint of a family that is known here, and for steps or draws of a family that has no such number.
    """
    directory = resolve(path_or_hub_id)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    config = directory / "config.json"
    if config.is_file() and str(read_object(config).get("_class_name")).startswith("Showo"):
        from showo import load_showo  # only here, and only for it: showo.py imports this file

        showo = load_showo(directory, str(path_or_hub_id), device, dtype)
        showo.steps, showo.draws = steps or showo.steps, draws or showo.draws
        return showo
    check_config(directory, str(path_or_hub_id))
    if steps:
        raise CheckpointError(f"{path_or_hub_id}: takes no --steps, found {steps}: it draws one token after the other")
    if draws:
        raise CheckpointError(f"{path_or_hub_id}: takes no --mask-draws, found {draws}: its log-probs are exact")
    with quiet():
        model, processor, report = read_checkpoint(directory, str(path_or_hub_id), dtype)
    check_report(report, str(path_or_hub_id))
    model.to(device)
    check_finite(model, str(path_or_hub_id))
    policy = Janus(model, processor, name=str(path_or_hub_id), directory=directory)
    check_text(policy)
    return policy


def check_report(report: dict[str, Any], name: str) -> None:
    """Raise CheckpointError if transformers' report on loading names tensors that were not there as they should be.

    It fills these with random numbers and goes on; a judge with random weights is worse than none.
    """
    lost = report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]}
    lost |= {key for key in report["unexpected_keys"] if ".layers." in key}  # config.json wants fewer than there are
    if lost:
        raise CheckpointError(f"{name}: {len(lost)} tensors are missing or misshapen, first {min(lost)}")


def check_finite(model: nn.Module, name: str) -> None:
    """Raise CheckpointError for NaN or infinite weights."""
    for key, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name}: {key} holds NaN or infinite weights")


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


def spellings(tokenizer: Any, word: str) -> list[int]:
    """Ids of all tokens that spell a word, whatever their capitals and leading space ("yes", " yes", "Yes", ...)."""
    clean = {"Ġ": " ", "▁": " "}  # how byte-level BPE and SentencePiece write a space
    found = []
    for token, index in tokenizer.get_vocab().items():
        for mark, space in clean.items():
            token = token.replace(mark, space)
        if token.strip().casefold() == word:
            found.append(index)
    return sorted(found)


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
    """log softmax of the given tokens: logits (..., V), tokens (...) int64 -> (...) float32, whatever the logits are."""
    return logits.float().log_softmax(dim=-1).gather(-1, tokens[..., None]).squeeze(-1)


def head_logps(head: nn.Module, hidden: Tensor, tokens: Tensor, codebook_size: int, most: int = MOST_LOGITS) -> Tensor:
    """`token_logps` of a head's logits, never more than about `most` of them at a time.

    hidden (B, T, C), tokens (B, T) int64 -> (B, T) float32. Where the whole batch has more, the logits are made in pieces,
    thrown away, and made again in the backward pass: 9,216 image tokens of Janus-Pro would be 600 MB, thrice over.
    """
    if tokens.numel() * codebook_size <= most:
        return token_logps(head(hidden), tokens)
    rows = max(1, most // codebook_size)
    parts = [
        checkpoint(lambda h, t: token_logps(head(h), t), h, t, use_reentrant=False, preserve_rng_state=False)
        for h, t in zip(hidden.flatten(0, 1).split(rows), tokens.flatten().split(rows), strict=True)
    ]
    return torch.cat(parts).view(tokens.shape)


def yes_no(logits: Tensor, yes_ids: Tensor, no_ids: Tensor) -> tuple[Tensor, Tensor]:
    """P(yes) and coverage from the logits of the first answer token (..., vocabulary); both (...) float32.

    P(yes) = sum of p over the spellings of yes / (the same sum over yes and no); coverage = that whole sum. A coverage
    far from 1 says that the model wanted to say something else.
    """
    yes, no = yes_no_logps(logits, yes_ids, no_ids)
    return torch.sigmoid(yes - no), torch.logaddexp(yes, no).exp()


def yes_no_logps(logits: Tensor, yes_ids: Tensor, no_ids: Tensor) -> tuple[Tensor, Tensor]:
    """log of the summed p of the spellings of yes, and of no, over the whole vocabulary: both (...) float32."""
    logps = logits.float().log_softmax(dim=-1)
    return logps[..., yes_ids].logsumexp(dim=-1), logps[..., no_ids].logsumexp(dim=-1)


def answer_logits(head: nn.Linear, hidden: Tensor, answers: Tensor) -> Tensor:
    """A head's logits (B, vocabulary) float32: those of `answers` from a float32 product, the others as the weights are.

    bfloat16 has steps of 1/16 at 10, and P(yes) is a difference of such numbers; the others only count as a sum.
    """
    bias = None if head.bias is None else head.bias[answers].float()
    logits = head(hidden).float()
    logits[:, answers] = F.linear(hidden.float(), head.weight[answers].float(), bias)
    return logits


def answer_logps(head: nn.Linear, hidden: Tensor, yes_ids: Tensor, no_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log P(yes), log P(no) and coverage, each (B,) float32, from the hidden states (B, C) that predict an answer."""
    yes, no = yes_no_logps(answer_logits(head, hidden, torch.cat([yes_ids, no_ids])), yes_ids, no_ids)
    return F.logsigmoid(yes - no), F.logsigmoid(no - yes), torch.logaddexp(yes, no).exp()


def text_logps(head: nn.Module, hidden: Tensor, texts: list[list[list[int]]], start: int) -> Tensor:
    """log p of each text's tokens from number `start` on, given those before: B lists of K texts -> (B, K) float32, in nats.

    hidden (B, K, S, C): the state at token s predicts token s + 1.
    """
    logps = torch.zeros(hidden.shape[:2], device=hidden.device)
    numbered = [(b, k, ids) for b, row in enumerate(texts) for k, ids in enumerate(row)]
    where = [(b, k, s, ids[s + 1]) for b, k, ids in numbered for s in range(start - 1, len(ids) - 1)]
    if where:
        b, k, s, token = torch.tensor(where, device=hidden.device).T
        logps.index_put_((b, k), token_logps(head(hidden[b, k, s]), token), accumulate=True)
    return logps


def read_answers(
    head: nn.Linear, hidden: Tensor, texts: list[list[list[int]]], n_questions: int, start: int, yes_ids: Tensor, no_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """P(yes), coverage (B, Q) and log p of captions (B, K) from the hidden states (B, Q + K, S, C) of a picture's texts.

    texts: B lists of Q questions, each answered at its last token, then K captions, whose tokens begin at `start`.
    """
    row = torch.arange(len(texts), device=hidden.device)
    last = torch.tensor([[len(ids) - 1 for ids in asked[:n_questions]] for asked in texts], device=hidden.device)  # (B, Q)
    answering = hidden[row[:, None], torch.arange(n_questions, device=hidden.device), last]  # (B, Q, C)
    logits = answer_logits(head, answering.flatten(0, 1), torch.cat([yes_ids, no_ids]))
    p_yes, coverage = yes_no(logits, yes_ids, no_ids)
    logps = text_logps(head, hidden[:, n_questions:], [asked[n_questions:] for asked in texts], start)
    return p_yes.view(-1, n_questions), coverage.view(-1, n_questions), logps


def train_only(model: nn.Module, pattern: str) -> dict[str, nn.Parameter]:
    """Freeze all parameters but those whose names begin with the regular expression; returns these by name."""
    trained = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.match(pattern, name) is not None)
        if parameter.requires_grad:
            trained[name] = parameter
    return trained


def recompute(language_model: nn.Module) -> None:
    """Turn on transformers' gradient checkpointing; the method's name changed in transformers 5."""
    enable = getattr(language_model, "activation_checkpointing_enable", None) or language_model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def pad_left(rows: list[list[int]], pad: int, device: torch.device, step: int = 1) -> tuple[Tensor, Tensor]:
    """Token lists -> ids (B, L) and mask (B, L) bool, padded on the left so that every row ends at the same place.

    L is the next multiple of `step`.
    """
    length = -(-max(map(len, rows)) // step) * step
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask, True where a token may look, as what attention adds to its scores: 0 there, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


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

    def __init__(self, model: JanusForConditionalGeneration) -> None:
        super().__init__()
        self.embed_tokens = model.get_input_embeddings()
        self.generation_embeddings = model.model.generation_embeddings
        self.generation_aligner = model.model.generation_aligner
        self.language_model = model.model.language_model
        self.generation_head = model.model.generation_head

    def embed_image(self, tokens: Tensor) -> Tensor:
        """Image tokens (B, T) -> what the language model reads (B, T, C)."""
        return self.generation_aligner(self.generation_embeddings(tokens))

    def forward(self, ids: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
        """ids (B, L), each row its prompt up to begin-of-image, `lengths` (B,) ids, then anything; tokens (B, T).

        Returns log-probs (B, T) float32. Hidden state k predicts image token k+1 and the last prompt position predicts token
        0, so the last image token is never fed in. Each row's image follows its own prompt and what is left over comes
        last, where causal attention never looks: no mask is needed, and flash attention takes none.
        """
        step = torch.arange(tokens.shape[1], device=ids.device)
        text = self.embed_tokens(ids)
        if torch.is_autocast_enabled(text.device.type):
            text = text.float()  # what the layers add to, also where frozen weights are bfloat16
        image = self.embed_image(tokens[:, :-1]).to(text.dtype)  # (B, T - 1, C)
        after = (lengths[:, None] + step[:-1])[..., None].expand_as(image)
        embeddings = F.pad(text, (0, 0, 0, len(step) - 1)).scatter(1, after, image)  # (B, L + T - 1, C)
        hidden = self.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        predicts = (lengths[:, None] - 1 + step)[..., None].expand(-1, -1, hidden.shape[-1])
        hidden = hidden.gather(1, predicts)  # (B, T, C)
        logps = head_logps(self.generation_head, hidden, tokens, self.generation_embeddings.num_embeddings)
        return logps.clone()  # no view: sharding hangs its hook on it


class Drawing:
    """The decode loop of one batch shape: everything that a step reads or writes has its place, allocated once.

    A step is plain tensor work that never waits for the device. On a GPU it is recorded as a CUDA graph, one for each
    READ_STEP tokens of cache to be read, and replayed: no Python, no launches, and short caches are not read as long ones.
    On a CPU it runs as it stands and reads what is there.
    """

    def __init__(
        self,
        branch: DrawingBranch,
        llama: Llama,
        n: int,
        length: int,
        image_tokens: int,
        guidance: float,
        temperature: float,
        record: bool,
    ) -> None:
        """n pictures at a time, of `image_tokens` tokens, after prompts of `length` tokens with their padding."""
        self.branch, self.llama, self.length = branch, llama, length
        self.guidance, self.temperature, self.record = guidance, temperature, record
        self.weights = llama.layers()  # recorded steps read these very tensors
        device = branch.embed_tokens.weight.device
        rows = 2 * n if guidance != 1 else n
        self.cache = llama.cache(rows, self._reads(length + image_tokens - 1))
        room = self.cache.keys[0].shape[2]
        self.angles = llama.angles(torch.arange(room, device=device))  # two of (room, D)
        self.added = torch.zeros(rows, 1, 1, room, dtype=self.cache.keys[0].dtype, device=device)  # to attention's scores
        self.first = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # the position of image token 0
        self.uniforms = torch.zeros(n, image_tokens, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(n, image_tokens, dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)  # the image token that is chosen next
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def draw(self, prefix: KeyValueCache, rows: Tensor, mask: Tensor, hidden: Tensor, uniforms: Tensor) -> Tensor:
        """Continue prompts to pictures: tokens (n, T).

        prefix: the cache of all prompts; rows (R,): which of them each row continues; mask (R, L) bool and hidden (R, C):
        their real tokens and last hidden states; uniforms (n, T) float64.
        """
        self.cache.fill(prefix, rows)
        self.first.copy_(mask.sum(dim=-1, keepdim=True))
        self.uniforms.copy_(uniforms)
        self.added.fill_(float("-inf"))
        self.added[:, 0, 0, : self.length] = additive(mask, self.added.dtype)
        self.masked = self.record or not mask.all()  # without padding, a CPU's exact reading needs no mask
        self.step.zero_()
        with torch.inference_mode():  # nothing of it is differentiated: cheaper still than no_grad
            self._choose(hidden)
            for place in range(self.length, self.length + self.tokens.shape[1] - 1):
                self._advance(self._reads(place + 1))
        return self.tokens.clone()

    def _reads(self, used: int) -> int:
        """How much of the cache a step reads of which `used` places are filled."""
        return -(-used // READ_STEP) * READ_STEP if self.record else used

    def _advance(self, end: int) -> None:
        """One step: replayed where it has been recorded; the first of its kind runs, then is recorded for the next."""
        if not self.record:
            self._feed_and_choose(end)
        elif end in self._graphs:
            self._graphs[end].replay()
        else:
            self._feed_and_choose(end)
            self._graphs[end] = self._recorded(end)

    def _recorded(self, end: int) -> "torch.cuda.CUDAGraph":
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None  # graphs never run at once: one pool
        with torch.cuda.graph(graph, pool=pool):
            self._feed_and_choose(end)
        return graph

    def _feed_and_choose(self, end: int) -> None:
        """Run the token chosen last through the language model and choose the next; `end` places of the cache are read."""
        place = self.length + self.step  # (1,)
        x = self.branch.embed_image(self.tokens.index_select(1, self.step))  # (n, 1, C)
        if len(self.first) > len(x):
            x = x.repeat(2, 1, 1)  # (R, 1, C)
        angles = tuple(table[self.first + self.step] for table in self.angles)  # two of (R, 1, D)
        mask = self.added.index_fill_(-1, place, 0.0)[..., :end] if self.masked else None
        hidden = self.llama.forward(x, angles, self.cache, place, end, mask)
        self.step += 1
        self._choose(hidden[:, -1])

    def _choose(self, hidden: Tensor) -> None:
        """Draw image token number `step` from the hidden states (R, C) that predict it."""
        logits = self.branch.generation_head(hidden).float()  # (R, V)
        if len(logits) > len(self.tokens):
            logits = guide(logits, self.guidance)  # (n, V)
        token = draw(logits, self.temperature, self.uniforms.index_select(1, self.step)[:, 0])
        self.tokens.index_copy_(1, self.step, token[:, None])


class Janus:
    """Janus-Pro: an autoregressive drawing branch and a looking branch about one language model.

    Chen et al. 2025 (arXiv 2501.17811); the implementation of the layers is transformers'.
    """

    exact_logps = True
    steps = draws = None  # a picture is drawn in as many steps as it has tokens, and nothing is estimated from draws

    def __init__(
        self, model: JanusForConditionalGeneration, processor: JanusProcessor, name: str = "", directory: Path | None = None
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.name = name
        self.directory = directory
        self.stored_dtype = stored_dtype(directory) if directory else "float32"
        self.branch = DrawingBranch(model)
        self.llama = model.model.language_model
        self.lean = Llama(self.llama)  # the same weights, read for inference
        self._drawing: tuple[tuple, Drawing] | None = None  # the last batch shape, and what it allocated
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
        self.special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        yes, no = (spellings(self.tokenizer, word) for word in ("yes", "no"))
        if not yes or not no:
            raise CheckpointError(f"{self.name}: no single token of the vocabulary spells {'no' if yes else 'yes'}")
        self._yes, self._no = (torch.tensor(ids, device=self.device) for ids in (yes, no))

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

    def caption_ids(self, caption: str) -> list[int]:
        """The tokens of a caption as the answer to DESCRIBE. Raises PromptError if it spells a special token of the model."""
        asked = self._tokenize(self._chat([{"type": "text", "text": DESCRIBE}]))
        ids = self._tokenize(self._chat([{"type": "text", "text": DESCRIBE}]) + " " + caption)
        if ids[: len(asked)] != asked or len(ids) == len(asked) or self.special & set(ids[len(asked) :]):
            raise PromptError(f"caption {caption[:80]!r} spells a special token of the model, or nothing")
        return ids[len(asked) :]

    def _check_length(self, kind: str, text: str, length: int) -> None:
        """Raise PromptError for what has more tokens than the model has positions: it would see noise, at great cost."""
        positions = self.llama.config.max_position_embeddings
        if length > positions:
            raise PromptError(
                f"{kind} {text[:80]!r} makes {length} tokens with its picture; the model has {positions} positions"
            )

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
        Each prompt is computed once; its keys and values are copied out to the candidates and their guidance rows. The
        candidates of all prompts are cut into batches of one size, `batch` at most.
        """
        seeds = list(range(len(prompts))) if seeds is None else seeds
        step = PROMPT_STEP if self._records else 1
        ids, mask = pad_left([self.prompt_ids(prompt) for prompt in prompts], self.pad, self.device, step)  # (P, L)
        guided = guidance != 1
        if guided:
            ids, mask = torch.cat([ids, self.unconditional(ids)]), mask.repeat(2, 1)  # (2P, L)
        prefix, hidden = self._prefill(ids, mask)
        uniforms = torch.from_numpy(noise(seeds, n, self.image_tokens)).flatten(0, 1).to(self.device)  # (P n, T)
        owner = torch.arange(len(prompts), device=self.device).repeat_interleave(n)  # (P n,) prompt of each candidate
        size = -(-len(owner) // -(-len(owner) // batch))
        drawing = self._drawing_of(size, ids.shape[1], guidance, temperature)
        drawn = []
        for start in range(0, len(owner), size):
            rows = torch.arange(start, start + size, device=self.device).clamp(max=len(owner) - 1)  # the last one filled up
            index = owner[rows]
            if guided:
                index = torch.cat([index, index + len(prompts)])
            drawn.append(drawing.draw(prefix, index, mask[index], hidden[index], uniforms[rows]))
        return torch.cat(drawn)[: len(owner)].unflatten(0, (len(prompts), n))

    @property
    def _records(self) -> bool:
        return self.device.type == "cuda"

    def _drawing_of(self, n: int, length: int, guidance: float, temperature: float) -> Drawing:
        """The decode loop of a batch shape; the last one is kept, because the next chunk of work mostly has its shape."""
        shape = (n, length, self.image_tokens, guidance, temperature, self._records)
        if self._drawing is None or self._drawing[0] != shape or self._drawing[1].weights is not self.lean.layers():
            self._drawing = None  # its memory first
            self._drawing = shape, Drawing(self.branch, self.lean, *shape)
        return self._drawing[1]

    def release_memory(self) -> None:
        """Give back what is kept between batches."""
        self._drawing = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def drawing_batch(self, prompts: list[str], guidance: float) -> int:
        """How many pictures at a time fit into free memory: what `batch` of sample may well be, at most MOST_AT_ONCE.

        A picture takes the keys and values of its tokens, twice with guidance, and its logits. 65 % of what is free is
        given to them, the rest is for looking at the pictures afterwards; on a CPU, which gains little by it, 64 at most.
        """
        config = self.llama.config
        tokens = max(len(self.prompt_ids(prompt)) for prompt in prompts) + PROMPT_STEP + self.image_tokens + READ_STEP
        numbers = 2 * config.num_hidden_layers * self.lean.n_key_heads * self.lean.head_dim
        rows = 2 if guidance != 1 else 1
        each = rows * tokens * numbers * self.model.dtype.itemsize + self.codebook_size * (4 * rows + 3 * 8)
        most = MOST_AT_ONCE if self.device.type == "cuda" else 64
        found = memory(self.device)
        fitting = int(0.65 * found[0]) // each if found else most
        return max(1, min(most, fitting // 8 * 8 or fitting))

    def _prefill(self, ids: Tensor, mask: Tensor) -> tuple[KeyValueCache, Tensor]:
        """Run the prompts (R, L) once: their cache, and the hidden state (R, C) that predicts image token 0."""
        rows, length = ids.shape
        place = torch.arange(length, device=self.device)
        visible = (place[:, None] >= place) & mask[:, None, None, :]  # (R, 1, L, L)
        visible |= place[:, None] == place  # padding sees itself: a row of none is NaN
        cache = self.lean.cache(rows, length)
        hidden = self.lean.forward(
            self.branch.embed_tokens(ids),
            self.lean.angles(positions_of(mask)),
            cache,
            place,
            length,
            None if mask.all() else additive(visible, self.model.dtype),
        )
        return cache, hidden[:, -1]

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

        pictures: image tokens (B, T), decoded first, or uint8 (B, H, W, 3); questions: B lists of Q. The picture and all text
        before it run once; its questions follow side by side in one pass, each seeing the picture and itself only.
        """
        return self.look(pictures, questions, [[] for _ in questions], batch)[:2]

    @torch.no_grad()
    def look(
        self, pictures: Tensor, questions: list[list[str]], captions: list[list[str]], batch: int = 32
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`judge`, and in the same pass how likely the model finds K captions of each picture.

        captions: B lists of K. Returns P(yes) and coverage (B, Q), and log p(caption | picture, DESCRIBE), summed over the
        caption's tokens, in nats, (B, K), all float32: what the model would say of the picture, unasked for yes or no.
        """
        answers = [
            self._look_batch(self._seen(pictures[part]), questions[part], captions[part])
            for part in (slice(start, start + batch) for start in range(0, len(pictures), batch))
        ]
        p_yes, coverage, logps = (torch.cat(parts) for parts in zip(*answers, strict=True))
        return p_yes, coverage, logps

    def _seen(self, pictures: Tensor) -> Tensor:
        """Pictures as they are, image tokens (B, T) as the pictures they stand for."""
        pictures = pictures.to(self.device)
        return self.decode(pictures) if pictures.dim() == 2 else pictures

    def _look_batch(
        self, pictures: Tensor, questions: list[list[str]], captions: list[list[str]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        prefix, describe = self.question_ids(DESCRIBE)  # the prefix is the same for all: no padding, plainly causal
        texts = [
            [self.question_ids(question)[1] for question in asked] + [describe + self.caption_ids(caption) for caption in said]
            for asked, said in zip(questions, captions, strict=True)
        ]
        hidden = self._read_side_by_side(pictures, prefix, texts)  # (B, Q + K, S, C)
        return read_answers(self.model.lm_head, hidden, texts, len(questions[0]), len(describe), self._yes, self._no)

    def _read_side_by_side(self, pictures: Tensor, prefix: list[int], texts: list[list[list[int]]]) -> Tensor:
        """Hidden states (B, K, S, C) of K texts a picture, each after the prefix and the picture, none seeing another."""
        n_texts, width = len(texts[0]), max(len(ids) for row in texts for ids in row)
        before, new = len(prefix), n_texts * width
        rows = [[token for ids in row for token in ids + [self.pad] * (width - len(ids))] for row in texts]
        cache = self._see(pictures, prefix, room=before + new)
        place = torch.arange(new, device=self.device)
        own = (place[:, None] // width == place // width) & (place[:, None] >= place)  # (K S, K S): its own text, causal
        hidden = self.lean.forward(
            self.branch.embed_tokens(torch.tensor(rows, device=self.device)),  # (B, K S, C)
            self.lean.angles((before + place % width)[None]),
            cache,
            before + place,
            before + new,
            additive(F.pad(own, (before, 0), value=True), self.model.dtype)[None, None],
        )
        return hidden.unflatten(1, (n_texts, width))

    def _see(self, pictures: Tensor, prefix: list[int], room: int) -> KeyValueCache:
        """Run the shared prefix, pictures (B, H, W, 3) included, and return its cache, with room for `room` tokens."""
        embeddings = self._embed_prefix(pictures, prefix)
        cache = self.lean.cache(len(pictures), room)
        place = torch.arange(len(prefix), device=self.device)
        self.lean.forward(embeddings, self.lean.angles(place[None]), cache, place, len(prefix), None)
        return cache

    @torch.no_grad()
    def _embed_prefix(self, pictures: Tensor, prefix: list[int]) -> Tensor:
        """What the language model reads of the shared prefix with each picture in it: (B, L, C)."""
        ids = torch.tensor(prefix, device=self.device)
        embeddings = self.branch.embed_tokens(ids).repeat(len(pictures), 1, 1)
        features = self.model.model.aligner(self.model.model.vision_model(self._pixels(pictures)).last_hidden_state)
        embeddings[:, ids == self.image] = features.to(embeddings.dtype)
        return embeddings

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
        rows = [self.prompt_ids(prompt) for prompt in prompts]
        grain = PROMPT_STEP if self.device.type == "cuda" else 1  # few different shapes, and round ones
        width = -(-max(map(len, rows)) // grain) * grain
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        ids = torch.tensor([row + [self.pad] * (width - len(row)) for row in rows], device=self.device)  # (B, L)
        if unconditional is not None:
            ids = torch.where(unconditional.to(self.device)[:, None], self.unconditional(ids), ids)
        return self.branch(ids, lengths, tokens.to(self.device))

    def answer_logps(self, pictures: Tensor, questions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """log P(yes), log P(no) and coverage of one question about each of B pictures: (B,) float32, differentiable.

        pictures: image tokens (B, T), decoded first, or uint8 (B, H, W, 3). `judge`'s numbers by the path that `logps` takes,
        for gradients in the language model; vision tower and aligner get none. P(yes) + P(no) = 1; their logs keep their
        digits where P(yes) rounds to 0 or 1.
        """
        prefix = self.question_ids(questions[0])[0]  # the same for all
        suffixes = [self.question_ids(question)[1] for question in questions]
        width = max(map(len, suffixes))
        text = torch.tensor([ids + [self.pad] * (width - len(ids)) for ids in suffixes], device=self.device)  # (B, S)
        last = torch.tensor([len(prefix) + len(ids) - 1 for ids in suffixes], device=self.device)  # (B,)
        seen = self._embed_prefix(self._seen(pictures), prefix)
        embeddings = torch.cat([seen, self.branch.embed_tokens(text)], dim=1)  # (B, L + S, C); pads come last: no mask
        hidden = self.llama(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        hidden = hidden[torch.arange(len(last), device=self.device), last]  # (B, C)
        return answer_logps(self.model.lm_head, hidden, self._yes, self._no)

    def trainable_parameters(self, scope: str = "language_model") -> dict[str, nn.Parameter]:
        """Name -> parameter of what training changes; all others are frozen (`requires_grad` False).

        scope "language_model": the decoder layers and the final norm, the paper's best choice. "drawing": those and the
        image-token embeddings, their aligner and the generation head. "adapters": those that lora.py has added. The token
        embedding, lm_head, vision tower, understanding aligner and VQ model never train.
        """
        pattern = {
            "language_model": r"model\.language_model\.(layers|norm)\.",
            "drawing": r"model\.(language_model\.(layers|norm)\.|generation_)",
            "adapters": r"model\.language_model\..*\.lora_[ab]$",
        }[scope]
        return train_only(self.model, pattern)

    def recompute_activations(self) -> None:
        """Have training's backward pass compute each layer anew instead of keeping what it computed."""
        recompute(self.llama)

    @property
    def activation_bytes(self) -> int:
        """What a picture's training pass keeps for its backward pass under bfloat16 autocast; a test counts it.

        Per token and layer 40 bytes a unit of the hidden state and 8 a unit of the MLP, prompts taken as 64 tokens.
        """
        config = self.llama.config
        each = 40 * config.hidden_size + 8 * config.intermediate_size
        return (64 + self.image_tokens) * config.num_hidden_layers * each

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

    def _plain(self) -> JanusForConditionalGeneration:
        """The model with its adapters, if it has any, merged into the weights as they are stored.

        The live ones may be rounded to bfloat16, which would swallow what was learnt, in this round and in those before.
        """
        if not adapters(self.model):
            return self.model
        plain = load(self.directory, device="cpu", dtype=torch.float32).model
        merge_adapters(self.model, plain)
        return plain

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a directory that plain transformers loads and generates with; it appears whole or not at all.

        dtype: default as it was stored. The live model is cast to it, so save is the last thing done with a model in
        training. Shards of at most 5 GB. An existing directory at `path` is replaced. A full disk is an OSError.
        """
        path = Path(path)
        dtype = dtype or getattr(torch, self.stored_dtype)
        model = self._plain()
        generation = model.generation_config  # what plain generate needs, also where it was not in a file before
        generation.bos_token_id, generation.pad_token_id = self.bos, self.pad
        generation.generation_kwargs = {"boi_token_id": self.boi}
        generation._from_model_config = False  # or transformers leaves generation_kwargs out
        for tensor in (*model.parameters(), *model.buffers()):  # one by one: sharded layers refuse .to()
            tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data
        with whole_directory(path) as directory:
            model.save_pretrained(directory, max_shard_size="5GB")
            self.processor.save_pretrained(directory)
        self.name, self.directory, self.stored_dtype = str(path), path, str(dtype).removeprefix("torch.")

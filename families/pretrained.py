"""Somebody else's checkpoint directory: find it, name it, and refuse it, mostly before anything of it is loaded.

Only safetensors weights and JSON are read, and no code from a checkpoint is ever run.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import resource
import signal
import string
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.command import printable
from common.records import parse_json
from common.writing import write_one_by_one

SUPPORTED = "Janus-Pro as transformers has it (model_type 'janus', such as deepseek-community/Janus-Pro-1B), any Janus as "
SUPPORTED += "DeepSeek has it (multi_modality), Show-o (showlab/show-o, showlab/show-o-512x512), or a language model with "
SUPPORTED += "image codes in its vocabulary (csuhan/Tar-1.5B, Junfeng5/Liquid_V1_7B)"
INDEX = "model.safetensors.index.json"
SHARDS, SHARD_BYTES = "model{suffix}.safetensors", 5 * 10**9
# What transformers and its tokenizers read of a checkpoint besides the weights and config.json.
JSON_FILES = (
    *("generation_config.json", "processor_config.json", "preprocessor_config.json", "chat_template.json", INDEX),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
LARGE_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")  # the largest published are of 35 MB
READ_SUFFIXES = (".jinja", ".model", ".safetensors")
ADAPTER = "adapter_config.json"
LIMIT_S, LIMIT_BYTES = 5, 2**31  # what a few lines of text may take of a processor and of memory; the largest tokenizer: 2 s
# Keys by which a checkpoint's JSON has transformers run other code, or read other files, than its own.
FOREIGN = {"auto_map", "quantization_config", "transformers_weights", "fusion_config", "kernel_config", "per_layer_config"}
IMPLEMENTATIONS = re.compile("_?(attn|experts)_implementation")  # foreign only if they name a kernel of the hub, owner/name


class CheckpointError(ValueError):
    """A path or hub id that is not a checkpoint this project can use; says what was found and what is supported."""

    exit_code = 2


def resolve(path_or_hub_id: str | Path) -> Path:
    """The local directory of a checkpoint, fetched from the hub where the name is not a directory.

    Raises CheckpointError if there is no such thing, or `check_directory` refuses it.
    """
    path = Path(path_or_hub_id)
    try:
        if path.is_dir():
            return check_directory(path)
        if path.exists():
            raise CheckpointError(f"{path}: is a file, but a checkpoint is a directory")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(path_or_hub_id)):
        raise CheckpointError(f"{path}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        fetched = Path(snapshot_download(str(path_or_hub_id), allow_patterns=patterns))
    except Exception as error:  # the hub's client raises its HTTP library's own kinds when there is no network
        raise CheckpointError(f"{path}: neither a directory here nor to be had from the hub: {reason(error)}") from None
    return check_directory(fetched)


def check_directory(directory: Path) -> Path:
    """A checkpoint's directory as it was given; nothing of it is read.

    Raises CheckpointError for a file that may not be read, for text of a size that only an attack or a mistake has, and for an
    adapter: where peft is installed, transformers would read the weights that the adapter names instead.
    """
    if os.path.lexists(directory / ADAPTER):
        raise CheckpointError(f"{directory}: has an {ADAPTER}: an adapter is not a whole checkpoint; merge it into its model")
    try:
        files = [*directory.iterdir(), *(directory / "additional_chat_templates").glob("*.jinja")]
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror}") from None
    for file in files:
        large = file.name in LARGE_FILES or file.suffix == ".model"
        if not (large or file.name in ("config.json", *JSON_FILES) or file.suffix in READ_SUFFIXES):
            continue
        try:
            if not file.is_file():  # opening a pipe would wait for ever
                if file.suffix == ".safetensors":  # the hash of the weights reads them all
                    raise CheckpointError(f"{file}: is not a file")
                continue  # refused where it is wanted
            with open(file, "rb"):
                size = file.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
        most = 2**27 if large else 2**24
        if size > most and file.suffix != ".safetensors":
            raise CheckpointError(f"{file}: is of {size:,} bytes, but at most {most:,} of it are read")
    return directory


def reason(error: Exception) -> str:
    """The first line of somebody else's error, not too long, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def device_and_type(device: str | torch.device | None, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    """Where a model is to lie, and as what: by default on the GPU where there is one, in bfloat16; in float32 on a CPU.

    A GPU's attention is then not left to cuDNN, which this process would prefer from torch 2.11 on: it plans every new shape
    for half a second, and with a mask its backward pass can give NaN (pytorch/pytorch#196678).
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device, dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)


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


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """The shapes of a safetensors file's tensors by name; raises CheckpointError for what is not such a file."""
    if not file.is_file():  # opening a pipe would wait for ever
        raise CheckpointError(f"{file}: is not a file")
    try:
        with open(file, "rb"), safe_open(file, framework="pt") as tensors:  # alone, it finds no file that may not be read
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be loaded as safetensors: {error}") from None


def tensor_sizes(file: Path) -> list[int]:
    """How many numbers each tensor of a safetensors file holds; raises CheckpointError for what is not such a file."""
    return [math.prod(shape) for shape in tensor_shapes(file).values()]


def tensor_names(file: Path) -> list[str]:
    """The names of the tensors of a safetensors file."""
    with safe_open(file, framework="pt") as tensors:
        return [*tensors.keys()]


def check_tensors(wanted: dict[str, list[int]], found: dict[str, list[int]], file: Path) -> None:
    """Raise CheckpointError for the first tensor that is missing, misshapen or too many."""
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            told = [f"of shape {shapes[key]}" if key in shapes else "missing" for shapes in (found, wanted)]
            raise CheckpointError(f"{file}: {key} is {told[0]}, but should be {told[1]}")


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a safetensors file as it is stored, on the CPU. The file is opened for it alone: pages go with it."""
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def stored_dtype(directory: Path, unused: re.Pattern[str] | None = None) -> str:
    """The torch name of the type a checkpoint's weights are stored in: a half one if all are of it, else float32.

    unused: names of what does not count.
    """
    kinds = set()
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if not (unused and unused.fullmatch(name))]  # noqa: SIM118 (no dict)
            kinds |= {file.get_slice(name).get_dtype() for name in names}
    kinds -= {"I64"}  # buffers that count
    return torch_name(kinds.pop()) if len(kinds) == 1 else "float32"


def torch_name(kind: str) -> str:
    """What torch calls a safetensors type that weights are stored in; float32 for all but the two half ones."""
    return {"BF16": "bfloat16", "F16": "float16"}.get(kind, "float32")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a checkpoint's file; raises CheckpointError for anything else, NaN included."""
    if not file.is_file():
        raise CheckpointError(f"{file}: is not a file")
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
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


def check_files(directory: Path, name: str, unread: str = "", ignored: tuple[str, ...] = ()) -> None:
    """Raise CheckpointError unless `directory` has safetensors weights, and JSON that has no other code run or files read.

    unread: what to do about weights that are pickled. ignored: keys whose code nobody is told of.
    """
    if not list(directory.glob("*.safetensors")):
        listing = sorted(entry.name for entry in directory.iterdir())[:8]
        raise CheckpointError(f"{name}: no safetensors weights (found {listing}); pickled weights are never read{unread}")
    found = [file for file in ("config.json", *JSON_FILES) if os.path.lexists(directory / file)]
    settings = {file: read_object(directory / file) for file in found}
    settings.pop("tokenizer.json", None)  # its keys are words
    for file, value in settings.items():
        if asked := foreign_keys(value).difference(ignored):
            raise CheckpointError(f"{name}: {file} has {min(asked)!r}: nothing but a checkpoint's own weights is read or run")


def foreign_keys(value: Any) -> set[str]:
    """The keys of a JSON value, however deep, that would have other code run or other files read."""
    if isinstance(value, list):
        return set().union(*map(foreign_keys, value))
    if not isinstance(value, dict):
        return set()
    kernels = {key for key, name in value.items() if IMPLEMENTATIONS.fullmatch(key) and "/" in str(name)}
    return kernels.union(FOREIGN & value.keys(), *map(foreign_keys, value.values()))


def absolute_name(path_or_hub_id: str) -> str:
    """A model's name that holds from any working directory: absolute for a directory, as it is for a hub id."""
    return str(Path(path_or_hub_id).resolve()) if Path(path_or_hub_id).is_dir() else path_or_hub_id


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


def put(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Move a model to its device, tensor by tensor, and its parameters to a type; the buffers' types are their own."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.to(device)
        if isinstance(tensor, torch.nn.Parameter):
            tensor.data = tensor.data.to(dtype)


def check_report(report: dict[str, Any], name: str) -> None:
    """Raise CheckpointError if transformers' report on loading names tensors that were not there as they should be.

    It fills these with random numbers and goes on; a judge with random weights is worse than none.
    """
    lost = report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]}
    lost |= {key for key in report["unexpected_keys"] if ".layers." in key}  # config.json wants fewer than there are
    if lost:
        raise CheckpointError(f"{name}: {len(lost)} tensors are missing or misshapen, first {min(lost)}")


def check_finite(weights: Iterable[tuple[str, Tensor]], name: str) -> None:
    """Raise CheckpointError for NaN or infinite weights."""
    for key, tensor in weights:
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name}: {key} holds NaN or infinite weights")


def check_head(head: Tensor, embedding: Tensor, name: str) -> None:
    """Warn, in one line, of a model whose lm_head is its token embedding, in a family that has two.

    transformers 5 ties the two by default, its own converter of the original checkpoints too: lm_head is lost.
    """
    same = head is embedding or (head.shape == embedding.shape and torch.equal(head, embedding))
    if same and not int(os.environ.get("RANK") or 0):
        about = "its lm_head is its token embedding, as transformers 5 converts it: what it says and how it judges is lost"
        print(f"warning        {printable(name)}: {about}", file=sys.stderr)


def check_text_limits(directory: Path, name: str, read: Callable[[str], object], more_s: int = 0) -> None:
    """Raise CheckpointError if `read`, a checkpoint's template and tokenizer at work on a text, takes for ever or all memory.

    It is tried in a process of its own: a normaliser's loop is no Python and can only be killed. The texts have every letter
    that the tokenizer's rules name, many times over. What `read` raises besides is left to who calls it again. more_s: what
    it may take of a processor beyond LIMIT_S.
    """
    limit_s = LIMIT_S + more_s
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):  # what Rust says when memory is refused is not our line
                os.dup2(null, stream)
            _limit_this_process(limit_s)
            for text in ("yes", _hard_text(directory)):
                read(text)
            code = 0
        except MemoryError:
            code = 2
        finally:
            os._exit(code)
    try:
        status = os.waitpid(pid, 0)[1]
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 2:
        most = f"{limit_s} s or {LIMIT_BYTES / 2**30:.0f} GB"
        raise CheckpointError(f"{name}: its tokenizer or chat template takes more than {most} for a few lines of text")


def _limit_this_process(limit_s: int) -> None:
    """The kernel ends a process that has used limit_s, whatever it is at; it may ask for LIMIT_BYTES more than it has."""
    resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s + 1))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(10 * limit_s)  # for what waits and takes no time
    torch.set_num_threads(1)  # the threads of the process before are not in this one
    if Path("/proc/self/statm").is_file():
        pages, hard = int(Path("/proc/self/statm").read_text().split()[0]), resource.getrlimit(resource.RLIMIT_AS)[1]
        most = pages * resource.getpagesize() + LIMIT_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _hard_text(directory: Path) -> str:
    """Every printable letter, and every letter of a tokenizer's rules, 48 times."""
    letters = string.ascii_letters + string.digits + string.punctuation
    if (directory / "tokenizer.json").is_file():
        rules = read_object(directory / "tokenizer.json")
        told = json.dumps([rules.get(key) for key in ("normalizer", "pre_tokenizer")], ensure_ascii=False)
        letters += "".join(sorted({letter for letter in told if letter.isprintable()} - set(letters))[:1000])
    return " ".join(letter * 48 for letter in letters)


def write_config(directory: Path, model: Any, dtype: torch.dtype) -> None:
    """Write config.json and generation_config.json as transformers' save_pretrained does for weights of `dtype`."""
    model.config.architectures, model.config.dtype = [type(model).__name__], str(dtype).removeprefix("torch.")
    for part in model.config.sub_configs:
        getattr(model.config, part).dtype = "float32"  # whatever type the live model was loaded in; nobody reads it
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)


def write_shards(directory: Path, tensors: dict[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write weights as transformers' save_pretrained does, byte for byte, but one tensor at a time.

    tensors, read: see `write_one_by_one`. Shards of at most SHARD_BYTES, and an index where there are several.
    """
    tensors = {name: tensors[name] for name in sorted(tensors, key=natural_order)}
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=SHARDS, max_shard_size=SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        write_one_by_one(directory / file, {name: tensors[name] for name in names}, read)
    if split.is_sharded:
        count = sum(tensor.numel() for tensor in tensors.values())
        index = {"metadata": {"total_parameters": count, **split.metadata}, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def natural_order(name: str) -> list[tuple[bool, str, int]]:
    """The key that transformers sorts tensors by: numbers, alone or at the end of a word, count as numbers."""
    parts = (re.fullmatch(r"(.*?)(\d*)", part) for part in name.split("."))
    return [(part[1] != "", part[1], int(part[2] or -1)) for part in parts if part]

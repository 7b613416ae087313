"""What the tests share: a random tiny Janus in the real file format, and the repository root on the path."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from warm import client

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if (
    os.environ.get("GPU_TESTS") != "1"
):  # what `make test-gpu` sets; before torch is imported, for every process that tests start
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

SPECIAL = ["<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<img>", "<|User|>", "<|Assistant|>"]
WORDS = (
    ": ? . , yes no Yes a and of one two three four red green blue cube sphere cone left right above below big small "
    "Does this image describe Is picture You are helpful the assistant"
).split()
TEMPLATE = (
    "{% for m in messages %}<|User|>: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<img>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)
SIDE, PATCH, CODEBOOK = 32, 16, 24  # 2 x 2 = 4 image tokens


def build_janus(seed: int = 0, image_tokens_side: int = SIDE // PATCH, system_prompt: bool = True, words=WORDS):
    """A random Janus (model, processor) whose pad and begin-of-image ids are neither 1B's nor 7B's."""
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        JanusConfig,
        JanusForConditionalGeneration,
        JanusProcessor,
        JanusVisionConfig,
        JanusVQVAEConfig,
        LlamaConfig,
        PreTrainedTokenizerFast,
    )
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    vocabulary = {word: index for index, word in enumerate([*SPECIAL, "<unk>", *words])}
    known = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    known.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    known.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=known,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<img>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
    )
    side = image_tokens_side * PATCH
    count = image_tokens_side**2
    processor = JanusProcessor(
        JanusImageProcessorPil(size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_size=1),
        tokenizer,
        chat_template=TEMPLATE,
        use_default_system_prompt=system_prompt,
        num_image_tokens=count,
    )
    width = 32
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
            initializer_range=0.3,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=side,
            patch_size=PATCH,
            projection_dim=width,
            depth=2,
            num_image_tokens=count,
            initializer_range=0.3,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=CODEBOOK,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1, 1, 1, 1],
            num_res_blocks=0,
            num_patches=image_tokens_side,
            projection_dim=width,
            image_token_embed_dim=width,
            num_hidden_layers=2,
            initializer_range=0.3,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<img>"),
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = JanusForConditionalGeneration(config).eval()
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    generation.eos_token_id = tokenizer.eos_token_id
    generation.generation_kwargs = {"boi_token_id": tokenizer.convert_tokens_to_ids("<boi>")}
    generation.guidance_scale = 3.0
    generation._from_model_config = False
    return model, processor


def save_janus(path: Path, **options) -> Path:
    """Write a random tiny Janus as a checkpoint directory."""
    model, processor = build_janus(**options)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


TAR = ("<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>", "<S0>", "<S1>", "<S2>")
LIQUID = ("<boi>", "<eoi>", "<unconditional>", "<start_of_turn>", "<end_of_turn>")


def save_codes(
    path: Path, seed: int = 1, kind: str = "qwen2", bits: int = 4, image_tokens: int = 4, words=WORDS, **options
) -> Path:
    """Write a random tiny Tar (`qwen2`) or Liquid (`gemma`) as a checkpoint directory, an image tokenizer beside it.

    words: which it knows. options: of its configuration.
    """
    import torch
    from safetensors.torch import save_file
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from families import codes_files, magvit

    special = ["<pad>", "<bos>", "<eos>", *(TAR if kind == "qwen2" else LIQUID)]
    vocabulary = {word: index for index, word in enumerate([*special, "<unk>", *words, "user", "model", "system"])}
    known = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    known.add_special_tokens([AddedToken(token, special=True) for token in special])
    if kind == "qwen2":
        known.add_tokens([f"<I{code}>" for code in range(2**bits)])
    else:
        known.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = {name: f"<{name.removesuffix('_token')}>" for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=known, **names)
    size = len(tokenizer) + (3 if kind == "qwen2" else 2**bits)  # the table of a Qwen2 is a little larger than its tokenizer
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": size}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3}
    shape |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, codes_files.LENGTH: image_tokens}
    shape |= {"tie_word_embeddings": False} if kind == "qwen2" else {"head_dim": 16}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape | options)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases, which begin as ones and zeros
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    levels = ((32, 1), (32, 1))
    vq = magvit.MagViT(levels, levels, bits) if kind == "qwen2" else magvit.VQGAN(levels, levels, 2**bits, 8)
    place = path / codes_files.PICTURES[type(vq)]
    place.parent.mkdir()
    save_file(vq.state_dict(), place, {"format": "pt"})
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The directory of a random tiny Janus checkpoint. Nothing may write to it."""
    return save_janus(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def policy(tiny):
    """The tiny checkpoint, loaded. Tests may not change its weights."""
    from model import load

    return load(tiny, device="cpu")


def learnt(path: Path, **options):
    """A loaded model whose adapters have learnt something."""
    import torch

    from common import lora
    from model import load

    policy = load(path, device="cpu", **options)
    lora.add_adapters(policy.blocks, rank=3, alpha=6.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters("adapters").items():
            if name.endswith("lora_b"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def script_path(name: str) -> Path:
    """Where a command lies: what is typed in a round at the top, the others in their rooms."""
    return next(path for room in (".", "analysis", "experiments", "shapes") if (path := ROOT / room / name).is_file())


def run(script: str, *args: object, ok: bool = True) -> subprocess.CompletedProcess:
    """Run a script's own parse_args and main as its guard would, in this process: an import of torch costs seconds."""
    from common.command import run_script

    module = importlib.import_module(str(script_path(script).relative_to(ROOT).with_suffix("")).replace("/", "."))
    stdout, stderr = io.StringIO(), io.StringIO()
    argv = [script, *map(str, args)]
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), mock.patch.object(sys, "argv", argv):
        try:
            code = run_script(module.main, module.parse_args(argv[1:]))
        except SystemExit as stop:  # argparse
            code = stop.code
    assert not ok or code == 0, stderr.getvalue()
    return subprocess.CompletedProcess(argv, code, stdout.getvalue(), stderr.getvalue())


HANGS_S = 600  # what takes longer than this hangs, however slow the machine


def spawn(*command: object, ok: bool = True, **options) -> subprocess.CompletedProcess:
    """Run a real command in the repository's root, as a person would; env: all of its environment but which GPUs it sees."""
    seen = {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES",) if name in os.environ}
    options["env"] = {**options.get("env", os.environ), **seen}
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=HANGS_S, **options)
    assert not ok or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def warm(tmp_path_factory) -> Iterator[Path]:
    """An executable that stands in for `python` and starts at once (see warm.py); one thread a process."""
    directory = tmp_path_factory.mktemp("warm")
    address = str(directory / "socket")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, ROOT / "tests" / "warm.py", address], env=environment, cwd=directory)
    while not Path(address).exists():
        assert server.poll() is None
        time.sleep(0.05)
    yield client(directory, address)
    server.kill()
    server.wait()


TOTALS: dict[str, Counter[str]] = defaultdict(Counter)  # what the tests count, printed at the end


STARTED, OUT_OF_TIME = time.monotonic(), "the minutes are over"


def pytest_terminal_summary(terminalreporter, config) -> None:
    for name, kinds in TOTALS.items():
        told = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
        terminalreporter.write_line(f"{name}: {sum(kinds.values())} ({told})")
    if late := sum(OUT_OF_TIME in str(report.longrepr) for report in terminalreporter.stats.get("skipped", ())):
        terminalreporter.write_line(f"NOT RUN: {late} thorough tests that had not begun after {config.option.minutes} minutes")


def pytest_addoption(parser) -> None:
    about = "leave out what is marked thorough, and most of the malformed inputs: minutes instead of a quarter of an hour"
    parser.addoption("--quick", action="store_true", help=about)
    about = "put what is marked thorough last, and begin none of it after so many minutes: for machines that may be slow"
    parser.addoption("--minutes", type=float, help=about)


def pytest_collection_modifyitems(config, items) -> None:
    """With --quick drop the tests that are marked thorough and are no sample of their kind; with --minutes put them last."""
    if config.getoption("--quick"):
        os.environ["QUICK_TESTS"] = "1"  # for tests that go through many cases
        config.hook.pytest_deselected(items=[item for item in items if is_thorough(item)])
        items[:] = [item for item in items if not is_thorough(item)]
    elif config.getoption("--minutes"):
        items.sort(key=is_thorough)


def is_thorough(item) -> bool:
    return bool(item.get_closest_marker("thorough") and not item.get_closest_marker("sample"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes and is_thorough(item) and time.monotonic() - STARTED > 60 * minutes:
        pytest.skip(OUT_OF_TIME)


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "thorough: takes long; left out by --quick")
    config.addinivalue_line("markers", "sample: runs with --quick though the tests around it are thorough")
    config.addinivalue_line("markers", "faults: kills, full disks, several ranks (deselect with -m 'not faults')")


# ---------------------------------------------------------------------------------------------------------------------
# A scored file of the tiny checkpoint and what make_pairs.py makes of it, once a session

PROMPTS = [
    "a red cube",
    "two green sphere",
    "one blue cone left of a red cube",
    "a big cube",
    "small green cone",
    "three red sphere and a cube",
]


def score(model: Path, directory: Path) -> Path:
    """scored.jsonl of a tiny checkpoint: 6 prompts, 6 candidates. A random judge, but a real file."""
    (directory / "color_train.txt").write_text("\n".join(PROMPTS))
    out = directory / "scored.jsonl"
    flags = ("--candidates", 6, "--guidance", 2, "--chunk", 4, "--device", "cpu")
    run("score.py", "--model", model, "--prompts", directory / "color_train.txt", "--out", out, *flags)
    return out


def pair_up(scored: Path, out: Path) -> Path:
    """pairs.jsonl (and sft.jsonl beside it): the better half by the random judge against the worse."""
    import statistics

    from common.records import SCORED, read_rows

    middle = statistics.median(row["p_yes"] for _, row in read_rows(scored, SCORED))
    run("make_pairs.py", "--scored", scored, "--out", out, "--threshold", middle, "--pairs-per-prompt", 2, "--force")
    return out / "pairs.jsonl"


@pytest.fixture(scope="session")
def scored(tiny, tmp_path_factory) -> Path:
    return score(tiny, tmp_path_factory.mktemp("scored"))


@pytest.fixture(scope="session")
def pairs(scored, tmp_path_factory) -> Path:
    return pair_up(scored, tmp_path_factory.mktemp("round") / "data")


@pytest.fixture(scope="session")
def trained_dpo(pairs, tmp_path_factory):
    """One finished dpo.py run: (the process, its output directory)."""
    out = tmp_path_factory.mktemp("dpo") / "model"
    flags = ("--epochs", 3, "--batch-size", 4, "--micro-batch", 3, "--lr", 1e-3, "--device", "cpu")
    return run("dpo.py", "--pairs", pairs, "--out", out, *flags), out


# ---------------------------------------------------------------------------------------------------------------------
# A finished run of self_improve.sh, once a session and family

SHIPPED = {"janus": ROOT / "shapes" / "base", "showo": ROOT / "shapes" / "showo", "tar": ROOT / "shapes" / "tar"}
DEMO = {
    "ROUNDS": "2",
    "CANDIDATES": "3",
    "EVAL_CANDIDATES": "1",
    "METHOD": "sft+dpo",
    "GATE": "warn",  # so little training shows nothing
    "PAIRS_FLAGS": "--force",
    "SFT_FLAGS": "--lr 3e-4 --epochs 1 --batch-size 8",
    "DPO_FLAGS": "--lr 1e-4 --epochs 1 --batch-size 8",
}


@pytest.fixture(scope="session", params=["janus", pytest.param("showo", marks=pytest.mark.thorough)])
def loop(request, warm, tmp_path_factory):
    """A finished run of self_improve.sh on a shipped model and a few of its prompts: (environment, output, stdout)."""
    directory = tmp_path_factory.mktemp("loop")
    for name, every in (("train", 40), ("heldout", 16)):
        lines = (ROOT / "shapes" / f"prompts_{name}.jsonl").read_text().splitlines()
        (directory / f"{name}.jsonl").write_text("\n".join(lines[::every]) + "\n")
    files = {"PROMPTS": directory / "train.jsonl", "EVAL_PROMPTS": directory / "heldout.jsonl", "OUT": directory / "run"}
    environment = os.environ | DEMO | {key: str(path) for key, path in files.items()} | {"PYTHON": str(warm)}
    environment |= {"FAMILY": request.param, "OMP_NUM_THREADS": "1"}
    done = spawn(ROOT / "self_improve.sh", env=environment)
    return environment, directory / "run", done.stdout

"""An independent judge: any image-text-to-text model of transformers, asked the same yes/no questions as a unified model.

`load_judge` takes a checkpoint directory or hub id that `AutoModelForImageTextToText` and `AutoProcessor` know (Qwen2.5-VL,
Gemma 3, LLaVA, ...) and returns a `Judge`, whose `judge(pictures, questions)` is that of `Janus`:

    judge(pictures, questions)  -> P(yes), coverage, each (B, Q)
    reply(pictures, questions)  -> what it writes, by transformers' own generate

The question is put as the checkpoint's own chat template puts one message of a user, a picture and a line of text; P(yes) is
read off the first token of the answer. A model that thinks first, or answers in sentences, shows a low coverage.

Pictures smaller than MIN_EDGE are enlarged by a whole number, every pixel to a square of its colour, before the
checkpoint's own image processor sees them: a picture of 48 pixels would be a handful of patches, or less than one.

Only safetensors weights and JSON are read, and no code from a checkpoint is ever run. One device has to hold the model. Some
processors need more than requirements.txt has: those that also take videos, Qwen2.5-VL's among them, need torchvision.

Legend: B pictures, Q questions a picture, R = B Q rows of a batch.
"""

import functools
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from families.family import PromptTooLong, Reserved
from families.judging import ONE, Reply, answer_ids, answered, digit_ids, end_ids, read_reply_ids, yes_no
from families.pretrained import (
    JSON_FILES,
    CheckpointError,
    absolute_name,
    check_finite,
    check_head,
    check_report,
    check_text_limits,
    device_and_type,
    foreign_keys,
    quiet,
    read_object,
    reason,
    resolve,
    tensor_sizes,
    weight_files,
    weights_hash,
)

SUPPORTED_JUDGE = "an image-text-to-text model of transformers (Qwen2.5-VL and its like)"
MIN_EDGE = 224  # pixels
ROUNDING = 1e-6  # by which answers to equal rows of a batch may differ
# What transformers reads of such a checkpoint besides what it reads of a Janus, and keys by which it reads other checkpoints.
FILES = {"config.json", "video_preprocessor_config.json", "audio_tokenizer_config.json", *JSON_FILES}
ROLE = re.compile("[A-Z]{2,}:")  # "USER:", as some templates write it
FOREIGN = {"audio_tokenizer", "audio_tokenizer_name_or_path", "base_model_name_or_path"}


# ---------------------------------------------------------------------------------------------------------------------
# Loading a checkpoint


def load_judge(
    path_or_hub_id: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> "Judge":
    """Load a checkpoint for judging.

    device: default the GPU where there is one, else the CPU. dtype: default bfloat16 on a GPU, float32 on a CPU. Raises
    CheckpointError for anything that is not a complete image-text-to-text checkpoint with a chat template.
    """
    directory, name = resolve(path_or_hub_id), str(path_or_hub_id)
    check_files(directory, name)
    device, dtype = device_and_type(device, dtype)
    with quiet():
        processor = read_processor(directory, name)
        model, report = read_model(directory, name, dtype)
    check_report(report, name)
    model.to(device)
    check_finite(model.named_parameters(), name)
    if model.config.model_type == "janus" and not model.config.text_config.tie_word_embeddings:
        check_head(model.lm_head.weight, model.get_input_embeddings().weight, name)
    judge = Judge(model, processor, name, directory)
    check_answers(judge)
    return judge


def check_files(directory: Path, name: str) -> None:
    """Raise CheckpointError unless `directory` holds an image-text-to-text model that loads without remote code."""
    listing = sorted(entry.name for entry in directory.iterdir())[:8]
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{name}: no config.json (found {listing}); --judge takes {SUPPORTED_JUDGE}")
    kind = read_object(directory / "config.json").get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise CheckpointError(f"{name}: found model_type {kind!r}; --judge takes {SUPPORTED_JUDGE}")
    if not list(directory.glob("*.safetensors")):
        raise CheckpointError(f"{name}: no safetensors weights (found {listing}); pickled weights are never read")
    for file in sorted(FILES - {"tokenizer.json"}):  # its keys are words
        value = read_object(directory / file) if os.path.lexists(directory / file) else {}
        if asked := foreign_keys(value) | (FOREIGN & value.keys()):
            raise CheckpointError(f"{name}: {file} has {min(asked)!r}: nothing but a checkpoint's own weights is read or run")


def read_processor(directory: Path, name: str) -> Any:
    """The checkpoint's own processor: chat template, tokenizer and image processor."""

    def read(text: str) -> None:
        processor = AutoProcessor.from_pretrained(directory)
        processor.tokenizer(chat(processor, text))

    check_text_limits(directory, name, read)
    try:
        processor = AutoProcessor.from_pretrained(directory)
    except Exception as error:  # transformers and tokenizers raise their own kinds; a missing package is the first sentence
        raise CheckpointError(f"{name}: its processor cannot be loaded: {reason(error).split('. ')[0]}") from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise CheckpointError(f"{name}: has no processor of pictures and text, found a {type(processor).__name__}")
    if not processor.chat_template:
        raise CheckpointError(f"{name}: its processor has no chat template; --judge takes a model that answers questions")
    return processor


def read_model(directory: Path, name: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The model and transformers' report on what it did not find in the files."""
    try:
        check_size(AutoConfig.from_pretrained(directory), directory)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            directory, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        return loaded
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{name}: cannot be loaded as {SUPPORTED_JUDGE}: {reason(error)}") from error


def check_size(config: Any, directory: Path) -> None:
    """Raise CheckpointError if config.json describes a larger model than the weights can fill, before it is made."""
    stored = sum(size for file in weight_files(directory) for size in tensor_sizes(file))
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in AutoModelForImageTextToText.from_config(config).parameters())
    if wanted > 2 * stored:
        raise CheckpointError(f"{directory}: config.json wants {wanted:,} weights, but its files hold {stored:,}")


def check_answers(judge: "Judge") -> None:
    """Raise CheckpointError unless a judge can be asked, and what it answers depends on the question and the picture."""
    black_and_white = torch.stack([torch.full((MIN_EDGE, MIN_EDGE, 3), value, dtype=torch.uint8) for value in (0, 255)])
    try:
        answers = torch.stack(judge.judge(black_and_white, [["Is it white?", "Is this picture black?"]] * 2))  # (2, B, Q)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the template's author made it raise, or a class that wants other inputs
        raise CheckpointError(f"{judge.name}: cannot be asked about a picture: {reason(error)}") from error
    if not torch.isfinite(answers).all():
        raise CheckpointError(f"{judge.name}: its answers are not numbers: the weights overflow")
    for what, dimension in (("picture", 1), ("question", 2)):
        if torch.allclose(answers.select(dimension, 0), answers.select(dimension, 1), rtol=0, atol=ROUNDING):
            raise CheckpointError(f"{judge.name}: its answers do not depend on the {what}: is its chat template for pictures?")


# ---------------------------------------------------------------------------------------------------------------------
# The judge


def enlarged(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) whose shorter edge has at least MIN_EDGE pixels, by repeating every pixel."""
    times = -(-MIN_EDGE // min(picture.shape[:2]))
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def chat(processor: Any, question: str) -> str:
    """A question about a picture as the chat template puts it."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def batches(pictures: Tensor, questions: list[list[str]], batch: int) -> list[list[tuple[np.ndarray, str]]]:
    """Pictures (B, H, W, 3), enlarged, with each of their questions, `batch` of these pairs at a time."""
    images = [enlarged(picture) for picture in pictures.cpu().numpy()]
    rows = [(image, question) for image, row in zip(images, questions, strict=True) for question in row]
    return [rows[i : i + batch] for i in range(0, len(rows), batch)]


class Judge:
    """An image-text-to-text model that answers yes or no; the layers are transformers'."""

    def __init__(self, model: PreTrainedModel, processor: Any, name: str, directory: Path) -> None:
        self.model = model.eval()
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.name, self.directory = name, directory
        self.tokenizer.padding_side = "left"  # every row ends where its answer begins
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._ends = end_ids(model, self.tokenizer)
        # Nothing else of the checkpoint's own: beams, samplers and kept caches have no part in the first token's logits.
        self.model.generation_config = GenerationConfig(
            max_new_tokens=1, output_logits=True, return_dict_in_generate=True, pad_token_id=self.tokenizer.pad_token_id
        )
        self._yes, self._no = answer_ids(self.tokenizer, name, model.device)
        self._exact = torch.cat([self._yes, self._no])  # the answers that are compared
        if (head := model.get_output_embeddings()) is not None:
            head.register_forward_hook(self._exact_answers)

    def _exact_answers(self, head: Any, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        """lm_head's logits in float32, those of the answers from a float32 product: bfloat16 has steps of 1/8 at 20."""
        answers = self._exact
        bias = None if getattr(head, "bias", None) is None else head.bias[answers].float()
        logits = logits.float()
        logits[..., answers] = F.linear(inputs[0].float(), head.weight[answers].float(), bias)
        return logits

    @functools.cached_property
    def _reserved(self) -> Reserved:
        """Special tokens, what the processor replaces, and the roles of a template that writes them as plain words."""
        more = {str(token) for key, token in vars(self.processor).items() if key.endswith("_token") and token}
        return Reserved(self.tokenizer, f"special tokens of {self.name}", more.union(ROLE.findall(self._chat("yes"))))

    def _chat(self, question: str) -> str:
        return chat(self.processor, question)

    @functools.cached_property
    def _digits(self) -> tuple[Tensor, Tensor]:
        """Ids of 1 and 0 after BEGUN; CheckpointError where they are not a token each."""
        return digit_ids(lambda answer: self._write("yes", answer), self.tokenizer, self.name, self.model.device)

    def _write(self, question: str, answer: str = "") -> list[int]:
        text = answered(self._chat(question), answer)
        return self.tokenizer(text, add_special_tokens=self._adds_bos(text))["input_ids"]

    def _adds_bos(self, text: str) -> bool:
        """Whether the tokenizer shall add its special tokens to a chat: not where the template has written BOS."""
        return self.tokenizer.bos_token is None or not text.startswith(self.tokenizer.bos_token)

    def question_ids(self, question: str, scored: bool = False) -> list[int]:
        """The tokens of a question, its picture as the one placeholder of the chat template, `scored` as in `judge`.

        Raises PromptError if the question spells one of the judge's special tokens, or is longer than its positions.
        """
        given = ONE if scored and self._digits else ""  # which raises where 0 and 1 are no tokens
        kind = "question to be scored" if scored else "question"  # texts are remembered by kind
        ids = self._reserved.tokens(kind, question, lambda text: self._write(text, given))
        ids = ids[: len(ids) - scored]  # without the digit
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or len(ids)
        if len(ids) > positions:
            raise PromptTooLong(f"question {question[:80]!r} makes {len(ids)} tokens; {self.name} has {positions} positions")
        return ids

    @torch.no_grad()
    def judge(
        self, pictures: Tensor, questions: list[list[str]], batch: int = 16, scored: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Answer Q yes/no questions about each of B pictures: P(yes) and coverage, each (B, Q) float32.

        pictures uint8 (B, H, W, 3); questions: B lists of Q. `batch` pictures with one question each run at a time. scored:
        the answer is begun with BEGUN, and P(1) against 0 is read.
        """
        yes, no = self._digits if scored else (self._yes, self._no)
        self._exact, given = torch.cat([yes, no]), ONE if scored else ""
        answers = [yes_no(self._logits(part, given), yes, no) for part in batches(pictures, questions, batch)]
        p_yes, coverage = (torch.cat(parts).view(len(pictures), -1) for parts in zip(*answers, strict=True))
        return p_yes, coverage

    @torch.no_grad()
    def reply(self, pictures: Tensor, questions: list[list[str]], most: int = 128, batch: int = 16) -> list[list[Reply]]:
        """What the model writes to Q questions about each of B pictures, greedily, at most `most` tokens: B lists of Q.

        pictures, questions and batch: as in `judge`.
        """
        written: list[list[int]] = []
        self._exact = self._yes[:0]  # no answers are compared: as the model is
        for part in batches(pictures, questions, batch):
            options = {"max_new_tokens": most, "eos_token_id": self._ends or None, "output_logits": False}
            inputs = self._inputs(part)
            start = 1 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
            with quiet():
                written += self.model.generate(**inputs, **options).sequences[:, start:].tolist()
        replies = iter(read_reply_ids(self.tokenizer, ids, self._ends) for ids in written)
        return [[next(replies) for _ in row] for row in questions]

    def _logits(self, rows: list[tuple[np.ndarray, str]], given: str = "") -> Tensor:
        """Logits of the first answer token (R, vocabulary) float32, or of the last one of the answer that is `given`.

        By way of `generate`, which knows of every class of model how the positions of a left-padded row count.
        """
        inputs = self._inputs(rows, given)
        if given:  # all rows end where their answer does: without its last token, of which the logits are wanted
            shape = inputs["input_ids"].shape
            whole = {name: value for name, value in inputs.items() if value.shape == shape and not value.is_floating_point()}
            inputs.update({name: value[:, :-1] for name, value in whole.items()})
        with quiet():
            return self.model.generate(**inputs).logits[0]

    def _inputs(self, rows: list[tuple[np.ndarray, str]], given: str = "") -> Any:
        """What the processor makes of R pictures with a question each, and of what of its answer is given."""
        from PIL import Image

        text = [answered(self._chat(question), given) for _, question in rows]
        inputs = self.processor(
            images=[[Image.fromarray(image)] for image, _ in rows],
            text=text,
            add_special_tokens=self._adds_bos(text[0]),
            padding=True,
            return_tensors="pt",
        )
        return inputs.to(self.model.device, self.model.dtype)

    def identity(self) -> dict[str, str]:
        """What the files between the steps say about this model: its name and the hash of its weights."""
        return {"model": absolute_name(self.name), "model_hash": weights_hash(self.directory)}

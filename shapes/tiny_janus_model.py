"""The tiny Janus of the shapes world before it has learnt anything: tokenizer, processor, random model, of the real classes."""

import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from torch import nn
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

sys.path.insert(0, str(Path(__file__).parent))
import lessons
import world
from teaching import N_CODES, T

SPECIAL = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "<begin_of_image>",
    "<image_placeholder>",
    "<end_of_image>",
    "<|User|>",
    "<|Assistant|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|User|>: {% else %}<|Assistant|>: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image_placeholder>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token; BOS is put in front by the tokenizer, as Janus-Pro's does."""
    ids = {word: i for i, word in enumerate([*SPECIAL, *lessons.vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=512,
        extra_special_tokens={
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )


def build_processor() -> JanusProcessor:
    image_processor = JanusImageProcessorPil(
        size={"height": world.SIZE, "width": world.SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_size=1
    )
    return JanusProcessor(image_processor, build_tokenizer(), chat_template=CHAT_TEMPLATE, num_image_tokens=T)


def build_model(tokenizer, args) -> JanusForConditionalGeneration:
    vision = JanusVisionConfig(
        hidden_size=args.vision_hidden,
        num_hidden_layers=args.vision_layers,
        num_attention_heads=4,
        image_size=world.SIZE,
        patch_size=world.CELL,
        mlp_ratio=2.0,
        projection_dim=args.hidden,
        num_image_tokens=T,
        initializer_range=0.05,
    )
    vq = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=N_CODES,
        latent_channels=32,
        base_channels=32,  # GroupNorm wants multiples of 32
        channel_multiplier=[1, 1, 1, 1, 2],  # four halvings: 48 pixels to 3 tokens a side
        num_res_blocks=0,  # then the multiplier must not grow before the last level
        projection_dim=args.hidden,
        image_token_embed_dim=args.hidden,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,  # tied, training the language model would train lm_head
        initializer_range=0.05,
    )
    config = JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq,
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
        tie_word_embeddings=False,
    )
    model = JanusForConditionalGeneration(config)
    for module in (model.model.language_model, model.model.vision_model, model.model.aligner, model.model.generation_aligner):
        for parameter in module.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0, 0.05)
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    generation.eos_token_id = tokenizer.eos_token_id
    generation.generation_kwargs = {"boi_token_id": tokenizer.convert_tokens_to_ids("<begin_of_image>")}
    generation.guidance_scale = 2.0
    generation._from_model_config = False  # or generation_kwargs is lost on the way to disk
    return model

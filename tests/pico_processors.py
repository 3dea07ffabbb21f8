"""Processors of image-text models from small parts, and chat templates of the shapes that such models have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from conftest import byte_tokenizer
from PIL import Image
from transformers import PreTrainedTokenizerFast
from vision_models import IMAGE, SIDE, save_vision

# Parts in their order, with a placeholder for each image.
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}PLACE{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# All images of a message before its texts, as LLaVA's templates have it; answers are marked.
IMAGES_FIRST = (
    "{% for m in messages %}{{ m.role | upper }}: "
    "{% for c in m.content | selectattr('type', 'equalto', 'image') %}PLACE\n{% endfor %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ c.text }}</s>{% endgeneration %}{% else %}{{ c.text }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
_TOKENS = {
    "llava": ["<image>"],
    "idefics3": ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"],
    "gemma3": ["<image_soft_token>", "<start_of_image>", "<end_of_image>"],
    "mistral3": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"],
    "mllama": ["<|image|>"],
    "aya_vision": ["<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "TILE", "TILE_GLOBAL"],
    "qwen2_5_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
    "qwen3_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
    "llava_next": ["<image>"],
}
_MARKED = {"qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>", "gemma3": "<start_of_image>"}
_MARKED["qwen3_vl"] = _MARKED["qwen2_5_vl"]
NEED_TORCHVISION = ("qwen2_5_vl", "qwen3_vl")
TYPES = tuple(_TOKENS)


def image_tokenizer(name: str, template: str = PARTS) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with the tokens of a type, of which the first stands for a part of an image."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<unused{at}>" for at in range(IMAGE - len(tokenizer))])
    tokenizer.add_tokens(_TOKENS[name], special_tokens=True)
    if name == "gemma3":
        for key, token in zip(("image_token", "boi_token", "eoi_token"), _TOKENS[name], strict=True):
            tokenizer.init_kwargs[key] = token
    tokenizer.chat_template = template.replace("PLACE", _MARKED.get(name, _TOKENS[name][0]))
    return tokenizer


def _size(name: str) -> dict[str, Any]:
    if name == "llava":
        return {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return {"size": {"height": SIDE, "width": SIDE}}


def processor_of(name: str, template: str = PARTS) -> Any:
    """The processor of a type's pico model."""
    import transformers

    tokenizer = image_tokenizer(name, template)
    if name == "llava":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        images = CLIPImageProcessorPil(**_size(name))
        return transformers.LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    raise ValueError(name)


def save_with_processor(name: str, folder: Path, template: str = PARTS) -> Path:
    """A type's pico model with its processor, as a checkpoint."""
    save_vision(name, folder)
    processor_of(name, template).save_pretrained(folder)
    return folder


def draw(folder: Path, count: int = 4) -> list[str]:
    """Images of random pixels in files of a folder; their names."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{at}.png" for at in range(count)]
    for name in names:
        Image.fromarray(random.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(folder / name)
    return names

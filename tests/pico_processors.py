"""Processors of image-text models from small parts, and chat templates of the shapes that such models have."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import transformers
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
_QWEN = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
_TOKENS = {
    "llava": ["<image>"],
    "llava_next": ["<image>"],
    "idefics3": ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"],
    "gemma3": ["<image_soft_token>", "<start_of_image>", "<end_of_image>"],
    "mistral3": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"],
    "mllama": ["<|image|>"],
    "aya_vision": ["<|IMG_PATCH|>", "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>"],
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
}
_MARKED = {"qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>", "gemma3": "<start_of_image>"}
_MARKED |= {"qwen3_vl": _MARKED["qwen2_5_vl"], "aya_vision": "<image>"}
NEED_TORCHVISION = ("mistral3", "qwen2_5_vl", "qwen3_vl")
TYPES = tuple(_TOKENS)
_SQUARE = {"size": {"height": SIDE, "width": SIDE}}
_CROPPED = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
_AREA = {"shortest_edge": 3136, "longest_edge": 6272}  # in pixels
_PATCHES = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "size": _AREA}
_CLIP = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
# The names of the classes of a type's parts and of itself, its own settings, and those of its part for images.
_PARTS_OF: dict[str, tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]] = {
    "llava": (("clip", "CLIPImageProcessorPil", "LlavaProcessor"), _CLIP, _CROPPED),
    "llava_next": (
        ("llava_next", "LlavaNextImageProcessorPil", "LlavaNextProcessor"),
        _CLIP,
        {**_CROPPED, "image_grid_pinpoints": [[SIDE, SIDE]]},
    ),
    "idefics3": (
        ("idefics3", "Idefics3ImageProcessorPil", "Idefics3Processor"),
        {"image_seq_len": 1},
        {"do_image_splitting": False, "size": {"longest_edge": SIDE}, "max_image_size": {"longest_edge": SIDE}},
    ),
    "gemma3": (("gemma3", "Gemma3ImageProcessorPil", "Gemma3Processor"), {"image_seq_length": 4}, _SQUARE),
    "mistral3": (
        ("pixtral", "PixtralImageProcessorPil", "PixtralProcessor"),
        {"patch_size": 14, "spatial_merge_size": 2},
        {"size": {"longest_edge": 2 * SIDE}, "patch_size": {"height": 28, "width": 28}},
    ),
    "mllama": (("mllama", "MllamaImageProcessorPil", "MllamaProcessor"), {}, {**_SQUARE, "max_image_tiles": 1}),
    "aya_vision": (
        ("got_ocr2", "GotOcr2ImageProcessorPil", "AyaVisionProcessor"),
        {"patch_size": 14, "img_size": SIDE, "downsample_factor": 2},
        {**_SQUARE, "crop_to_patches": False},
    ),
    "qwen2_5_vl": (
        ("qwen2_vl", "Qwen2VLImageProcessorPil", "qwen2_vl", "Qwen2VLVideoProcessor", "Qwen2_5_VLProcessor"),
        {},
        _PATCHES,
    ),
    "qwen3_vl": (
        ("qwen2_vl", "Qwen2VLImageProcessorPil", "qwen3_vl", "Qwen3VLVideoProcessor", "Qwen3VLProcessor"),
        {},
        _PATCHES,
    ),
}


def image_tokenizer(name: str, template: str = PARTS) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with the tokens of a type, of which the first stands for a part of an image."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<unused{at}>" for at in range(IMAGE - len(tokenizer))])
    tokenizer.add_tokens(_TOKENS[name], special_tokens=True)
    special: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    if name == "gemma3":
        keys = ("image_token", "boi_token", "eoi_token")
        special["extra_special_tokens"] = dict(zip(keys, _TOKENS[name], strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special)
    tokenizer.chat_template = template.replace("PLACE", _MARKED.get(name, _TOKENS[name][0]))
    return tokenizer


def processor_of(name: str, template: str = PARTS) -> Any:
    """The processor of a type's pico model."""
    owner, options, of_images = _PARTS_OF[name]
    images = getattr(import_module(f"transformers.models.{owner[0]}.image_processing_pil_{owner[0]}"), owner[1])
    parts: list[Any] = [images(**of_images), image_tokenizer(name, template)]
    if len(owner) > 3:
        module = import_module(f"transformers.models.{owner[2]}.video_processing_{owner[2]}")
        parts.append(getattr(module, owner[3])(**of_images))
    processor = getattr(transformers, owner[-1])(*parts, **options)
    processor.chat_template = parts[1].chat_template
    return processor


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

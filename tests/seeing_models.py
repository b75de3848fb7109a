"""Tiny random models that read images, of every kind whose weights can stay on the disk, with their processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mixtures import random_like  # type: ignore[import-not-found]
from mlx.utils import tree_flatten
from tokenizers import Tokenizer
from vlm_mixtures import (  # type: ignore[import-not-found]
    COMMON,
    GEMMA4_BESIDE,
    MARKS,
    QWEN_VISION,
    ROPE,
    TEMPLATE,
    make_seeing_mixture,
)

from mlx_flash.source.zoos import random_mlx_vlm_model
from mlx_flash.text.image_prompts import ImageProcessor

WORDS = {"image_token": "<|image_pad|>", "boi_token": "<|vision_start|>", "eoi_token": "<|vision_end|>"}
QWEN_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen3VLProcessor",
    "patch_size": QWEN_VISION["patch_size"],
    "temporal_patch_size": QWEN_VISION["temporal_patch_size"],
    "merge_size": QWEN_VISION["spatial_merge_size"],
    "size": {"shortest_edge": 64, "longest_edge": 256},
    "min_pixels": 64,
    "max_pixels": 256,
}
GEMMA4 = {
    "model_type": "gemma4_text",
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": COMMON["vocab_size"],
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "use_double_wide_mlp": False,
    "tie_word_embeddings": True,
}
GEMMA4_PROCESSOR = {
    "processor_class": "Gemma4Processor",
    "image_processor": {
        "image_processor_type": "Gemma4ImageProcessor",
        "patch_size": 4,
        "max_soft_tokens": 6,
        "pooling_kernel_size": 3,
    },
}
DENSE = {**COMMON, "num_hidden_layers": 4, "intermediate_size": 128}
# name, with the model_type -> (settings of the text model, settings beside it, settings of the processor)
SEEING: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen3_vl": (  # what it sees is also added between the layers
        {
            **DENSE,
            "model_type": "qwen3_vl_text",
            "rope_scaling": {"type": "default", "mrope_section": [6, 5, 5]},
        },
        {
            "vision_config": {**QWEN_VISION, "model_type": "qwen3_vl", "deepstack_visual_indexes": [0]},
            "image_token_index": MARKS["image_token_id"],
            "video_token_index": MARKS["video_token_id"],
        },
        QWEN_PROCESSOR,
    ),
    "qwen3_5": (  # recurrences, which drafts cannot trim
        {
            **DENSE,
            "model_type": "qwen3_5_text",
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
            "rope_parameters": ROPE,
        },
        {
            "vision_config": {**QWEN_VISION, "model_type": "qwen3_5", "deepstack_visual_indexes": []},
            "image_token_index": MARKS["image_token_id"],
            "video_token_index": MARKS["video_token_id"],
        },
        QWEN_PROCESSOR,
    ),
    # a table of per-layer embeddings, windows, and layers that share keys
    "gemma4": ({**DENSE, **GEMMA4}, GEMMA4_BESIDE, GEMMA4_PROCESSOR),
    # the same, where the tokens of an image attend to each other in both directions
    "gemma4 at once": (
        {**DENSE, **GEMMA4, "use_bidirectional_attention": "vision"},
        GEMMA4_BESIDE,
        GEMMA4_PROCESSOR,
    ),
}


def make_seeing_model(folder: Path, name: str) -> Path:
    """Writes a checkpoint in float32 with a tokenizer, a chat template and a processor."""
    if name not in SEEING:
        return Path(make_seeing_mixture(folder))
    text, beside, processor = SEEING[name]
    config = {"model_type": name.split()[0], "text_config": text, "vocab_size": text["vocab_size"], "eos_token_id": 95}
    config |= beside | MARKS
    mx.random.seed(len(name))
    model: Any = random_mlx_vlm_model(config)
    parameters: Any = tree_flatten(model.parameters())
    weights = {name: random_like(name, array) for name, array in parameters}
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, MARKS["video_token_id"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"pad_token": "</s>", "extra_special_tokens": WORDS, "video_token": "<|video_pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    file = "processor_config.json" if "image_processor" in processor else "preprocessor_config.json"
    (folder / file).write_text(json.dumps(processor))
    return folder


def said_by_mlx_vlm(
    folder: Path, text: str, images: list[Any], chunk: int | None, count: int
) -> tuple[list[int], list[int], np.ndarray]:
    """(prompt, tokens, log-probabilities (count, V)) of a greedy answer of mlx-vlm's own model, wholly in memory.

    images: Pillow's. chunk: tokens of the prompt that are read at once; the last token is read alone. None: the whole
    prompt is read at once.
    """
    from mlx_vlm.models.cache import make_prompt_cache
    from mlx_vlm.utils import load_model

    inputs = ImageProcessor(folder).inputs(text, images)
    zoo = load_model(folder)
    ids, pixels, mask = (inputs.pop(name) for name in ("input_ids", "pixel_values", "attention_mask"))
    found = zoo.get_input_embeddings(ids, pixels, mask=mask, **inputs).to_dict()
    more = inputs | {name: value for name, value in found.items() if value is not None}
    cache = make_prompt_cache(zoo.language_model)
    begin = 0
    embeddings = more.pop("inputs_embeds")
    length = ids.shape[1]
    for end in [length] if chunk is None else [*range(chunk, length - 1, chunk), length - 1, length]:
        piece = {"inputs_embeds": embeddings[:, begin:end], **more}
        logits = zoo.language_model(ids[:, begin:end], cache=cache, **piece).logits[:, -1]
        mx.eval(logits)
        begin = end
    logprobs: list[np.ndarray] = []
    tokens: list[int] = []
    for _ in range(count):
        logprobs.append(np.array(logits[0] - mx.logsumexp(logits)))
        tokens.append(int(np.argmax(logprobs[-1])))
        logits = zoo.language_model(mx.array([tokens[-1:]]), cache=cache).logits[:, -1]
    return ids.reshape(-1).tolist(), tokens, np.stack(logprobs)

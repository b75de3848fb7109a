"""Prompts with images: the checkpoint's processor, as mlx-vlm has it, and what the model sees of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError, FlashError, ImageError, UsageError
from ..flash.system import large_memory_given_back
from ..source.model_kind import error_line
from ..source.remote_code import refusing_remote_code
from .images import SEEN_PIXELS, Picture, scaled
from .token_loop import cached_tokens

REGISTERS = ("_position_ids", "_rope_deltas")  # what mlx-vlm's text models keep between the calls of one prompt


@dataclass(frozen=True)
class ImagePrompt:
    """A prompt with images, as the model takes it. ids: its tokens, those of the images included."""

    ids: list[int]
    inputs: dict[str, Any]


class ImageProcessor:
    """The processor of a checkpoint: turns texts and images into what the model takes."""

    def __init__(self, folder: Path) -> None:
        """folder: with the checkpoint's small files. Raises CheckpointError or UnsupportedModelError."""
        from mlx_vlm.utils import load_image_processor, load_processor

        try:
            with refusing_remote_code():
                self._own: Any = load_processor(
                    folder, add_detokenizer=False, trust_remote_code=False, local_files_only=True
                )
                if (images := load_image_processor(folder, trust_remote_code=False)) is not None:
                    self._own.image_processor = images
        except FlashError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"the image processor in {folder} cannot be loaded: {error_line(error)}. Download its files "
                "(config.json, preprocessor_config.json, the tokenizer's) again, or leave images out."
            ) from None
        if not hasattr(self._own, "image_processor"):
            raise CheckpointError(f"{folder} has no image processor (preprocessor_config.json). Leave images out.")

    def prompt(self, text: str | list[int], pictures: Sequence[Picture]) -> ImagePrompt:
        """A prompt with images. text: with the model's mark where an image belongs. Raises ImageError."""
        if not isinstance(text, str):
            raise ImageError("this model's chat template is code that has no place for images.")
        inputs = self.inputs(text, scaled(pictures))
        mx.eval([value for value in inputs.values() if isinstance(value, mx.array)])  # for another thread
        return ImagePrompt(inputs["input_ids"].reshape(-1).tolist(), inputs)

    def inputs(self, text: str, images: Sequence[Any]) -> dict[str, Any]:
        """What the model takes for a prompt: input_ids (1, T), pixel_values and more.

        text: as in `prompt`. images: Pillow's. Raises ImageError.
        """
        from mlx_vlm.utils import prepare_inputs

        try:
            with refusing_remote_code():
                return dict(prepare_inputs(self._own, images=list(images), prompts=[text], add_special_tokens=False))
        except FlashError:
            raise
        except Exception as error:
            raise ImageError(f"the model's image processor cannot use this prompt: {error_line(error)}.") from None

    @property
    def mark(self) -> str:
        """The text that marks an image's place in a prompt without a chat template."""
        return str(getattr(self._own, "image_token", None) or "<image>")

    def largest(self, text: str = "") -> dict[str, Any]:
        """What the model takes for an image of SEEN_PIXELS and a text."""
        from PIL import Image

        side = int(SEEN_PIXELS**0.5)
        return self.inputs(self.mark + text, [Image.new("RGB", (side, side))])


class Sight:
    """What the model sees of a prompt with images, until all of its tokens are read. It belongs to a prompt cache.

    Called in place of the text model, it gives each chunk of the prompt its part.
    """

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        """Runs the model's vision part. inputs: from `ImageProcessor.inputs`."""
        text = model.language_model
        given = {name: value for name, value in inputs.items() if value is not None}
        ids, pixels, mask = given.pop("input_ids"), given.pop("pixel_values"), given.pop("attention_mask", None)
        self._registers: dict[str, Any] = {name: None for name in REGISTERS if hasattr(text, name)}
        self._exchange(text)
        found = {k: v for k, v in model.get_input_embeddings(ids, pixels, mask=mask, **given).to_dict().items()}
        self._exchange(text)
        self._embeddings = found.pop("inputs_embeds")  # (1, T, D)
        self._more = given | {name: value for name, value in found.items() if value is not None}
        self.tokens = int(ids.shape[1])
        self.whole = not self._may_be_split(model, ids)  # The prompt must be read in one call.

    def arrays(self) -> list[mx.array]:
        """What is to be evaluated before the prompt is read."""
        nested = [value if isinstance(value, (list, tuple)) else [value] for value in self._more.values()]
        return [self._embeddings, *(array for values in nested for array in values if isinstance(array, mx.array))]

    def __call__(self, text: Any, inputs: mx.array, cache: Any) -> mx.array:
        """Logits (1, T, V) of the next tokens (1, T) of the prompt, or of the answer."""
        begin = cached_tokens(cache)
        rest = self.tokens - begin  # of the prompt
        if 0 < rest < inputs.shape[1]:  # drafts follow the prompt's last token
            own, drafts = mx.split(inputs, [rest], axis=1)
            first = self._called(text, own, cache, begin)
            return mx.concatenate([first, self._called(text, drafts, cache, self.tokens)], axis=1)
        if rest <= 0:  # A pass is never taken back to before its beginning.
            self._embeddings, self._more = mx.zeros((1, 0, 0)), {}
        return self._called(text, inputs, cache, begin)

    def _called(self, text: Any, inputs: mx.array, cache: Any, begin: int) -> mx.array:
        more: dict[str, Any] = {}
        if begin < self.tokens:
            more = self._more | {"inputs_embeds": self._embeddings[:, begin : begin + inputs.shape[1]]}
        if self.whole and begin < self.tokens and self._keeps_logits(text):
            more |= {"logits_to_keep": 1}  # the others would take much memory
        self._exchange(text)
        logits = text(inputs, cache=cache, **more).logits
        self._exchange(text)
        return logits  # type: ignore[no-any-return]

    def _exchange(self, text: Any) -> None:
        """Exchanges the text model's registers with this prompt's."""
        for name, value in self._registers.items():
            self._registers[name] = getattr(text, name)
            setattr(text, name, value)

    @staticmethod
    def _keeps_logits(text: Any) -> bool:
        """Whether the text model's call takes `logits_to_keep`, which some ignore."""
        parameters = inspect.signature(type(text).__call__).parameters
        return any(one.kind is one.VAR_KEYWORD or one.name == "logits_to_keep" for one in parameters.values())

    def _may_be_split(self, model: Any, ids: mx.array) -> bool:
        from mlx_vlm.generate.common import _chunked_prefill_enabled

        return bool(
            _chunked_prefill_enabled(
                model, input_ids=ids, inputs_embeds=self._embeddings, prompt_cache=None, prefill_kwargs=self._more
            )
        )


def see(model: Any, prompt: ImagePrompt) -> list[Any]:
    """The prompt cache of a prompt with images, for `stream_generate` with its ids. The vision part runs now.

    model: loaded with images. Raises ImageError for images that the model cannot use, UsageError for a prompt that is
    too long.
    """
    from mlx_lm.models.cache import make_prompt_cache

    flash, tokens = model.flash, len(prompt.ids)
    if tokens > flash.plan.context:
        raise UsageError(
            f"the prompt has {tokens} tokens, those of its images included, and the plan has room for "
            f"{flash.plan.context}. Shorten it, or load with a larger context (--context)."
        )
    with flash.lock, large_memory_given_back():
        try:
            sight = Sight(model, prompt.inputs)
            mx.eval(sight.arrays())
        except FlashError:
            raise
        except Exception as error:
            raise ImageError(f"the model cannot use these images: {error_line(error)}.") from None
        mx.clear_cache()
    if sight.whole and tokens > flash.prefill_tokens:
        raise ImageError(
            f"the prompt has {tokens} tokens, and this model must read one with images at once, at most "
            f"{flash.prefill_tokens}. Use a smaller image, a shorter text, or a larger --prefill-chunk."
        )
    cache: list[Any] = make_prompt_cache(model)
    cache[0].sight = sight
    return cache


def processor_of(model: Any) -> ImageProcessor:
    """The model's image processor. Raises ImageError for a model that was loaded without its vision part."""
    found: ImageProcessor | None = model.flash.images
    if found is None:
        raise ImageError("the model was loaded without its vision part. Load it with images (--images).")
    return found

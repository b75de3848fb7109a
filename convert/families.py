"""The table of model families: which tensors are the feed-forward neurons, and which activation they pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_flash.errors import UnsupportedModelError
from mlx_flash.layers.activations import Activation
from mlx_flash.source.model_kind import SEE, is_mixture, mlx_lm_knows, refuse_own_code


@dataclass(frozen=True)
class Family:
    """A row. Names are those after the model's own `sanitize`; `{}` stands for the layer.

    Row i of every matrix but the last, (F, D), and column i of the last, (D, F), make neuron i. A model whose FFN is
    streamed has its biases as `up_bias` and `down_bias` in the FFN's place.
    """

    ffn: str  # the FFN's place in the model
    matrices: tuple[str, ...]  # (up, down) or (gate, up, down)
    activations: Mapping[str, str]  # what the configuration calls it -> the kind of Activation; others are not sparse
    activation_key: str = "hidden_act"
    default_activation: str | None = None  # where the configuration does not say
    threshold_keys: Mapping[str, str] = field(default_factory=dict)  # of an activation that has a threshold
    layers_key: str = "num_hidden_layers"
    positions_key: str = "max_position_embeddings"
    instead: str = "a relufied version of it"  # of a model that is not sparse
    parts: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", ("gate", "up", "down")[-len(self.matrices) :])

    def weights(self, layer: int) -> list[str]:
        """Names of a layer's matrices, in the order of a bundle's parts."""
        return [f"{self.ffn.format(layer)}.{name}.weight" for name in self.matrices]

    def biases_of(self, layer: int) -> dict[str, str]:
        """A layer's biases: name in the whole model -> name in the model with a streamed FFN."""
        ffn, up, down = self.ffn.format(layer), *self.matrices[-2:]
        return {f"{ffn}.{up}.bias": f"{ffn}.up_bias", f"{ffn}.{down}.bias": f"{ffn}.down_bias"}

    def activation(self, config: dict[str, Any], where: object) -> Activation:
        """Raises UnsupportedModelError, naming what was found."""
        found = config.get(self.activation_key)
        unnamed = ""
        if found is None:
            found, key, wanted = self.default_activation, self.activation_key, next(iter(self.activations))
            remedy = f'if its own code computes {wanted}, add "{key}": "{wanted}"'
            unnamed = f" by default (its config.json has no {key}; {remedy})"
        if not isinstance(found, str) or found not in self.activations:
            # Of these types mlx-lm computes the default activation, whatever the configuration says.
            own = found == self.default_activation and mlx_lm_knows(config)
            runtime = "mlx-lm itself" if own else "a runtime that computes it and loads it whole"
            raise UnsupportedModelError(
                f"{where} uses the activation {found!r}{unnamed}, which leaves no neuron exactly zero. It is neither a "
                f"ReLU model ({' or '.join(self.activations)} there) nor a mixture of experts, so flash loading would "
                f"gain nothing; {runtime} runs it, if it fits into memory. What would gain: {self.instead}."
            )
        threshold = config.get(self.threshold_keys[found], 0.0) if found in self.threshold_keys else 0.0
        try:
            return Activation(self.activations[found], threshold)
        except ValueError as error:
            raise UnsupportedModelError(f"{where}: {error}.") from None


# What has no table of its own below: gated, with names as Llama's.
LLAMA_LIKE = Family(
    ffn="model.layers.{}.mlp",
    matrices=("gate_proj", "up_proj", "down_proj"),
    activations={"relu": "relu", "fatrelu": "relu"},
    default_activation="silu",
    threshold_keys={"fatrelu": "hidden_act_param"},
    instead="a relufied version (SparseLLM/ReluLLaMA-7B, SparseLLM/prosparse-llama-2-7b)",
)

FAMILIES = {
    "bamboo": replace(LLAMA_LIKE, activations={"relu": "drelu"}, default_activation="relu"),
    "falcon": Family(
        ffn="transformer.h.{}.mlp",
        matrices=("dense_h_to_4h", "dense_4h_to_h"),
        activations={"relu": "relu"},
        activation_key="activation",
        default_activation="gelu",
        instead="a relufied version (SparseLLM/ReluFalcon-40B)",
    ),
    "llama": LLAMA_LIKE,
    "mistral": replace(
        LLAMA_LIKE,
        activations={"relu": "relu"},
        instead="a relufied version (PowerInfer/TurboSparse-Mistral-Instruct), its mixture-of-experts sibling Mixtral",
    ),
    "nemotron": Family(
        ffn="model.layers.{}.mlp",
        matrices=("up_proj", "down_proj"),
        activations={"relu2": "relu2"},
        default_activation="relu2",
    ),
    "opt": Family(
        ffn="model.decoder.layers.{}.mlp",
        matrices=("fc1", "fc2"),
        activations={"relu": "relu"},
        activation_key="activation_function",
        default_activation="relu",
    ),
    "persimmon": Family(
        ffn="model.layers.{}.mlp",
        matrices=("dense_h_to_4h", "dense_4h_to_h"),
        activations={"relu2": "relu2"},
        default_activation="relu2",
    ),
    "phi": Family(
        ffn="model.layers.{}.mlp",
        matrices=("fc1", "fc2"),
        activations={"relu": "relu"},
        default_activation="gelu_new",
    ),
    "sparsellama": LLAMA_LIKE,
}


def family_of(config: dict[str, Any], where: object) -> Family:
    """The row for a checkpoint's configuration. Raises UnsupportedModelError, naming what was found."""
    refuse_own_code(config, where)
    model_type = config.get("model_type")
    if (family := FAMILIES.get(str(model_type))) is not None:
        return family
    families = f"ReLU models ({', '.join(FAMILIES)})"
    if is_mixture(config, where):
        raise UnsupportedModelError(
            f"{where} is a mixture of experts ({model_type}), which needs no conversion: it is run as it is."
        )
    if mlx_lm_knows(config):
        raise UnsupportedModelError(
            f"{where} ({model_type}) is none of the {families}, nor a mixture of experts in mlx-lm's switch_layers: "
            f"flash loading would gain nothing. mlx-lm itself runs it, if it fits into memory. {SEE}"
        )
    raise UnsupportedModelError(
        f"{where} is of model type {model_type!r}, which neither mlx_flash nor the installed mlx-lm knows. Two kinds "
        f"are run: {families}, and mixtures of experts that mlx-lm knows. {SEE}"
    )

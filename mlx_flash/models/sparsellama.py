"""ProSparse: Llama with FATReLU, under the model type of its published checkpoints."""

from .llama import FAMILY, Model, ModelArgs

__all__ = ["FAMILY", "Model", "ModelArgs"]

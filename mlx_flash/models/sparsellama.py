"""ProSparse: Llama with FATReLU, under the model type of its published checkpoints."""

from .llama import Model, ModelArgs

__all__ = ["Model", "ModelArgs"]

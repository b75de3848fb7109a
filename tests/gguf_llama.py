"""A Llama in a GGUF file as a Hugging Face checkpoint in float32: dense, or the same function as a mixture of experts.

MLX reads the file. Three facts about it come from llama.cpp, which wrote it:
- convert_hf_to_gguf.py interleaves the two halves of each head's rows in `attn_q` and `attn_k`, for its own rotation.
- Matrices of the types Q4_1 and Q8_0 hold numbers of 4 or 8 bits; every 32 share a scale, and with Q4_1 a bias, of 16
  bits. MLX reads both as its own affine quantisation.
- The pre-tokenizer "smollm" parts numbers into digits before it splits text like GPT-2 (llama-vocab.cpp).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

GROUP = 32  # numbers that share a scale
CONTROL = 3  # the type of a token that stands for no text
EXPERTS = 8
# GGUF's names of a layer's matrices and vectors, and Hugging Face's.
LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
EXPERT = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # Mixtral's names

Weights = dict[str, mx.array]


class GgufLlama:
    """A file of a Llama whose matrices are of type Q4_1 or Q8_0, and whose input embeddings are its output head.

    weights: Hugging Face's names -> float32. config: of a LlamaForCausalLM.
    """

    def __init__(self, path: Path) -> None:
        loaded: Any = mx.load(str(path), return_metadata=True)
        stored, self._about = loaded
        of = self._number
        heads = {"attn_q": of("attention.head_count"), "attn_k": of("attention.head_count_kv")}
        self.config: dict[str, Any] = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "torch_dtype": "float32",
            "vocab_size": of("vocab_size"),
            "hidden_size": of("embedding_length"),
            "intermediate_size": of("feed_forward_length"),
            "num_hidden_layers": of("block_count"),
            "num_attention_heads": heads["attn_q"],
            "num_key_value_heads": heads["attn_k"],
            "max_position_embeddings": of("context_length"),
            "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
            "rope_theta": of("rope.freq_base"),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": of("bos_token_id", "tokenizer.ggml."),
            "eos_token_id": of("eos_token_id", "tokenizer.ggml."),
        }
        self.weights: Weights = {}
        for name in [name for name in stored if name.endswith(".weight")]:
            tensor, *layer = reversed(name.removesuffix(".weight").removeprefix("blk.").split("."))
            whole = _dequantised(stored, name)
            if tensor in heads:
                whole = _in_halves(whole, heads[tensor])
            own = f"model.layers.{layer[0]}.{LAYER[tensor]}" if layer else OUTSIDE[tensor]
            self.weights[f"{own}.weight"] = whole

    def _number(self, name: str, prefix: str = "llama.") -> Any:
        return self._about[prefix + name].item()

    def write_dense(self, folder: Path) -> None:
        self._write(folder, self.weights, self.config)

    def write_mixture(self, folder: Path) -> None:
        """Writes a Mixtral in which every expert has an eighth of each FFN's neurons, and every token takes all.

        The routers are zero, so each expert counts an eighth, and the down projections are eight times as large. Powers
        of two do not round, so only the order of sums differs from the dense model's.
        """
        neurons = self.config["intermediate_size"] // EXPERTS
        mixture: Weights = {}
        for name, whole in self.weights.items():
            layer, found, matrix = name.partition(".mlp.")
            if not found:
                mixture[name] = whole
                continue
            block, matrix = f"{layer}.block_sparse_moe", matrix.removesuffix(".weight")
            mixture[f"{block}.gate.weight"] = mx.zeros((EXPERTS, self.config["hidden_size"]))
            parts = mx.split(whole * EXPERTS, EXPERTS, axis=1) if matrix == "down_proj" else mx.split(whole, EXPERTS)
            for number, part in enumerate(parts):
                mixture[f"{block}.experts.{number}.{EXPERT[matrix]}.weight"] = mx.contiguous(part)
        kind = {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "intermediate_size": neurons,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": EXPERTS,
        }
        self._write(folder, mixture, {**self.config, **kind})

    def _write(self, folder: Path, weights: Weights, config: dict[str, Any]) -> None:
        folder.mkdir(parents=True)
        mx.eval(weights)
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        self._write_tokenizer(folder)

    def _write_tokenizer(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and the chat template."""
        about = {name.removeprefix("tokenizer."): value for name, value in self._about.items()}
        if about["ggml.model"] != "gpt2" or about["ggml.pre"] != "smollm":
            raise ValueError(f"the tokenizer is {about['ggml.model']}, {about['ggml.pre']}; expected gpt2, smollm")
        words = about["ggml.tokens"]
        vocabulary = {word: number for number, word in enumerate(words)}
        merges = [tuple(merge.split(" ")) for merge in about["ggml.merges"]]
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        kinds = about["ggml.token_type"].tolist()
        control = [word for word, kind in zip(words, kinds, strict=True) if kind == CONTROL]
        tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in control])
        tokenizer.save(str(folder / "tokenizer.json"))
        names = {f"{name}_token": words[self._number(f"{name}_token_id", "tokenizer.ggml.")] for name in ("bos", "eos")}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "chat_template.jinja").write_text(about["chat_template"])


def _dequantised(stored: Weights, name: str) -> mx.array:
    """float32; the scales are widened first, so that products are not rounded to 16 bits."""
    prefix = name.removesuffix("weight")
    if f"{prefix}scales" not in stored:
        return stored[name].astype(mx.float32)
    scales, biases = (stored[prefix + part].astype(mx.float32) for part in ("scales", "biases"))
    bits = 32 * stored[name].shape[-1] // (GROUP * scales.shape[-1])
    return mx.dequantize(stored[name], scales, biases, group_size=GROUP, bits=bits)


def _in_halves(rows: mx.array, heads: int) -> mx.array:
    """Puts each head's rows into the order of Hugging Face's rotation: all first halves, then all second ones."""
    return mx.contiguous(rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2)).reshape(rows.shape)

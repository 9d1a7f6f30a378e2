"""Tiny GGUF files, as llama.cpp's converter would write them: a random model of a family and a byte-level tokenizer.

Weights are stored as they come (llama.cpp permutes some), so what they mean is for transformers' loader to say. Does
not cover sentencepiece vocabularies.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

from tests.support.families import tiny_config

SPECIAL = ("<|end|>", "<|turn|>")
MERGES = ("Ċ Ċ", "Ġ Ġ", "ĠĠ ĠĠ", "h e", "l l", "he ll", "hell o", "Ġ w", "1 2")
END, TURN = 0, 1
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
VOCABULARY = 288  # more rows than tokens, and a multiple of 32, the block of the quantised types

MODEL_TYPES = {"gemma3": "gemma3_text"}
"""transformers' model type for an architecture, where its name is another."""

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "n_positions": 1024,  # transformers reads it from no entry of a GPT-2
}


def family_config(architecture: str, **settings: Any) -> PreTrainedConfig:
    """The config of a tiny model of an architecture of GGUF files."""
    config = tiny_config(MODEL_TYPES.get(architecture, architecture))
    for name, value in {**SIZES, **settings}.items():
        if name in settings or (getattr(config, name, None) is not None and _is_field(config, name)):
            setattr(config, name, value)
    return type(config)(**{key: value for key, value in config.to_dict().items() if key not in ("n_inner",)})


def _is_field(config: PreTrainedConfig, name: str) -> bool:
    return not isinstance(getattr(type(config), name, None), property)


def write_gguf(
    path: Path,
    kind: str = "F32",
    architecture: str = "llama",
    *,
    pre: str | None = "gpt-2",
    entries: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
    **settings: Any,
) -> Path:
    """Writes a random model whose matrices are of the type `kind`.

    Args:
        pre: the pre-tokenizer.
        entries: further metadata, which replace others; None as a value leaves one out.
        tensors: further tensors, in F32.
        without: names of tensors to leave out.
        settings: of the config.
    """
    torch.manual_seed(0)
    config = family_config(architecture, **settings)
    model = AutoModelForCausalLM.from_config(config)
    writer = gguf.GGUFWriter(path, architecture)
    metadata = {**_settings(config, architecture), **_tokenizer(pre), **(entries or {})}
    for name, value in metadata.items():
        _add(writer, name, value)
    names = {name: theirs for theirs, name in get_gguf_hf_weights_map(model, TensorProcessor()).items()}
    for name, value in model.state_dict().items():
        if name in names and name not in model.all_tied_weights_keys and names[name] not in without:
            _add_tensor(writer, names[name], _stored(architecture, names[name], value), kind)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _settings(config: PreTrainedConfig, architecture: str) -> dict[str, Any]:
    found = {}
    rope = getattr(config, "rope_parameters", None) or {}
    for key, name in GGUF_CONFIG_MAPPING[architecture].items():
        value = rope.get("rope_theta") if name == "rope_theta" else name and getattr(config, name, None)
        if value is not None:
            found[f"{architecture}.{key}"] = value
    return found


def _tokenizer(pre: str | None) -> dict[str, Any]:
    padding = [f"<unused{i}>" for i in range(VOCABULARY - len(TOKENS))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*TOKENS, *padding],
        "tokenizer.ggml.token_type": [*[3] * len(SPECIAL), *[1] * (len(TOKENS) - len(SPECIAL)), *[5] * len(padding)],
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.eos_token_id": END,
        "tokenizer.ggml.bos_token_id": END,
        "tokenizer.chat_template": "{% for message in messages %}{{ message['content'] }}<|turn|>{% endfor %}",
    }


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _stored(architecture: str, name: str, value: torch.Tensor) -> np.ndarray:
    array = value.detach().float().numpy()
    transposed = ("attn_qkv.weight", "ffn_down.weight", "ffn_up.weight", "attn_output.weight")
    if architecture == "gpt2" and name.endswith(transposed):
        array = array.T
    if name.endswith("shortconv.conv.weight"):
        array = array[:, 0]
    return np.ascontiguousarray(array)


def _add_tensor(writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: str) -> None:
    if array.ndim == 1 or array.shape[-1] % 32 or kind == "F32":
        writer.add_tensor(name, array.astype(np.float32))
        return
    quantization = gguf.GGMLQuantizationType[kind]
    if kind == "F16":
        writer.add_tensor(name, array.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quantize(array, quantization), raw_dtype=quantization)

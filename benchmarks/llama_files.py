"""Random Llama checkpoints of several sizes for benchmarks, written shard by shard.

Does not cover the measurements.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flexmoe.io.tensors import CHUNK_BYTES, CheckpointFolder, Chunk, TensorInfo, tensor_info
from flexmoe.io.writer import TensorSource, source_from_file, write_checkpoint
from flexmoe.modeling.fingerprint_flexmoe import tensor_bytes

NOISE_NUMBERS = 5_000_011  # values drawn once; each tensor starts at another offset
SHARD_BYTES = 5_000_000_000

SHAPES = {
    # layers, hidden, FFN, heads, key-value heads, vocabulary
    "100m": (12, 768, 2048, 12, 12, 8_000),
    "1b": (22, 2048, 5632, 32, 4, 32_000),  # TinyLlama
    "7b": (32, 4096, 11008, 32, 32, 32_000),  # Llama 2
}


def llama_config(size: str) -> LlamaConfig:
    """The config of a Llama in bfloat16 with an untied head; `size` is a key of `SHAPES`."""
    layers, hidden, ffn, heads, key_value_heads, vocabulary = SHAPES[size]
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_value_heads, max_position_embeddings=2048,
        dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def write_llama(folder: Path, size: str, *, min_shards: int = 4) -> list[TensorInfo]:
    """Writes a random Llama, using a few megabytes of memory. Returns the names, dtypes and shapes of its tensors."""
    config = llama_config(size)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    infos = [tensor_info(name, tensor) for name, tensor in model.state_dict().items()]
    total, largest = sum(info.nbytes for info in infos), max(info.nbytes for info in infos)
    folder.mkdir()
    sources = [noise_source(info, number) for number, info in enumerate(infos)]
    shard = min(SHARD_BYTES, (total + min_shards * largest) // min_shards)
    write_checkpoint(folder, sources, max_shard_size=shard, flush=False)
    config.save_pretrained(folder)
    return infos


def write_fine_tune(anchor: Path, folder: Path, seed: int) -> None:
    """Writes a copy of the checkpoint `anchor` with other feed-forward weights (".mlp.")."""
    shutil.copytree(anchor, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    with CheckpointFolder(anchor) as files:
        largest = max(sum(info.nbytes for info in file.infos.values()) for file in files.files.values())
        sources = [
            noise_source(info, seed + number) if ".mlp." in name else source_from_file(files, name)
            for number, (name, info) in enumerate(files.infos.items())
        ]
        write_checkpoint(folder, sources, max_shard_size=largest, flush=False)


def noise_source(info: TensorInfo, seed: int) -> TensorSource:
    """A tensor of normal noise in bfloat16."""
    return TensorSource(info, lambda: noise(info.nbytes, seed))


def noise(count: int, seed: int) -> Iterator[Chunk]:
    """`count` bytes of the values drawn once, cyclically from an offset that depends on the seed."""
    drawn = _noise_bytes()
    position = seed * 7919 * 2 % len(drawn)
    while count:
        chunk = drawn[position : position + min(count, CHUNK_BYTES)]
        yield chunk
        count -= len(chunk)
        position = (position + len(chunk)) % len(drawn)


@functools.cache
def _noise_bytes() -> memoryview:
    values = torch.randn(NOISE_NUMBERS, generator=torch.Generator().manual_seed(0))
    return tensor_bytes((values * 0.02).bfloat16())


__all__ = ["SHAPES", "llama_config", "write_fine_tune", "write_llama"]

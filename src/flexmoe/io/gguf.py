"""GGUF files, llama.cpp's format, as dense checkpoints: a folder with config.json, safetensors and a tokenizer.

Names, shapes and layouts are transformers' own (its loader of GGUF files), tensor by tensor, so that one dequantised
tensor is in memory at a time. What that loader leaves out without a word is added or refused: settings that change
what the model computes (`_complete_config`), tensors without a place in the model, and mixtures of experts.

Does not cover the tokenizer (`flexmoe.io.gguf_tokenizer`), writing GGUF, files split into several, or what
quantisation costs against the original weights, which a quantised file no longer holds.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from flexmoe.io.dense import CheckpointNamesError, DenseCheckpoint
from flexmoe.io.folders import atomic_folder, scratch_folder
from flexmoe.io.gguf_header import (
    MAGIC,
    GgufError,
    GgufHeader,
    GgufTensor,
    check_complete,
    read_header,
    write_outline,
)
from flexmoe.io.gguf_tokenizer import convert_tokenizer, special_ids
from flexmoe.io.hashing import sha256_of
from flexmoe.io.lfs import refuse_pointers
from flexmoe.io.tensors import Chunk, TensorInfo, listed
from flexmoe.io.writer import MAX_SHARD_SIZE, TensorSource, source_from_tensor, write_checkpoint
from flexmoe.meta import build_on_meta
from flexmoe.modeling.anchors_flexmoe import UnsupportedAnchorError
from flexmoe.modeling.fingerprint_flexmoe import DTYPE_CODES

SUFFIX = ".gguf"

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types of a GGUF file that hold numbers, not blocks of quantised ones."""

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}  # numpy has no bfloat16

DEFAULT_DTYPE = torch.bfloat16
"""Of quantised files. The rounding is small beside their own error (docs/grafting.md), and float16, which is more
exact, overflows in the activations of models that were trained in bfloat16."""

_BLOCKS_PER_ROW = 512

_SPLIT_NAME = re.compile(r"-\d{5}-of-\d{5}\.gguf", re.IGNORECASE)

_NORM_EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "layernorm_epsilon")

_SET = {  # settings that transformers does not read for every family, and the config's name for each
    "attention.sliding_window": "sliding_window",
    "attention.key_length": "head_dim",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}

_SHAPES = {  # settings that the shapes of the weights contain, or that nothing is computed with
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout"),
    *("attention.head_count_kv", "attention.causal", "nextn_predict_layers", "expert_count", "expert_used_count"),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned", "full_attention_interval"),
    *("ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank", "ssm.inner_size"),
    *("shortconv.l_cache", "rope.dimension_sections", "attention.head_count", "use_parallel_residual"),
}

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of all models with Llama 3's scaling of rotary frequencies. A GGUF file holds only the resulting factors."""


@dataclass
class GgufFile:
    """An open GGUF file: its metadata and the table of its tensors. No weights are read.

    Attributes:
        path: the file.
        architecture: llama.cpp's name of the model's family.
        header: its metadata and the table of its tensors.
    """

    path: Path
    architecture: str
    header: GgufHeader

    @property
    def metadata(self) -> dict[str, Any]:
        """Its entries."""
        return self.header.metadata

    @property
    def tensors(self) -> list[GgufTensor]:
        """The table of its tensors."""
        return self.header.tensors

    @property
    def weights_by_type(self) -> dict[str, int]:
        """The number of weights of each type, most first: {"Q4_1": 106168320, ...}."""
        counts: dict[str, int] = {}
        for tensor in self.tensors:
            name = _type_of(tensor).name
            counts[name] = counts.get(name, 0) + tensor.count
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    @property
    def is_quantized(self) -> bool:
        """Whether any tensor holds blocks of quantised weights."""
        return not FLOATS.keys() >= self.weights_by_type.keys()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to store: the file's own, or `DEFAULT_DTYPE` if it is quantised."""
        if self.is_quantized:
            return DEFAULT_DTYPE
        # norms are F32 in files of every type, so the narrower one is the model's
        return min((FLOATS[name] for name in self.weights_by_type), key=lambda dtype: dtype.itemsize)

    def setting(self, name: str) -> Any:
        """The entry of this name under the architecture's; None if there is none."""
        return self.metadata.get(f"{self.architecture}.{name}")

    def values(self, tensor: GgufTensor) -> np.ndarray:
        """The dequantised values of a tensor in float32, in torch's shape."""
        kind = _type_of(tensor)
        weights, nbytes = _gguf().GGML_QUANT_SIZES[kind]
        *rows, columns = tensor.shape
        stored = np.memmap(
            self.path, np.uint8, mode="r", offset=tensor.start, shape=(*rows, columns // weights * nbytes)
        )
        if kind.name in _NUMPY:
            return stored.view(_NUMPY[kind.name]).astype(np.float32)
        # `dequantize` takes 16 rows at a time: longer ones cost fewer calls, and blocks do not depend on each other
        blocks = math.gcd(stored.size // nbytes, _BLOCKS_PER_ROW)
        values: np.ndarray = _gguf().dequantize(np.asarray(stored).reshape(-1, blocks * nbytes), kind)
        return values.reshape(tensor.shape)

    def describe_types(self) -> str:
        """The share and the bits of each type: "Q4_1: 79 % of the weights, 5 bits each; F32: ..."."""
        sizes = {kind.name: size for kind, size in _gguf().GGML_QUANT_SIZES.items()}
        total = sum(self.weights_by_type.values())
        parts = []
        for name, count in self.weights_by_type.items():
            per_block, block_bytes = sizes[name]
            share = f"{count / total:.0%}" if count >= total / 100 else "below 1%"
            parts.append(
                f"{name}: {share.replace('%', ' %')} of the weights, {8 * block_bytes / per_block:.3g} bits each"
            )
        return "; ".join(parts)


@dataclass
class _Rounding:
    """The error of storing the dequantised weights in another dtype, over all of them."""

    squared_error: float = 0.0
    squared: float = 0.0

    def add(self, exact: torch.Tensor, stored: torch.Tensor) -> None:
        for values, name in ((stored.float() - exact, "squared_error"), (exact, "squared")):
            square = float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
            setattr(self, name, getattr(self, name) + square)

    @property
    def relative(self) -> float:
        """The root of the mean squared error, divided by that of the weights."""
        return math.sqrt(self.squared_error / self.squared) if self.squared else 0.0


def is_gguf(path: str | Path) -> bool:
    """Whether `path` is a GGUF file, by its name or its first bytes."""
    path = Path(path).expanduser()
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return path.name.lower().endswith(SUFFIX) or file.read(len(MAGIC)) == MAGIC


def open_gguf(path: str | Path) -> GgufFile:
    """Opens a GGUF file and checks that it holds one complete dense model.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the extra `gguf` is not installed.
        GgufError: it is not a GGUF file, cut off, one part of several, or a Git LFS pointer.
        UnsupportedAnchorError: it holds a mixture of experts, or a family that transformers does not read from GGUF.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    refuse_pointers([path])
    with _errors_naming(path):
        header = read_header(path)
        is_part = header.metadata.get("split.count", 0) > 1
    if is_part or _SPLIT_NAME.search(path.name):
        raise GgufError(
            f"{path} is one part of a model that is split into several files. Merge them first: "
            f"`llama-gguf-split --merge {path.name} merged.gguf`, with the first part."
        )
    architecture = header.metadata.get("general.architecture")
    check_complete(path, header.tensors, {int(kind): sizes for kind, sizes in _gguf().GGML_QUANT_SIZES.items()})
    opened = GgufFile(path, str(architecture), header)
    if opened.setting("expert_count") or any("_exps." in tensor.name for tensor in opened.tensors):
        raise UnsupportedAnchorError(
            f"{path} holds a mixture of experts ({architecture}, {opened.setting('expert_count')} experts). An anchor "
            "is a dense model."
        )
    if architecture not in supported_architectures():
        raise UnsupportedAnchorError(
            f"{path} holds a model of the architecture {architecture!r}, which transformers does not read from GGUF. "
            f"It reads {', '.join(supported_architectures())}. Graft the original checkpoint instead."
        )
    _check_entries(opened)
    return opened


@contextmanager
def _errors_naming(path: Path) -> Iterator[None]:
    """Raises a GgufError instead of what damaged entries and tensors cause in other libraries."""
    try:
        yield
    except (GgufError, UnsupportedAnchorError, CheckpointNamesError, OSError, ImportError):
        raise
    except Exception as error:  # arithmetic, lookups, validation of configs, tokenizers' own kinds
        raise GgufError(
            f"{path}: its entries or tensors do not fit together ({type(error).__name__}: {str(error)[:300]}). "
            "Download it again, or graft the original checkpoint."
        ) from error


def _check_entries(file: GgufFile) -> None:
    """Numbers are finite, and the layers are there: a model of as many as an entry claims may take hours to set up."""
    for name, value in file.metadata.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise GgufError(f"{file.path}: the entry {name!r} is {value}. Download it again.")
    layers = {match[1] for tensor in file.tensors if (match := re.match(r"blk\.(\d+)\.", tensor.name))}
    count = file.setting("block_count")
    if not isinstance(count, int) or count > len(layers):
        raise GgufError(
            f"{file.path}: block_count is {count!r}, and the file has tensors of {len(layers)} layers. Download it "
            "again."
        )


def supported_architectures() -> list[str]:
    """The architectures that transformers reads from GGUF, without mixtures of experts and encoder-decoders."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    names = {*GGUF_SUPPORTED_ARCHITECTURES, *_new_mappings()}
    others = {"t5", "t5encoder", "umt5", "mamba"}
    return sorted(name for name in names - others if "moe" not in name and name in _gguf().MODEL_ARCH_NAMES.values())


def convert_gguf(
    file: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> Path:
    """Writes the model of a GGUF file as a dense checkpoint that `from_pretrained` loads and `graft` takes.

    The folder appears only once it is complete. Returns it.

    Args:
        file: a GGUF file of a dense causal LM.
        dtype: of the stored weights; None keeps that of the file, and is bfloat16 for quantised files.

    Raises:
        FileExistsError: `out` exists and `overwrite` is False.
        FileNotFoundError, ImportError, GgufError, UnsupportedAnchorError: as `open_gguf`.
        CheckpointNamesError: the file lacks tensors of the model, or has others.

    Example:
        folder = convert_gguf("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2")
    """
    opened = open_gguf(file)
    with atomic_folder(out, overwrite, durable=overwrite) as folder:
        _write_dense(opened, folder, dtype or opened.dtype, max_shard_size)
    return Path(out)


@contextmanager
def dense_from_gguf(file: GgufFile, beside: Path) -> Iterator[Path]:
    """A dense checkpoint with the weights of a GGUF file, in a temporary folder next to `beside`.

    It is deleted at the end. Raises as `convert_gguf`.
    """
    with scratch_folder(beside) as folder:
        _write_dense(file, folder, file.dtype, MAX_SHARD_SIZE)
        yield folder


def provenance(file: GgufFile) -> dict[str, Any]:
    """What identifies the file: its name, SHA-256, and types with their share of the weights."""
    total = sum(file.weights_by_type.values())
    return {
        "file": file.path.name,
        "sha256": sha256_of(file.path)[1],
        "types": {name: round(count / total, 4) for name, count in file.weights_by_type.items()},
    }


def _write_dense(file: GgufFile, folder: Path, dtype: torch.dtype, max_shard_size: int) -> None:
    with _errors_naming(file.path):
        config, settings = _read_config(file)
        model, _ = build_on_meta(config)
        rounding = _Rounding()
        if file.architecture in _new_mappings():
            sources = _loaded_sources(file, config, dtype)
        else:
            sources = _streamed_sources(file, model, settings, dtype, rounding)
        write_checkpoint(folder, sources, max_shard_size=max_shard_size, flush=False)
        config.architectures, config.dtype = [type(model).__name__], dtype
        convert_tokenizer(file.path, file.metadata, type(config), folder)
        ids = special_ids(file.metadata)
        GenerationConfig(**{key: value for key, value in ids.items() if key != "unk_token_id"}).save_pretrained(folder)
        config.save_pretrained(folder)
        DenseCheckpoint(folder)  # all tensors of the model are there, with the shapes of the config
        _report(file, dtype, rounding)


def _report(file: GgufFile, dtype: torch.dtype, rounding: _Rounding) -> None:
    stored = str(dtype).removeprefix("torch.")
    added = f" Storing them in {stored} adds a rounding of {rounding.relative:.2g} of their size (RMS)."
    if not rounding.squared_error:
        added = ""
    if file.is_quantized:
        warnings.warn(
            f"{file.path.name} is quantised ({file.describe_types()}), so its weights differ from the original ones, "
            f"which the file no longer holds. What is written are its dequantised weights in {stored}.{added} If the "
            "original checkpoint is available, graft that.",
            stacklevel=5,
        )
    elif added:
        warnings.warn(f"{file.path.name} holds {file.describe_types()}.{added}", stacklevel=5)


def _transformers_settings(file: GgufFile) -> dict[str, Any]:
    """What transformers makes of the metadata: the arguments of the config."""
    settings: dict[str, Any]
    if file.architecture in _new_configs():
        from transformers.integrations.gguf import get_gguf_config, read_gguf_metadata

        settings = get_gguf_config(*read_gguf_metadata(str(file.path)))
    else:
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        with TemporaryDirectory() as scratch:
            outline = Path(scratch, file.path.name)
            write_outline(file.path, file.header, outline)
            settings = load_gguf_checkpoint(str(outline))["config"]
    # the file's float32 as the number that was written: 1e-05, not 9.999999747378752e-06
    written = {key: float(str(np.float32(value))) for key, value in settings.items() if isinstance(value, float)}
    title = "_model_name_or_path"  # not a place that the model is loaded from
    return {key: value for key, value in {**settings, **written}.items() if key != title}


def _read_config(file: GgufFile) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """transformers' config for this file, with the settings that it does not read; and `_transformers_settings`."""
    try:
        settings = _transformers_settings(file)
        config = AutoConfig.for_model(**settings)
    except (ValueError, KeyError, IndexError, TypeError, NotImplementedError) as error:
        raise UnsupportedAnchorError(
            f"{file.path}: transformers builds no config of its metadata ({type(error).__name__}: {error})."
        ) from error
    config._attn_implementation = config._experts_implementation = None
    _complete_config(config, file)
    return config, settings


def _complete_config(config: Any, file: GgufFile) -> None:
    """Sets what transformers does not read, and checks the values that it does not read but assumes.

    Raises:
        UnsupportedAnchorError: the model computes with a setting that the config cannot hold.
    """
    ours = {"rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scale_linear"}
    _scale_rotary(config, file)
    for key, name in _SET.items():
        if (value := file.setting(key)) is not None and hasattr(config, name):
            setattr(config, name, value)
    effective = _effective(config)
    wrong, unread = [], []
    for entry, value in file.metadata.items():
        architecture, _, key = entry.partition(".")
        if architecture != file.architecture or key in _SHAPES or key in ours:
            continue
        if key not in effective:
            unread.append(f"{entry} = {value}")
        elif not _equal(value, effective[key]):
            wrong.append(f"{entry} is {value}, and transformers' {type(config).__name__} has {effective[key]}")
    if wrong:
        raise UnsupportedAnchorError(
            f"{file.path}: transformers would compute something else than the file states: {'; '.join(wrong)}. Graft "
            "the original checkpoint instead."
        )
    if unread:
        warnings.warn(
            f"{file.path.name}: transformers has no setting for {listed(unread)}. If the model computes with it, the "
            "result differs from llama.cpp's.",
            stacklevel=6,
        )


def _effective(config: Any) -> dict[str, Any]:
    """What the config makes of the settings that no shape shows, by llama.cpp's names."""
    rope = _rope(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
    eps = next((getattr(config, name) for name in _NORM_EPS if getattr(config, name, None) is not None), None)
    return {
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_epsilon": eps,
        "attention.layer_norm_rms_epsilon": eps,
        "rope.dimension_count": int(head_dim * partial),
        "rope.freq_base": rope.get("rope_theta"),
        **{key: getattr(config, name, None) for key, name in _SET.items() if key != "attention.key_length"},
    }


def _equal(stated: Any, used: Any) -> bool:
    if isinstance(stated, float) and isinstance(used, int | float):
        return math.isclose(stated, used, rel_tol=1e-5)  # float32 in the file
    return bool(stated == used)


def _rope(config: Any) -> dict[str, Any]:
    """The rotary settings of the layers with full attention, to be changed in place."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters if "rope_type" in parameters else parameters.get("full_attention", parameters)


def _scale_rotary(config: Any, file: GgufFile) -> None:
    """Gives the config the scaling of rotary frequencies, linear or Llama 3's."""
    rope, kind = _rope(config), file.setting("rope.scaling.type")
    factor = file.setting("rope.scaling.factor") or file.setting("rope.scale_linear") or 1.0
    tensors = {tensor.name: tensor for tensor in file.tensors if tensor.name.startswith("rope_")}
    if kind not in (None, "none", "linear") or tensors.keys() - {"rope_freqs.weight"}:
        raise UnsupportedAnchorError(
            f"{file.path}: it scales rotary frequencies ({', '.join(filter(None, [kind, *tensors]))}), which "
            "transformers does not read from GGUF. Graft the original checkpoint instead."
        )
    if kind != "none" and factor != 1.0:
        rope.update(rope_type="linear", factor=float(factor))
    if tensors:
        stored = torch.from_numpy(file.values(tensors["rope_freqs.weight"])).flatten()
        if stored.eq(1).all():
            return
        rope.update(rope_type="llama3", factor=float(stored.max()), **LLAMA3_ROPE)
        if not torch.allclose(_llama3_factors(config), stored, rtol=1e-3):
            raise UnsupportedAnchorError(
                f"{file.path}: its rotary frequencies are scaled by factors (rope_freqs.weight, 1 to "
                f"{float(stored.max()):g}) that are not those of Llama 3. Graft the original checkpoint instead."
            )


def _llama3_factors(config: Any) -> torch.Tensor:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    head_dim = 2 * len(scaled)
    return 1.0 / _rope(config)["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim) / scaled


def _streamed_sources(
    file: GgufFile, model: PreTrainedModel, settings: dict[str, Any], dtype: torch.dtype, rounding: _Rounding
) -> list[TensorSource]:
    """A source per tensor, which dequantises it when it is written. The loop of `load_gguf_checkpoint`, unrolled."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=settings)
    try:
        names = get_gguf_hf_weights_map(_Distinct(model, {frozenset()}), processor)
    except NotImplementedError as error:
        raise UnsupportedAnchorError(f"{file.path}: {error}") from error
    names.setdefault("output.weight", "lm_head.weight")  # GPT-2's processor renames it itself
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sources, unknown = [], []
    for tensor in file.tensors:
        name = names.get(tensor.name)
        if name in shapes:
            sources.append(_dequantized(file, tensor, name, shapes[name], processor, names, dtype, rounding))
        elif tensor.name != "rope_freqs.weight":  # in the config: `_scale_rotary`
            unknown.append(tensor.name)
    if unknown:
        raise CheckpointNamesError(
            f"{file.path}: {len(unknown)} tensor(s) that {type(model).__name__} does not have, which transformers "
            f"would leave out: {listed(unknown)}. Graft the original checkpoint instead."
        )
    return sources


class _Distinct:
    """A module as `get_gguf_hf_weights_map` reads it, with fewer submodules: each set of parameter names once.

    That function builds a table of all names of the family for each submodule, and of the entries that it finds for
    several, it keeps the first. So a second layer, or a second linear one, adds nothing.

    Args:
        seen: the sets of names that are left out.
    """

    def __init__(self, module: torch.nn.Module, seen: set[frozenset[str]]) -> None:
        self.config = getattr(module, "config", None)
        self.state_dict = module.state_dict
        self.module, self.seen = module, seen

    def named_children(self) -> Iterator[tuple[str, _Distinct]]:
        for name, child in self.module.named_children():
            if (names := frozenset(child.state_dict())) not in self.seen:
                self.seen.add(names)
                yield name, _Distinct(child, self.seen)


def _dequantized(
    file: GgufFile,
    tensor: GgufTensor,
    name: str,
    shape: tuple[int, ...],
    processor: Any,
    names: Mapping[str, str],
    dtype: torch.dtype,
    rounding: _Rounding,
) -> TensorSource:
    info = TensorInfo(name, DTYPE_CODES[dtype], shape, math.prod(shape) * dtype.itemsize)

    def chunks() -> Iterator[Chunk]:
        kept: dict[str, Any] = {"tensors": {}}  # where a processor puts what it renames itself
        values = file.values(tensor)
        result = processor.process(weights=values, name=tensor.name, tensor_key_mapping=names, parsed_parameters=kept)
        exact = kept["tensors"][name] if result.name is None else torch.from_numpy(result.weights.copy())
        if tuple(exact.shape) != shape:
            raise CheckpointNamesError(
                f"{file.path}: {tensor.name} has the shape {list(exact.shape)}; the config gives {list(shape)}."
            )
        stored = exact.to(dtype)
        rounding.add(exact, stored)
        return source_from_tensor(name, stored).chunks()

    return TensorSource(info, chunks)


def _loaded_sources(file: GgufFile, config: PreTrainedConfig, dtype: torch.dtype) -> list[TensorSource]:
    """The tensors of a family that transformers only reads as a whole: the model is in memory, in `dtype`."""
    from transformers.utils.quantization_config import GgufConfig

    model, info = AutoModelForCausalLM.from_pretrained(
        file.path.parent,
        config=config,
        gguf_file=file.path.name,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    if missing := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
        raise CheckpointNamesError(
            f"{file.path}: {len(missing)} tensor(s) are only in the file or only in {type(model).__name__}: "
            f"{listed(missing)}. Graft the original checkpoint instead."
        )
    tied = model.all_tied_weights_keys
    return [source_from_tensor(name, value) for name, value in model.state_dict().items() if name not in tied]


def _new_mappings() -> Mapping[str, Callable[..., Any]]:
    """The architectures of transformers' second loader of GGUF files, which is to replace the first."""
    from transformers.integrations.gguf import GGUF_ARCHS

    return GGUF_ARCHS


def _new_configs() -> Mapping[str, Callable[..., Any]]:
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

    return GGUF_CONFIG_ARCHS


def _type_of(tensor: GgufTensor) -> Any:
    return _gguf().GGMLQuantizationType(tensor.type)


def _gguf() -> ModuleType:
    try:
        return import_module("gguf")
    except ImportError as error:
        raise ImportError("GGUF files are read with the gguf package: pip install 'flexmoe[gguf]'.") from error


__all__ = [
    "GgufError",
    "GgufFile",
    "convert_gguf",
    "dense_from_gguf",
    "is_gguf",
    "open_gguf",
    "provenance",
    "supported_architectures",
]

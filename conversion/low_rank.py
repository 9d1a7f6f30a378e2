"""Compress a full expert to a low-rank one by a truncated SVD of its difference from public, and densify it again.

Shapes: O out, I in, R rank. `compress` keeps the best approximation of each matrix's difference at a given rank
(Eckart and Young), in the Frobenius norm or, given the owner's text, in the metric of the loss on it
(`flexmoe.conversion.loss_metric`); all matrices of a layer have one rank. `densify` adds the differences to public's
matrices.

Does not cover training at low rank (`flexmoe.training.experts`), or experts whose width differs from public's.

Source: FlexMoRE, arXiv 2602.08818.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoe.conversion.loss_metric import Key, Metric, loss_metrics
from flexmoe.conversion.public_networks import PublicNetworks
from flexmoe.data import Documents, check_output_apart
from flexmoe.hub.fetch import open_package
from flexmoe.io.folders import check_apart, check_new_folder
from flexmoe.io.tensors import Chunk
from flexmoe.io.writer import TensorSource, source_from_tensor
from flexmoe.modeling.fingerprint_flexmoe import TORCH_DTYPES
from flexmoe.modeling.low_rank_flexmoe import as_out_in, low_rank_scale, matrices
from flexmoe.packages.checks import check_fingerprint
from flexmoe.packages.package import ExpertPackage, stream_package

ROUNDING = 1e-10  # relative, of squared singular values: the rounding error of float32

PackageLike = str | Path | ExpertPackage


@dataclass(frozen=True)
class CompressedLayer:
    """The result of compressing one layer.

    Attributes:
        layer: its index.
        rank: singular values kept in each of its matrices.
        error: relative error of the stored approximation: the Frobenius norm of the residual divided by that of the
            difference from public, over all matrices; 0 if there was no difference.
    """

    layer: int
    rank: int
    error: float


def compress(
    package: PackageLike,
    out: str | Path,
    *,
    anchor: str | Path | None = None,
    rank: int | Sequence[int] | None = None,
    energy: float | None = None,
    data: Sequence[str | Path] | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    progress: Callable[[CompressedLayer], None] | None = None,
) -> list[CompressedLayer]:
    """Writes the full expert in `package` as a low-rank one, in its own dtype; returns each layer's rank and error.

    Args:
        package: folder, Hub id or opened package.
        anchor: folder or Hub id of the dense model, or of a FlexMoE model of it. Default: as the package records.
        rank: singular values to keep, one number or one per layer; matrices with fewer are padded with zeros.
        energy: instead of `rank`, the share of the squared singular values to keep, above 0 and at most 1; each layer
            gets the smallest sufficient rank.
        data: the owner's text (see `flexmoe.data.Documents`). The approximation is then the best one for the loss on
            it, and one `rank` is the mean: layers get more or less of its parameters, by what they gain. The
            anchor must be the FlexMoE model that the expert was trained in.
        device: where the singular values, and losses on `data`, are computed.
        overwrite: replace an existing `out`.
        progress: called with each finished layer.

    Raises:
        FileExistsError: `out` exists and `overwrite` is False.
        FileNotFoundError: no such package, anchor or text.
        ValueError: both or neither of `rank` and `energy`, or out of range; the expert is low-rank already, is for
            another anchor or of another width, or differs from public in a parameter that is not a matrix or bias;
            with `data`, the anchor is a dense model, or the text cannot be read (see `loss_metrics`).

    Example:
        ```pycon
        >>> import flexmoe
        >>> layers = flexmoe.compress("math-expert", "math-rank-8", anchor="grafted", rank=8)
        >>> flexmoe.ExpertPackage.open("math-rank-8").manifest.rank
        [8, 8]
        ```
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"rank={rank} and energy={energy}: give exactly one of them.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy}: must be above 0 and at most 1.")
    opened, public = _open(package, anchor, out, overwrite, kind="full")
    ranks = None if rank is None else _rank_per_layer(rank, len(public.networks))
    metrics = None
    if data is not None:
        documents = Documents(data)
        documents.check()
        check_output_apart(Path(out), data)
        metrics = loss_metrics(public.folder, opened, documents, device=device)
        if isinstance(rank, int):
            ranks = _ranks_by_gain(_spectra(opened, public, metrics, device), rank)
    written: dict[int, dict[str, Tensor]] = {}
    done = []
    for layer, own in _by_layer(opened):
        deltas_OI, biases_O = _differences(opened, public, layer, own)
        spectra = {
            path: torch.linalg.svd(_weighed(delta, metrics, (layer, path)).to(device), full_matrices=False)
            for path, delta in deltas_OI.items()
        }
        kept = ranks[layer] if ranks else _smallest_rank(energy or 1.0, [values for _, values, _ in spectra.values()])
        factors: dict[str, Tensor] = {}
        residual = 0.0
        for path, delta_OI in deltas_OI.items():
            dtype = own[f"ffn.{path}.weight"].dtype
            a_RI, b_OR = (factor.cpu() for factor in _factors(spectra[path], kept))
            if metrics is not None:
                b_OR, a_RI = metrics[layer, path].unweigh(b_OR, a_RI)
            a_RI, b_OR = a_RI.to(dtype).contiguous(), b_OR.to(dtype).contiguous()
            factors |= {f"ffn.{path}.lora_A.weight": a_RI, f"ffn.{path}.lora_B.weight": b_OR}
            residual += float((delta_OI - b_OR.float() @ a_RI.float()).square().sum())
        rows = {key: row for key, row in own.items() if not key.startswith("ffn.")}
        written[layer] = {**factors, **biases_O, **rows}
        total = sum(float(delta_OI.square().sum()) for delta_OI in deltas_OI.values())
        done.append(CompressedLayer(layer, kept, (residual / total) ** 0.5 if total else 0.0))
        if progress is not None:
            progress(done[-1])
    done.sort(key=lambda entry: entry.layer)
    kept_ranks, errors = [entry.rank for entry in done], [entry.error for entry in done]
    manifest = replace(
        opened.manifest,
        kind="low_rank",
        rank=kept_ranks,
        training={**(opened.manifest.training or {}), "compressed": {"rank": kept_ranks, "relative_error": errors}},
        sha256={},
    )
    sources = [
        source_from_tensor(f"layers.{layer}.{key}", tensor)
        for layer in sorted(written)
        for key, tensor in written[layer].items()
    ]
    stream_package(out, manifest, sources, overwrite=overwrite)
    return done


def densify(
    package: PackageLike,
    out: str | Path,
    *,
    anchor: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes the low-rank expert in `package` as a full one: public's networks with the differences added.

    Sums are computed in float32 and rounded once, to the dtype of public. `progress` is called with the number of
    bytes just written; other arguments and errors: as `compress`. Returns the package's folder.

    Example:
        ```pycon
        >>> import flexmoe
        >>> folder = flexmoe.densify("math-small", "math-full", anchor="grafted")
        >>> flexmoe.ExpertPackage.open(folder).manifest.kind
        'full'
        ```
    """
    opened, public = _open(package, anchor, out, overwrite, kind="low_rank")
    manifest = opened.manifest
    sources = []
    for layer, own in sorted(_by_layer(opened)):
        scale = low_rank_scale((manifest.rank or [])[layer], manifest.alpha)
        differences = {key.removeprefix("ffn."): tensor for key, tensor in own.items()}
        for key in public.networks[layer].state_dict():
            sources.append(merged_source(f"layers.{layer}.ffn.{key}", public, layer, key, differences, scale))
        rows = {key: row for key, row in own.items() if not key.startswith("ffn.")}
        sources += [source_from_tensor(f"layers.{layer}.{key}", row) for key, row in rows.items()]
    codes = {source.info.dtype for source in sources if ".ffn." in source.info.name}
    dtypes = [str(TORCH_DTYPES[code]).removeprefix("torch.") for code in codes]
    dtype = dtypes[0] if len(dtypes) == 1 else "mixed"
    manifest = replace(manifest, kind="full", rank=None, alpha=None, dtype=dtype, sha256={})
    return stream_package(out, manifest, sources, overwrite=overwrite, progress=progress)


def merged_source(
    name: str, public: PublicNetworks, layer: int, key: str, differences: Mapping[str, Tensor], scale: float
) -> TensorSource:
    """The tensor `key` of public's network in a layer plus a low-rank expert's difference, under `name`; lazy.

    Args:
        differences: the expert's tensors of that layer, by their names in a package.
    """

    def chunks() -> Iterator[Chunk]:
        yield from source_from_tensor(name, _merged(public, layer, key, differences, scale)).chunks()

    return TensorSource(replace(public.info(layer, key), name=name), chunks)


def _merged(public: PublicNetworks, layer: int, key: str, differences: Mapping[str, Tensor], scale: float) -> Tensor:
    ours, (path, _, parameter) = public.read_one(layer, key), key.rpartition(".")
    if parameter == "weight" and f"{path}.lora_A.weight" in differences:
        a_RI, b_OR = (differences[f"{path}.lora_{side}.weight"].float() for side in "AB")
        delta = as_out_in(public.networks[layer].get_submodule(path), scale * (b_OR @ a_RI))
    elif parameter == "bias" and f"{path}.bias_delta" in differences:
        delta = differences[f"{path}.bias_delta"].float()
    else:
        return ours
    return (ours.float() + delta).to(ours.dtype)


def _open(
    package: PackageLike, anchor: str | Path | None, out: str | Path, overwrite: bool, kind: str
) -> tuple[ExpertPackage, PublicNetworks]:
    """Opens the package, which must be of this kind, and its anchor's networks."""
    target = check_new_folder(out, overwrite)
    opened, _ = open_package(package)
    manifest = opened.manifest
    if manifest.kind != kind:
        do, other = ("compressed", "densify") if kind == "full" else ("densified", "compress")
        raise ValueError(
            f"{opened.folder} holds a {manifest.kind} expert, and only a {kind} one can be {do}: use "
            f"`flexmoe {other}` for the other direction."
        )
    revision = None
    if anchor is None:
        anchor, revision = manifest.anchor["repo"], manifest.anchor["revision"]
    if anchor is None:
        raise ValueError(
            f"{opened.folder} does not record where its anchor is: give --anchor (anchor=), the dense model or the "
            "grafted one."
        )
    public = PublicNetworks.open(anchor, revision=revision)
    check_apart(target, opened.folder, public.folder)
    check_fingerprint(public.fingerprint, manifest)
    if manifest.layers != list(range(len(public.networks))):
        raise ValueError(f"{opened.folder} has the layers {manifest.layers}; its anchor has {len(public.networks)}.")
    return opened, public


def _by_layer(package: ExpertPackage) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yields each layer once it is complete: its tensors by their names in the package after `layers.<i>.`."""
    expected: dict[int, set[str]] = {}
    for name in package.infos:
        _, number, key = name.split(".", 2)
        expected.setdefault(int(number), set()).add(key)
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in package.tensors():
        _, number, key = name.split(".", 2)
        layer = int(number)
        found.setdefault(layer, {})[key] = tensor
        if found[layer].keys() == expected[layer]:
            yield layer, found.pop(layer)


def _differences(
    package: ExpertPackage, public: PublicNetworks, layer: int, own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The differences of a full expert's layer from public's: float32 matrices [O, I] by path, biases by package name.

    Raises:
        ValueError: it has other tensors or shapes, or differs in a parameter that is neither a matrix nor its bias.
    """
    theirs = {f"ffn.{key}": tensor for key, tensor in public.read(layer).items()}
    for key in sorted({key for key in own if key.startswith("ffn.")} ^ theirs.keys()):
        raise ValueError(f"{package.folder}: 'layers.{layer}.{key}' is in the package or the anchor, but not in both.")
    for key, tensor in theirs.items():
        if own[key].shape != tensor.shape:
            raise ValueError(
                f"{package.folder}: 'layers.{layer}.{key}' has shape {list(own[key].shape)}, public's has "
                f"{list(tensor.shape)}; the difference is defined for experts of public's width only."
            )
    parts = dict(matrices(public.networks[layer]))
    deltas_OI = {
        path: as_out_in(part, own[f"ffn.{path}.weight"].float() - theirs[f"ffn.{path}.weight"].float())
        for path, part in parts.items()
    }
    used = {f"ffn.{path}.{parameter}" for path in parts for parameter in ("weight", "bias")}
    for key in theirs.keys() - used:
        if not torch.equal(own[key], theirs[key]):
            raise ValueError(
                f"{package.folder}: 'layers.{layer}.{key}' differs from public's and is not a matrix, so it has no "
                "low-rank form. Keep this expert as a full one."
            )
    biases = {
        f"ffn.{path}.bias_delta": (own[key].float() - theirs[key].float()).to(own[key].dtype)
        for path in parts
        if (key := f"ffn.{path}.bias") in theirs
    }
    return deltas_OI, biases


def _factors(spectrum: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, I] and B [O, rank] of the best approximation; each holds the square roots of the singular values."""
    left_OR, values_R, right_RI = spectrum
    root_R = values_R[:rank].sqrt()
    a_RI, b_OR = root_R[:, None] * right_RI[:rank], left_OR[:, :rank] * root_R
    missing = rank - len(root_R)
    return F.pad(a_RI, (0, 0, 0, missing)), F.pad(b_OR, (0, missing))


def _weighed(delta_OI: Tensor, metrics: Mapping[Key, Metric] | None, key: Key) -> Tensor:
    return delta_OI if metrics is None else metrics[key].weigh(delta_OI)


def _spectra(
    package: ExpertPackage, public: PublicNetworks, metrics: Mapping[Key, Metric], device: str | torch.device
) -> list[tuple[Tensor, int]]:
    """Of each layer: the squared singular values of its matrices, summed by their order, and parameters of a rank."""
    found = {}
    for layer, own in _by_layer(package):
        deltas_OI, _ = _differences(package, public, layer, own)
        values = [
            torch.linalg.svdvals(_weighed(delta, metrics, (layer, path)).to(device)).cpu()
            for path, delta in deltas_OI.items()
        ]
        found[layer] = (_total_energy(values), sum(sum(delta.shape) for delta in deltas_OI.values()))
    return [found[layer] for layer in sorted(found)]


def _ranks_by_gain(layers: Sequence[tuple[Tensor, int]], rank: int) -> list[int]:
    """The rank of each layer, at least 1, with the parameters of `rank` in all layers.

    Singular values are taken by their energy per parameter. They decrease within a layer, so this is the best choice
    up to the last one.
    """
    budget = (rank - 1) * sum(cost for _, cost in layers)
    gains = [(float(gain) / cost, layer) for layer, (gains_R, cost) in enumerate(layers) for gain in gains_R[1:]]
    ranks = [1] * len(layers)
    for _, layer in sorted(gains, key=lambda entry: (-entry[0], entry[1])):
        cost = layers[layer][1]
        if cost <= budget:
            ranks[layer] += 1
            budget -= cost
    return ranks


def _smallest_rank(energy: float, spectra: Sequence[Tensor]) -> int:
    """The smallest rank that keeps this share of the squared singular values of all matrices of a layer together."""
    kept_R = _total_energy(spectra).cumsum(0)
    if kept_R[-1] == 0:
        return 1
    wanted = energy * kept_R[-1] * (1 - ROUNDING)
    return min(int((kept_R < wanted).sum()) + 1, len(kept_R))


def _total_energy(spectra: Sequence[Tensor]) -> Tensor:
    """The squared singular values of all matrices of a layer, summed by their order: float64 [longest]."""
    longest = max(map(len, spectra))
    return torch.stack([F.pad(values_R.double().square(), (0, longest - len(values_R))) for values_R in spectra]).sum(
        0
    )


def _rank_per_layer(rank: int | Sequence[int], layers: int) -> list[int]:
    ranks = [rank] * layers if isinstance(rank, int) else list(rank)
    if len(ranks) != layers or not all(type(value) is int and value > 0 for value in ranks):
        raise ValueError(f"rank={rank}: must be a positive integer, or a list of {layers}, one per layer.")
    return ranks


__all__ = ["CompressedLayer", "compress", "densify", "merged_source"]

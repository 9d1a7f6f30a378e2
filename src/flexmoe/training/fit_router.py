"""Fits the router of an expert that exists: its row and its evidence, on its owner's text; the networks stay.

For packages that were trained before there was evidence, or without it, and for more text than the expert was trained
on. Nothing is trained, so it takes seconds to minutes.

Does not cover experts whose rows are trained by the loss (`flexmoe.training.experts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexmoe.data import check_output_apart
from flexmoe.hub.client import resolve_folder
from flexmoe.hub.fetch import open_package
from flexmoe.io.dense import load_causal_lm
from flexmoe.io.folders import check_apart, check_new_folder
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.packages.checks import check_fingerprint
from flexmoe.packages.package import ExpertPackage, write_package
from flexmoe.routers.evidence import EvidenceSettings
from flexmoe.routers.rows import row_method
from flexmoe.tokenization import load_tokenizer
from flexmoe.training.defaults import choose
from flexmoe.training.experts import (
    checked_config,
    fitted_router,
    runs_in_bfloat16,
    sides_of,
    situation,
)
from flexmoe.training.settings import TrainingSettings
from flexmoe.training.text import pack_text, read_sides


def fit_router(
    package: str | Path | ExpertPackage,
    grafted: str | Path,
    data: Sequence[str | Path],
    out: str | Path,
    *,
    public_data: Sequence[str | Path] | None = None,
    settings: TrainingSettings | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **overrides: Any,
) -> Path:
    """Writes the expert in `package` with a router row and evidence that are fitted on its owner's text.

    Args:
        package: folder, Hub id or opened package.
        grafted: folder or Hub id of the model that `flexmoe graft` wrote, which the expert was trained in.
        data: the owner's files (see `flexmoe.data.Documents`).
        out: the new package's folder.
        public_data: public text. Default: the sample stored with the graft.
        settings: of which `router`, `router_bias`, `router_tokens`, `evidence`, `sequence_length`, `dtype`, `seed`
            and those on reading text are used. Default: `TrainingSettings()`.
        overwrite: replace an existing `out`.
        progress: show progress bars on stderr.
        overrides: fields of `TrainingSettings` that replace those of `settings`.

    Raises:
        FileExistsError: `out` exists and `overwrite` is False.
        FileNotFoundError: no such package, model or file.
        ValueError: the expert is for another anchor, rows of this method are trained by the loss, or as
            `train_expert` for the text.

    Example:
        ```pycon
        >>> import flexmoe
        >>> fitted = flexmoe.fit_router("math-expert", "grafted", ["problems.txt"], "math-refitted", router_tokens=300)
        >>> flexmoe.ExpertPackage.open(fitted).manifest.evidence["kind"]
        'unigram'
        ```
    """
    given = replace(settings or TrainingSettings(), **overrides)
    method = row_method(given.router)
    if method.trained_by_loss:
        raise ValueError(
            f"router={given.router!r}: its rows are trained by the loss, with the expert (flexmoe train). Rows of "
            "log_odds and lda can be fitted to an expert that exists."
        )
    out = check_new_folder(out, overwrite)
    opened, _ = open_package(package)
    folder = resolve_folder(grafted).path
    config = checked_config(folder, opened.manifest.name)
    check_fingerprint((config.anchor or {}).get("fingerprint"), opened.manifest)
    check_apart(out, folder, opened.folder)
    check_output_apart(out, [*data, *(public_data or ())])
    texts = read_sides(
        sides_of(folder, config, data, public_data, given),
        load_tokenizer(folder),
        validation_fraction=0.0,
        seed=given.seed,
        vocab_size=config.get_text_config().vocab_size,
    )
    chosen, _ = choose(given, situation(config, texts))
    text = pack_text(texts, sequence_length=chosen.sequence_length, validation_tokens=0, seed=chosen.seed)
    dtype = torch.bfloat16 if runs_in_bfloat16(config, chosen) else torch.float32
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model = load_causal_lm(folder, FlexMoeForCausalLM, dtype=dtype).to(device)
    router = fitted_router(model, method, text, chosen, progress)
    evidence = EvidenceSettings().record(len(router["table"])) if "table" in router else None
    manifest = replace(opened.manifest, evidence=evidence, sha256={})
    return write_package(out, manifest, _tensors(opened, router), overwrite=overwrite)


def _tensors(package: ExpertPackage, router: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The package's tensors, with the fitted ones in place of those of its router."""
    yield from ((name, tensor) for name, tensor in package.tensors() if ".router." not in name)
    for layer in package.manifest.layers:
        at = f"layers.{layer}.router"
        yield f"{at}.weight", router["weight"][layer][None]
        yield f"{at}.bias", router["bias"][layer][None]
        if "table" in router:
            yield f"{at}.calibration", router["calibration"][layer]
        if "table" in router and layer == 0:
            yield f"{at}.table", router["table"]


__all__ = ["fit_router"]

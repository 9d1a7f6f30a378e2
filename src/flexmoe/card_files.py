"""The README.md of an existing folder, written again with scores, routing statistics and a licence.

`flexmoe train`, `compose`, `add`, `remove` and `save_composition` write a card themselves; here measurements are
added. Does not cover the text (`flexmoe.cards`) or uploads. A card that was edited by hand is replaced.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmoe.cards.facts import composition_facts, expert_facts, model_facts
from flexmoe.cards.rendering import conflicts_of, render
from flexmoe.composition.format import Composition
from flexmoe.io.folders import write_file
from flexmoe.io.strict_json import json_text, read_json_object
from flexmoe.modeling.configuration_flexmoe import PUBLIC, FlexMoeConfig
from flexmoe.packages.manifest import MANIFEST_FILE, ExpertManifest
from flexmoe.packages.package import CARD_FILE, CONFIG_FILE, ExpertPackage
from flexmoe.packages.trust import SIGNATURE_FILE

if TYPE_CHECKING:
    from flexmoe.evaluation import DomainScore
    from flexmoe.usage import ExpertUsage

_SCORE_KEYS = ("loss", "perplexity", "tokens", "documents")


def write_card(
    folder: str | Path,
    *,
    evaluation: str | Path | Mapping[str, DomainScore] | None = None,
    routing: ExpertUsage | Mapping[str, ExpertUsage] | None = None,
    license: str | None = None,
    anchor_license: str | None = None,
    version: str | None = None,
    data_statement: str | None = None,
) -> Path:
    """Writes the README.md of an expert package, a composition or a merged model, atomically; returns its path.

    Args:
        folder: the package, composition or model.
        evaluation: scores by domain from `flexmoe.evaluate`, or the output file of `flexmoe evaluate --json`. They are
            also written into the card's `model-index`, which the Hub shows.
        routing: the result of `flexmoe.track_usage`, or several by the name of their text.
        license: of the complete composition or model: an identifier of the Hub, or a name. For a package it is also
            written into the manifest, as are `version` and `data_statement`, which only packages have.
        anchor_license: of the anchor, which is not recorded in a model's files.

    Raises:
        FileNotFoundError: no such folder, or it holds neither a package nor a FlexMoE model.
        ValueError: a signed package; a package with routing statistics or an anchor's licence; a model with a version
            or a data statement; a dense model; invalid scores; or an invalid file (`PackageError` for a package).

    Example:
        ```pycon
        >>> import flexmoe
        >>> scores = flexmoe.evaluate("model", {"math": ["problems.txt"]})
        >>> flexmoe.write_card("model", evaluation=scores, anchor_license="apache-2.0").name
        'README.md'
        ```
    """
    path = Path(folder).expanduser().absolute()
    kind, facts = _read_facts(path, anchor_license)
    if kind == "expert" and (anchor_license or routing is not None):
        raise ValueError(
            f"{path} is an expert package: an anchor's licence and routing statistics belong in the card of a model. "
            "Leave them out."
        )
    if kind != "expert" and (version is not None or data_statement is not None):
        raise ValueError(f"{path} is a {kind}: only experts have a version and a data statement. Leave them out.")
    if kind == "expert" and os.path.lexists(path / SIGNATURE_FILE):
        raise ValueError(
            f"{path} is signed, and a new card would invalidate the signature: delete {SIGNATURE_FILE}, write the "
            "card, and sign again (flexmoe sign)."
        )
    scores = None if evaluation is None else _read_scores(evaluation)
    metadata = {"license": license, "version": version, "data_statement": data_statement}
    if kind == "expert" and (given := {key: value for key, value in metadata.items() if value is not None}):
        facts, license = expert_facts(_update_manifest(path, given)), None
    text = render(
        kind,
        facts,
        evaluation=scores,
        routing=None if routing is None else _shares(routing),
        license=license,
        name=path.name,
    )
    return write_file(path / CARD_FILE, text.encode(), overwrite=True)


def license_conflicts(
    folder: str | Path, *, license: str | None = None, anchor_license: str | None = None
) -> list[str]:
    """The conflicts between licences in a composition or model, one sentence each; empty for a package.

    Args:
        folder, license, anchor_license: as in `write_card`.

    Raises:
        FileNotFoundError, ValueError: as `write_card`.
    """
    kind, facts = _read_facts(Path(folder).expanduser().absolute(), anchor_license)
    return [] if kind == "expert" else conflicts_of(facts, license)


def measure(
    folder: str | Path,
    data: Mapping[str, Sequence[str | Path]],
    *,
    text_column: str = "text",
    text_template: str | None = None,
    skip_empty: bool = False,
) -> tuple[dict[str, DomainScore], dict[str, ExpertUsage]]:
    """Scores a model on the text of each domain, and records expert usage in the same forward passes.

    Args:
        folder: a merged FlexMoE model with its tokenizer; loaded once, on a GPU if there is one.
        data: files per domain; see `flexmoe.data.Documents`.
        text_column, text_template, skip_empty: how rows of tables become texts; see `flexmoe.data.Documents`.

    Returns:
        Scores and usage by domain, for `evaluation` and `routing` of `write_card`.

    Raises:
        FileNotFoundError: as `write_card`, or a file is missing.
        ValueError: the folder holds no merged model; or as `flexmoe.evaluate`.
    """
    path = Path(folder).expanduser().absolute()
    kind, _ = _read_facts(path)
    if kind != "model":
        raise ValueError(
            f"{path} holds {'an expert package' if kind == 'expert' else 'a composition'}, and only merged models are "
            "evaluated: make one with flexmoe compose, or of a composition with save_pretrained."
        )
    import torch

    from flexmoe.evaluation import evaluate
    from flexmoe.io.dense import load_causal_lm
    from flexmoe.usage import track_usage

    model: Any = load_causal_lm(path, dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    scores: dict[str, DomainScore] = {}
    usages: dict[str, ExpertUsage] = {}
    for domain, files in data.items():
        with track_usage(model) as usages[domain]:
            scores |= evaluate(
                model, {domain: files}, text_column=text_column, text_template=text_template, skip_empty=skip_empty
            )
    return scores, usages


def _read_facts(folder: Path, anchor_license: str | None = None) -> tuple[str, dict[str, Any]]:
    """The kind of the folder's card, and its facts."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder. Pass the folder of a model, composition or expert package."
        )
    if (folder / MANIFEST_FILE).is_file():
        return "expert", expert_facts(ExpertPackage.open(folder).manifest)
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} holds neither {CONFIG_FILE} (a model) nor {MANIFEST_FILE} (an expert package)."
        )
    config = FlexMoeConfig.from_pretrained(folder)
    if config.composition is None:
        kind, facts = "model", model_facts(config)
    else:
        composition = Composition.from_config(config)
        references = {PUBLIC: composition.anchor, **composition.experts}
        sources = {name: reference.to_dict() for name, reference in references.items()}
        kind, facts = "composition", composition_facts(config, sources)
    if anchor_license:
        facts["anchor"]["license"] = anchor_license
    return kind, facts


def _update_manifest(folder: Path, values: Mapping[str, Any]) -> ExpertManifest:
    """Writes licence, version or data statement into a manifest; its hashes stay."""
    manifest = replace(ExpertPackage.open(folder).manifest, **values)
    write_file(folder / MANIFEST_FILE, json_text(manifest.to_dict()).encode(), overwrite=True)
    return manifest


def _read_scores(evaluation: str | Path | Mapping[str, DomainScore]) -> dict[str, dict[str, Any]]:
    if isinstance(evaluation, Mapping):
        return {domain: score.to_dict() for domain, score in evaluation.items()}
    domains = read_json_object(evaluation).get("domains")
    if not isinstance(domains, dict) or not domains:
        raise ValueError(f"{evaluation}: it has no domains; it must be the output of flexmoe evaluate --json.")
    for domain, score in domains.items():
        if not isinstance(score, dict) or not set(_SCORE_KEYS) <= set(score):
            raise ValueError(f"{evaluation}: the domain {domain!r} must have {', '.join(_SCORE_KEYS)}.")
        if invalid := [key for key in _SCORE_KEYS if type(score[key]) not in (int, float, type(None))]:
            raise ValueError(
                f"{evaluation}, domain {domain!r}: {invalid[0]} must be a number; it is {score[invalid[0]]!r}."
            )
    return domains


def _shares(routing: ExpertUsage | Mapping[str, ExpertUsage]) -> dict[str, dict[str, Any]]:
    usages = routing if isinstance(routing, Mapping) else {"share": routing}
    return {
        text: {"tokens": usage.tokens, "share": usage.share(), "chosen_share": usage.chosen_share()}
        for text, usage in usages.items()
    }


__all__ = ["license_conflicts", "measure", "write_card"]

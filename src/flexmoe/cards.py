"""The card of a folder, written anew: with scores, routing statistics and the licence of the whole.

`flexmoe train`, `compose`, `add`, `remove` and `save_composition` write a card by themselves; this one also says what
was measured. Does not cover the text (`flexmoe.model_cards`), uploads, or a card that somebody wrote by hand, which is
replaced.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmoe.modeling.cards_flexmoe import composition_facts, expert_facts, model_facts
from flexmoe.modeling.composition_flexmoe import Composition
from flexmoe.modeling.configuration_flexmoe import PUBLIC, FlexMoeConfig
from flexmoe.modeling.folders_flexmoe import TEMPORARY_MARK
from flexmoe.modeling.json_flexmoe import json_text, read_json_object
from flexmoe.modeling.manifest_flexmoe import MANIFEST_FILE, ExpertManifest
from flexmoe.modeling.packages_flexmoe import CARD_FILE, CONFIG_FILE, ExpertPackage
from flexmoe.modeling.trust_flexmoe import SIGNATURE_FILE

if TYPE_CHECKING:
    from flexmoe.evaluation import DomainScore
    from flexmoe.modeling.usage_flexmoe import ExpertUsage

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
    """Writes the README.md of an expert package, a composition or a model anew, whole or not at all.

    Args:
        folder: the package, composition or model.
        evaluation: scores by domain, as `flexmoe.evaluate` gives them, or the file that `flexmoe evaluate --json`
            printed. The Hub shows them: they also go into the card's `model-index`.
        routing: what `flexmoe.track_usage` counted; several by the name of the text that each was counted on.
        license: of the whole composition or model: an identifier of the Hub, or a name. Of a package it goes into the
            manifest, too, as do `version` and `data_statement`, which only packages have.
        anchor_license: of the anchor, which a model's files do not tell.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError: no such folder, or neither a package nor a FlexMoE model in it.
        ValueError: a package that is signed, or with routing statistics or an anchor's licence; a model with a version
            or a data statement; a dense model, scores that are none, or a file that is not what it should be
            (`PackageError` for a package's).
    """
    from flexmoe.model_cards.rendering import render

    place = Path(folder).expanduser().absolute()
    kind, facts = _describe(place, anchor_license)
    if kind == "expert" and (anchor_license or routing is not None):
        raise ValueError(
            f"{place} is an expert package: the anchor's licence and routing statistics belong into the card of a "
            "model. Leave them out."
        )
    if kind != "expert" and (version is not None or data_statement is not None):
        raise ValueError(f"{place} is a {kind}: a version and a data statement are an expert's. Leave them out.")
    if kind == "expert" and os.path.lexists(place / SIGNATURE_FILE):
        raise ValueError(
            f"{place} is signed, and so is its card, which a new one would undo: delete {SIGNATURE_FILE}, write the "
            "card, and sign again (flexmoe sign)."
        )
    scores = None if evaluation is None else _scores(evaluation)
    papers = {"license": license, "version": version, "data_statement": data_statement}
    if kind == "expert" and (papers := {key: value for key, value in papers.items() if value is not None}):
        facts, license = expert_facts(_change_papers(place, papers)), None
    text = render(
        kind,
        facts,
        evaluation=scores,
        routing=None if routing is None else _shares(routing),
        license=license,
        name=place.name,
    )
    return _replace(place / CARD_FILE, text)


def license_conflicts(
    folder: str | Path, *, license: str | None = None, anchor_license: str | None = None
) -> list[str]:
    """What of the licences in a composition or model does not go together, a sentence each; none for a package.

    Args:
        folder, license, anchor_license: as of `write_card`.

    Raises: as `write_card`.
    """
    from flexmoe.model_cards.rendering import facts_conflicts

    kind, facts = _describe(Path(folder).expanduser().absolute(), anchor_license)
    return [] if kind == "expert" else facts_conflicts(facts, license)


def measure(
    folder: str | Path, data: Mapping[str, Sequence[str | Path]], *, text_column: str = "text"
) -> tuple[dict[str, DomainScore], dict[str, ExpertUsage]]:
    """Scores a model on the text of each domain, and counts in the same passes how much each expert is used.

    Args:
        folder: a merged FlexMoE model with its tokenizer; it is loaded once, on a GPU if there is one.
        data: files per domain: .txt, .md, .jsonl, .json, .parquet.
        text_column: column of tabular files.

    Raises:
        FileNotFoundError: as `write_card`, or a missing file.
        ValueError: the folder holds no merged model; as `flexmoe.evaluate`.
    """
    place = Path(folder).expanduser().absolute()
    kind, _ = _describe(place)
    if kind != "model":
        raise ValueError(
            f"{place} holds {'an expert package' if kind == 'expert' else 'a composition'}, and text is measured with "
            "a merged model: make one with flexmoe compose, or of a composition with save_pretrained."
        )
    import torch
    from transformers import AutoModelForCausalLM

    from flexmoe.evaluation import evaluate
    from flexmoe.modeling.usage_flexmoe import track_usage

    model: Any = AutoModelForCausalLM.from_pretrained(place, dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    scores: dict[str, DomainScore] = {}
    usages: dict[str, ExpertUsage] = {}
    for domain, files in data.items():
        with track_usage(model) as usages[domain]:
            scores |= evaluate(model, {domain: files}, text_column=text_column)
    return scores, usages


def _describe(folder: Path, anchor_license: str | None = None) -> tuple[str, dict[str, Any]]:
    """Which kind of card the folder has, and its facts."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. Give that of a model, composition or expert package.")
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
        places = {name: reference.to_dict() for name, reference in references.items()}
        kind, facts = "composition", composition_facts(config, places)
    if anchor_license:
        facts["anchor"]["license"] = anchor_license
    return kind, facts


def _change_papers(place: Path, papers: Mapping[str, Any]) -> ExpertManifest:
    """Writes what a manifest says about licence, version and data anew; what it says about files stays."""
    manifest = replace(ExpertPackage.open(place).manifest, **papers)
    _replace(place / MANIFEST_FILE, json_text(manifest.to_dict()))
    return manifest


def _scores(evaluation: str | Path | Mapping[str, DomainScore]) -> dict[str, dict[str, Any]]:
    if isinstance(evaluation, Mapping):
        return {domain: score.to_dict() for domain, score in evaluation.items()}
    domains = read_json_object(evaluation).get("domains")
    if not isinstance(domains, dict) or not domains:
        raise ValueError(f"{evaluation}: it names no domains; it must be what flexmoe evaluate --json printed.")
    for domain, score in domains.items():
        if not isinstance(score, dict) or not set(_SCORE_KEYS) <= set(score):
            raise ValueError(f"{evaluation}: of the domain {domain!r} it must say {', '.join(_SCORE_KEYS)}.")
        if strange := [key for key in _SCORE_KEYS if type(score[key]) not in (int, float, type(None))]:
            raise ValueError(
                f"{evaluation}, domain {domain!r}: {strange[0]} must be a number; it is {score[strange[0]]!r}."
            )
    return domains


def _shares(routing: ExpertUsage | Mapping[str, ExpertUsage]) -> dict[str, dict[str, Any]]:
    usages = routing if isinstance(routing, Mapping) else {"share": routing}
    return {
        text: {"tokens": usage.tokens, "share": usage.share(), "chosen_share": usage.chosen_share()}
        for text, usage in usages.items()
    }


def _replace(path: Path, text: str) -> Path:
    """Writes the file beside its place and renames it, so that a kill leaves the old one or the new one."""
    beside = path.with_name(f".{path.name}{TEMPORARY_MARK}{secrets.token_hex(4)}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return path


__all__ = ["license_conflicts", "measure", "write_card"]

"""Facts for model cards, from manifests and configs: who owns what, where it comes from, under which licence.

Facts are raw values of untrusted files; the templates escape them (`flexmoe.cards.markdown`). Does not cover scores
and routing statistics (`flexmoe.card_files`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from flexmoe.io.hub_ids import HUB_ID

if TYPE_CHECKING:
    from flexmoe.modeling.configuration_flexmoe import FlexMoeConfig
    from flexmoe.packages.manifest import ExpertManifest


def expert_facts(manifest: ExpertManifest) -> dict[str, Any]:
    """Facts for the card of a package: the manifest's values, and `metadata`, the fields of the front matter."""
    metadata: dict[str, Any] = {"library_name": "flexmoe", "tags": ["flexmoe", "flexmoe-expert"]}
    if bases := _hub_ids([manifest.anchor.get("repo")]):
        metadata |= {"base_model": bases[0], "base_model_relation": "adapter"}
    return {"evidence": None, **manifest.to_dict(), "metadata": metadata}


def model_facts(config: FlexMoeConfig) -> dict[str, Any]:
    """Facts for the card of a merged model.

    Returns:
        `anchor` (`repo`, `revision`, `folder`, `fingerprint`, `model_type`, `license`), `experts` (without "public",
        in order: `name`, `owner`, `repo`, `revision`, `folder`, `version`, `kind`, `rank`, `license`,
        `data_statement`), `num_experts_per_tok`, `inactive` (names of experts outside the active set) and `metadata`,
        the fields of the front matter. Unknown values are None.
    """
    public, *owned = config.expert_records
    sources = {public["name"]: config.anchor} | {record["name"]: record.get("source") for record in owned}
    return _facts(config, sources, "merge", ["flexmoe"])


def composition_facts(config: FlexMoeConfig, sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Facts for the card of a composition, as in `model_facts`.

    Args:
        sources: `repo` and `revision`, or `folder`, of the anchor (under "public") and of each expert, by name.
    """
    return _facts(config, sources, None, ["flexmoe", "flexmoe-composition"])


def _facts(
    config: FlexMoeConfig, sources: Mapping[str, Mapping[str, Any] | None], relation: str | None, tags: list[str]
) -> dict[str, Any]:
    public, *owned = config.expert_records
    anchor_config: Any = config.anchor_config
    recorded = config.anchor or {}
    anchor = {**_source(sources[public["name"]]), "model_type": anchor_config.model_type}
    anchor |= {"fingerprint": recorded.get("fingerprint"), "license": recorded.get("license")}
    experts = [_expert(record, sources.get(record["name"])) for record in owned]
    metadata: dict[str, Any] = {"library_name": "flexmoe", "pipeline_tag": "text-generation", "tags": tags}
    if bases := _hub_ids([anchor["repo"], *(expert["repo"] for expert in experts)]):
        metadata["base_model"] = bases if len(bases) > 1 else bases[0]
        if relation and len(bases) > 1:
            metadata["base_model_relation"] = relation
    active = config.active_experts
    return {
        "anchor": anchor,
        "experts": experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "inactive": [] if active is None else [name for name in config.expert_names if name not in active],
        "metadata": metadata,
    }


def _expert(record: Mapping[str, Any], source: Mapping[str, Any] | None) -> dict[str, Any]:
    recorded = {key: record.get(key) for key in ("version", "kind", "rank", "license", "data_statement")}
    return {"name": record["name"], **_source(source), **recorded}


def _source(source: Mapping[str, Any] | None) -> dict[str, str | None]:
    """Repository, revision and folder of a part, and its owner: the user or organisation of the repository."""
    values = source if isinstance(source, Mapping) else {}
    found = {key: str(values[key]) if values.get(key) else None for key in ("repo", "revision", "folder")}
    owner, slash, _ = (found["repo"] or "").partition("/")
    return {"owner": owner if slash else None, **found}


def _hub_ids(repos: Iterable[Any]) -> list[str]:
    """The valid Hub ids among `repos`, without duplicates; the Hub rejects a card with an invalid one."""
    return list(dict.fromkeys(repo for repo in repos if isinstance(repo, str) and HUB_ID.fullmatch(repo)))


__all__ = ["composition_facts", "expert_facts", "model_facts"]

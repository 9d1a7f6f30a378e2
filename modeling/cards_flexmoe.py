"""Model cards: the facts that one is made of, and a short card of them.

A card comes from a renderer that is registered (the package `flexmoe` registers its templates), else it is the short
one, as where these files travel alone. Facts are what the files say, and what strangers wrote in them: whoever puts
them into Markdown escapes them (`table_cell`, `one_line`).

Not here: the templates (`flexmoe.model_cards`), scores and routing statistics (`flexmoe.cards`), which licences go
together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .configuration_flexmoe import FlexMoeConfig
    from .manifest_flexmoe import ExpertManifest

CardKind = Literal["expert", "composition", "model"]
Facts = Mapping[str, Any]
CardRenderer = Callable[[str, Facts], str]

# What the Hub takes for an id of its own: in a card, and where something is pushed to.
HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$|[.-]$|[.-]/))[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_HUB_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*", re.ASCII)
_LONGEST_CELL = 200
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# What nobody sees: without width, or turning the direction of the text that follows.
_UNSEEN = re.compile(
    "[\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_PIECE = re.compile(r"[^\s`|<>\\]+|[`|<>\\]")
# What GitHub's Markdown makes a link or a mention of, whatever is escaped in it: not so in code.
_LINKED = re.compile(r"://|www\.|@", re.IGNORECASE)
_PUNCTUATION = ".,;:!?'\"()[]"
# `&` where an entity may begin; `_` unless it stands inside a word.
_MARKUP = re.compile(r"[\\`*\[\]|~$<]|&(?=[#A-Za-z])|(?<![^\W_])_|_(?![^\W_])")
_ENTITIES = {"<": "&lt;", "&": "&amp;"}
_UNQUOTED = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")  # JSON lets them be, YAML does not

_renderers: list[CardRenderer] = []  # one, or none


def register_card_renderer(renderer: CardRenderer) -> None:
    """From now on `renderer(kind, facts)` writes the cards."""
    _renderers[:] = [renderer]


def render_card(kind: CardKind, facts: Facts) -> str:
    """The README.md of an expert's package, a composition or a model.

    Args:
        kind, facts: "expert" and `expert_facts`, "composition" and `composition_facts`, "model" and `model_facts`.
    """
    return _renderers[0](kind, facts) if _renderers else short_card(kind, facts)


def expert_facts(manifest: ExpertManifest) -> dict[str, Any]:
    """What the card of a package says: the manifest's values, and `metadata`, the fields of the front matter."""
    facts = manifest.to_dict()
    metadata: dict[str, Any] = {"library_name": "flexmoe", "tags": ["flexmoe", "flexmoe-expert"]}
    if bases := _hub_ids([manifest.anchor.get("repo")]):
        metadata |= {"base_model": bases[0], "base_model_relation": "adapter"}
    return {**facts, "metadata": metadata | license_fields(manifest.license)}


def model_facts(config: FlexMoeConfig) -> dict[str, Any]:
    """What the card of a model says: a function of who is in it.

    Returns:
        `anchor` (`repo`, `revision`, `folder`, `fingerprint`, `model_type`, `license`), `experts` (the owners', in
        order: `name`, `owner`, `repo`, `revision`, `folder`, `version`, `kind`, `rank`, `license`, `data_statement`),
        `num_experts_per_tok`, `inactive` (names of experts that are not in the active set) and `metadata`, the fields
        of the front matter. None where nothing is recorded.
    """
    public, *owners = config.expert_records
    places = {public["name"]: config.anchor} | {record["name"]: record.get("source") for record in owners}
    return _facts(config, places, "merge", ["flexmoe"])


def composition_facts(config: FlexMoeConfig, references: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """As `model_facts`, of a model by reference.

    Args:
        references: where each part comes from, the anchor under "public": `repo` and `revision`, or `folder`.
    """
    return _facts(config, references, None, ["flexmoe", "flexmoe-composition"])


def license_fields(license: str | None) -> dict[str, str]:
    """A front matter's fields that name a licence: what looks like the Hub's identifier, or "other" and a name."""
    if not license:
        return {}
    return {"license": license} if _HUB_LICENSE.fullmatch(license) else other_license(license)


def other_license(name: str) -> dict[str, str]:
    """The fields for a licence without an identifier, its name in the Hub's form (https://hf.co/docs/hub/model-cards)."""
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")[:96]
    return {"license": "other", "license_name": slug or "other"}


def front_matter(fields: Mapping[str, Any]) -> str:
    """The YAML block at the top of a card, between its marks: a line for each field, its value as JSON."""
    lines = (f"{key}: {_quoted(json.dumps(value, ensure_ascii=False))}\n" for key, value in fields.items())
    return f"---\n{''.join(lines)}---\n"


def plain_line(value: Any) -> str:
    """A stranger's text on one line, without what nobody sees: not yet Markdown. "" of None."""
    return " ".join(_CONTROLS.sub(" ", _UNSEEN.sub("", "" if value is None else str(value))).split())


def one_line(value: Any) -> str:
    """A stranger's text as a line of Markdown: nothing but text, words like addresses as code.

    Of CommonMark and GitHub's extensions no table, link, mention, picture, emphasis, formula, entity or HTML comes of
    it, in a table or in a paragraph. At the beginning of a line it can still open a heading or a list.
    """
    return _PIECE.sub(_as_text, plain_line(value))


def table_cell(value: Any) -> str:
    """As `one_line`, of at most 200 characters."""
    return one_line(shortened(plain_line(value)))


def shortened(text: str) -> str:
    """The text, or its first 199 characters and an ellipsis."""
    return text if len(text) <= _LONGEST_CELL else text[: _LONGEST_CELL - 1] + "…"


def _as_text(piece: re.Match[str]) -> str:
    word: str = piece[0]
    if not _LINKED.search(word):
        return _MARKUP.sub(_escape, word)
    address = word.strip(_PUNCTUATION)
    before, _, after = word.partition(address)
    return f"{_MARKUP.sub(_escape, before)}`{address}`{_MARKUP.sub(_escape, after)}"


def _escape(match: re.Match[str]) -> str:
    return _ENTITIES.get(match[0], f"\\{match[0]}")


def short_card(kind: CardKind, facts: Facts) -> str:
    """The card where no renderer is registered: what it is, its parts, how it is used."""
    return front_matter(facts["metadata"]) + "\n" + _SHORT[kind](facts)


def _facts(
    config: FlexMoeConfig, places: Mapping[str, Mapping[str, Any] | None], relation: str | None, tags: list[str]
) -> dict[str, Any]:
    public, *owners = config.expert_records
    anchor_config: Any = config.anchor_config
    recorded = config.anchor or {}
    anchor = {**_place(places[public["name"]]), "model_type": anchor_config.model_type}
    anchor |= {"fingerprint": recorded.get("fingerprint"), "license": recorded.get("license")}
    experts = [_part(record, places.get(record["name"])) for record in owners]
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


def _part(record: Mapping[str, Any], place: Mapping[str, Any] | None) -> dict[str, Any]:
    told = {key: record.get(key) for key in ("version", "kind", "rank", "license", "data_statement")}
    return {"name": record["name"], **_place(place), **told}


def _place(place: Mapping[str, Any] | None) -> dict[str, str | None]:
    """Where a part comes from, and the owner: the organisation, or the person, that the repository belongs to."""
    values = place if isinstance(place, Mapping) else {}
    found = {key: str(values[key]) if values.get(key) else None for key in ("repo", "revision", "folder")}
    owner, slash, _ = (found["repo"] or "").partition("/")
    return {"owner": owner if slash else None, **found}


def _hub_ids(repos: Iterable[Any]) -> list[str]:
    """What of `repos` can be an id on the Hub, each once: it refuses a card that names others."""
    return list(dict.fromkeys(repo for repo in repos if isinstance(repo, str) and HUB_ID.fullmatch(repo)))


def _quoted(json_text: str) -> str:
    return _UNQUOTED.sub(lambda match: f"\\u{ord(match[0]):04x}", json_text)


def _short_expert(facts: Facts) -> str:
    anchor = facts["anchor"]
    base = anchor["repo"] or f"an anchor of type {anchor['model_type']}"
    return f"""# {facts["name"]}

An expert for FlexMoE, version {table_cell(facts["version"])}, kind {facts["kind"]}, of {len(facts["layers"])} layers.
It is for {table_cell(base)} with the fingerprint {table_cell(anchor["fingerprint"]) or "unknown"}.
Licence: {table_cell(facts["license"]) or "none given"}.

```python
import flexmoe
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/grafted-anchor")
model.add_expert("path/to/this-folder")  # or the id of this repository; becomes "{facts["name"]}"
model.remove_expert("{facts["name"]}")  # and the model is again the one that never had it
```

Trained on: {table_cell(facts["data_statement"]) or "the owner did not say."}
"""


def _short_composition(facts: Facts) -> str:
    return f"""# A composition of {len(facts["experts"])} expert(s)

This folder holds no weights. It names a dense anchor and the packages of its experts; loading it fetches them, checks
the anchor by its fingerprint and each expert by the SHA-256 of its files, and gives one model.

{_parts_table(facts)}

{_LOAD}
model.save_pretrained("merged")  # the same model with its weights, which needs none of the sources
```

An owner who takes a repository away takes the expert out of every later load of this folder. A merged copy, and a copy
in somebody's cache, cannot be recalled.
"""


def _short_model(facts: Facts) -> str:
    return f"""# A FlexMoE model of {len(facts["experts"])} expert(s)

A dense anchor, whose own networks are the expert "public", and experts of other owners, in one checkpoint.

{_parts_table(facts)}

{_LOAD}
model.add_expert("path/to/package")
model.remove_expert("NAME")  # exact: what is left is the model that never had it
```

A copy that somebody has cannot be recalled.
"""


def _parts_table(facts: Facts) -> str:
    anchor = facts["anchor"]
    lines = ["| part | from | commit | licence |", "|---|---|---|---|"]
    for part in ({"name": "public", **anchor}, *facts["experts"]):
        cells = (part["name"], part["repo"] or part["folder"], part["revision"], part["license"])
        lines.append(f"| {' | '.join(map(table_cell, cells))} |")
    fingerprint = table_cell(anchor["fingerprint"]) or "unknown"
    return "\n".join([*lines, "", f"The anchor's fingerprint is {fingerprint}."])


_LOAD = """```python
import flexmoe  # or trust_remote_code=True below, without the package
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this-folder")  # or the id of this repository"""

_SHORT: dict[str, Callable[[Facts], str]] = {
    "expert": _short_expert,
    "composition": _short_composition,
    "model": _short_model,
}

__all__ = [
    "HUB_ID",
    "composition_facts",
    "expert_facts",
    "front_matter",
    "license_fields",
    "model_facts",
    "one_line",
    "other_license",
    "plain_line",
    "register_card_renderer",
    "render_card",
    "short_card",
    "shortened",
    "table_cell",
]

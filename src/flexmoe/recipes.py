"""Recipes of mergekit-moe: which dense models become experts, and by which prompts their router rows are made.

    base_model: owner/base            # the anchor
    gate_mode: hidden                 # see flexmoe.routers.prompt_gates; default: hidden
    dtype: bfloat16                   # must be the stored dtype of the base model
    experts_per_token: 2              # default: 2
    experts:
      - source_model: owner/math      # a folder (relative to the working directory) or a Hub id, optional @revision
        name: math                    # FlexMoE's own key; default: the last part of source_model
        positive_prompts: [...]
        negative_prompts: [...]

The base model is the anchor, so its own FFNs are "public", listed or not. An entry whose source is the base model
defines public's gate, which is subtracted from the others': public's row is zero in every graft, and softmax is
invariant to a common shift. Without such an entry, public is inactive.

Keys that a FlexMoE model cannot satisfy are errors that name the key.

Does not cover what the modes compute (`flexmoe.routers.prompt_gates`), adapters (`model+lora`) or the graft itself.

Source: mergekit 0.1.5, https://github.com/arcee-ai/mergekit, docs/moe.md: keys, defaults and checks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from flexmoe.conversion.router_tensors import StackedRows
from flexmoe.hub.client import resolve_folder
from flexmoe.io.dense import DenseCheckpoint, read_dense_config
from flexmoe.meta import build_on_meta
from flexmoe.modeling import PUBLIC
from flexmoe.modeling.configuration_flexmoe import check_expert_name, check_top_k
from flexmoe.routers.prompt_gates import GATE_MODES, GateMode, Prompts, check_gate_mode, make_gates

DEFAULT_GATE_MODE = "hidden"
DEFAULT_EXPERTS_PER_TOKEN = 2

RECIPE_KEYS = ("base_model", "experts", "gate_mode", "dtype", "experts_per_token", "shared_experts", "architecture")
EXPERT_KEYS = ("source_model", "name", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
SOURCE_KEYS = ("model", "lora", "override_architecture")

# Accepted values of `architecture`. All of them normalise the k weights, as a grafted recipe does.
ARCHITECTURES = ("mixtral", "deepseek moe", "qwen moe", "qwen3 moe")

NAME_LENGTH = 56  # of 64: leaves room for a suffix that makes names unique


@dataclass(frozen=True)
class Source:
    """A dense model: a folder or a Hub id, and a revision on the Hub."""

    path: str
    revision: str | None = None

    def same_as(self, other: Source) -> bool:
        """Whether both are the same model; a folder may be written in several ways."""
        return self.revision == other.revision and (
            self.path == other.path or Path(self.path).resolve() == Path(other.path).resolve()
        )

    def __str__(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"


@dataclass(frozen=True)
class RecipeExpert:
    """An entry of a recipe: the name of its expert, the model, the prompts."""

    name: str
    source: Source
    prompts: Prompts


@dataclass(frozen=True)
class Recipe:
    """A valid recipe. `notes`: entries without effect, one sentence each."""

    base: Source
    experts: list[RecipeExpert]
    gate_mode: GateMode
    experts_per_token: int
    dtype: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def grafted(self) -> dict[str, Source]:
        """The models that become experts besides public, by name."""
        return {expert.name: expert.source for expert in self.experts if expert.name != PUBLIC}

    @property
    def active_experts(self) -> list[str] | None:
        """Names of the active experts: None (all) if an entry is the base model, else all but public."""
        return None if len(self.grafted) < len(self.experts) else list(self.grafted)


@dataclass(frozen=True)
class RecipeRows:
    """Makes the rows of a graft (a `RowMaker`) from a recipe: the experts' gates minus public's, if it has one."""

    recipe: Recipe
    seed: int

    def __call__(self, anchor: DenseCheckpoint, public: Sequence[str] | None) -> dict[str, StackedRows]:
        """The rows. ValueError: the recipe's dtype is not the stored one; or as `make_gates`."""
        if self.recipe.dtype not in (None, anchor.dtype):
            raise ValueError(
                f"dtype: {self.recipe.dtype}, but {anchor.folder} is stored in {anchor.dtype}, and a graft keeps its "
                "bytes. Leave dtype out, or save base_model and experts in that dtype first: AutoModelForCausalLM"
                f'.from_pretrained(model, dtype="{self.recipe.dtype}").save_pretrained(new_folder).'
            )
        prompts = [expert.prompts for expert in self.recipe.experts]
        gates_NEH = make_gates(self.recipe.gate_mode, prompts, anchor, seed=self.seed).float()
        gates = dict(zip((expert.name for expert in self.recipe.experts), gates_NEH.unbind(1), strict=True))
        shift = gates.pop(PUBLIC, torch.zeros(()))
        return {name: StackedRows(gate - shift, torch.zeros(len(gate))) for name, gate in gates.items()}


def read_recipe(file: str | Path) -> Recipe:
    """Reads a recipe of mergekit-moe.

    Raises:
        FileNotFoundError: no such file.
        ValueError, TypeError: it is not a YAML mapping, a key is missing, unknown or unsupported, or the entries do
            not define a mixture; names the key and the alternative.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such recipe.")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not YAML ({error}).") from error
    try:
        return parse_recipe(values)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{file}: {error}") from error


def check_base(recipe: Recipe, token: str | bool | None = None) -> None:
    """Checks by the base model's configuration alone that its gate mode fits it, before any weights are fetched.

    Raises:
        ValueError: as `check_gate_mode`, or the model cannot be an anchor.
        FileNotFoundError, PermissionError, ConnectionError: no such model (see `resolve_folder`).
    """
    if recipe.gate_mode.needs != "embeddings":
        return
    base = recipe.base
    found = resolve_folder(base.path, revision=base.revision, token=token, allow_patterns=["config.json"])
    model, _ = build_on_meta(read_dense_config(found.path))
    check_gate_mode(recipe.gate_mode, model)


def parse_recipe(values: Any) -> Recipe:
    """The recipe in a parsed YAML mapping. Raises: as `read_recipe`."""
    _check_keys(values, RECIPE_KEYS, "a recipe")
    if values.get("shared_experts"):
        raise ValueError(
            "shared_experts: a FlexMoE model has no shared experts. List them under experts, or leave them out."
        )
    base = _source(_required(values, "base_model", "the recipe"), "base_model")
    entries = _required(values, "experts", "the recipe")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"experts: must be a list of at least one entry; got {entries!r}.")
    mode, notes = _gate_mode(values.get("gate_mode")), _architecture_notes(values.get("architecture"))
    experts = _experts(entries, base, notes)
    k = values.get("experts_per_token")
    recipe = Recipe(
        base=base,
        experts=experts,
        gate_mode=mode,
        experts_per_token=_checked_k(k, len(experts)),
        dtype=_dtype(values.get("dtype")),
        notes=notes,
    )
    if not recipe.grafted:
        raise ValueError("experts: the only one is base_model itself; `flexmoe graft` does that without a recipe.")
    _check_prompts(recipe)
    return recipe


def expert_name(source: str) -> str:
    """A name for the expert made of `source`: its last part in lower case, with dashes for other characters.

    An invalid name (it begins with a digit, is reserved) gets the prefix `expert-`.
    """
    name = re.sub(r"[^a-z0-9]+", "-", Path(source).name.lower()).strip("-")[:NAME_LENGTH].strip("-")
    try:
        return check_expert_name(name) if name != PUBLIC else f"expert-{name}"
    except ValueError:
        return check_expert_name(f"expert-{name}"[:NAME_LENGTH].strip("-"))


def _experts(entries: Sequence[Any], base: Source, notes: list[str]) -> list[RecipeExpert]:
    experts: list[RecipeExpert] = []
    for number, entry in enumerate(entries):
        where = f"experts[{number}]"
        _check_keys(entry, EXPERT_KEYS, where)
        _check_unchanged(entry, where)
        source = _source(_required(entry, "source_model", where), f"{where}.source_model")
        prompts = Prompts(
            *(_texts(entry.get(key), f"{where}.{key}") for key in ("positive_prompts", "negative_prompts"))
        )
        given, taken = entry.get("name"), {expert.name for expert in experts}
        if source.same_as(base) and PUBLIC not in taken:
            if given not in (None, PUBLIC):
                notes.append(f"{where}.name: {given} is the base model, which is named {PUBLIC} in FlexMoE models.")
            name = PUBLIC
        elif given is None:
            name = _free(expert_name(source.path), taken)
        else:
            name = _given_name(given, taken, where)
        experts.append(RecipeExpert(name, source, prompts))
    return experts


def _free(name: str, taken: Iterable[str]) -> str:
    """`name`, or the first of `name-2`, `name-3` ... that is free."""
    number = 1
    free = name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free


def _given_name(name: Any, taken: Iterable[str], where: str) -> str:
    try:
        check_expert_name(name)
    except ValueError as error:
        raise ValueError(f"{where}.name: {error}") from error
    if name == PUBLIC:
        raise ValueError(f"{where}.name: {PUBLIC!r} is the base model's own network; choose another name.")
    if name in taken:
        raise ValueError(f"{where}.name: {name!r} is taken by an earlier entry; names must be unique.")
    return str(name)


def _check_keys(values: Any, known: Sequence[str], what: str) -> None:
    if not isinstance(values, Mapping):
        raise TypeError(f"{what} is a mapping with the keys {', '.join(known)}; got {type(values).__name__}.")
    if unknown := [str(key) for key in values if key not in known]:
        raise ValueError(f"{what} has unknown keys: {', '.join(unknown)}. Known keys: {', '.join(known)}.")


def _required(values: Mapping[str, Any], key: str, what: str) -> Any:
    if values.get(key) is None:
        raise ValueError(f"{what} lacks {key}.")
    return values[key]


def _check_unchanged(entry: Mapping[str, Any], where: str) -> None:
    """ValueError: the entry asks for changed weights, which a graft copies byte for byte."""
    for key, neutral in (("noise_scale", 0), ("residual_scale", 1)):
        value = entry.get(key)
        if value is not None and value != neutral:
            raise ValueError(
                f"{where}.{key}: {value!r}; weights are copied unchanged. Leave the key out, or save a changed copy "
                "of the model and name that."
            )


def _source(value: Any, where: str) -> Source:
    """The model of `path`, `path@revision`, or of mergekit's mapping with the key `model`."""
    if isinstance(value, Mapping):
        _check_keys(value, SOURCE_KEYS, where)
        if value.get("override_architecture") is not None:
            raise ValueError(
                f"{where}.override_architecture: the architecture is read from config.json. Change it there."
            )
        lora, value = value.get("lora"), _required(value, "model", where)
    else:
        value, _, lora = str(value).partition("+") if isinstance(value, str) else (value, "", None)
    if lora:
        raise ValueError(
            f"{where}: an adapter ({lora}); the experts of a recipe are dense models. Merge it into one first (PEFT: "
            "merge_and_unload, save_pretrained) and name the folder."
        )
    if isinstance(value, Mapping):
        _check_keys(value, ("path", "revision"), f"{where}.model")
        revision = value.get("revision")
        return Source(str(_required(value, "path", where)), None if revision is None else str(revision))
    if not isinstance(value, str) or value.count("@") > 1:
        raise ValueError(f"{where}: {value!r} is not a model; write a folder, a Hub id, or HUB_ID@REVISION.")
    path, _, revision = value.partition("@")
    return Source(path, revision or None)


def _texts(value: Any, where: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"{where}: must be a list of texts; got {value!r}.")
    return value


def _gate_mode(value: Any) -> GateMode:
    name = DEFAULT_GATE_MODE if value is None else value
    if name not in GATE_MODES:
        raise ValueError(f"gate_mode: {name!r} is unknown; available are {', '.join(GATE_MODES)}.")
    return GATE_MODES[name]


def _dtype(value: Any) -> str | None:
    name = None if value is None else str(value).removeprefix("torch.")
    if name is not None and not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"dtype: {value!r} is not a torch dtype, such as bfloat16, float16 or float32.")
    return name


def _architecture_notes(value: Any) -> list[str]:
    if not value:
        return []
    if not any(name.startswith(str(value).lower()) for name in ARCHITECTURES):
        raise ValueError(
            f"architecture: {value!r} is not one of {', '.join(ARCHITECTURES)}. Leave it out: a FlexMoE model is "
            "written."
        )
    return [f"architecture: {value} has no effect. A FlexMoE model is written; flexmoe export converts it to others."]


def _checked_k(value: Any, count: int) -> int:
    try:
        k = check_top_k(DEFAULT_EXPERTS_PER_TOKEN if value is None else value)
    except (ValueError, TypeError) as error:
        raise type(error)(f"experts_per_token: {error}") from error
    if k > count:
        default = ", its default" if value is None else ""
        raise ValueError(f"experts_per_token: {k}{default}, but there are {count} experts; set at most {count}.")
    return k


def _check_prompts(recipe: Recipe) -> None:
    """ValueError: prompts are missing, or the same for all experts."""
    if recipe.gate_mode.needs == "nothing":
        return
    for number, expert in enumerate(recipe.experts):
        if not expert.prompts.positive:
            raise ValueError(
                f"experts[{number}] has no positive_prompts, which gate_mode: {recipe.gate_mode.name} needs. Give it "
                "some, or set gate_mode: random and train the rows."
            )
    first, *others = (expert.prompts for expert in recipe.experts)
    if others and all(prompts == first for prompts in others):
        raise ValueError(
            "experts: the prompts are the same for all, so all router rows would be equal. Write prompts that are "
            "specific to each expert."
        )

"""Compose, add, remove: the lifecycle of experts on disk, checkpoint in, checkpoint out.

A result is a function of its experts alone: the checkpoint after a removal has the bytes of one that never had that
expert. The model is built on the meta device for names, order and shapes; weights are streamed one tensor at a time,
and a package is read once and verified on the way, before the result appears.

Does not cover live models (`flexmoe.modeling.lifecycle_flexmoe`), training, or compositions by reference
(`flexmoe.composition`).
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from flexmoe.admission.incoming import (
    PRIOR_WITH_BIASES,
    IncomingExpert,
    PackageLike,
    PolicyLike,
    check_public_prior,
    choose_prior,
    rename_incoming,
    with_experts,
)
from flexmoe.admission.router_inputs import inputs_of_stored
from flexmoe.admission.stored_outputs import PublicNetworks
from flexmoe.admission.stored_rows import check_incoming_rows, tensor_places
from flexmoe.cards.facts import model_facts
from flexmoe.cards.rendering import render
from flexmoe.companions import copy_companions
from flexmoe.hub.contents import check_others, model_files
from flexmoe.hub.stored_model import CONFIG_FILE, StoredModel
from flexmoe.io.finite import cast_finite
from flexmoe.io.folders import atomic_folder, check_apart, check_new_folder
from flexmoe.io.strict_json import read_json_object
from flexmoe.io.tensors import Chunk, TensorInfo, expected_bytes
from flexmoe.io.writer import MAX_SHARD_SIZE, TensorSource, source_from_file, source_from_tensor, write_checkpoint
from flexmoe.modeling.configuration_flexmoe import PUBLIC, FlexMoeConfig, check_top_k, drop_experts
from flexmoe.modeling.fingerprint_flexmoe import TORCH_DTYPES
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from flexmoe.packages.checks import check_position, check_shapes, errors_naming
from flexmoe.packages.package import CARD_FILE, ExpertPackage, PackageError
from flexmoe.tokenization import check_tokenizer


def compose(
    grafted: str | Path,
    packages: Sequence[PackageLike],
    out: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    public_prior: float | None = None,
    num_experts_per_tok: int | None = None,
    verify: bool = True,
    policy: PolicyLike = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes the model of a grafted anchor and the experts in `packages`, in that order, and returns its folder.

    Args:
        grafted: folder or Hub id of a model that has "public" only.
        packages: folders, Hub ids or opened packages.
        names: new names for experts: {package as given in `packages`, or its own name: name in the model}.
        public_prior: log prior odds of "public", its bias in every layer. Default: 0 if all rows are bias-free and 0.5
            if none is; a default that depended on single experts would make removal inexact. For a model whose public
            row is not zero (an imported one), its own prior is the default.
        num_experts_per_tok: k of the top-k. Default: the graft's.
        verify: refuse experts whose router row or bias would dominate the routing, or whose networks would dominate
            the outputs (`flexmoe.verify` checks more). They are compared with the graft, and the norms of their rows
            with the smallest among the other packages.
        policy: which packages are trusted: a policy file; default: the one that FLEXMOE_POLICY names.
        max_shard_size: bytes per weight file.
        overwrite: replace an existing `out`.
        progress: called with the number of bytes just written.

    Raises:
        FileExistsError: `out` exists and `overwrite` is False.
        FileNotFoundError: no such model or package.
        ValueError: an expert is for another anchor, of an unknown kind or shape, or its name is taken; its package
            does not match its manifest, is not trusted or not admitted (`PackageError`); or some rows have a bias,
            others none, and no `public_prior` is given.
        TypeError: `packages` is one package instead of a list.

    Example:
        ```pycon
        >>> import flexmoe
        >>> from transformers import AutoModelForCausalLM
        >>> folder = flexmoe.compose("grafted", ["math-expert", "code-expert"], "composed")
        >>> AutoModelForCausalLM.from_pretrained(folder).expert_names
        ['public', 'math', 'code']
        ```
    """
    if isinstance(packages, str | Path | ExpertPackage):
        raise TypeError(f"packages: one package ({packages!r}), expected a list of them. Write [{packages!r}].")
    if num_experts_per_tok is not None:
        check_top_k(num_experts_per_tok)
    if public_prior is not None:
        check_public_prior(public_prior)
    model = StoredModel(grafted)
    if len(model.config.expert_names) > 1:
        raise ValueError(
            f"{grafted} has the experts {model.config.expert_names} already: add to it with `flexmoe add`, or compose "
            "from the grafted anchor."
        )
    if not packages:
        raise ValueError("There is no package to compose with: give at least one.")
    incoming = [IncomingExpert.open(package, model.config, policy) for package in packages]
    rename_incoming(incoming, packages, names or {})
    prior = choose_prior(model, incoming, public_prior)
    config = with_experts(model.config, incoming)
    if num_experts_per_tok is not None:
        config.num_experts_per_tok = num_experts_per_tok
    return _write(model, config, incoming, out, overwrite, max_shard_size, progress, public_prior=prior, verify=verify)


def add(
    model: str | Path,
    package: PackageLike,
    out: str | Path,
    *,
    name: str | None = None,
    verify: bool = True,
    policy: PolicyLike = None,
    position: int | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes the stored `model` with the expert in `package` added, as `name` or by its own, and returns its folder.

    The public prior is kept, and so is a choice of active experts: if the config has one (`active_experts`), the new
    expert is inactive until `set_active_experts` includes it; the command line prints a note. `out` may be the model's
    own folder, with `overwrite`. `position` is the expert's index among the names, 0 being public's (None: the last):
    an expert that was removed and is added at its old position gives the files that there were. Other arguments and
    errors: as `compose`.

    Example:
        ```pycon
        >>> import flexmoe
        >>> folder = flexmoe.add("model", "law-expert", "model-with-law")
        >>> [expert["name"] for expert in flexmoe.inspect(folder)["experts"]]
        ['public', 'math', 'code', 'law']
        ```
    """
    stored = StoredModel(model)
    expert = IncomingExpert.open(package, stored.config, policy)
    expert.name = name or expert.name
    check_position(position, stored.config.expert_names)
    config = with_experts(stored.config, [expert], position)
    return _write(stored, config, [expert], out, overwrite, max_shard_size, progress, verify=verify)


def remove(
    model: str | Path,
    name: str,
    out: str | Path,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes the stored `model` without the expert `name`, byte for byte as if it had never had it.

    `out` may be the model's own folder, with `overwrite`. Returns its folder.

    Raises:
        FileExistsError: `out` exists and `overwrite` is False.
        ValueError: there is no such expert, it is "public", or it is the only active one.

    Example:
        ```pycon
        >>> import flexmoe
        >>> folder = flexmoe.remove("model", "math", "model-without-math")
        >>> [expert["name"] for expert in flexmoe.inspect(folder)["experts"]]
        ['public', 'code']
        ```
    """
    stored = StoredModel(model)
    config = copy.deepcopy(stored.config)
    if name == PUBLIC:
        raise ValueError(f"{PUBLIC!r} is the anchor's own network and cannot be removed, only masked.")
    if name not in config.expert_names:
        raise ValueError(f"{model} has no expert {name!r}; it has {', '.join(config.expert_names)}.")
    drop_experts(config, {name})
    return _write(stored, config, [], out, overwrite, max_shard_size, progress)


class _PackageStream:
    """A package's tensors in any order, while its files are read once, in their own order.

    If the two orders agree, as in packages that FlexMoE wrote, one tensor is in memory at a time. Rows are left out:
    they were read before (the default prior depends on them) and are only verified here.
    """

    def __init__(self, expert: IncomingExpert):
        self._expert = expert
        self._stream = expert.verified_tensors()
        self._waiting: dict[str, torch.Tensor] = {}

    def take(self, name: str) -> torch.Tensor:
        while name not in self._waiting:
            if not self._advance():
                raise PackageError(f"{self._expert.package.folder}: {name!r} vanished while the package was read.")
        return self._waiting.pop(name)

    def finish(self) -> None:
        """Reads the remaining tensors, so the hash of every file is compared."""
        while self._advance():
            pass

    def _advance(self) -> bool:
        item = next(self._stream, None)
        if item is None:
            return False
        name, tensor = item
        if name not in self._expert.rows:
            self._waiting[name] = tensor
        return True


def _write(
    stored: StoredModel,
    config: FlexMoeConfig,
    incoming: Sequence[IncomingExpert],
    out: str | Path,
    overwrite: bool,
    max_shard_size: int,
    progress: Callable[[int], None] | None,
    *,
    public_prior: float | None = None,
    verify: bool = True,
) -> Path:
    target = check_new_folder(out, overwrite)
    check_apart(target, *(expert.package.folder for expert in incoming))
    if stored.folder.resolve() != target:  # a model may be replaced by its successor
        check_apart(target, stored.folder)
    with errors_naming(*(expert.package for expert in incoming)), torch.device("meta"):
        model = FlexMoeForCausalLM(config)
    streams = {expert.name: _PackageStream(expert) for expert in incoming}
    sources = _sources(stored, model, {expert.name: expert for expert in incoming}, streams, public_prior)
    if verify and incoming:
        check_incoming_rows(incoming, _present_rows(stored, model, public_prior), inputs_of_stored(stored, model))
        publics = PublicNetworks.of_model(stored)
        for expert in incoming:
            expert.expect(config, publics, verify=True)
    check_others(stored.folder, target, model_files(stored.folder, read_json_object(stored.folder / CONFIG_FILE)))
    tokenizer = check_tokenizer(stored.folder)
    with atomic_folder(target, overwrite) as folder:
        write_checkpoint(folder, sources, max_shard_size=max_shard_size, progress=progress)
        for stream in streams.values():
            stream.finish()
        copy_companions(stored.folder, folder, config, public_sample=config.public_sample, tokenizer=tokenizer)
        # a function of the model's experts, instead of the card that was copied
        (folder / CARD_FILE).write_text(render("model", model_facts(config)), encoding="utf-8")
        model.save_code(folder)
        config.save_pretrained(folder)  # last: a folder without it does not load
    return target


def _sources(
    stored: StoredModel,
    model: FlexMoeForCausalLM,
    incoming: Mapping[str, IncomingExpert],
    streams: Mapping[str, _PackageStream],
    public_prior: float | None,
) -> list[TensorSource]:
    """The tensors to write, in the order of the model's state dict."""
    state, owned = model.state_dict(), tensor_places(model)
    _check_incoming(incoming, state, owned)
    _check_stored(stored, state, owned, incoming)
    sources = []
    for key, empty in state.items():
        owner, inside = owned.get(key, ("", ""))
        if owner in incoming:
            sources.append(_incoming_source(stored, incoming[owner], streams[owner], key, inside, empty.shape))
        elif owner == PUBLIC and inside.endswith(".router.bias") and public_prior is not None:
            sources.append(source_from_tensor(key, torch.tensor([public_prior], dtype=torch.float32)))
        elif key in stored.tensors.infos:
            sources.append(source_from_file(stored.tensors, key))
        # other names are tied to a tensor that is stored
    return sources


def _incoming_source(
    stored: StoredModel, expert: IncomingExpert, stream: _PackageStream, key: str, inside: str, shape: Sequence[int]
) -> TensorSource:
    """A tensor of a package under its name in the model, in the dtype of public's counterpart; rows are float32."""
    what = f"{expert.package.folder}: {inside!r}"
    if inside in expert.rows:
        return source_from_tensor(key, cast_finite(expert.rows[inside], torch.float32, what))
    code = stored.tensors.infos[_public_counterpart(key, expert)].dtype

    def chunks() -> Iterator[Chunk]:
        cast = cast_finite(stream.take(inside), TORCH_DTYPES[code], what)
        yield from source_from_tensor(key, cast).chunks()

    return TensorSource(TensorInfo(key, code, tuple(shape), expected_bytes(code, shape)), chunks)


def _public_counterpart(key: str, expert: IncomingExpert) -> str:
    """The public network's tensor of the same role; for a low-rank expert's factors, the matrix that they change."""
    counterpart = key.replace(f".experts.{expert.name}.", f".experts.{PUBLIC}.")
    if expert.package.manifest.kind == "low_rank":
        matrix, _, parameter = counterpart.rsplit(".", 2)
        return f"{matrix}.{parameter}"
    return counterpart


def _present_rows(
    stored: StoredModel, model: FlexMoeForCausalLM, public_prior: float | None
) -> dict[str, dict[str, torch.Tensor]]:
    """The stored router rows and biases by expert, named as in a package; public's bias is the new prior."""
    rows: dict[str, dict[str, torch.Tensor]] = {}
    for key, (owner, inside) in tensor_places(model).items():
        if ".router." in inside and key in stored.tensors.infos:
            is_prior = owner == PUBLIC and inside.endswith(".bias") and public_prior is not None
            row = torch.tensor([public_prior], dtype=torch.float32) if is_prior else stored.tensors.read(key)
            rows.setdefault(owner, {})[inside] = row
    return rows


def _check_incoming(
    incoming: Mapping[str, IncomingExpert], state: Mapping[str, torch.Tensor], owned: Mapping[str, tuple[str, str]]
) -> None:
    for name, expert in incoming.items():
        expected = {inside: tuple(state[key].shape) for key, (owner, inside) in owned.items() if owner == name}
        check_shapes(expert.package, expected)


def _check_stored(
    stored: StoredModel,
    state: Mapping[str, torch.Tensor],
    owned: Mapping[str, tuple[str, str]],
    incoming: Mapping[str, IncomingExpert],
) -> None:
    """Checks that the experts that stay are complete, shapes are right, and every stored tensor has an owner."""
    infos = stored.tensors.infos
    removed = _prefixes_of_removed(stored, owned)
    for key in infos:
        if key.startswith(removed):
            continue
        if key not in state or infos[key].shape != tuple(state[key].shape):
            expected = list(state[key].shape) if key in state else "none"
            raise ValueError(
                f"{stored.folder}: tensor {key!r} has shape {list(infos[key].shape)}; its config implies {expected}."
            )
    missing = [key for key, (owner, _) in owned.items() if owner not in incoming and key not in infos]
    if missing:
        raise ValueError(
            f"{stored.folder} lacks {len(missing)} tensors that its config implies, such as {missing[0]!r}."
        )


def _prefixes_of_removed(stored: StoredModel, owned: Mapping[str, tuple[str, str]]) -> tuple[str, ...]:
    """The prefixes of stored tensors that belong to experts which are being removed."""
    leaving = set(stored.config.expert_names) - {owner for owner, _ in owned.values()}
    public = {key.rpartition(f".{PUBLIC}.")[0] for key in owned if f".router.{PUBLIC}." in key}
    blocks = {path.removesuffix(".router") for path in public}
    return tuple(f"{block}.{part}.{name}." for block in blocks for part in ("experts", "router") for name in leaving)


__all__ = ["PRIOR_WITH_BIASES", "add", "compose", "remove"]

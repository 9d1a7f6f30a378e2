"""Compose, add, remove: the lifecycle of experts on disk, checkpoint in, checkpoint out.

A result is a function of who is in it: the checkpoint after a removal has the bytes of the one that never had that
expert. The model is built on the meta device for names, order and shapes; weights pass through a tensor at a time,
and a package is read once, verified on the way, before its result appears.

Not here: live models (`flexmoe.modeling.lifecycle_flexmoe`), training of any kind, compositions by reference.
"""

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from flexmoe.conversion.judging import judge_rows_of, places, public_matrices
from flexmoe.conversion.newcomers import (
    PRIOR_WITH_BIASES,
    Newcomer,
    PackageLike,
    PolicyLike,
    choose_prior,
    rename,
    with_experts,
)
from flexmoe.conversion.stored import CONFIG_FILE, StoredModel
from flexmoe.modeling.cards_flexmoe import model_facts, render_card
from flexmoe.modeling.configuration_flexmoe import PUBLIC, FlexMoeConfig, drop_experts
from flexmoe.modeling.fitting_flexmoe import cast_finite, naming
from flexmoe.modeling.folders_flexmoe import atomic_folder, check_apart, check_new_folder, file_inside
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from flexmoe.modeling.packages_flexmoe import CARD_FILE, ExpertPackage, PackageError
from flexmoe.modeling.tensor_writer_flexmoe import (
    MAX_SHARD_SIZE,
    TensorSource,
    source_from_file,
    source_from_tensor,
    write_checkpoint,
)
from flexmoe.modeling.tensors_flexmoe import TORCH_DTYPES, Chunk, TensorInfo, expected_bytes

CODE = "_flexmoe.py"  # what files of FlexMoE's own code end with; an older copy's may have others than ours
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".onnx"}


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
    """Writes the model of a grafted anchor and the experts in `packages`, in that order. Returns its folder.

    Args:
        grafted: folder or Hub id of a model that has "public" only.
        packages: folders, Hub ids or opened packages.
        names: what to call experts here: {package as given in `packages`, or its own name: name in the model}.
        public_prior: log prior odds of "public", its bias in every layer. By default 0 if all rows are bias-free and
            0.5 if none is; a default that depended on who is there would make removal inexact. A model whose public
            row is not zero (an imported one) brings its own prior, which is then the default.
        num_experts_per_tok: k of the top-k; the graft's by default.
        verify: refuse experts whose row or bias would take over the model (`flexmoe.verify` checks more). They are
            held against the graft, and the lengths of their rows against the shortest of each other's.
        policy: whose packages are let in: a policy file, by default the one that FLEXMOE_POLICY names.
        max_shard_size: bytes per weight file.
        progress: called with the number of bytes just written.

    Raises:
        FileExistsError: `out` exists and `overwrite` is False.
        FileNotFoundError: no such model or package.
        ValueError: an expert is for another anchor, of an unknown kind or shape, its name is taken, its package is
            not what it says, not let in or refused (`PackageError`), or rows with and without bias meet and no
            `public_prior` is given.
        TypeError: `packages` is one package and no list.
    """
    if isinstance(packages, str | Path | ExpertPackage):
        raise TypeError(f"packages: one package ({packages!r}), want a list of them. Write [{packages!r}].")
    model = StoredModel(grafted)
    if len(model.config.expert_names) > 1:
        raise ValueError(
            f"{grafted} has the experts {model.config.expert_names} already: add to it with `flexmoe add`, or compose "
            "from the grafted anchor."
        )
    if not packages:
        raise ValueError("There is no package to compose with: give at least one.")
    newcomers = [Newcomer.open(package, policy) for package in packages]
    rename(newcomers, packages, names or {})
    prior = choose_prior(model, newcomers, public_prior)
    config = with_experts(model.config, newcomers)
    if num_experts_per_tok is not None:
        config.num_experts_per_tok = num_experts_per_tok
    return _write(
        model, config, newcomers, out, overwrite, max_shard_size, progress, public_prior=prior, verify=verify
    )


def add(
    model: str | Path,
    package: PackageLike,
    out: str | Path,
    *,
    name: str | None = None,
    verify: bool = True,
    policy: PolicyLike = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes the stored `model` with the expert in `package` added, as `name` or by its own. Returns its folder.

    The public prior stays what it is, and so does a choice of active experts: where the config has one
    (`active_experts`), the newcomer is not in it and takes no part until `set_active_experts` names it. The command
    line says so. `out` may be the model's own folder, with `overwrite`.

    Raises: as `compose`.
    """
    stored, newcomer = StoredModel(model), Newcomer.open(package, policy)
    newcomer.name = name or newcomer.name
    config = with_experts(stored.config, [newcomer])
    return _write(stored, config, [newcomer], out, overwrite, max_shard_size, progress, verify=verify)


def remove(
    model: str | Path,
    name: str,
    out: str | Path,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes the stored `model` without the expert `name`: byte for byte the one that never had it.

    `out` may be the model's own folder, with `overwrite`.

    Raises:
        FileExistsError: `out` exists and `overwrite` is False.
        ValueError: there is no such expert, it is "public", or it is the only active one.
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
    """Hands out a package's networks in the order asked for, reading its files once, in their own order.

    Where the two orders agree, as in packages that FlexMoE wrote, one tensor is in memory at a time. Rows were read
    beforehand (a composition's prior depends on them) and are compared here with the verified ones.
    """

    def __init__(self, newcomer: Newcomer):
        self._newcomer = newcomer
        self._stream = newcomer.package.tensors()
        self._waiting: dict[str, torch.Tensor] = {}

    def take(self, name: str) -> torch.Tensor:
        while name not in self._waiting:
            if not self._advance():
                raise PackageError(f"{self._newcomer.package.folder}: {name!r} vanished while the package was read.")
        return self._waiting.pop(name)

    def finish(self) -> None:
        """Reads what is left, so that every file's hash has been compared."""
        while self._advance():
            pass

    def _advance(self) -> bool:
        item = next(self._stream, None)
        if item is None:
            return False
        name, tensor = item
        row = self._newcomer.rows.get(name)
        if row is None:
            self._waiting[name] = tensor
        elif not torch.equal(row, tensor):
            raise PackageError(f"{self._newcomer.package.folder}: {name!r} changed while the package was read.")
        return True


def _write(
    stored: StoredModel,
    config: FlexMoeConfig,
    newcomers: Sequence[Newcomer],
    out: str | Path,
    overwrite: bool,
    max_shard_size: int,
    progress: Callable[[int], None] | None,
    *,
    public_prior: float | None = None,
    verify: bool = True,
) -> Path:
    target = check_new_folder(out, overwrite)
    check_apart(target, *(newcomer.package.folder for newcomer in newcomers))
    if stored.folder.resolve() != target:  # a model may be replaced by what is made of it
        check_apart(target, stored.folder)
    with naming(*(newcomer.package for newcomer in newcomers)), torch.device("meta"):
        model = FlexMoeForCausalLM(config)
    streams = {newcomer.name: _PackageStream(newcomer) for newcomer in newcomers}
    sources = _sources(stored, model, {newcomer.name: newcomer for newcomer in newcomers}, streams, public_prior)
    if verify and newcomers:
        judge_rows_of(newcomers, _rows_there(stored, model, public_prior), public_matrices(stored, model))
    with atomic_folder(target, overwrite) as folder:
        write_checkpoint(folder, sources, max_shard_size=max_shard_size, progress=progress)
        for stream in streams.values():
            stream.finish()
        _copy_companions(stored.folder, folder)
        # a function of who is in it, in place of the card that came along
        (folder / CARD_FILE).write_text(render_card("model", model_facts(config)), encoding="utf-8")
        model.save_code(folder)
        config.save_pretrained(folder)  # last: a folder without it does not load
    return target


def _sources(
    stored: StoredModel,
    model: FlexMoeForCausalLM,
    newcomers: Mapping[str, Newcomer],
    streams: Mapping[str, _PackageStream],
    public_prior: float | None,
) -> list[TensorSource]:
    """What to write, in the order of the model's state dict."""
    state, owned = model.state_dict(), places(model)
    _check_newcomers(newcomers, state, owned)
    _check_stored(stored, state, owned, newcomers)
    sources = []
    for key, empty in state.items():
        owner, inside = owned.get(key, ("", ""))
        if owner in newcomers:
            sources.append(_newcomer_source(stored, newcomers[owner], streams[owner], key, inside, empty.shape))
        elif owner == PUBLIC and inside.endswith(".router.bias") and public_prior is not None:
            sources.append(source_from_tensor(key, torch.tensor([public_prior], dtype=torch.float32)))
        elif key in stored.tensors.infos:
            sources.append(source_from_file(stored.tensors, key))
        # what is left is tied to a tensor that is stored
    return sources


def _newcomer_source(
    stored: StoredModel, newcomer: Newcomer, stream: _PackageStream, key: str, inside: str, shape: Sequence[int]
) -> TensorSource:
    """A tensor of a package under its name in the model, in the dtype of public's own; rows are float32."""
    what = f"{newcomer.package.folder}: {inside!r}"
    if inside in newcomer.rows:
        return source_from_tensor(key, cast_finite(newcomer.rows[inside], torch.float32, what))
    code = stored.tensors.infos[_twin(key, newcomer)].dtype

    def chunks() -> Iterator[Chunk]:
        cast = cast_finite(stream.take(inside), TORCH_DTYPES[code], what)
        yield from source_from_tensor(key, cast).chunks()

    return TensorSource(TensorInfo(key, code, tuple(shape), expected_bytes(code, shape)), chunks)


def _twin(key: str, newcomer: Newcomer) -> str:
    """The public network's tensor beside a newcomer's; beside a low-rank expert's factors, the matrix they change."""
    twin = key.replace(f".experts.{newcomer.name}.", f".experts.{PUBLIC}.")
    if newcomer.package.manifest.kind == "low_rank":
        matrix, _, parameter = twin.rsplit(".", 2)
        return f"{matrix}.{parameter}"
    return twin


def _rows_there(
    stored: StoredModel, model: FlexMoeForCausalLM, public_prior: float | None
) -> dict[str, dict[str, torch.Tensor]]:
    """Router rows and biases that are stored, by expert, called as in a package; public's bias is the new prior."""
    rows: dict[str, dict[str, torch.Tensor]] = {}
    for key, (owner, inside) in places(model).items():
        if ".router." in inside and key in stored.tensors.infos:
            is_prior = owner == PUBLIC and inside.endswith(".bias") and public_prior is not None
            row = torch.tensor([public_prior], dtype=torch.float32) if is_prior else stored.tensors.read(key)
            rows.setdefault(owner, {})[inside] = row
    return rows


def _check_newcomers(
    newcomers: Mapping[str, Newcomer], state: Mapping[str, torch.Tensor], owned: Mapping[str, tuple[str, str]]
) -> None:
    for name, newcomer in newcomers.items():
        wanted = {inside: tuple(state[key].shape) for key, (owner, inside) in owned.items() if owner == name}
        found = {inside: info.shape for inside, info in newcomer.package.infos.items()}
        for inside in sorted(wanted.keys() | found.keys()):
            if wanted.get(inside) != found.get(inside):
                raise ValueError(
                    f"{newcomer.package.folder}: tensor {inside!r} has shape {_shape(found.get(inside))}, this model "
                    f"wants {_shape(wanted.get(inside))}. The expert was made for another network."
                )


def _check_stored(
    stored: StoredModel,
    state: Mapping[str, torch.Tensor],
    owned: Mapping[str, tuple[str, str]],
    newcomers: Mapping[str, Newcomer],
) -> None:
    """Every expert that stays is there whole, shapes are right, and nothing is stored that nobody owns."""
    infos = stored.tensors.infos
    leaving = _removed(stored, owned)
    for key in infos:
        if key.startswith(leaving):
            continue
        if key not in state or infos[key].shape != tuple(state[key].shape):
            wanted = _shape(tuple(state[key].shape)) if key in state else "none"
            raise ValueError(
                f"{stored.folder}: tensor {key!r} has shape {_shape(infos[key].shape)}; the config says {wanted}."
            )
    missing = [key for key, (owner, _) in owned.items() if owner not in newcomers and key not in infos]
    if missing:
        raise ValueError(
            f"{stored.folder} lacks {len(missing)} tensors that its config names, such as {missing[0]!r}."
        )


def _removed(stored: StoredModel, owned: Mapping[str, tuple[str, str]]) -> tuple[str, ...]:
    """What the names of tensors begin with that are stored, but belong to an expert who leaves."""
    leaving = set(stored.config.expert_names) - {owner for owner, _ in owned.values()}
    public = {key.rpartition(f".{PUBLIC}.")[0] for key in owned if f".router.{PUBLIC}." in key}
    blocks = {path.removesuffix(".router") for path in public}
    return tuple(f"{block}.{part}.{name}." for block in blocks for part in ("experts", "router") for name in leaving)


def _shape(shape: Sequence[int] | None) -> str:
    return "none" if shape is None else str(list(shape))


def _copy_companions(source: Path, folder: Path) -> None:
    """Copies what lies beside: tokenizer, public sample, licence; not weights, config, code and hidden files."""
    for entry in sorted(source.iterdir()):
        if (
            entry.name.startswith(".")
            or entry.name == CONFIG_FILE
            or entry.name.endswith(CODE)
            or _holds_weights(entry)
        ):
            continue
        if entry.is_dir() and not entry.is_symlink():
            (folder / entry.name).mkdir()
            _copy_companions(entry, folder / entry.name)
        else:
            shutil.copyfile(file_inside(source, entry.name), folder / entry.name)


def _holds_weights(path: Path) -> bool:
    name = path.name.removesuffix(".json").removesuffix(".index")
    return Path(name).suffix in _WEIGHT_SUFFIXES


__all__ = ["PRIOR_WITH_BIASES", "add", "compose", "remove"]

"""Adding, removing, replacing, renaming, switching and saving experts of a live model.

Every change is prepared first and made last, so one that fails leaves the model as it was. Does not cover files
(`packages_flexmoe`), pushing (`sharing_flexmoe`), or the same changes on disk (`flexmoe.conversion.compose`).
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters_flexmoe import adapters_around
from .admission_flexmoe import judge_parts, refuse_unless_admitted
from .configuration_flexmoe import PUBLIC, FlexMoeConfig, check_expert_name, expert_record
from .context_flexmoe import is_recording, model_scope
from .experts_flexmoe import FlexMoeBlock
from .fitting_flexmoe import (
    ExpertPart,
    check_anchor,
    check_layers,
    expert_manifest,
    expert_tensors,
    fresh_experts,
    fresh_networks,
    naming,
    open_package,
    package_record,
    parts_from_package,
    parts_from_public,
    public_widths,
)
from .fused_flexmoe import redirecting
from .hub_flexmoe import HubAccess
from .implementations_flexmoe import Inputs, LayerPath, asked_for
from .packages_flexmoe import ExpertPackage, write_package
from .parallel_flexmoe import (
    PLANS,
    Plan,
    agree_on,
    in_first_process,
    is_fully_sharded,
    is_sharded,
    plan_of_experts,
    shard_by_plan,
    tensor_parallel_mesh,
)
from .prepacked_flexmoe import CpuInference
from .quantization_flexmoe import quantized_alike
from .selection_flexmoe import CacheStamp, Selection, check_names
from .trust_flexmoe import TrustPolicy

_counting = threading.Lock()


class ExpertLifecycle(CpuInference):
    """The part of a FlexMoE model that deals with experts by name."""

    config: FlexMoeConfig

    def _start_lifecycle(self) -> None:
        # a serial tells an expert from another of the same name, in this model or another; a rename keeps it
        self._serials = {name: _new_serial() for name in self.config.expert_names}
        self._generations_running = 0

    # Who is there

    @property
    def expert_names(self) -> list[str]:
        """Names of all experts, in order; "public" is the anchor's own network."""
        return self.config.expert_names

    @property
    def active_experts(self) -> list[str]:
        """Names of the experts that take part, in order: all, unless `set_active_experts` said otherwise."""
        active = self.config.active_experts
        return [name for name in self.expert_names if active is None or name in active]

    def flexmoe_blocks(self) -> list[FlexMoeBlock]:
        """The blocks, in layer order."""
        return list(self._named_blocks().values())

    def _named_blocks(self) -> dict[str, FlexMoeBlock]:
        """The blocks by their names, in layer order."""
        blocks = [(name, module) for name, module in self.named_modules() if isinstance(module, FlexMoeBlock)]
        return dict(sorted(blocks, key=lambda named: named[1].layer_index))

    def implementation_paths(
        self,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        capability: tuple[int, int] | None = None,
        tokens: int | None = None,
    ) -> list[LayerPath]:
        """Which way inference takes through each layer, PyTorch's modules or fused operators, and why.

        Args:
            device: for a device of this type; by default, where the model is.
            dtype: of the hidden states; by default that of the experts.
            capability: compute capability of a CUDA device, as (9, 0).
            tokens: how many at once, of all sequences; None stands for any number.
        """
        inputs = Inputs(device or self.device.type, dtype, tokens, capability)
        with torch.no_grad():
            return [block.path(self.active_experts, inputs, asked_for(self.config)) for block in self.flexmoe_blocks()]

    # Who takes part

    def set_active_experts(self, names: Sequence[str] | None) -> None:
        """Lets only `names` take part from now on; None lets all. Saved in the config.

        Raises:
            ValueError: a name is unknown, or there is none.
            RuntimeError: a `generate` of this model is running.
        """
        self._refuse_while_generating("set_active_experts")
        self.config.active_experts = None if names is None else list(check_names(names, self.expert_names, "names"))

    def only_experts(self, *names: str) -> contextlib.AbstractContextManager[None]:
        """A context in which only `names` take part, in this thread or task alone; contexts within narrow it further.

        Raises:
            ValueError: a name is unknown, or there is none.
        """
        allowed = check_names(names, self.expert_names, "only_experts")
        return model_scope(self, "only", frozenset(self._serials[name] for name in allowed))

    def recording_usage(self, usage: Any) -> contextlib.AbstractContextManager[None]:
        """A context in which forward passes of this thread call `usage.record`, as `ExpertUsage` has it."""
        return model_scope(self, "usage", usage)

    def expert_mask(self, experts: Sequence[Sequence[str]]) -> Tensor:
        """The mask [batch, experts] for `forward` that allows each sequence its list of names.

        Raises:
            ValueError: a list is empty or names an unknown expert.
        """
        everyone = self.expert_names
        allowed = [check_names(names, everyone, f"experts[{row}]") for row, names in enumerate(experts)]
        rows = [[name in names for name in everyone] for names in allowed]
        return torch.tensor(rows, dtype=torch.bool, device=self.device)

    def freeze_except(self, *names: str, rows: bool = True) -> None:
        """Lets gradients reach the networks of `names` only, and their router rows and biases if `rows`.

        Raises:
            ValueError: a name is unknown, there is none, or an adapter is around one of them: PEFT decides what trains
                there.
        """
        names = check_names(names, self.expert_names, "freeze_except")
        for name in names:
            self._refuse_under_adapters(name, "freeze_except")
        self.requires_grad_(False)
        for block in self.flexmoe_blocks():
            for name in names:
                block.experts[name].requires_grad_(True)
                block.router[name].requires_grad_(rows)

    # Changes

    def add_expert(
        self,
        source: str | Path | ExpertPackage,
        name: str | None = None,
        *,
        revision: str | None = None,
        verify: bool = True,
        policy: str | Path | TrustPolicy | None = None,
        **hub: Any,
    ) -> str:
        """Adds an expert from a package: a folder, a Hub id, or an `ExpertPackage`. Returns the name that it got.

        An active set that is in force stays as it is: the newcomer takes part once `set_active_experts` names it.
        It is frozen if the public network is, and comes without the adapters that are around other experts.
        A model that was loaded with a `quantization_config` quantises it alike.

        Args:
            source: where the package is.
            name: what to call the expert here; the package's own name by default.
            revision: branch, tag or commit, for a Hub id.
            verify: refuse an expert whose row or bias would take over the model, or whose weights would wreck it, as
                far as its numbers alone tell. `flexmoe.verify` also looks at what it does to text.
            policy: whose packages are let in: a policy file, by default the one that the environment variable
                FLEXMOE_POLICY names.
            hub: `token`, `cache_dir`, `local_files_only` and `force_download`, as `from_pretrained` takes them.

        Raises:
            ValueError: the name is taken, the expert was made for another anchor, its kind is unknown, or its files
                are not what its manifest says; it is not let in (`UntrustedPackageError`, `AdmissionError`); or the
                model's quantiser needs calibration data.
            FileNotFoundError, PermissionError, ConnectionError: there is no such package, or it can't be had.
            RuntimeError: a `generate` of this model is running, or FSDP2 has sharded it.
        """
        self._refuse_while_generating("add_expert")
        self._refuse_if_fully_sharded("add_expert")
        package, origin = open_package(source, revision, hub=HubAccess(**hub), policy=policy)
        with naming(package):
            name = self._free_name(name or package.manifest.name)
        self._put_package(package, name, origin, verify)
        return name

    def add_expert_copy(self, name: str, *, rank: int | None = None, alpha: float | None = None) -> str:
        """Adds what computes as the public network does, with a router row of zeros: where training begins.

        Args:
            name: what to call it.
            rank: None adds a copy of the public network; a number adds a low-rank expert, which has nothing but its
                differences from public, of this rank in every layer, and none yet.
            alpha: the differences are scaled by `alpha / rank`; None is 1.

        Raises:
            ValueError: the name is taken or none, the rank is no positive integer, or there is an alpha and no rank.
            RuntimeError: a `generate` of this model is running, or FSDP2 has sharded it.
        """
        self._refuse_while_generating("add_expert_copy")
        self._refuse_if_fully_sharded("add_expert_copy")
        values: dict[str, Any] = {"name": self._free_name(name)}
        if rank is None and alpha is not None:
            raise ValueError(f"alpha={alpha} scales the differences of a low-rank expert: give its rank, too.")
        if rank is not None:
            values |= {"kind": "low_rank", "rank": [rank] * len(self.flexmoe_blocks()), "alpha": alpha}
        record = expert_record(values)
        parts = parts_from_public(self.flexmoe_blocks(), fresh_experts(self.config, record))
        if rank is not None and (mesh := tensor_parallel_mesh(self)) is not None:
            for network, _ in parts:
                agree_on(network, mesh)  # each process has drawn its own
        self._put(record, parts)
        return name

    def remove_expert(self, name: str) -> None:
        """Removes an expert: the model is then the one that never had it.

        Raises:
            ValueError: the name is unknown or "public", nobody would be left in the active set, or an adapter is
                around the expert.
            RuntimeError: a `generate` of this model is running.
        """
        self._refuse_while_generating("remove_expert")
        self._check_owned(name, "removed", "mask it, with set_active_experts or only_experts")
        self._refuse_under_adapters(name, "remove_expert")
        active = self.config.active_experts
        if active == [name]:
            raise ValueError(f"{name!r} is the only active expert: choose others with set_active_experts first.")
        if active is not None:
            self.config.active_experts = [other for other in active if other != name]
        self.config.experts = [record for record in self.config.expert_records if record["name"] != name]
        self.undo_prepacking()
        for block in self.flexmoe_blocks():
            with redirecting(block):
                del block.experts[name]
                del block.router[name]
        del self._serials[name]
        self._plan_for_experts()

    def replace_expert(
        self,
        name: str,
        source: str | Path | ExpertPackage,
        *,
        revision: str | None = None,
        verify: bool = True,
        policy: str | Path | TrustPolicy | None = None,
        **hub: Any,
    ) -> None:
        """Puts the package `source` in the place of the expert `name`, which keeps its name and its position.

        Args:
            revision, verify, policy, hub: as in `add_expert`.

        Raises: as `add_expert` and `remove_expert`.
        """
        self._refuse_while_generating("replace_expert")
        self._refuse_if_fully_sharded("replace_expert")
        self._check_owned(name, "replaced", "graft the other anchor instead")
        self._refuse_under_adapters(name, "replace_expert")
        package, origin = open_package(source, revision, hub=HubAccess(**hub), policy=policy)
        self._put_package(package, name, origin, verify)

    def rename_expert(self, old: str, new: str) -> None:
        """Calls the expert `old` by the name `new`; its position, and caches that it filled, stay valid.

        Raises:
            ValueError: `old` is unknown or "public", `new` is taken or no name, or an adapter is around the expert.
            RuntimeError: a `generate` of this model is running.
        """
        self._refuse_while_generating("rename_expert")
        self._check_owned(old, "renamed", "it names the anchor's own network in every model")
        self._refuse_under_adapters(old, "rename_expert")
        new = self._free_name(new)
        active = self.config.active_experts
        if active is not None:
            self.config.active_experts = None  # for a moment neither name is right
        self.config.experts = [
            {**record, "name": new} if record["name"] == old else record for record in self.config.expert_records
        ]
        if active is not None:
            self.config.active_experts = [new if name == old else name for name in active]
        for block in self.flexmoe_blocks():
            _rename_entry(block.experts, old, new)
            _rename_entry(block.router, old, new)
        self._serials = {new if name == old else name: serial for name, serial in self._serials.items()}
        self._plan_for_experts()

    # Saving one expert

    def save_expert(self, name: str, folder: str | Path, *, overwrite: bool = False, **manifest_fields: Any) -> Path:
        """Writes one expert as a package. Of a sharded model, every process calls this and the first one writes.

        Args:
            name: which one.
            folder: where to; must not exist, unless `overwrite`.
            manifest_fields: `version`, `license`, `data_statement` or `training`, to say something else than the
                expert's record does.

        Raises:
            ValueError: the name is unknown or "public", the expert is quantised, or an adapter is still wrapped
                around it.
            FileExistsError: `folder` exists and `overwrite` is False.
        """
        self._check_owned(name, "saved as a package", "it is the anchor itself")
        record = next(record for record in self.config.expert_records if record["name"] == name)
        networks = fresh_networks(self.config)
        tensors = dict(expert_tensors(self.flexmoe_blocks(), name, fresh_experts(self.config, record, networks)))
        manifest = expert_manifest(self.config, networks, {**record, **manifest_fields}, tensors)
        if is_sharded(self):
            in_first_process(lambda: write_package(folder, manifest, tensors.items(), overwrite=overwrite))
            return Path(folder)
        return write_package(folder, manifest, tensors.items(), overwrite=overwrite)

    # How it is done

    def _put_package(
        self, package: ExpertPackage, name: str, origin: dict[str, str | None] | None, verify: bool
    ) -> None:
        blocks = self.flexmoe_blocks()
        with naming(package):
            check_anchor(self.config, package.manifest)
            check_layers([block.layer_index for block in blocks], package.manifest)
            networks = fresh_networks(self.config)
            record = package_record(package.manifest, public_widths(self.config, networks))
            record = expert_record({**record, "name": name, "source": origin})
            parts = parts_from_package(blocks, fresh_experts(self.config, record, networks), package)
        if verify:
            refuse_unless_admitted(name, judge_parts(blocks, parts, replaced=name))
        self._put(record, self._quantized_alike(name, parts))

    def _quantized_alike(self, name: str, parts: list[ExpertPart]) -> list[ExpertPart]:
        places = [f"{at}.experts.{name}" for at in self._named_blocks()]
        networks = quantized_alike(self, dict(zip(places, (network for network, _ in parts), strict=True)))
        return [(networks[place], row) for place, (_, row) in zip(places, parts, strict=True)]

    def _put(self, record: dict[str, Any], parts: list[ExpertPart]) -> None:
        """Makes the expert part of the model, in place of one of that name or at the end."""
        name = record["name"]
        records = {known["name"]: known for known in self.config.expert_records} | {name: expert_record(record)}
        if (mesh := tensor_parallel_mesh(self)) is not None:
            plan = self._plan_for(records, "_tp_plan")
            for block_name, (network, _) in zip(self._named_blocks(), parts, strict=True):
                shard_by_plan(network, f"{block_name}.experts.{name}", plan, mesh)
        self.undo_prepacking()
        self.config.experts = list(records.values())
        for block, (network, row) in zip(self.flexmoe_blocks(), parts, strict=True):
            public = block.experts[PUBLIC]
            with redirecting(block):
                block.experts[name] = network.train(self.training).requires_grad_(_trains(public))
                block.router[name] = row.requires_grad_(_trains(public))
        self._serials[name] = _new_serial()
        self._plan_for_experts()

    def _plan_for_experts(self) -> None:
        """Brings the parallel plans up to date with who is there."""
        records = {record["name"]: record for record in self.config.expert_records}
        for attribute in PLANS:
            setattr(self, attribute, self._plan_for(records, attribute))

    def _plan_for(self, records: Mapping[str, dict[str, Any]], attribute: str) -> Plan:
        """The parallel plan that the model has as `attribute`, for the experts with these records."""
        kinds = {name: record["kind"] for name, record in records.items()}
        return plan_of_experts(getattr(self, attribute), list(self._named_blocks()), kinds)

    def _free_name(self, name: str) -> str:
        check_expert_name(name)
        if name in self.expert_names:
            raise ValueError(
                f"This model has an expert {name!r} already: give another name, or use replace_expert. "
                f"It has {self.expert_names}."
            )
        if name in getattr(self, "peft_config", ()):
            raise ValueError(
                f"An adapter of this model is called {name!r}, and PEFT confuses the two: choose another."
            )
        return name

    def _check_owned(self, name: str, done: str, instead: str) -> None:
        if name == PUBLIC:
            raise ValueError(f"{PUBLIC!r} cannot be {done}: {instead}.")
        if name not in self.expert_names:
            raise ValueError(f"This model has no expert {name!r}: it has {self.expert_names}.")

    def _refuse_under_adapters(self, name: str, what: str) -> None:
        if adapters := sorted(adapters_around(self.flexmoe_blocks(), name)):
            raise ValueError(
                f"{what}: the adapter(s) {adapters} are around {name!r}. Merge them into it (merge_and_unload) or "
                "take them off (unload, delete_adapter) first; save them before, for their tensors go by its name."
            )

    # Caches and running generations

    def serial_of(self, name: str) -> str:
        """What tells this expert from any other, of this name or another; it survives a rename, not a replacement."""
        return self._serials[name]

    def _stamp(self, selection: Selection) -> CacheStamp | None:
        if is_recording():
            return None
        serials = tuple(self.serial_of(name) for name in selection.names)
        return CacheStamp(serials, selection.names, selection.row_mask)

    @contextlib.contextmanager
    def _while_generating(self) -> Iterator[None]:
        with _counting:
            self._generations_running += 1
        try:
            yield
        finally:
            with _counting:
                self._generations_running -= 1

    def _refuse_while_generating(self, what: str) -> None:
        if self._generations_running:
            raise RuntimeError(
                f"{what} while generate() runs would mix two models in one text: wait until it is done."
            )

    def _refuse_if_fully_sharded(self, what: str) -> None:
        if is_fully_sharded(self):
            raise RuntimeError(
                f"{what} on a model that FSDP2 has sharded: the newcomer would stand outside of its groups, with "
                "gradients of its own in each process. Make the change before sharding: load the model whole, change "
                "it, save_pretrained, then load that sharded."
            )


def _new_serial() -> str:
    return uuid.uuid4().hex


def _trains(network: nn.Module) -> bool:
    return all(parameter.requires_grad for parameter in network.parameters())


def _rename_entry(modules: nn.ModuleDict, old: str, new: str) -> None:
    for name in list(modules):  # one full turn, so that the order stays
        module = modules.pop(name)
        modules[new if name == old else name] = module


__all__ = ["ExpertLifecycle"]

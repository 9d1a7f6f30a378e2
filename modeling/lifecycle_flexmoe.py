"""Experts of a live model by name: listing, selecting, masking, adding, removing, replacing, renaming, saving.

Every change is prepared first and applied last, so a failed one leaves the model as it was. Expert packages, the Hub,
compositions and fast inference need the package `flexmoe`, which these methods import when they are called.

Does not cover package files (`flexmoe.packages`), or the same changes on disk (`flexmoe.conversion.compose`).
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from .adapters_flexmoe import adapters_around, parts_of_expert
from .configuration_flexmoe import (
    PUBLIC,
    FlexMoeConfig,
    check_expert_name,
    drop_experts,
    expert_record,
    optional_flexmoe,
    require_flexmoe,
)
from .distributed_flexmoe import is_fully_sharded
from .experts_flexmoe import FlexMoeBlock
from .masking_flexmoe import CacheStamp, Selection, check_names, is_capturing, model_scope

# For type checkers only: at run time the model classes bring PreTrainedModel in themselves.
if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Model
else:
    _Model = object

_observers: WeakKeyDictionary[nn.Module, list[Callable[[], None]]] = WeakKeyDictionary()


class ChangeGuard:
    """Lets forward passes of a model run side by side, and a change of its experts alone.

    A copy of it, as a copy of the model has, is a new one.
    """

    def __init__(self) -> None:
        self._state = threading.Condition(threading.RLock())
        self._passes: Counter[int] = Counter()  # running forward passes by thread
        self._generations = 0
        self.managers: WeakSet[Any] = WeakSet()  # of continuous batching

    def __reduce__(self) -> tuple:
        return type(self), ()

    @contextlib.contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Waits for a running change; changes wait for it."""
        thread = threading.get_ident()
        with self._state:
            self._passes[thread] += 1
        try:
            yield
        finally:
            with self._state:
                self._passes[thread] -= 1
                self._passes += Counter()  # drops the zeros
                self._state.notify_all()

    @contextlib.contextmanager
    def generation(self) -> Iterator[None]:
        """Changes are refused while it runs."""
        with self._state:
            self._generations += 1
        try:
            yield
        finally:
            with self._state:
                self._generations -= 1

    def check(self, what: str) -> None:
        """Raises RuntimeError if the change `what` would be refused now."""
        if self._generations or any(manager.is_running() for manager in self.managers):
            raise RuntimeError(
                f"{what} while generate() runs, or a continuous batch, would mix two models in one text: wait until "
                "it is done, or stop the manager."
            )
        if self._passes[threading.get_ident()]:
            raise RuntimeError(f"{what} inside a forward pass of the same model: make the change after it.")

    @contextlib.contextmanager
    def change(self, what: str) -> Iterator[None]:
        """Waits for running forward passes and for other changes. RuntimeError: see `check`."""
        with self._state:
            self.check(what)
            self._state.wait_for(lambda: not self._passes)
            self.check(what)
            yield


class ExpertLifecycle(_Model):
    """The part of a FlexMoE model that manages experts by name."""

    config: FlexMoeConfig

    def _start_lifecycle(self, blocks: Mapping[str, FlexMoeBlock]) -> None:
        self._blocks = dict(blocks)  # modules, but not registered a second time
        # a serial identifies an expert across models and names; a rename keeps it
        self._serials = {name: _new_serial() for name in self.config.expert_names}
        self._guard = ChangeGuard()

    # Listing

    @property
    def expert_names(self) -> list[str]:
        """Names of all experts, in order; "public" is the anchor's own FFN."""
        return self.config.expert_names

    @property
    def active_experts(self) -> list[str]:
        """Names of the experts that take part, in order: all, unless `set_active_experts` has chosen some."""
        active = self.config.active_experts
        return [name for name in self.expert_names if active is None or name in active]

    def flexmoe_blocks(self) -> list[FlexMoeBlock]:
        """The blocks, in layer order."""
        return list(self._blocks.values())

    def named_blocks(self) -> dict[str, FlexMoeBlock]:
        """The blocks by module name, in layer order."""
        return dict(self._blocks)

    def serial_of(self, name: str) -> str:
        """An id of this expert that survives a rename, but not a replacement."""
        return self._serials[name]

    def implementation_paths(self, **inputs: Any) -> list[Any]:
        """How inference runs each layer, and why; see `flexmoe.kernels.dispatch.implementation_paths`."""
        return require_flexmoe("kernels.dispatch", "implementation_paths").implementation_paths(self, **inputs)

    # Selecting

    def set_active_experts(self, names: Sequence[str] | None) -> None:
        """Lets only `names` take part from now on; None lets all. Saved in the config.

        Raises:
            ValueError: a name is unknown, or the list is empty.
            RuntimeError: a `generate` of this model is running.
        """
        with self._guard.change("set_active_experts"):
            active = None if names is None else list(check_names(names, self.expert_names, "names"))
            self.config.active_experts = active

    def only_experts(self, *names: str) -> contextlib.AbstractContextManager[None]:
        """A context in which only `names` take part, in this thread or task; nested contexts narrow it further.

        Raises:
            ValueError: a name is unknown, or there is none.

        Example:
            with model.only_experts("public", "math"):
                model.generate(**inputs)
        """
        allowed = check_names(names, self.expert_names, "only_experts")
        return model_scope(self, "only", frozenset(self._serials[name] for name in allowed))

    def recording_usage(self, usage: Any) -> contextlib.AbstractContextManager[None]:
        """A context in which forward passes of this thread call `usage.record`; see `flexmoe.track_usage`."""
        return model_scope(self, "usage", usage)

    def expert_mask(self, experts: Sequence[Sequence[str] | None]) -> Tensor:
        """The mask, bool [batch, experts], that allows each sequence the experts in its list; None allows all.

        Raises:
            ValueError: a list is empty or names an unknown expert.
        """
        all_names = self.expert_names
        lists = [all_names if names is None else names for names in experts]
        allowed = [check_names(names, all_names, f"experts[{row}]") for row, names in enumerate(lists)]
        rows = [[name in names for name in all_names] for names in allowed]
        return torch.tensor(rows, dtype=torch.bool, device=self.device)

    def mask_of(self, experts: Sequence[Any], batch: int) -> Tensor:
        """The mask, bool [batch, experts], for `experts` as `generate` takes it.

        Raises:
            TypeError: it is a string, or an entry is.
            ValueError: as `expert_mask`, or it has lists for another number of sequences.
        """
        strings = [name for name in experts if isinstance(name, str)]
        if isinstance(experts, str) or 0 < len(strings) < len(experts):
            raise TypeError(f"experts is a list of names, or one such list (or None) per sequence; got {experts!r}.")
        mask = self.expert_mask([experts] * batch if strings or not len(experts) else experts)
        if len(mask) != batch:
            raise ValueError(f"experts has {len(mask)} lists of names for {batch} sequence(s): give one per sequence.")
        return mask

    def freeze_except(self, *names: str, rows: bool = True) -> None:
        """Leaves only the FFNs of `names` trainable, with their router rows and biases if `rows`.

        Raises:
            ValueError: a name is unknown, there is none, or an adapter is around one of them: PEFT trains there.
        """
        names = check_names(names, self.expert_names, "freeze_except")
        for name in names:
            self._refuse_under_adapters(name, "freeze_except")
        self.requires_grad_(False)
        for block in self.flexmoe_blocks():
            for name in names:
                block.experts[name].requires_grad_(True)
                block.router[name].requires_grad_(rows)

    # Changing

    def add_expert(self, source: Any, name: str | None = None, **options: Any) -> str:
        """Adds an expert from a package: a folder, a Hub id, or an `ExpertPackage`. Returns its name in this model.

        An active set that is in force does not change; the expert is frozen if the public network is, and quantised if
        the model was. Options and errors: see `flexmoe.admission.live.add_expert`.

        Raises:
            RuntimeError: a `generate` of this model is running, or FSDP2 has sharded it.
            ImportError: the package `flexmoe` is not installed.
        """
        self._guard.check("add_expert")
        self._refuse_if_fully_sharded("add_expert")
        return require_flexmoe("admission.live", "add_expert").add_expert(self, source, name, **options)

    def add_expert_copy(self, name: str, **options: Any) -> str:
        """Adds an expert that computes what the public network does, with a router row of zeros: to be trained.

        Options (`rank`, `alpha`): see `flexmoe.admission.live.add_expert_copy`.
        Raises: as `add_expert`; ValueError: the rank is not a positive integer, or `alpha` without `rank`.
        """
        self._guard.check("add_expert_copy")
        self._refuse_if_fully_sharded("add_expert_copy")
        live = require_flexmoe("admission.live", "add_expert_copy")
        return live.add_expert_copy(self, name, **options)

    def remove_expert(self, name: str) -> None:
        """Removes an expert: config, tensors and outputs are then those of a model that never had it.

        Raises:
            ValueError: the name is unknown or "public", it is the last active one, or an adapter is around it.
            RuntimeError: a `generate` of this model is running.
        """
        with self._guard.change("remove_expert"):
            self._check_owned(name, "removed", "mask it, with set_active_experts or only_experts")
            self._refuse_under_adapters(name, "remove_expert")
            drop_experts(self.config, {name})
            for block in self.flexmoe_blocks():
                del block.experts[name]
                del block.router[name]
            del self._serials[name]
            self._plan_for_experts()
            self._notify_observers()

    def replace_expert(self, name: str, source: Any, **options: Any) -> None:
        """Replaces the expert `name` by the package `source`; name and position stay.

        Args: as for `add_expert`. Raises: as `add_expert` and `remove_expert`.
        """
        self._guard.check("replace_expert")
        self._refuse_if_fully_sharded("replace_expert")
        self._check_owned(name, "replaced", "graft the other anchor instead")
        self._refuse_under_adapters(name, "replace_expert")
        require_flexmoe("admission.live", "replace_expert").replace_expert(self, name, source, **options)

    def rename_expert(self, old: str, new: str) -> None:
        """Renames the expert `old` to `new`; its position, and caches that it filled, stay valid.

        Raises: as `remove_expert`, or ValueError: `new` is taken or invalid.
        """
        with self._guard.change("rename_expert"):
            self._check_owned(old, "renamed", "it names the anchor's own network in every model")
            self._refuse_under_adapters(old, "rename_expert")
            new = self.free_name(new)
            active = self.config.active_experts
            if active is not None:
                self.config.active_experts = None  # while neither name is valid
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

    def insert_expert(
        self, record: Mapping[str, Any], parts: Sequence[Any], replaces: bool = False, position: int | None = None
    ) -> None:
        """Makes an expert part of the model, at `position` (None: last) or in place of the one that it `replaces`.

        `parts`: its (FFN, router row) per layer, complete and equal on every rank; sharded here if the model is.

        Raises:
            ValueError: the name was taken, or the expert to replace removed, while this one was prepared.
            RuntimeError: a `generate` of this model has started meanwhile.
        """
        record = expert_record(dict(record))
        with self._guard.change("replace_expert" if replaces else "add_expert"):
            if replaces:
                self._check_owned(record["name"], "replaced", "graft the other anchor instead")
            else:
                self.free_name(record["name"])
            self._insert(record, parts, later=[] if position is None else self.expert_names[position:])

    def _insert(self, record: dict[str, Any], parts: Sequence[Any], later: Sequence[str]) -> None:
        name = record["name"]
        records = {known["name"]: known for known in self.config.expert_records} | {name: record}
        records |= {other: records.pop(other) for other in later}
        if (getattr(self, "_tp_size", None) or 1) > 1:
            parallel = require_flexmoe("parallel", "a change of a model that is sharded by tensor parallelism")
            parallel.shard_expert(self, records, name, [network for network, _ in parts])
        self.config.experts = list(records.values())
        for block, (network, row) in zip(self.flexmoe_blocks(), parts, strict=True):
            trains = all(parameter.requires_grad for parameter in block.experts[PUBLIC].parameters())
            block.experts[name] = network.train(self.training).requires_grad_(trains)
            block.router[name] = row.requires_grad_(trains)
            for other in later:
                block.experts[other], block.router[other] = block.experts.pop(other), block.router.pop(other)
        self._serials[name] = _new_serial()
        self._plan_for_experts()
        self._notify_observers()

    def on_experts_changed(self, callback: Callable[[], None]) -> None:
        """Calls `callback` after experts were added, removed or replaced, and when training starts; not in copies."""
        _observers.setdefault(self, []).append(callback)

    def _notify_observers(self) -> None:
        for callback in list(_observers.get(self, ())):
            callback()

    def train(self, mode: bool = True) -> Any:
        """As in torch."""
        if mode:
            self._notify_observers()
        return super().train(mode)

    # Saving and sharing

    def save_expert(self, name: str, folder: str | Path, **options: Any) -> Path:
        """Writes one expert as a package; see `flexmoe.packages.export.save_expert`."""
        self._check_owned(name, "saved as a package", "it is the anchor itself")
        self._refuse_under_adapters(name, "save_expert")
        return require_flexmoe("packages.export", "save_expert").save_expert(self, name, folder, **options)

    def push_expert_to_hub(self, name: str, repo_id: str, **options: Any) -> Any:
        """Pushes one expert to the Hub as a package; see `flexmoe.hub.model.push_expert_to_hub`."""
        return require_flexmoe("hub.model", "push_expert_to_hub").push_expert_to_hub(self, name, repo_id, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Pushes the model with a card, merged or as a composition; see `flexmoe.hub.model.push_to_hub`.

        With adapters of `load_adapter`, transformers pushes these instead.
        """
        if self._hf_peft_config_loaded:
            return super().push_to_hub(repo_id, **options)
        return require_flexmoe("hub.model", "push_to_hub").push_to_hub(self, repo_id, **options)

    def save_composition(self, folder: str | Path, **options: Any) -> Path:
        """Writes the model by reference, in kilobytes; see `flexmoe.composition.save.save_composition`."""
        save = require_flexmoe("composition.save", "save_composition").save_composition
        return save(self, folder, **options)

    def prepack_for_cpu(self) -> int:
        """Speeds up decoding on this CPU until the model changes; see `flexmoe.cpu.prepack.prepack_for_cpu`."""
        return require_flexmoe("cpu.prepack", "prepack_for_cpu").prepack_for_cpu(self)

    def undo_prepacking(self) -> None:
        """Frees the memory that `prepack_for_cpu` took, if it was called."""
        require_flexmoe("cpu.prepack", "undo_prepacking").undo_prepacking(self)

    # Names, refusals

    def _plan_for_experts(self) -> None:
        """Brings the parallel plans in line with the experts; without the package there are none to keep."""
        if parallel := optional_flexmoe("parallel"):
            parallel.update_plans(self)

    def free_name(self, name: str) -> str:
        """Returns `name` if a new expert may have it. ValueError: it is invalid, or an expert or adapter has it."""
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
        if adapters := sorted(adapters_around(self, self.flexmoe_blocks(), inside=False)):
            raise ValueError(
                f"The adapter(s) {adapters} train copies of whole blocks (modules_to_save), which would not have the "
                "new expert: merge them (merge_and_unload) or remove them (unload, delete_adapter) first."
            )
        return name

    def _check_owned(self, name: str, done: str, instead: str) -> None:
        if name == PUBLIC:
            raise ValueError(f"{PUBLIC!r} cannot be {done}: {instead}.")
        if name not in self.expert_names:
            raise ValueError(f"This model has no expert {name!r}: it has {self.expert_names}.")

    def _refuse_under_adapters(self, name: str, what: str) -> None:
        if adapters := sorted(adapters_around(self, parts_of_expert(self.flexmoe_blocks(), name))):
            raise ValueError(
                f"{what}: the adapter(s) {adapters} are around {name!r}. Merge them into it (merge_and_unload) or "
                "take them off (unload, delete_adapter) first; save them before, for their tensors go by its name."
            )

    def _stamp(self, selection: Selection) -> CacheStamp | None:
        if is_capturing():
            return None
        serials = tuple(self.serial_of(name) for name in selection.names)
        return CacheStamp(serials, selection.names, selection.row_mask)

    def _refuse_if_fully_sharded(self, what: str) -> None:
        if is_fully_sharded(self):
            raise RuntimeError(
                f"{what} on a model that FSDP2 has sharded: the new expert would be outside of its groups, with "
                "gradients of its own on each rank. Make the change before sharding: load the model unsharded, change "
                "it, save_pretrained, then load that sharded."
            )


def _new_serial() -> str:
    return uuid.uuid4().hex


def _rename_entry(modules: nn.ModuleDict, old: str, new: str) -> None:
    for name in list(modules):  # one full rotation keeps the order
        module = modules.pop(name)
        modules[new if name == old else name] = module

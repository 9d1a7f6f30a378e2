"""Checks of incoming router rows against those of a stored model, without loading it.

Does not cover the checks themselves (`flexmoe.admission.rows`), or what networks compute
(`flexmoe.admission.stored_outputs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from flexmoe.admission.evidence import check_evidence
from flexmoe.admission.findings import refuse_unless_admitted
from flexmoe.admission.incoming import IncomingExpert
from flexmoe.admission.router_inputs import RouterInput
from flexmoe.admission.rows import check_row_tensors
from flexmoe.io.finite import all_finite
from flexmoe.modeling.configuration_flexmoe import PUBLIC
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from flexmoe.packages.checks import check_layers, errors_naming, name_in_package
from flexmoe.packages.package import PackageError

RowsByExpert = Mapping[str, Mapping[str, torch.Tensor]]
"""Router rows and biases of a model, by expert (including "public") and by their names in a package."""


def check_incoming_rows(
    incoming: Sequence[IncomingExpert],
    existing: RowsByExpert,
    inputs: Sequence[RouterInput] | None = None,
) -> None:
    """Compares the rows and biases of each incoming expert with those of public and the model's other experts.

    If the model has no other expert, the shortest row of the other incoming experts is the reference for lengths;
    their biases are no reference.

    Args:
        inputs: as in `flexmoe.admission.rows.check_rows`.

    Raises:
        PackageError: a row or a bias is not finite.
        AdmissionError: a row or a bias would take over the routing.
    """
    for expert in incoming:
        for name, row in expert.rows.items():
            if not all_finite(row):
                raise PackageError(f"{expert.package.folder}: tensor {name!r} holds NaN or an infinity.")
    others = {name: rows for name, rows in existing.items() if name != PUBLIC}
    for expert in incoming:
        findings = check_row_tensors(
            expert.rows,
            public=existing[PUBLIC],
            others=others,
            incoming={other.name: other.rows for other in incoming if other is not expert},
            inputs=inputs,
        )
        manifest = expert.package.manifest
        if manifest.evidence is not None:
            calibrations = [expert.rows[f"layers.{layer}.router.calibration"] for layer in manifest.layers]
            findings.append(check_evidence(expert.rows["layers.0.router.table"], calibrations, manifest.evidence))
        refuse_unless_admitted(expert.name, findings, expert.package.folder)


def check_composed_rows(
    model: FlexMoeForCausalLM,
    changed: Mapping[str, torch.Tensor],
    incoming: Sequence[IncomingExpert],
    existing: Sequence[IncomingExpert],
    inputs: Sequence[RouterInput] | None = None,
) -> None:
    """As `check_incoming_rows`, for a composition, whose rows may differ from those of the packages.

    Args:
        model: the composition's on the meta device, incoming experts included.
        changed: the rows and biases that differ (those of public: from zero), by their names in the model.
        existing: the other experts.

    Raises:
        ValueError: an expert has other layers than the model; or as `check_incoming_rows`.
    """
    shapes, places = model.state_dict(), tensor_places(model)
    public = {key: inside for key, (owner, inside) in places.items() if owner == PUBLIC and ".router." in inside}
    zeros = {inside: torch.zeros(shapes[key].shape) for key, inside in public.items()}

    def effective(name: str, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**rows, **{places[key][1]: row for key, row in changed.items() if places.get(key, ("",))[0] == name}}

    for expert in (*incoming, *existing):
        with errors_naming(expert.package):
            check_layers(range(len(model.flexmoe_blocks())), expert.package.manifest)
    check_incoming_rows(
        [replace(expert, rows=effective(expert.name, expert.rows)) for expert in incoming],
        {PUBLIC: effective(PUBLIC, zeros), **{other.name: effective(other.name, other.rows) for other in existing}},
        inputs,
    )


def tensor_places(model: FlexMoeForCausalLM) -> dict[str, tuple[str, str]]:
    """For each tensor of an expert, by its name in the model: the expert, and the tensor's name in a package."""
    found: dict[str, tuple[str, str]] = {}
    for path, block in model.named_blocks().items():
        for part, modules in (("experts", block.experts), ("router", block.router)):
            inside = f"layers.{block.layer_index}.{'ffn' if part == 'experts' else part}"
            for name, module in modules.items():
                for key in module.state_dict():
                    found[f"{path}.{part}.{name}.{key}"] = (name, f"{inside}.{name_in_package(module, key)}")
    return found


__all__ = [
    "RowsByExpert",
    "check_composed_rows",
    "check_incoming_rows",
    "tensor_places",
]

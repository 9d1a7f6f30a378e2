"""Expert packages that are about to be added to a stored model: opened, named, and recorded in its config.

Does not cover their networks, which are streamed (`flexmoe.conversion.compose`) or only referred to
(`flexmoe.composition`), or the checks of their rows and outputs (`flexmoe.admission.stored_rows`, `stored_outputs`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path

import torch

from flexmoe.admission.rows import BIAS_THRESHOLD
from flexmoe.admission.stored_outputs import PublicNetworks, StreamedOutputs
from flexmoe.hub.fetch import open_package
from flexmoe.hub.stored_model import StoredModel
from flexmoe.modeling.configuration_flexmoe import PUBLIC, FlexMoeConfig, check_expert_name, expert_record
from flexmoe.packages.checks import (
    check_anchor,
    check_config_size,
    check_hidden_size,
    check_layers,
    check_row_shape,
    check_shapes,
    errors_naming,
    expected_shapes,
    package_record,
    public_widths,
)
from flexmoe.packages.manifest import PackageError
from flexmoe.packages.modules import fresh_networks
from flexmoe.packages.package import ExpertPackage
from flexmoe.packages.trust import TrustPolicy

PRIOR_WITH_BIASES = 0.5
"""Public's log prior odds if the experts' rows have biases. Source: 3 owners, 40 % replay; docs/results.md."""

PackageLike = str | Path | ExpertPackage
PolicyLike = str | Path | TrustPolicy | None


@dataclass
class IncomingExpert:
    """A package that is about to be added to a model: its rows are read, its networks are not.

    Attributes:
        name: the expert's name in the model.
        source: `repo` and `revision` on the Hub; None for a folder.
        rows: router rows and biases by their names in the package; unverified until the package is read.
        outputs: checks what the networks compute while the package is read; None: they are not checked.
    """

    package: ExpertPackage
    name: str
    source: dict[str, str | None] | None
    rows: dict[str, torch.Tensor]
    outputs: StreamedOutputs | None = field(default=None, kw_only=True)

    @classmethod
    def open(
        cls,
        given: PackageLike,
        config: FlexMoeConfig,
        policy: PolicyLike = None,
        revision: str | None = None,
        *,
        is_repo: bool = False,
    ) -> IncomingExpert:
        """Opens a folder or a Hub id, checks its signature, and reads its rows.

        Args:
            config: of the model that it is for.
            given, policy, revision, is_repo: as of `flexmoe.hub.fetch.open_package`.

        Raises: as `open_package`; ValueError: the expert was made for another anchor, or for another hidden size.
        """
        package, origin = open_package(given, revision, policy=policy, is_repo=is_repo)
        with errors_naming(package):
            check_anchor(config, package.manifest)
            check_hidden_size(config, package.manifest)  # before the rows are read, which are as wide as it says
        return cls(package, package.manifest.name, origin, package.read_rows())

    def expect(self, config: FlexMoeConfig, publics: PublicNetworks, *, verify: bool) -> None:
        """Checks the shapes of its tensors by their headers, and prepares the check of its outputs.

        Args:
            config: the model's, with a record of this expert.
            publics: the model's.
            verify: let `verified_tensors` check what the networks compute.

        Raises:
            ValueError: a tensor is unknown, missing, or of another shape.
        """
        record = next(record for record in config.expert_records if record["name"] == self.name)
        networks = {layer: publics.expert(record, layer) for layer in publics.layers}
        check_shapes(self.package, expected_shapes(networks, record, publics.hidden_size))
        self.outputs = StreamedOutputs(self.name, self.package.folder, networks, publics) if verify else None

    def record(self, widths: Sequence[int]) -> dict[str, object]:
        """The expert's record in the config of a model whose public networks have these widths."""
        record = package_record(self.package.manifest, widths)
        return expert_record({**record, "name": self.name, "source": self.source})

    def verified_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the package's tensors, verified once the iteration has ended (`ExpertPackage.tensors`).

        Raises:
            PackageError: the package does not match its manifest, or its rows have changed since they were read.
            AdmissionError: `expect` was told to verify them, and its outputs would dominate, or damage, the model.
        """
        for name, tensor in self.package.tensors():
            if name in self.rows and not torch.equal(self.rows[name], tensor):
                raise PackageError(f"{self.package.folder}: {name!r} changed while the package was read.")
            if self.outputs is not None:
                self.outputs.add(name, tensor)
            yield name, tensor

    def has_bias(self) -> bool:
        """Whether a bias of its rows is not zero."""
        return any(bool(row.any()) for name, row in self.rows.items() if name.endswith(".router.bias"))


def rename_incoming(
    incoming: Sequence[IncomingExpert], packages: Sequence[PackageLike], names: Mapping[str, str]
) -> None:
    """Renames incoming experts.

    Args:
        packages: as given by the caller, in the order of `incoming`.
        names: names in the model, by package as given or by the package's own name.

    Raises:
        ValueError: a key of `names` is neither of the two.
    """
    unused = set(names)
    for expert, given in zip(incoming, packages, strict=True):
        for key in (str(given), expert.name):
            if key in names:
                expert.name = names[key]
                unused.discard(key)
                break
    if unused:
        own = ", ".join(expert.package.manifest.name for expert in incoming)
        raise ValueError(f"There is no package {min(unused)!r} to rename; the packages are {own}.")


def check_public_prior(value: float) -> float:
    """Returns a public prior if it is valid: a number that float32, the dtype of biases, can hold.

    Raises:
        TypeError: it is not a number.
        ValueError: it is NaN, infinite or too large.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"public_prior must be a number; it is {value!r} ({type(value).__name__}).")
    largest = torch.finfo(torch.float32).max
    if not -largest <= value <= largest:  # NaN is not, either
        raise ValueError(
            f"public_prior must be a finite number, at most {largest:.3g} in size (a bias is float32); it is "
            f"{str(value)[:40]}. It is a logarithm of odds: {BIAS_THRESHOLD} is 99 % for public."
        )
    return float(value)


def choose_prior(model: StoredModel, incoming: Sequence[IncomingExpert], given: float | None) -> float | None:
    """The public prior of a composition: `given`, else the default; None keeps the stored one.

    Raises:
        TypeError, ValueError: `given` is invalid (`check_public_prior`).
        ValueError: it is None, and rows with and without bias are combined.
    """
    if given is not None:
        return check_public_prior(given)
    if has_fitted_public_row(model):
        return None
    with_bias = [expert.name for expert in incoming if expert.has_bias()]
    if not with_bias:
        return 0.0
    if len(with_bias) == len(incoming):
        return PRIOR_WITH_BIASES
    without = [expert.name for expert in incoming if not expert.has_bias()]
    raise ValueError(
        f"The rows of {', '.join(with_bias)} have biases, those of {', '.join(without)} have none, so there is no "
        f"default for the public prior: pass --public-prior (public_prior=), for example {PRIOR_WITH_BIASES}."
    )


def read_public_rows(model: StoredModel) -> dict[str, torch.Tensor]:
    """The public rows and biases of a stored model, by their names there; errors as `check_row_shape`."""
    own = re.compile(rf".+\.router\.{PUBLIC}\.(weight|bias)")
    infos = [info for info in model.tensors.infos.values() if own.fullmatch(info.name)]
    for info in infos:
        check_row_shape(info, model.config.get_text_config().hidden_size, model.folder)
    return {info.name: model.tensors.read(info.name) for info in infos}


def has_fitted_public_row(model: StoredModel) -> bool:
    """Whether the model's public row is not zero, as in an imported model; errors as `check_row_shape`."""
    return any(bool(row.any()) for name, row in read_public_rows(model).items() if name.endswith(".weight"))


def with_experts(
    config: FlexMoeConfig, incoming: Sequence[IncomingExpert], position: int | None = None
) -> FlexMoeConfig:
    """A copy of the config with the incoming experts, one after another at `position`, or at the end.

    Raises:
        ValueError: a name is taken or invalid, or an expert was made for another anchor; names the package.
    """
    config, widths = copy.deepcopy(config), public_widths(config, fresh_networks(config))
    for expert in incoming:
        with errors_naming(expert.package):
            check_expert_name(expert.name)
            if expert.name in config.expert_names:
                raise ValueError(
                    f"There is an expert {expert.name!r} already, beside {', '.join(config.expert_names)}: pass "
                    f"another name for {expert.package.folder} with --name (name=, or names= of compose)."
                )
            check_anchor(config, expert.package.manifest)
            check_layers(range(len(widths)), expert.package.manifest)
            known = config.expert_records
            at = len(known) if position is None else position
            config.experts = [*known[:at], expert.record(widths), *known[at:]]
            check_config_size(config)
    return config


__all__ = [
    "PRIOR_WITH_BIASES",
    "IncomingExpert",
    "PackageLike",
    "PolicyLike",
    "check_public_prior",
    "choose_prior",
    "has_fitted_public_row",
    "read_public_rows",
    "rename_incoming",
    "with_experts",
]

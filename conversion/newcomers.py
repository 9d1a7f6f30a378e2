"""Expert packages on their way into a stored model: opened, named, recorded in its config.

Not here: their networks, which are streamed (`compose`) or only named (`by_reference`), and whether their rows are let
in (`judging`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch

from flexmoe.conversion.stored import StoredModel
from flexmoe.modeling.configuration_flexmoe import PUBLIC, FlexMoeConfig, check_expert_name, expert_record
from flexmoe.modeling.fitting_flexmoe import (
    check_anchor,
    check_layers,
    fresh_networks,
    naming,
    open_package,
    package_record,
    public_widths,
)
from flexmoe.modeling.packages_flexmoe import ExpertPackage
from flexmoe.modeling.trust_flexmoe import TrustPolicy

PRIOR_WITH_BIASES = 0.5
"""Public's log prior odds where owners' rows have biases. Source: 3 owners, 40 % replay; docs/results.md."""

PackageLike = str | Path | ExpertPackage
PolicyLike = str | Path | TrustPolicy | None


@dataclass
class Newcomer:
    """A package on its way into a model, under `name`: opened, its rows read, its networks not yet.

    Attributes:
        source: `repo` and `revision` on the Hub, if it came from there.
        rows: router rows and biases, as a package names them. Not verified yet: reading the package does that.
    """

    package: ExpertPackage
    name: str
    source: dict[str, str | None] | None
    rows: dict[str, torch.Tensor]

    @classmethod
    def open(
        cls, given: PackageLike, policy: PolicyLike = None, revision: str | None = None, *, is_repo: bool = False
    ) -> Newcomer:
        """Opens a folder or a Hub id that the policy lets in. Raises: as `open_package`."""
        package, origin = open_package(given, revision, policy=policy, is_repo=is_repo)
        return cls(package, package.manifest.name, origin, package.read_rows())

    def record(self, widths: Sequence[int]) -> dict[str, object]:
        """The expert's record in the config of a model whose public networks have these widths."""
        record = package_record(self.package.manifest, widths)
        return expert_record({**record, "name": self.name, "source": self.source})

    def has_bias(self) -> bool:
        """Whether a bias of its rows is not zero."""
        return any(bool(row.any()) for name, row in self.rows.items() if name.endswith(".router.bias"))


def rename(newcomers: Sequence[Newcomer], packages: Sequence[PackageLike], names: Mapping[str, str]) -> None:
    """Calls newcomers otherwise. ValueError: a key of `names` is neither a package as given nor an own name.

    Args:
        packages: as they were given, in the order of the newcomers.
        names: names in the model, by package as given or by its own name.
    """
    unused = set(names)
    for newcomer, given in zip(newcomers, packages, strict=True):
        for key in (str(given), newcomer.name):
            if key in names:
                newcomer.name = names[key]
                unused.discard(key)
                break
    if unused:
        own = ", ".join(newcomer.package.manifest.name for newcomer in newcomers)
        raise ValueError(f"There is no package {min(unused)!r} to give another name; the packages are {own}.")


def choose_prior(model: StoredModel, newcomers: Sequence[Newcomer], given: float | None) -> float | None:
    """The public prior of a composition: as given, else the default; None is the one that is stored.

    Raises:
        ValueError: what is given is not finite; or nothing is, and rows with and without bias meet.
    """
    if given is not None:
        if not isfinite(given):
            raise ValueError(f"public_prior must be a finite number; it is {given}.")
        return given
    if has_fitted_public_row(model):
        return None
    biased = [newcomer.name for newcomer in newcomers if newcomer.has_bias()]
    if not biased:
        return 0.0
    if len(biased) == len(newcomers):
        return PRIOR_WITH_BIASES
    free = [newcomer.name for newcomer in newcomers if not newcomer.has_bias()]
    raise ValueError(
        f"The rows of {', '.join(biased)} have biases, those of {', '.join(free)} have none, so there is no default "
        f"for the public prior: give --public-prior (public_prior=), for example {PRIOR_WITH_BIASES}."
    )


def has_fitted_public_row(model: StoredModel) -> bool:
    """Whether the model's public row is not zero, as that of an imported one."""
    rows = [name for name in model.tensors.infos if name.endswith(f".router.{PUBLIC}.weight")]
    return any(bool(model.tensors.read(name).any()) for name in rows)


def with_experts(config: FlexMoeConfig, newcomers: Sequence[Newcomer]) -> FlexMoeConfig:
    """The config with the newcomers at its end.

    Raises:
        ValueError: a name is taken or none, or an expert was made for another anchor; names the package.
    """
    config, widths = copy.deepcopy(config), public_widths(config, fresh_networks(config))
    for newcomer in newcomers:
        with naming(newcomer.package):
            check_expert_name(newcomer.name)
            if newcomer.name in config.expert_names:
                raise ValueError(
                    f"There is an expert {newcomer.name!r} already, beside {', '.join(config.expert_names)}: give "
                    f"{newcomer.package.folder} another name (--name)."
                )
            check_anchor(config, newcomer.package.manifest)
            check_layers(range(len(widths)), newcomer.package.manifest)
            config.experts = [*(config.experts or []), newcomer.record(widths)]
    return config


__all__ = [
    "PRIOR_WITH_BIASES",
    "Newcomer",
    "PackageLike",
    "PolicyLike",
    "choose_prior",
    "has_fitted_public_row",
    "rename",
    "with_experts",
]

"""Opens an expert package for a model: from a folder or the Hub, checked against a trust policy.

Does not cover copying a package into a folder (`flexmoe.hub.pull`), or whether it fits a model
(`flexmoe.packages.checks`).
"""

from __future__ import annotations

from pathlib import Path

from flexmoe.hub.client import HubAccess
from flexmoe.packages.package import PACKAGE_FILES, ExpertPackage
from flexmoe.packages.trust import TrustPolicy, resolve_policy


def open_package(
    source: str | Path | ExpertPackage,
    revision: str | None = None,
    *,
    hub: HubAccess | None = None,
    policy: TrustPolicy | str | Path | None = None,
    is_repo: bool = False,
) -> tuple[ExpertPackage, dict[str, str | None] | None]:
    """Opens a package and checks its signature; returns it with its `repo` and `revision`, None for a folder.

    Args:
        source: a folder, a Hub id, or an opened package.
        revision: branch, tag or commit on the Hub.
        hub: options for accessing the Hub.
        policy: the trust policy, as in `resolve_policy`.
        is_repo: `source` is a Hub id, even if a folder of that name exists.

    Raises:
        FileNotFoundError: no such folder or repository, or it is not an expert package.
        PackageError: the package is invalid, or the policy refuses it (`UntrustedPackageError`).
        PermissionError, ConnectionError: as `flexmoe.hub.client.resolve_folder`.
    """
    if not isinstance(source, str | Path):
        _check_trust(source, None, policy)
        return source, None
    # owned: deleting the repository withdraws the expert, even if it is in the cache
    found = (hub or HubAccess()).resolve(source, revision, owned=True, allow_patterns=PACKAGE_FILES, is_repo=is_repo)
    if found.repo is None:
        package = ExpertPackage.open(found.path)
        _check_trust(package, None, policy)
        return package, None
    try:
        package = ExpertPackage.open(found.path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The Hub repository {found.repo!r} is not an expert package, or an incomplete one ({error})"
        ) from error
    _check_trust(package, found.repo, policy)
    return package, {"repo": found.repo, "revision": found.revision}


def _check_trust(package: ExpertPackage, origin: str | None, policy: TrustPolicy | str | Path | None) -> None:
    if (resolved := resolve_policy(policy)) is not None:
        resolved.check(package, origin)


__all__ = ["open_package"]

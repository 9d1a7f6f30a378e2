"""Copies an expert package, a composition or a model from the Hub into a folder.

Does not cover opening a package from the Hub for a model (`flexmoe.hub.fetch`), or loading models, which transformers
does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexmoe.foreign_code import copy_companion, foreign_code
from flexmoe.hub.client import DOWNLOADED, HubAccess, ResolvedFolder
from flexmoe.hub.contents import composition_files, model_files, package_files
from flexmoe.hub.publish import local_parts
from flexmoe.io.folders import atomic_folder, check_new_folder
from flexmoe.io.strict_json import read_json_object
from flexmoe.modeling.configuration_flexmoe import FlexMoeConfig
from flexmoe.packages.manifest import MANIFEST_FILE, PackageError
from flexmoe.packages.package import CONFIG_FILE, PACKAGE_FILES, ExpertPackage
from flexmoe.packages.trust import TrustPolicy, resolve_policy


def pull(
    repo_id: str,
    out: str | Path,
    *,
    policy: TrustPolicy | str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    **hub: Any,
) -> Path:
    """Downloads an expert package, a composition or a merged model and copies it into a folder, atomically.

    The weights of a package are verified while they are copied from the Hub's cache. Only the files of the package or
    model are copied (`flexmoe.hub.contents`): no code, and no entry of a JSON file that names code of others.

    Args:
        repo_id: a Hub id, or a folder.
        out: the new folder; must not exist, unless `overwrite`.
        policy: the trust policy for packages: an opened policy or a file, by default the file in FLEXMOE_POLICY.
        revision: branch, tag or commit.
        progress: called with the number of bytes just copied (for packages).
        hub: `token`, `cache_dir`, `local_files_only`, `force_download`.

    Returns:
        `out`.

    Raises:
        FileExistsError: `out` exists and `overwrite` is False.
        FileNotFoundError, PermissionError, ConnectionError: there is no such repository, or no access to it.
        ValueError: it is not FlexMoE's, or a composition that refers to local folders; or its weights hold an expert
            that its config does not list.
        PackageError: the package is invalid, damaged, or refused by the policy; or its config.json names code.

    Warns:
        UserWarning: a JSON file of a model names code of others, which is left out.

    Example:
        ```pycon
        >>> import flexmoe
        >>> folder = flexmoe.pull("hospital/derm-expert", "pulled")
        >>> flexmoe.ExpertPackage.open(folder).manifest.name
        'derm'
        ```
    """
    check_new_folder(out, overwrite)
    access = HubAccess(**hub)
    # the manifest first: of a package, only its own files are downloaded
    found = access.resolve(repo_id, revision, owned=True, allow_patterns=(MANIFEST_FILE, CONFIG_FILE))
    is_package = (found.path / MANIFEST_FILE).is_file()
    if not is_package:
        _check_model(found)
    found = access.resolve(repo_id, found.revision, allow_patterns=PACKAGE_FILES if is_package else DOWNLOADED)
    package = ExpertPackage.open(found.path) if is_package else None
    if package is not None and (resolved := resolve_policy(policy)) is not None:
        resolved.check(package, found.repo)
    files = _model_files(found.path) if package is None else _package_files(package)
    with atomic_folder(out, overwrite) as folder:
        if package is not None:
            package.copy_weights(folder, progress)
        for name, path in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            copy_companion(path, folder / name)
        if package is not None:
            _check_manifest(package, folder)
    return Path(out)


def _check_model(found: ResolvedFolder) -> None:
    """Raises a ValueError if this is not a FlexMoE model, or a composition on the Hub that refers to local folders."""
    path = found.path / CONFIG_FILE
    model_type = read_json_object(path).get("model_type") if path.is_file() else None
    if model_type != FlexMoeConfig.model_type:
        raise ValueError(
            f"{found.repo or found.path} is neither an expert package nor a FlexMoE model (its model_type is "
            f"{model_type!r}): download it with `hf download`."
        )
    config = FlexMoeConfig.from_pretrained(found.path)
    local = local_parts(config.composition) if config.composition is not None else {}
    if local and found.repo is not None:
        raise ValueError(
            f"The composition {found.repo} refers to local folders ({', '.join(local.values())}): on the Hub it may "
            "only refer to repositories. Its author should push the anchor and the experts, and save it again with "
            "their ids."
        )


def _model_files(folder: Path) -> dict[str, Path]:
    config = read_json_object(folder / CONFIG_FILE)
    listed = model_files if config.get("composition") is None else composition_files
    return listed(folder, config)


def _package_files(package: ExpertPackage) -> dict[str, Path]:
    """The files of a package but its weights; their bytes stay, as they may be signed."""
    files = {name: path for name, path in package_files(package).items() if name not in package.manifest.sha256}
    if CONFIG_FILE in files and (named := foreign_code(read_json_object(files[CONFIG_FILE]))):
        raise PackageError(
            f"{files[CONFIG_FILE]} names code of others ({'; '.join(named)}); a package has none. Ask its owner."
        )
    return files


def _check_manifest(package: ExpertPackage, folder: Path) -> None:
    """Checks that the copied manifest is the one against which the weights were verified."""
    if ExpertPackage.open(folder).manifest_sha256 != package.manifest_sha256:
        raise PackageError(f"{package.folder / MANIFEST_FILE}: it changed while the package was copied. Pull again.")


__all__ = ["pull"]

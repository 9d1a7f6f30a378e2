"""Experts, compositions and models to and from the Hub, by folder.

A thin layer over `flexmoe.modeling.publishing_flexmoe` and `hub_flexmoe`. Not here: pushing from a live model
(`push_expert_to_hub`, `push_to_hub`), cards and signatures.
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexmoe.modeling.composition_flexmoe import Composition
from flexmoe.modeling.configuration_flexmoe import FlexMoeConfig
from flexmoe.modeling.folders_flexmoe import atomic_folder, check_new_folder, file_inside
from flexmoe.modeling.hub_flexmoe import DOWNLOADED, HubAccess, Pushed, ResolvedFolder
from flexmoe.modeling.json_flexmoe import read_json_object
from flexmoe.modeling.manifest_flexmoe import MANIFEST_FILE, WEIGHT_FILE, PackageError
from flexmoe.modeling.packages_flexmoe import CONFIG_FILE, PACKAGE_FILES, ExpertPackage
from flexmoe.modeling.publishing_flexmoe import Upload, plan_upload
from flexmoe.modeling.publishing_flexmoe import push as push_upload
from flexmoe.modeling.trust_flexmoe import TrustPolicy, resolve_policy


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    allow_private_text: bool = False,
) -> Pushed:
    """Pushes an expert package, a composition or a merged model to the Hub, checked before, as one commit.

    Args:
        folder: what to push; of a package only its own files go (`plan_upload` lists them).
        repo_id: the Hub's model repository, made if it is not there.
        private: of a repository that is made here; None is what the account's settings say.
        revision: the branch, made if it is not there.
        create_pr: open a pull request instead.
        allow_private_text: push although its texts (card, manifest, configs, licence) hold what looks private.

    Raises:
        FileNotFoundError: no such folder, or nothing of FlexMoE in it.
        ValueError: the folder is not what it says; a composition names folders; `repo_id` is no Hub id; or a text
            holds an e-mail address, a token, a key or a path of a machine (`PrivateTextError`).
        PermissionError, ConnectionError: the Hub does not take it.
    """
    return push_upload(
        plan_upload(folder),
        repo_id,
        allow_private_text=allow_private_text,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
    )


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
    """Pulls an expert package, a composition or a merged model from the Hub into a folder, whole or not at all.

    A package's weights are hashed and checked while they are copied out of the Hub's cache.

    Args:
        repo_id: a Hub id; a folder is copied likewise.
        out: the folder to make; must not exist, unless `overwrite`.
        policy: whose packages are let in: a policy file, by default the one that FLEXMOE_POLICY names.
        revision: branch, tag or commit.
        progress: called with the number of bytes just copied, of a package.
        hub: `token`, `cache_dir`, `local_files_only`, `force_download`.

    Raises:
        FileExistsError: `out` exists and `overwrite` is False.
        FileNotFoundError, PermissionError, ConnectionError: there is no such repository, or it can't be had.
        ValueError: it is no FlexMoE, or a composition that names folders, which would be those of this machine.
        PackageError: the package is not what its manifest says, or not let in.
    """
    check_new_folder(out, overwrite)
    access = HubAccess(**hub)
    # the manifest first: of a package, nothing else than its own files is fetched
    found = access.resolve(repo_id, revision, owned=True, allow_patterns=(MANIFEST_FILE, CONFIG_FILE))
    is_package = (found.path / MANIFEST_FILE).is_file()
    if not is_package:
        _check_model(found)
    found = access.resolve(repo_id, found.revision, allow_patterns=PACKAGE_FILES if is_package else DOWNLOADED)
    package = ExpertPackage.open(found.path) if is_package else None
    if package is not None and (followed := resolve_policy(policy)) is not None:
        followed.check(package, found.repo)
    with atomic_folder(out, overwrite) as folder:
        if package is not None:
            package.copy_weights(folder, progress)
        for entry in sorted(found.path.iterdir()):
            if _is_copied(entry, package):
                shutil.copyfile(file_inside(found.path, entry.name), folder / entry.name)
        if package is not None:
            _check_manifest(package, folder)
    return Path(out)


def _check_model(found: ResolvedFolder) -> None:
    """Raises ValueError if this is no FlexMoE, or a composition from the Hub that names folders of some machine."""
    path = found.path / CONFIG_FILE
    model_type = read_json_object(path).get("model_type") if path.is_file() else None
    if model_type != FlexMoeConfig.model_type:
        raise ValueError(
            f"{found.repo or found.path} is neither an expert package nor a model of FlexMoE (its model_type is "
            f"{model_type!r}): fetch it with `hf download`."
        )
    config = FlexMoeConfig.from_pretrained(found.path)
    if config.composition is not None:
        composition = Composition.from_config(config)
        for part in (composition.anchor, *composition.experts.values()):
            part.wanted(found, ())  # refuses a folder


def _is_copied(entry: Path, package: ExpertPackage | None) -> bool:
    if package is None:
        return not entry.name.startswith(".") and entry.is_file()
    wanted = any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in PACKAGE_FILES)
    return wanted and not WEIGHT_FILE.fullmatch(entry.name)


def _check_manifest(package: ExpertPackage, folder: Path) -> None:
    """The manifest that was copied is the one that the weights were checked against."""
    if ExpertPackage.open(folder).manifest_sha256 != package.manifest_sha256:
        raise PackageError(f"{package.folder / MANIFEST_FILE}: it changed while the package was copied. Pull again.")


__all__ = ["Upload", "plan_upload", "pull", "push"]

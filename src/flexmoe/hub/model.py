"""Pushes a live model to the Hub, or one of its experts as a package.

The model's methods of the same names delegate here. Does not cover which files are uploaded (`flexmoe.hub.publish`),
or saving to a local folder (`save_pretrained`, `save_expert`, `save_composition`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexmoe.cards.facts import model_facts
from flexmoe.cards.rendering import render
from flexmoe.hub.client import Pushed, check_pushable
from flexmoe.hub.publish import plan_upload, push_upload
from flexmoe.modeling.distributed_flexmoe import is_sharded
from flexmoe.packages.package import CARD_FILE, ExpertPackage


def push_expert_to_hub(
    model: Any,
    name: str,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    allow_private_text: bool | Collection[str] = False,
    **manifest_fields: Any,
) -> Pushed:
    """Pushes one expert as a package and records its repository in the config, so that a composition can refer to it.

    Args:
        model: a FlexMoE model.
        name: the expert.
        repo_id: the Hub's model repository, created if necessary.
        private: visibility of a new repository.
        revision: the branch; created if necessary.
        create_pr: open a pull request instead; nothing is recorded in the config then.
        allow_private_text: push even if text looks private: in all files, or in those of these names.
        manifest_fields: as in `save_expert`.

    Returns:
        The repository, its page, and the new commit.

    Raises:
        ValueError: as `save_expert`; `repo_id` is not a Hub id; or card or manifest hold an e-mail address, a token or
            a local path (`PrivateTextError`).
        PermissionError, ConnectionError: the Hub rejects the push.
        RuntimeError: the model is sharded over several processes.
    """
    if is_sharded(model):
        raise RuntimeError(
            "push_expert_to_hub of a sharded model: call save_expert on every rank, then push that folder once, with "
            "`flexmoe push`."
        )
    check_pushable(repo_id)
    with tempfile.TemporaryDirectory(prefix="flexmoe-") as folder:
        upload = plan_upload(model.save_expert(name, Path(folder) / "package", **manifest_fields))
        pushed = push_upload(
            upload,
            repo_id,
            allow_private_text=allow_private_text,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
        manifest = ExpertPackage.open(upload.folder).manifest
    if not create_pr:
        source = {"repo": pushed.repo, "revision": pushed.revision}
        model.config.experts = [
            {**record, **manifest.record(), "source": source} if record["name"] == name else record
            for record in model.config.expert_records
        ]
    return pushed


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    by_reference: bool = False,
    sources: Mapping[str, str | Path] | None = None,
    allow_private_text: bool | Collection[str] = False,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    max_shard_size: int | str = "5GB",
    tags: Sequence[str] | None = None,
) -> Pushed:
    """Pushes a model with a card that lists its experts, as a merged checkpoint or as a composition.

    Args:
        model: a FlexMoE model.
        repo_id: the Hub's model repository, created if necessary.
        by_reference: push a composition, a few kilobytes that refer to anchor and experts, which must be on the Hub.
        sources: as in `save_composition`.
        allow_private_text: push even if text looks private: in all files, or in those of these names.
        private: visibility of a new repository.
        revision: the branch; created if necessary.
        create_pr: open a pull request instead.
        max_shard_size: of a weight file.
        tags: further tags for the card of a merged model.

    Returns:
        The repository, its page, and the new commit.

    Raises:
        ValueError: as `save_composition`; a composition refers to folders, or is given `tags`; `repo_id` is not a Hub
            id; or a text looks private.
        PermissionError, ConnectionError: the Hub rejects the push.
        RuntimeError: the model is sharded over several processes.
    """
    if is_sharded(model):
        raise RuntimeError(
            "push_to_hub of a sharded model: call save_pretrained on every rank, then push that folder once, with "
            "`flexmoe push`."
        )
    if by_reference and tags:
        raise ValueError(f"tags={list(tags)}: only the card of a merged model has them; leave out by_reference.")
    check_pushable(repo_id)
    with tempfile.TemporaryDirectory(prefix="flexmoe-") as temporary:
        folder = Path(temporary) / "model"
        if by_reference:
            model.save_composition(folder, sources=sources, token=token)
        else:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            facts = model_facts(model.config)
            facts["metadata"]["tags"] = [*facts["metadata"]["tags"], *(tags or ())]
            (folder / CARD_FILE).write_text(render("model", facts), encoding="utf-8")
        return push_upload(
            plan_upload(folder),
            repo_id,
            allow_private_text=allow_private_text,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
        )


__all__ = ["push_expert_to_hub", "push_to_hub"]

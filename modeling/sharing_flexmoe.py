"""What goes out of a live model for others: one expert as a package on the Hub, the whole merged or by reference.

Not here: what may go (`publishing_flexmoe`), the connection (`hub_flexmoe`), and saving into a folder that nobody else
sees (`save_pretrained`, `save_expert`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cards_flexmoe import model_facts, render_card
from .configuration_flexmoe import FlexMoeConfig
from .hub_flexmoe import HubAccess, Pushed, check_pushable
from .packages_flexmoe import CARD_FILE, ExpertPackage
from .parallel_flexmoe import is_sharded
from .publishing_flexmoe import plan_upload, push
from .referring_flexmoe import save_composition

# For type checkers alone: at run time the model classes bring these in themselves.
if TYPE_CHECKING:
    from .lifecycle_flexmoe import ExpertLifecycle as _Model
else:
    _Model = object


class ModelSharing(_Model):
    """The part of a FlexMoE model that hands it, or an expert of it, to others."""

    config: FlexMoeConfig

    def push_expert_to_hub(
        self,
        name: str,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        allow_private_text: bool = False,
        **manifest_fields: Any,
    ) -> Pushed:
        """Pushes one expert as a package, and remembers where it is: a composition can then name it.

        Args:
            name: which one.
            repo_id: the Hub's model repository, made if it is not there.
            private: of a repository that is made here.
            revision: the branch; made if it is not there.
            create_pr: open a pull request instead. The model then does not remember it.
            allow_private_text: push although card or manifest hold what looks private.
            manifest_fields: as in `save_expert`.

        Returns:
            The repository, its page, and the commit that was made.

        Raises:
            ValueError: as `save_expert`; `repo_id` is no Hub id; or card or manifest hold an e-mail address, a token
                or a path of this machine (`PrivateTextError`).
            PermissionError, ConnectionError: the Hub does not take it.
            RuntimeError: the model is sharded over several processes.
        """
        if is_sharded(self):
            raise RuntimeError(
                "push_expert_to_hub of a sharded model: let every process call save_expert, then push that folder "
                "once, with `flexmoe push`."
            )
        check_pushable(repo_id)
        with tempfile.TemporaryDirectory(prefix="flexmoe-") as folder:
            upload = plan_upload(self.save_expert(name, Path(folder) / "package", **manifest_fields))
            pushed = push(
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
            self.config.experts = [
                {**record, **manifest.record(), "source": source} if record["name"] == name else record
                for record in self.config.expert_records
            ]
        return pushed

    def save_composition(
        self,
        folder: str | Path,
        *,
        sources: Mapping[str, str | Path] | None = None,
        overwrite: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> Path:
        """Writes this model by reference: kilobytes that name its dense anchor and the packages of its experts.

        `from_pretrained` of that folder pulls them and gives this model again. The sources are read and compared with
        the model first. Returns the folder.

        Args:
            folder: where to; must not exist, unless `overwrite`.
            sources: folder or Hub id, by name, of what did not come from the Hub: of "public" the dense checkpoint
                that was grafted, of an expert its package. What is not named is taken from where the config says that
                it came from. A folder beside `folder` is named relative to it, so both can be moved together.
            token, cache_dir: for the Hub.

        Raises:
            FileExistsError: `folder` exists and `overwrite` is False.
            ValueError: a source is not known or not given; the anchor or an expert was changed since it came from
                there (changed router rows are fine: they are saved); or the anchor has no fingerprint.
        """
        hub = HubAccess(token=token, cache_dir=cache_dir)
        return save_composition(self, folder, sources=sources, overwrite=overwrite, hub=hub)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        by_reference: bool = False,
        sources: Mapping[str, str | Path] | None = None,
        allow_private_text: bool = False,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        max_shard_size: int | str = "5GB",
        tags: Sequence[str] | None = None,
    ) -> Any:
        """Pushes this model to the Hub with a card that names its experts, merged or as a composition.

        Args:
            repo_id: the Hub's model repository, made if it is not there.
            by_reference: push a composition, kilobytes that name anchor and experts, which must be on the Hub.
            sources: as in `save_composition`.
            allow_private_text: push although the card or config.json hold what looks private.
            private: of a repository that is made here.
            revision: the branch; made if it is not there.
            create_pr: open a pull request instead.
            max_shard_size: of a weight file.
            tags: further tags for the card of a merged model.

        Returns:
            The repository, its page, and the commit that was made (`Pushed`). A model that only lends its adapters
            (`load_adapter`) is left to transformers, which pushes these.

        Raises:
            ValueError: as `save_composition`; a composition names folders, or is given `tags`; `repo_id` is no Hub id;
                or something looks private.
            PermissionError, ConnectionError: the Hub does not take it.
            RuntimeError: the model is sharded over several processes.
        """
        options: dict[str, Any] = {
            "private": private,
            "token": token,
            "revision": revision,
            "create_pr": create_pr,
            "commit_message": commit_message,
            "commit_description": commit_description,
        }
        if self._hf_peft_config_loaded:
            return super().push_to_hub(repo_id, max_shard_size=max_shard_size, tags=tags, **options)
        if is_sharded(self):
            raise RuntimeError(
                "push_to_hub of a sharded model: let every process call save_pretrained, then push that folder once, "
                "with `flexmoe push`."
            )
        if by_reference and tags:
            raise ValueError(f"tags={list(tags)}: only the card of a merged model takes them; leave out by_reference.")
        check_pushable(repo_id)
        with tempfile.TemporaryDirectory(prefix="flexmoe-") as temporary:
            folder = Path(temporary) / "model"
            if by_reference:
                self.save_composition(folder, sources=sources, token=token)
            else:
                self.save_pretrained(folder, max_shard_size=max_shard_size)
                facts = model_facts(self.config)
                facts["metadata"]["tags"] = [*facts["metadata"]["tags"], *(tags or ())]
                (folder / CARD_FILE).write_text(render_card("model", facts), encoding="utf-8")
            upload = plan_upload(folder)
            return push(upload, repo_id, allow_private_text=allow_private_text, **options)


__all__ = ["ModelSharing"]

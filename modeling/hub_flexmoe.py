"""Folders from and to the Hugging Face Hub, and whether a repository may still be had.

The only module of FlexMoE that opens a network connection, and always through `huggingface_hub`, whose tokens, cache,
resumed downloads and HF_HUB_OFFLINE hold here, too. It does not look into what it moves: `tensors_flexmoe` and
`packages_flexmoe` validate what came, `publishing_flexmoe` says what may go.
"""

import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import logging

# Weights as safetensors under the names that transformers and FlexMoE write, and everything a tokenizer is made of.
# Not asked for: pickles, code, second copies of the weights (`consolidated.safetensors`, `original/`, ONNX, GGUF).
DOWNLOADED = (
    "model*.safetensors",
    "expert*.safetensors",
    "adapter_model.safetensors",
    "router.safetensors",
    "*.json",
    "*.jsonl",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "README.md",
    "LICENSE*",
    "model.sig",
)
PACKAGE_FILES = (
    "expert*.safetensors",
    "expert.safetensors.index.json",
    "expert_config.json",
    "config.json",
    "README.md",
    "LICENSE*",
    "model.sig",
)
NEVER_DOWNLOADED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.py", "original/*", "onnx/*", "openvino/*")

ATTEMPTS = 3  # at a download whose connection breaks off; what has arrived is kept in between

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ResolvedFolder:
    """A folder that can be read now, and the Hub repository and commit hash that it came from, if it did."""

    path: Path
    repo: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Wanted:
    """A source to resolve: a folder or a Hub id, its revision, and which files of a repository are fetched."""

    source: str | Path
    revision: str | None = None
    patterns: Sequence[str] = DOWNLOADED


@dataclass(frozen=True)
class Pushed:
    """What an upload made: the commit `revision` of `repo`, its page `url`, and the pull request, if it is one."""

    repo: str
    revision: str
    url: str
    pull_request: str | None = None


def resolve_folder(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    allow_patterns: Sequence[str] | None = None,
) -> ResolvedFolder:
    """The folder that `source` names: itself if it exists, else the Hub repository of that id, fetched into the cache.

    Args:
        source: a folder, or a Hub id ("owner/name", or a bare "name"). A `Path` is never taken for a Hub id.
        revision: branch, tag or commit of a Hub repository; None is its main branch.
        allow_patterns: files to fetch instead of `DOWNLOADED`; pickles and code stay out whatever it says.

    Raises:
        FileNotFoundError: neither a folder nor a repository (or revision) that this account can see; or not cached,
            while offline.
        NotADirectoryError: `source` is a file.
        PermissionError: the repository is gated and this account has not been let in.
        ConnectionError: the Hub answered with a fault of its own.
        ValueError: `revision` given for a folder.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"{path} is a folder, and only Hub repositories have revisions: leave out revision={revision!r}"
            )
        return ResolvedFolder(path)
    if path.exists():
        raise NotADirectoryError(f"{path} is a file; expected a folder, or the id of a Hub repository")
    if not is_hub_id(source):
        raise FileNotFoundError(
            f"no folder {path}; expected one, or the id of a Hub repository such as 'allenai/OLMo-2-0425-1B'"
        )
    repo = str(source)
    with _plain_errors(repo, revision):
        snapshot = _download(
            repo,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            allow_patterns=list(DOWNLOADED if allow_patterns is None else allow_patterns),
            ignore_patterns=list(NEVER_DOWNLOADED),
        )
    return ResolvedFolder(Path(snapshot), repo=repo, revision=Path(snapshot).name)


def _download(repo: str, **options: Any) -> str:
    """`snapshot_download`, taken up again where a connection broke off: not every version does so by itself."""
    for _ in range(ATTEMPTS - 1):
        try:
            return snapshot_download(repo, **options)
        except Exception as error:
            if not _is_of_the_way(error):
                raise
    return snapshot_download(repo, **options)


def is_hub_id(source: str | os.PathLike[str]) -> bool:
    """Whether this names a repository rather than a folder: text of the form "owner/name" that is no folder here."""
    return isinstance(source, str) and bool(_HUB_ID.fullmatch(source)) and not Path(source).expanduser().is_dir()


@dataclass(frozen=True)
class HubAccess:
    """How the Hub is asked: as `resolve_folder` takes it."""

    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False

    def resolve(self, source: str | Path, revision: str | None = None, **options: Any) -> ResolvedFolder:
        """The folder that `source` names, fetched if need be. Raises: as `resolve_folder`."""
        return resolve_folder(source, revision=revision, **vars(self), **options)

    def resolve_all(
        self, wanted: Mapping[str, Wanted], *, still_there: Collection[str] = ()
    ) -> dict[str, ResolvedFolder | OSError]:
        """The folders that several sources name, by the same keys, fetched at the same time, with a progress bar.

        Args:
            still_there: keys of repositories that are taken from the cache only if the Hub says that they may still be
                had; where it cannot be asked, a warning says so.

        Returns:
            For each key its folder, or the error that `resolve_folder` or `check_access` raised.
        """

        def resolve_one(key: str) -> ResolvedFolder | OSError:
            part = wanted[key]
            try:
                if key in still_there and is_hub_id(part.source):
                    self.check_access(str(part.source))
                return self.resolve(part.source, part.revision, allow_patterns=part.patterns)
            except OSError as error:
                return error

        remote = sum(is_hub_id(part.source) for part in wanted.values())
        with ThreadPoolExecutor(max_workers=4, thread_name_prefix="flexmoe-pull") as pool:
            jobs = {key: pool.submit(resolve_one, key) for key in wanted}
            hidden = None if remote > 1 else True  # None: unless nobody is at a terminal to see it
            shown = logging.tqdm(jobs.items(), desc="Pulling the parts of a model", disable=hidden)
            return {key: job.result() for key, job in shown}

    def check_access(self, repo: str) -> None:
        """Asks the Hub whether this account may have a repository now, whatever is in the cache.

        Nothing is asked while offline (HF_HUB_OFFLINE, `local_files_only`); if the Hub cannot be reached, a warning
        says that the answer is not known.

        Raises:
            FileNotFoundError: there is no such repository (any more), or it is private.
            PermissionError: it is gated, and this account has not been let in.
        """
        if self.local_files_only or is_offline_mode():
            return
        try:
            with _plain_errors(repo, None):
                HfApi(token=self.token).auth_check(repo)
        except ConnectionError as error:
            warnings.warn(
                f"Whether {repo!r} was withdrawn by its owner is not known: {error}. What is in the cache is used.",
                stacklevel=2,
            )


def push_folder(
    folder: str | Path,
    repo: str,
    *,
    files: Sequence[str],
    replaced: Sequence[str] = (),
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> Pushed:
    """Uploads `files` of a folder as one commit to a model repository, which is made if it is not there.

    Args:
        files: names of files in `folder`; nothing else goes.
        replaced: patterns of files that go from the repository if they are not among `files`, as shards of an older
            version.
        private: of a repository that is made here; None is what the account's settings say.
        revision: the branch, made if it is not there; None is the main one.
        create_pr: open a pull request instead.

    Raises:
        PermissionError: no token, or this account may not write there.
        FileNotFoundError: there is no such account or organisation.
        ValueError: `repo` is no Hub id.
        ConnectionError: the Hub cannot be reached, or answered with a fault of its own.
    """
    if not _HUB_ID.fullmatch(repo):
        raise ValueError(f"{repo!r} is not a Hub id; expected one such as 'my-organisation/math-expert'.")
    if is_offline_mode():
        raise ConnectionError(f"Nothing can be pushed to {repo!r} while HF_HUB_OFFLINE is set: unset it.")
    api = HfApi(token=token)
    with _plain_errors(repo, revision, writing=True):
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[_literally(name) for name in files],
            delete_patterns=list(replaced) or None,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
    return Pushed(repo, commit.oid, f"{api.endpoint}/{repo}", commit.pr_url)


def _literally(name: str) -> str:
    """A pattern that this file name alone matches."""
    return re.sub(r"([*?[])", r"[\1]", name)


@contextmanager
def _plain_errors(repo: str, revision: str | None, *, writing: bool = False) -> Iterator[None]:
    """`huggingface_hub`'s errors as one sentence each: what, and the way out. Subclasses come before their bases."""
    try:
        yield
    except GatedRepoError as error:
        raise PermissionError(
            f"the Hub repository {repo!r} is gated: ask for access on its page, {HfApi().endpoint}/{repo}, then "
            "log in (`hf auth login`) or pass a token"
        ) from error
    except RepositoryNotFoundError as error:
        raise _no_repository(repo, writing) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"the Hub repository {repo!r} has no revision {revision!r} (a branch, tag or commit)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo!r} is not a folder here, and the Hub repository of that name is not (wholly) in the local cache "
            "while the Hub cannot be reached or is switched off (HF_HUB_OFFLINE, local_files_only): "
            "go online once, or give a folder"
        ) from error
    except HFValidationError as error:
        raise FileNotFoundError(f"{repo!r} is neither a folder here nor a valid Hub id: {error}") from error
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"there is no token for {repo!r}: log in (`hf auth login`) or pass one") from error
    except OfflineModeIsEnabled as error:
        raise ConnectionError(f"{repo!r} cannot be asked for while HF_HUB_OFFLINE is set") from error
    except (EntryNotFoundError, HfHubHTTPError) as error:
        if writing and (refused := _refused_write(repo, error)):
            raise refused from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        done = "take" if writing else "hand out"
        raise ConnectionError(f"the Hub did not {done} {repo!r} ({reason}); try again later") from error
    except Exception as error:
        if not _is_of_the_way(error):
            raise
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise ConnectionError(
            f"the connection to the Hub failed or broke off at {repo!r} ({type(error).__name__}: {reason}); try "
            "again: what has arrived whole is kept"
        ) from error


def _no_repository(repo: str, writing: bool) -> Exception:
    """What to say of a repository that the Hub does not show to this account as one of models."""
    if writing:
        return PermissionError(
            f"the Hub has no place {repo!r} that this account may write to: check the name and the organisation, and "
            "log in (`hf auth login`) with a token that may write"
        )
    for kind in ("dataset", "space"):
        try:
            HfApi().repo_info(repo, repo_type=kind)
        except Exception:  # whatever it is: the question was only asked to say more
            continue
        return FileNotFoundError(f"{repo!r} is a {kind} on the Hub, and a model repository was expected")
    return FileNotFoundError(
        f"{repo!r} is neither a folder here nor a Hub repository that this account can see; "
        "check the spelling, or log in (`hf auth login`) if it is private"
    )


def _refused_write(repo: str, error: Exception) -> PermissionError | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status not in (401, 403):
        return None
    return PermissionError(
        f"this account may not write to {repo!r} on the Hub (it answered {status}): log in (`hf auth login`) with a "
        "token that may write there, or choose a repository of your own"
    )


def _is_of_the_way(error: Exception) -> bool:
    """Whether the error is one of the HTTP library's, whose name has changed between versions, or of a file that came
    cut short: not the Hub's answer, and not a fault of this code."""
    if type(error) is OSError and "Consistency check failed" in str(error):
        return True
    return any(base.__name__ == "TransportError" for base in type(error).__mro__)


__all__ = [
    "DOWNLOADED",
    "NEVER_DOWNLOADED",
    "PACKAGE_FILES",
    "HubAccess",
    "Pushed",
    "ResolvedFolder",
    "Wanted",
    "is_hub_id",
    "push_folder",
    "resolve_folder",
]

"""Folders from and to the Hugging Face Hub, and whether a repository may still be had.

The only module of FlexMoE that opens a network connection, and always through `huggingface_hub`, whose tokens, cache,
resumed downloads and HF_HUB_OFFLINE hold here, too. It does not look into what it moves: `tensors_flexmoe` and
`packages_flexmoe` validate what came, `publishing_flexmoe` says what may go.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from .cards_flexmoe import HUB_ID
from .packages_flexmoe import PACKAGE_FILES

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
    "*.spm",
    "README.md",
    "LICENSE*",
    "USE_POLICY*",
    "model.sig",
)
NEVER_DOWNLOADED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.py", "original/*", "onnx/*", "openvino/*")

ATTEMPTS = 3  # at a download whose connection breaks off; what has arrived is kept in between


@dataclass(frozen=True)
class ResolvedFolder:
    """A folder that can be read now, and the Hub repository and commit hash that it came from, if it did."""

    path: Path
    repo: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Wanted:
    """A source to resolve, for `HubAccess.resolve_all`.

    Attributes:
        source: a folder or a Hub id.
        revision: of a Hub repository.
        patterns: files of a repository that are fetched.
        is_repo: whether `source` is a repository whatever folders there are here.
        owned: whether its owner may withdraw it, so that the Hub is asked even where all of it is in the cache.
    """

    source: str | Path
    revision: str | None = None
    patterns: Sequence[str] = DOWNLOADED
    is_repo: bool = False
    owned: bool = False


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
    is_repo: bool = False,
) -> ResolvedFolder:
    """The folder that `source` names: itself if it exists, else the Hub repository of that id, fetched into the cache.

    Args:
        source: a folder, or a Hub id ("owner/name", or a bare "name"). A `Path` is never taken for a Hub id.
        revision: branch, tag or commit of a Hub repository; None is its main branch.
        allow_patterns: files to fetch instead of `DOWNLOADED`; pickles and code stay out whatever it says.
        is_repo: `source` is a Hub id, also where a folder here is called so.

    Raises:
        FileNotFoundError: neither a folder nor a repository (or revision) that this account can see; or not cached,
            while offline was chosen.
        NotADirectoryError: `source` is a file.
        PermissionError: the repository is gated, or closed otherwise, and this account has not been let in.
        ConnectionError: the Hub cannot be reached and not all is cached, or it answered with a fault of its own.
        ValueError: `revision` given for a folder.
    """
    path = Path(source).expanduser()
    if is_repo and not (isinstance(source, str) and HUB_ID.fullmatch(source)):
        raise FileNotFoundError(f"{source!r} is no id of a Hub repository")
    if not is_repo and path.is_dir():
        if revision is not None:
            raise ValueError(
                f"{path} is a folder, and only Hub repositories have revisions: leave out revision={revision!r}"
            )
        return ResolvedFolder(path)
    if not is_repo and path.exists():
        raise NotADirectoryError(f"{path} is a file; expected a folder, or the id of a Hub repository")
    if not is_repo and not is_hub_id(source):
        raise FileNotFoundError(
            f"no folder {path}; expected one, or the id of a Hub repository such as 'allenai/OLMo-2-0425-1B'"
        )
    repo = str(source)
    with _plain_errors(repo, revision, token=token, offline=local_files_only or is_offline_mode()):
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
    return isinstance(source, str) and bool(HUB_ID.fullmatch(source)) and not Path(source).expanduser().is_dir()


@dataclass(frozen=True)
class HubAccess:
    """How the Hub is asked: as `resolve_folder` takes it."""

    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False

    def resolve(
        self, source: str | Path, revision: str | None = None, *, owned: bool = False, **options: Any
    ) -> ResolvedFolder:
        """The folder that `source` names, fetched if need be.

        Args:
            owned: its owner may withdraw it: a repository is asked for even where all of it is in the cache.
            options: `allow_patterns` and `is_repo` of `resolve_folder`.

        Raises: as `resolve_folder` and `check_access`.
        """
        if owned and (options.get("is_repo") or is_hub_id(source)):
            self.check_access(str(source))
        return resolve_folder(source, revision=revision, **vars(self), **options)

    def resolve_all(self, wanted: Mapping[str, Wanted]) -> dict[str, ResolvedFolder | OSError]:
        """The folders that several sources name, by the same keys, fetched at the same time, with a progress bar.

        Returns:
            For each key its folder, or the error that `resolve` raised.
        """

        def resolve_one(part: Wanted) -> ResolvedFolder | OSError:
            try:
                return self.resolve(
                    part.source,
                    part.revision,
                    owned=part.owned,
                    allow_patterns=part.patterns,
                    is_repo=part.is_repo,
                )
            except OSError as error:
                return error

        remote = sum(part.is_repo or is_hub_id(part.source) for part in wanted.values())
        pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="flexmoe-pull")
        try:
            jobs = {key: pool.submit(resolve_one, part) for key, part in wanted.items()}
            hidden = None if remote > 1 else True  # None: unless nobody is at a terminal to see it
            shown = logging.tqdm(jobs.items(), desc="Pulling the parts of a model", disable=hidden)
            return {key: job.result() for key, job in shown}
        finally:
            pool.shutdown(cancel_futures=True)

    def check_access(self, repo: str) -> None:
        """Asks the Hub whether this account may have a repository now, whatever is in the cache.

        Nothing is asked while offline (HF_HUB_OFFLINE, `local_files_only`); if the Hub cannot be reached, a warning
        says that the answer is not known.

        Raises:
            FileNotFoundError: there is no such repository (any more), or it is private.
            PermissionError: it is gated or closed, and this account has not been let in.
        """
        if self.local_files_only or is_offline_mode():
            return
        try:
            with _plain_errors(repo, None, token=self.token):
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
    outdated: Callable[[Sequence[str]], Sequence[str]] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> Pushed:
    """Uploads `files` of a folder as one commit to a model repository, which is made if it is not there.

    Args:
        files: names of files in `folder`; nothing else goes.
        outdated: is told the names at the top of the repository, folders' files not among them, and says which of
            them the same commit takes away, if they are not in `files`: shards of an older version, say.
        private: of a repository that is made here; None is what the account's settings say.
        revision: the branch, made if it is not there; None is the main one.
        create_pr: open a pull request instead.

    Raises:
        PermissionError: no token, or this account may not write there.
        FileNotFoundError: there is no such account or organisation.
        ValueError: `repo` is no Hub id.
        ConnectionError: the Hub cannot be reached, or answered with a fault of its own.
    """
    check_pushable(repo)
    api = HfApi(token=token)
    with _plain_errors(repo, revision, writing=True):
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        there = [name for name in api.list_repo_files(repo, revision=revision) if "/" not in name] if outdated else []
        leaving = [name for name in outdated(there) if name not in files] if outdated else []
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[_literally(name) for name in files],
            delete_patterns=[_literally(name) for name in leaving] or None,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
        )
    return Pushed(repo, commit.oid, f"{api.endpoint}/{repo}", commit.pr_url)


def check_pushable(repo: str) -> None:
    """What can be said of a push to `repo` before anything is written or sent.

    Raises:
        ValueError: it is no Hub id.
        ConnectionError: HF_HUB_OFFLINE is set.
    """
    if not HUB_ID.fullmatch(repo):
        raise ValueError(f"{repo!r} is not a Hub id; expected one such as 'my-organisation/math-expert'.")
    if is_offline_mode():
        raise ConnectionError(f"Nothing can be pushed to {repo!r} while HF_HUB_OFFLINE is set: unset it.")


def _literally(name: str) -> str:
    """A pattern that this file name alone matches."""
    return re.sub(r"([*?[])", r"[\1]", name)


@contextmanager
def _plain_errors(
    repo: str,
    revision: str | None,
    *,
    token: str | bool | None = None,
    writing: bool = False,
    offline: bool = False,
) -> Iterator[None]:
    """`huggingface_hub`'s errors as one sentence each: what, and the way out. Subclasses come before their bases."""
    try:
        yield
    except GatedRepoError as error:
        raise PermissionError(
            f"the Hub repository {repo!r} is gated: ask for access on its page, {HfApi().endpoint}/{repo}, then "
            "log in (`hf auth login`) or pass a token"
        ) from error
    except RepositoryNotFoundError as error:
        raise (_no_place(repo) if writing else _no_repository(repo, token)) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"the Hub repository {repo!r} has no revision {revision!r} (a branch, tag or commit)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise _not_cached(repo, error, offline) from error
    except HFValidationError as error:
        raise FileNotFoundError(f"{repo!r} is neither a folder here nor a valid Hub id: {error}") from error
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"there is no token for {repo!r}: log in (`hf auth login`) or pass one") from error
    except OfflineModeIsEnabled as error:
        raise ConnectionError(f"{repo!r} cannot be asked for while HF_HUB_OFFLINE is set") from error
    except (EntryNotFoundError, HfHubHTTPError) as error:
        raise _answered(repo, error, writing) from error
    except Exception as error:
        if not _is_of_the_way(error):
            raise
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise ConnectionError(
            f"the connection to the Hub failed or broke off at {repo!r} ({type(error).__name__}: {reason}); try "
            "again: what has arrived whole is kept"
        ) from error


def _no_place(repo: str) -> PermissionError:
    return PermissionError(
        f"the Hub has no place {repo!r} that this account may write to: check the name and the organisation, and log "
        "in (`hf auth login`) with a token that may write"
    )


def _no_repository(repo: str, token: str | bool | None) -> FileNotFoundError:
    """What to say of a repository that the Hub does not show to this account as one of models."""
    for kind in ("dataset", "space"):
        try:
            HfApi(token=token).repo_info(repo, repo_type=kind)
        except Exception:  # whatever it is: the question was only asked to say more
            continue
        return FileNotFoundError(f"{repo!r} is a {kind} on the Hub, and a model repository was expected")
    return FileNotFoundError(
        f"{repo!r} is neither a folder here nor a Hub repository that this account can see; "
        "check the spelling, or log in (`hf auth login`) if it is private"
    )


def _not_cached(repo: str, error: Exception, offline: bool) -> OSError:
    """Offline by choice, what is not in the cache is not there; else it is the Hub that could not be reached."""
    if offline:
        return FileNotFoundError(
            f"{repo!r} is not a folder here, and the Hub repository of that name is not (wholly) in the local cache "
            "while the Hub is switched off (HF_HUB_OFFLINE, local_files_only): go online once, or give a folder"
        )
    cause = error.__cause__ or error
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return ConnectionError(
        f"the Hub cannot be reached for {repo!r}, which is not a folder here and not (wholly) in the local cache "
        f"({reason}); try again later, or give a folder"
    )


def _answered(repo: str, error: Exception, writing: bool) -> OSError:
    """What to say of an answer that is an error and has no class of its own."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) and writing:
        return PermissionError(
            f"this account may not write to {repo!r} on the Hub (it answered {status}): log in (`hf auth login`) with "
            "a token that may write there, or choose a repository of your own"
        )
    if status in (401, 403):
        return PermissionError(
            f"the Hub does not let this account have {repo!r} (it answered {status}): the repository may have been "
            "closed, or the token is not valid (`hf auth login`)"
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    done = "take" if writing else "hand out"
    return ConnectionError(f"the Hub did not {done} {repo!r} ({reason}); try again later")


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
    "check_pushable",
    "is_hub_id",
    "push_folder",
    "resolve_folder",
]

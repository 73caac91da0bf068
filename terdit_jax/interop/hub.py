"""The Hugging Face Hub: what a name there stands for, fetched into huggingface_hub's cache, and folders pushed to it.

Which files of a repository are needed is left to `weights` and `vae_weights`, what a pushed folder holds to `exports`.
huggingface_hub, of the extra `hub`, is imported at first use.
"""

from collections.abc import Callable, Iterator
import contextlib
import logging
import os
from pathlib import Path
import re
from types import ModuleType

from terdit_jax.errors import UserError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_NAME = re.compile(rf"(?!.*\.\.)({_REPOSITORY.pattern})(?:@([\w.-]+))?(?:/(.*))?", re.ASCII)


def is_name(path: str | os.PathLike) -> bool:
    """Whether a path, of nothing on this machine, could be a name, `organisation/name[@revision][/path]`."""
    return bool(_NAME.fullmatch(os.fspath(path)))


def fetch(name: str, choose: Callable[[list[str], str], list[str]]) -> Path:
    """The local path, in huggingface_hub's cache, of what a name stands for; fetched as far as it is not there yet.

    Where the Hub cannot be reached, it is what was fetched before.

    Args:
      name: "organisation/name". "@revision" may follow, a branch, tag or commit, and "/path", of a folder or a file in
        the repository.
      choose: given the names in that folder and the one that `path` names, or "", returns those to fetch; the path of
        the first is returned.

    Raises:
      UserError: huggingface_hub is not installed, or the Hub does not give the files; as `choose`.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise ValueError(f"{name!r} is no name on the Hub")
    repository, revision, inside = match[1], match[2], (match[3] or "").strip("/")
    with _asking(f"{name} does not exist here, and the Hugging Face Hub does not give it", "give a local path") as hub:
        try:
            files = [file.rfilename for file in hub.model_info(repository, revision=revision).siblings]
        except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError):
            raise
        except Exception:
            if cached := _find_cached(hub, repository, revision, inside):
                return cached if cached.is_file() else cached / choose(sorted(os.listdir(cached)), "")[0]
            raise
        folder, asked = os.path.split(inside) if inside in files else (inside, "")
        prefix = folder and f"{folder}/"
        there = {file.removeprefix(prefix).split("/")[0] for file in files if file.startswith(prefix)}
        if not there:
            raise UserError(f"{name}: {repository} has no {folder or 'files'} on the Hugging Face Hub")
        wanted = choose(sorted(there), asked)
        return [Path(hub.hf_hub_download(repository, prefix + file, revision=revision)) for file in wanted][0]


def _find_cached(hub: ModuleType, repository: str, revision: str | None, inside: str) -> Path | None:
    """The path of a repository in the cache, which may hold only a part of it; None if there is nothing."""
    try:  # of no file, which is never an incomplete part
        snapshot = hub.snapshot_download(repository, revision=revision, allow_patterns=[], local_files_only=True)
    except hub.errors.LocalEntryNotFoundError:
        return None
    return path if (path := Path(snapshot, inside)).exists() else None


def check_push(repository: str) -> None:
    """Raises UserError if nothing could be pushed there: no such name, no huggingface_hub, or nobody is logged in."""
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"--push_to={repository}: must be ORGANISATION/NAME, as on the Hugging Face Hub")
    with _asking(f"--push_to={repository}: the Hugging Face Hub cannot be used", "leave it out") as hub:
        if hub.get_token() is None:
            raise UserError(f"--push_to={repository}: log in to the Hugging Face Hub first: hf auth login")


def push(folder: str | os.PathLike, repository: str) -> str:
    """Uploads a folder's files to a repository, which is made if there is none, and returns its address.

    Raises:
      UserError: it was not, or not wholly, uploaded; the folder is as it was.
    """
    later = f"push it later: hf upload {repository} {os.fspath(folder)}"
    with _asking(f"{os.fspath(folder)} is written, but was not pushed to {repository}", later) as hub:
        address = hub.create_repo(repository, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder)
        return str(address)


@contextlib.contextmanager
def _asking(failure: str, advice: str) -> Iterator[ModuleType]:
    """Gives huggingface_hub to the body; raises UserError where it is not installed, or the body fails."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise UserError(f'{failure} without huggingface_hub: pip install "terdit-jax[hub]", or {advice}') from error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for every retry; the last one is told below
    try:
        yield huggingface_hub
    except UserError:
        raise
    except Exception as error:  # its own, its validator's or its network library's
        reason = (str(error).split("\n")[0] or type(error).__name__)[:160]
        raise UserError(
            f"{failure}: check the name and the network, or {advice} ({type(error).__name__}: {reason})"
        ) from error

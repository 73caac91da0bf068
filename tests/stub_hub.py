"""A stand-in for huggingface_hub: repositories are folders, and nothing touches a network."""

from pathlib import Path
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest


class RepositoryNotFoundError(OSError):
    pass


class RevisionNotFoundError(OSError):
    pass


class LocalEntryNotFoundError(FileNotFoundError):
    pass


class StubHub(ModuleType):
    """`folder` holds organisation/name; what was fetched is in `cache`. `asked` lists (repository, file, revision);
    `fails` is raised by whatever needs the network."""

    def __init__(self, folder: Path, cache: Path):
        super().__init__("huggingface_hub")
        self.errors = ModuleType("huggingface_hub.errors")
        for error in (RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError):
            setattr(self.errors, error.__name__, error)
        self.folder, self.cache = folder, cache
        self.asked, self.fails, self.token = [], None, "token"

    def model_info(self, repository, revision=None):
        if self.fails:
            raise self.fails
        if not (self.folder / repository).is_dir():
            raise RepositoryNotFoundError(f"404 Client Error.\n\nRepository Not Found for {repository}")
        if revision not in (None, "main"):
            raise RevisionNotFoundError(f"404 Client Error.\n\nRevision Not Found for {revision}")
        files = sorted(path for path in (self.folder / repository).rglob("*") if path.is_file())
        return SimpleNamespace(
            siblings=[SimpleNamespace(rfilename=str(path.relative_to(self.folder / repository))) for path in files]
        )

    def hf_hub_download(self, repository, file, revision=None):
        self.asked.append((repository, file, revision))
        if self.fails:
            raise self.fails
        there, here = self.folder / repository / file, self.cache / repository / file
        here.parent.mkdir(parents=True, exist_ok=True)
        return shutil.copyfile(there, here)

    def snapshot_download(self, repository, revision, allow_patterns, local_files_only):
        assert local_files_only and allow_patterns == []
        if not (self.cache / repository).exists():
            raise LocalEntryNotFoundError("nothing is cached")
        return str(self.cache / repository)

    def get_token(self):
        return self.token

    def create_repo(self, repository, exist_ok):
        assert exist_ok
        if self.fails:
            raise self.fails
        return f"https://hub/{repository}"

    def upload_folder(self, repo_id, folder_path):
        shutil.copytree(folder_path, self.folder / repo_id)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """`StubHub` in huggingface_hub's place, and a fresh current folder."""
    stub = StubHub(tmp_path / "hub", tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", stub.errors)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return stub

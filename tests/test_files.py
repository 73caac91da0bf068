"""Files appear whole or not at all: whoever writes beside whom, whatever is there, and wherever a writer dies."""

import concurrent.futures
import errno
import functools
import os
import signal
import subprocess
import sys

import pytest

from terdit_jax import files
from terdit_jax.errors import UserError


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


def test_content_is_there_when_the_body_ends_and_nothing_else(tmp_path):
    with files.new_file(tmp_path / "a" / "b.json") as temporary:
        temporary.write_text("whole")
        assert not (tmp_path / "a" / "b.json").exists()
    assert (tmp_path / "a" / "b.json").read_text() == "whole"
    assert names(tmp_path / "a") == ["b.json"]


@pytest.mark.parametrize("make", [files.new_file, files.new_folder])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_body_that_raises_leaves_what_was_there(tmp_path, make, error):
    with pytest.raises(error), make(tmp_path / "x"):
        raise error
    assert names(tmp_path) == []
    (tmp_path / "x").write_text("old")
    with pytest.raises(error), files.new_file(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise error
    assert names(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "old"


@pytest.mark.parametrize("writing", [functools.partial(files.new_file, replace=False), files.new_folder])
@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_without_replace_nothing_is_overwritten_however_late_it_came(tmp_path, writing, there):
    path = tmp_path / "x"
    with pytest.raises(FileExistsError), writing(path) as temporary:
        (temporary if temporary.is_file() else temporary / "new").write_text("new")
        make = {"file": lambda: path.write_text("old"), "folder": path.mkdir, "link": lambda: path.symlink_to("no")}
        make[there]()
    assert path.is_symlink() or path.is_dir() or path.read_text() == "old"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("number", [errno.EEXIST, errno.ENOTEMPTY])
def test_a_folder_that_came_meanwhile_is_named_whatever_the_file_system_calls_it(tmp_path, monkeypatch, number):
    def rename(source, target):
        raise OSError(number, os.strerror(number), source, None, target)

    monkeypatch.setattr(files.os, "rename", rename)
    with pytest.raises(FileExistsError) as caught, files.new_folder(tmp_path / "out"):
        pass
    assert caught.value.filename == str(tmp_path / "out") and os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", ["", "new", "new/deep"])
def test_a_folder_that_can_be_made_is_taken_and_not_made(tmp_path, path):
    files.check_folder(tmp_path / path, "--workdir")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "reason"),
    [("file", "is no folder"), ("file/below", "takes no files"), ("dangling", "is no folder"), ("/proc/x", "takes no")],
)
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, path, reason):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match=f"--workdir={tmp_path / path}: .*{reason}"):
        files.check_folder(tmp_path / path, "--workdir")
    assert (tmp_path / "file").read_text() == "kept"


def test_where_the_file_system_has_no_links_an_existing_file_still_stays(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    files.write_text(tmp_path / "x", "first", replace=False)
    with pytest.raises(FileExistsError):
        files.write_text(tmp_path / "x", "second", replace=False)
    assert (tmp_path / "x").read_text() == "first" and names(tmp_path) == ["x"]


def test_many_writers_of_one_path_give_one_of_their_contents(tmp_path):
    def write(number: int) -> None:
        with files.new_file(tmp_path / "x", sync=False) as temporary:
            for _ in range(20):
                with temporary.open("ab") as file:
                    file.write(bytes([number]) * 1000)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    content = (tmp_path / "x").read_bytes()
    assert len(content) == 20_000 and len(set(content)) == 1
    assert names(tmp_path) == ["x"]


def test_of_writers_that_must_not_overwrite_exactly_one_succeeds(tmp_path):
    def write(number: int) -> bool:
        try:
            files.write_text(tmp_path / "x", str(number), replace=False)
        except FileExistsError:
            return False
        return True

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(write, range(32))) == 1


@pytest.mark.parametrize("make", ["new_file", "new_folder"])
def test_what_a_killed_writer_left_is_removed_by_the_next_and_what_a_living_one_writes_is_not(tmp_path, make):
    killed = f"""
import os, signal
from terdit_jax import files
with files.{make}("x"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    status = subprocess.run([sys.executable, "-c", killed], cwd=tmp_path, env=environment).returncode
    assert status == -signal.SIGKILL and len(names(tmp_path)) == 1
    with files.new_file(tmp_path / "x") as living:
        assert names(tmp_path) == [living.name]
        files.write_text(tmp_path / "x", "another's")
        assert living.exists()
    assert names(tmp_path) == ["x"]


def test_a_folder_that_another_writer_takes_for_an_orphan_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    def open_late(path, *flags, opening=os.open):
        monkeypatch.undo()
        files._remove_orphans(tmp_path, "a")
        assert not os.listdir(tmp_path)
        return opening(path, *flags)

    monkeypatch.setattr(files.os, "open", open_late)
    with files.new_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("x")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a" / "file").read_text() == "x"


def test_names_as_long_as_a_file_system_takes_can_be_written(tmp_path):
    files.write_text(tmp_path / ("n" * 255), "long")
    files.write_text(tmp_path / ("ü" * 127), "long in bytes")
    assert len(names(tmp_path)) == 2


def test_permissions_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "x", "")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("path", "reason"),
    [("file/x", "Not a directory"), ("folder", "directory"), ("n" * 256, "too long")],
)
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, path, reason):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=reason), files.refusing(tmp_path / path):
        files.write_text(tmp_path / path, "content")
    assert names(tmp_path) == ["file", "folder"]


def test_what_exists_is_refused_by_name_links_that_lead_nowhere_included(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    for path in (tmp_path, tmp_path / "link"):
        with pytest.raises(UserError, match="exists already"):
            files.refuse_existing(path)
    files.refuse_existing(tmp_path / "free")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that stands for an object store: nothing is renamed or locked there, only copied to."""
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    monkeypatch.setattr(files, "is_remote", lambda path: str(path).startswith(str(bucket)))
    return bucket


def test_an_object_store_gets_files_and_folders_whole(bucket):
    files.write_text(bucket / "runs" / "x.json", "whole")
    with files.new_folder(bucket / "model") as folder:
        (folder / "weights").write_text("w")
        assert not (bucket / "model").exists()
    with pytest.raises(RuntimeError), files.new_file(bucket / "y"):
        raise RuntimeError
    assert (bucket / "runs" / "x.json").read_text() == "whole" and (bucket / "model" / "weights").read_text() == "w"
    assert names(bucket) == ["model", "runs"]


def test_what_is_in_an_object_store_is_not_overwritten_unless_asked(bucket):
    files.write_text(bucket / "x", "old")
    with pytest.raises(FileExistsError):
        files.write_text(bucket / "x", "new", replace=False)
    with pytest.raises(FileExistsError), files.new_folder(bucket / "x"):
        pass
    assert (bucket / "x").read_text() == "old"
    files.write_text(bucket / "x", "new")
    assert (bucket / "x").read_text() == "new"

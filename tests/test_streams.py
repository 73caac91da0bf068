"""A standard output that fails costs its lines, never the work; nor do letters that its encoding lacks."""

import io
import os
import subprocess
import sys

import pytest

from terdit_jax.data.reader import open_dataset
from terdit_jax.streams import SteadyStream, steady_streams
from tests.runs import ROOT

WARNING = "warning: standard output cannot be written ({}): the work goes on without it"
FULL, CLOSED, PIPE = "No space left on device", "Bad file descriptor", "Broken pipe"


def open_text(path, encoding="utf-8"):
    return io.TextIOWrapper(open(path, "wb", buffering=0), encoding=encoding, write_through=True)


def full_disk(tmp_path):
    return open_text("/dev/full")


def pipe_that_nobody_reads(tmp_path):
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", buffering=1)


def closed(tmp_path):
    file = open(tmp_path / "out", "w")
    file.close()
    return file


@pytest.mark.parametrize(("opened", "reason"), [(full_disk, FULL), (pipe_that_nobody_reads, PIPE), (closed, CLOSED)])
def test_a_stream_that_fails_is_said_once_and_costs_lines(tmp_path, capsys, opened, reason):
    stream = SteadyStream(opened(tmp_path), "standard output")
    assert stream.write("lost\n") == 5
    stream.writelines(["lost\n", "too\n"])
    print("and this", file=stream, flush=True)
    stream.flush()
    assert capsys.readouterr().err.splitlines() == [WARNING.format(reason)]
    stream.finish()
    if opened is full_disk:
        stream.flush()
    assert capsys.readouterr().err == ""


def test_a_failing_standard_error_is_silent(capsys):
    stream = SteadyStream(open_text("/dev/full"), "standard error")
    print("lost", file=stream, flush=True)
    stream.finish()
    assert capsys.readouterr() == ("", "")


class Filling(io.RawIOBase):
    """A disk that takes nothing until there is room."""

    def __init__(self):
        self.room, self.content = False, b""

    def writable(self):
        return True

    def write(self, data):
        if not self.room:
            raise OSError(28, FULL)
        self.content += bytes(data)
        return len(data)


def test_what_waits_is_written_once_there_is_room():
    disk = Filling()
    stream = SteadyStream(io.TextIOWrapper(io.BufferedWriter(disk), encoding="utf-8"), "standard error")
    print("first", file=stream, flush=True)
    disk.room = True
    print("second", file=stream, flush=True)
    assert disk.content == b"first\nsecond\n"


@pytest.mark.parametrize(
    ("encoding", "text", "written"),
    [
        ("ascii", "für 64 px", b"f\\xfcr 64 px\n"),
        ("ascii", "日本/\udcff", b"\\u65e5\\u672c/\\udcff\n"),  # a name that is no text in the system's encoding
        ("latin-1", "ü → 日", b"\xfc \\u2192 \\u65e5\n"),
        ("utf-8", "日\udcff", "日\\udcff\n".encode()),
    ],
)
def test_letters_that_the_encoding_lacks_are_spelt_out(tmp_path, encoding, text, written):
    stream = SteadyStream(open_text(tmp_path / "out", encoding), "standard output")
    print(text, file=stream, flush=True)
    assert (tmp_path / "out").read_bytes() == written


def test_streams_are_wrapped_once_and_missing_ones_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    (first,) = steady_streams()
    assert sys.stdout is first and sys.stderr is None
    assert steady_streams() == [first]


@pytest.mark.parametrize("wanted", ["full", "gone", "closed", "ascii"])
def test_a_command_does_its_work_and_ends_with_status_0(tmp_path, wanted):
    output = tmp_path / "für" / "digits"
    command = [sys.executable, "-m", "terdit_jax.prepare", "--source=digits", f"--output={output}"]
    if wanted == "closed":
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full, open(tmp_path / "out", "w") as file, open(write, "w") as gone:
        stdout = {"full": full, "gone": gone}.get(wanted, file)
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE, timeout=300)
    err = done.stderr.decode()
    assert done.returncode == 0 and "Traceback" not in err and "Exception ignored" not in err, err
    assert open_dataset(output).metadata.num_classes == 10
    assert ("f\\xfcr" in (tmp_path / "out").read_text("ascii")) == (wanted == "ascii")

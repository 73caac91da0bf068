"""Commands in processes of their own that do not each import JAX anew: a server that has imported it forks for each.

`python forked.py serve SOCKET` is the server, `Command` a command for tests to start, wait for and kill.
`python forked.py run SOCKET ARGUMENTS...` stands for `python ARGUMENTS...`, with its folder, environment and streams.
Commands that are not ours go to Python itself.
"""

import atexit
import concurrent.futures
import contextlib
import gc
import json
import os
from pathlib import Path
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback

OURS = ("terdit_jax.", "benchmarks.")
# JAX has read the server's variables while it was imported: of these a command's own count, or the want of them.
VARIABLES = ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
PROGRAMS = "TERDIT_TEST_PROGRAMS"  # a variable for the workers of pytest-xdist
COMMANDS = ("main", "prepare", "sample", "export", "evaluate", "compile", "report")  # not imported: each defines flags
SECONDS = 600  # that a command may take, on a machine with other work too


def programs() -> Path:
    """Where commands keep what they have compiled: one folder for this process and all that it starts."""
    if PROGRAMS not in os.environ:
        os.environ[PROGRAMS] = tempfile.mkdtemp(prefix="programs_")
        atexit.register(shutil.rmtree, os.environ[PROGRAMS], ignore_errors=True)
    return Path(os.environ[PROGRAMS])


@contextlib.contextmanager
def python_on_path(folder, environment):
    """A folder for the PATH whose `python` belongs to a server started with this environment.

    The server ends with the context, or with the process that has started it, however that ends.
    """
    address = str(folder / "server")
    server = subprocess.Popen([sys.executable, __file__, "serve", address], env=environment, stdin=subprocess.PIPE)
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {__file__} run {address} "$@"\n')
    script.chmod(0o755)
    try:
        while not os.path.exists(address):
            assert server.poll() is None, "the server has ended"
            time.sleep(0.05)
        yield folder
    finally:
        server.kill()
        server.stdin.close()
        server.wait()


class Command:
    """A command that a server runs: what the tests use of `subprocess.Popen`, with text in both streams."""

    def __init__(self, address: str, arguments: list[str], folder: str, environment: dict[str, str]):
        outputs, inputs = zip(os.pipe(), os.pipe(), strict=True)
        streams = [os.open(os.devnull, os.O_RDONLY), *inputs]
        self._connection, self.pid = _request(address, arguments, folder, environment, streams)
        for stream in streams:
            os.close(stream)
        self._pool = concurrent.futures.ThreadPoolExecutor(2)
        self._outputs = [self._pool.submit(_read, output) for output in outputs]
        self.arguments, self.returncode = arguments, None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, 128 more than the number of the signal that ended it."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.arguments, timeout)
            self.returncode = _status(self._connection)
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits, and returns what was printed on stdout and stderr."""
        self.wait(timeout)
        out, err = (output.result(timeout) for output in self._outputs)
        self._pool.shutdown()
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _request(address, arguments, folder, environment, streams: list[int]) -> tuple[socket.socket, int]:
    """A connection on which the exit status comes, and the command's process."""
    request = json.dumps({"arguments": arguments, "folder": folder, "environment": environment}, default=str).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(address))
    socket.send_fds(connection, [len(request).to_bytes(4, "little")], streams)
    connection.sendall(request)
    return connection, int.from_bytes(connection.recv(4), "little")


def _read(stream: int) -> str:
    with open(stream, errors="backslashreplace") as file:
        return file.read()


def _status(connection: socket.socket) -> int:
    with connection:
        status = connection.recv(1)
    return status[0] if status else 1


def _run(address: str, arguments: list[str]) -> int:
    ours = arguments[:1] == ["-m"] and arguments[1].startswith(OURS) or arguments[0].endswith(".py")
    if not ours:
        os.execv(sys.executable, [sys.executable, *arguments])
    return _status(_request(address, arguments, os.getcwd(), dict(os.environ), [0, 1, 2])[0])


def _serve(address: str) -> dict:
    """Returns, in a fork for each, what a command is to be; never returns in the server itself."""
    _import_all()
    gc.collect()
    gc.freeze()  # else every fork copies what is imported as soon as it collects garbage
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen(16)
    os.rename(address + ".new", address)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:  # its other end is closed
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        header, streams, *_ = socket.recv_fds(connection, 4, 3)
        length, content = int.from_bytes(header, "little"), b""
        while len(content) < length:
            content += connection.recv(length - len(content))
        command = os.fork()
        if command:
            connection.sendall(command.to_bytes(4, "little"))
            status = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
            connection.sendall(bytes([status if status >= 0 else 128 - status]))
            os._exit(0)
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return json.loads(content)


def _import_all() -> None:
    import importlib
    import pkgutil

    import terdit_jax

    for module in pkgutil.walk_packages(terdit_jax.__path__, "terdit_jax."):
        if module.name.removeprefix("terdit_jax.") not in COMMANDS:
            with contextlib.suppress(ImportError):  # of what is not installed, such as PyTorch
                importlib.import_module(module.name)


def _be(request: dict) -> None:
    signal.alarm(SECONDS)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    import jax

    before = dict(jax.config.values)
    for name in VARIABLES:
        jax.config.update(name.lower(), None)
    for name in os.environ:
        if name.startswith("JAX_") and name.lower() in before:
            number = isinstance(before[name.lower()], (int, float))
            value = type(before[name.lower()])(float(os.environ[name])) if number else os.environ[name]
            jax.config.update(name.lower(), value)
    if request["arguments"][0] == "-m":
        _, module, *rest = request["arguments"]
        sys.path[0] = request["folder"]
        sys.argv = [module, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = request["arguments"]
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")


def _end(status: int) -> None:
    """Ends a process like Python, but does not take apart all that the server has imported, which takes seconds."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "run":
        sys.exit(_run(sys.argv[2], sys.argv[3:]))
    request = _serve(sys.argv[2])
    try:
        _be(request)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else bool(error.code)
    except BaseException:
        traceback.print_exc()
        status = 1
    _end(status)

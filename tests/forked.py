"""Commands in processes of their own that do not each import JAX anew: a server that has imported it forks for each.

`python forked.py serve SOCKET` is the server. `python forked.py run SOCKET ARGUMENTS...` stands for
`python ARGUMENTS...`, with its folder, environment and streams. Commands that are not ours go to Python itself.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback

OURS = ("terdit_jax.", "benchmarks.")
# Of JAX's variables those that commands are given otherwise than the server: it has read its own while it was imported.
VARIABLES = {
    "JAX_PLATFORMS": str,
    "JAX_COMPILATION_CACHE_DIR": str,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": float,
}
COMMANDS = ("main", "prepare", "sample", "export", "evaluate", "compile")  # not imported: each defines flags
SECONDS = 600  # that a command may take, on a machine with other work too


@contextlib.contextmanager
def python_on_path(folder, environment):
    """A folder for the PATH whose `python` is a server's, started with this environment.

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


def _run(address: str, arguments: list[str]) -> int:
    ours = arguments[:1] == ["-m"] and arguments[1].startswith(OURS) or arguments[0].endswith(".py")
    if not ours:
        os.execv(sys.executable, [sys.executable, *arguments])
    request = json.dumps({"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)})
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [len(request.encode()).to_bytes(4, "little")], [0, 1, 2])
        connection.sendall(request.encode())
        status = connection.recv(1)
    return status[0] if status else 1


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

    for name, read in VARIABLES.items():
        jax.config.update(name.lower(), read(os.environ[name]) if name in os.environ else None)
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
    """As Python ends a process, but for taking apart all that the server has imported, which takes seconds."""
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

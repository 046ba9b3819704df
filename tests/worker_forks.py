"""Workers without the seconds that importing torch and trl takes: forked from a server that has imported them.

What starts a worker (pytest, a kernel) calls `install`; from then on `training.launch` gets workers from the server,
of which each pytest process has its own. A forked worker runs the same `python -m` code in a session of its own, with
the command line, environment and descriptors that a started one has. Real starts remain where an import is the point:
for Unsloth, for several processes, and where PYTHONPATH is changed.
"""

import contextlib
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

SOCKET = "BIZASSIST_TEST_FORKS"
"""Environment variable with the path of the server's socket."""
_STARTUP = f"import sys; sys.path.append({str(Path(__file__).parent)!r})\nimport worker_forks\nworker_forks.install()\n"


@functools.cache
def start() -> str:
    """Start this process's server, which ends with it; the socket's path."""
    folder = Path(tempfile.mkdtemp(prefix="forks-"))
    os.environ[SOCKET] = str(folder / "socket")
    log = (folder / "log").open("wb")
    subprocess.Popen([sys.executable, __file__, os.environ[SOCKET]], stdin=subprocess.PIPE, stdout=log, stderr=log)
    return os.environ[SOCKET]


def install() -> None:
    """Have this process's workers forked, where they may be."""
    from bizassist_nb.training import launch

    launch.subprocess = SimpleNamespace(Popen=_popen, STDOUT=subprocess.STDOUT)


def ipython_profile(folder: Path) -> dict[str, str]:
    """Environment of kernels whose workers are forked by this process's server."""
    startup = folder / "profile_default" / "startup"
    startup.mkdir(parents=True, exist_ok=True)
    (startup / "00-worker-forks.py").write_text(_STARTUP)
    return {"IPYTHONDIR": str(folder), SOCKET: start()}


def _popen(command, *, stdin, stdout, stderr, start_new_session, env):
    from bizassist_nb.core.settings import Settings
    from bizassist_nb.runs.run import WORKER

    settings = Settings.from_toml((Path(command[-1]) / "settings.toml").read_text("utf-8"))
    as_imported = os.environ.get("PYTHONPATH", "") == _PYTHONPATH
    if command[2] != WORKER or settings.engine != "transformers" or not as_imported:
        return subprocess.Popen(
            command, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=start_new_session, env=env
        )
    with socket.socket(socket.AF_UNIX) as connection:
        _connect(connection, os.environ.get(SOCKET) or start())
        what = json.dumps({"command": command, "env": env, "folder": str(Path.cwd())}).encode()
        socket.send_fds(connection, [what], [stdin, stdout.fileno()])
        return SimpleNamespace(pid=int(connection.recv(32)))


def _connect(connection: socket.socket, path: str) -> None:
    end = time.monotonic() + 120
    while True:
        try:
            return connection.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > end:
                raise
            time.sleep(0.05)  # the server is still importing


def _serve(path: str) -> None:
    import torch
    from setproctitle import setproctitle
    from transformers.models.llama import modeling_llama  # noqa: F401 - what models of the tests are

    from bizassist_nb.assistant import decoding  # noqa: F401 - which a worker answers by
    from bizassist_nb.training import trainer  # noqa: F401 - which a worker trains by

    torch.set_num_threads(1)  # more would not survive the fork
    setproctitle(" ".join(sys.orig_argv))  # finds its place in memory now, before a child changes the environment
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that no worker is left as a zombie
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        connection, _ = listening.accept()
        what, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 2)
        asked = json.loads(what)
        if os.fork():
            for descriptor in (*descriptors, connection.fileno()):
                os.close(descriptor)
            connection.detach()
            continue
        os.setsid()
        connection.send(str(os.getpid()).encode())  # only now: whoever asked may kill the session at once
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # as a launcher leaves it
        for number, descriptor in enumerate((*descriptors, descriptors[1])):
            os.dup2(descriptor, number)
        os.closerange(3, 1 + max(*descriptors, connection.fileno(), listening.fileno()))
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["env"])
        setproctitle(" ".join(asked["command"]))
        os._exit(_run(asked["command"][2:]))


def _run(command: list[str]) -> int:
    """What `python -m` does with that command; its exit status."""
    sys.argv = command
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:  # noqa: BLE001 - the child of a fork must not go on as its parent
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


_PYTHONPATH = os.environ.get("PYTHONPATH", "")

if __name__ == "__main__":
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]  # a worker does not have it either
    _serve(sys.argv[1])

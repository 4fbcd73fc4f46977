"""For tests: a `python` that starts instantly, forked from a process that has imported everything.

`running.warm_python()` is the path of a command that takes a script, `-m module` or `-c code`, and their arguments, as
python does: it has the caller's folder, environment, open-file limit and standard streams (as UTF-8), returns the
script's exit status, forwards signals, and kills the script when it is killed. Unlike a user's python, it has all of
forked_ranks.py's imports loaded. One process, forked from there, serves all calls (`serve`); the command itself (this
file, run as a script) imports the standard library only.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import select
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGCONT)


def serve(listener: socket.socket) -> list[str]:
    """Serve while the parent lives. In a forked script's process, return its command line."""
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # auto-reap the children that wait for scripts
    listener.settimeout(1.0)
    while os.getppid() == parent:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            listener.close()
            return attend(connection)
        connection.close()
    os._exit(0)


def attend(connection: socket.socket) -> list[str]:
    """Fork the script, forward signals to it and its status back. In the script's process, return its command line."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.setblocking(True)
    content, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not content.endswith(b"\n"):
        content += connection.recv(1 << 20)
    request = json.loads(content)
    ended, child_ends = os.pipe()  # closed when the script exits
    script = os.fork()
    if script == 0:
        os.close(ended)
        connection.close()
        return become(request, streams)
    os.close(child_ends)
    for stream in streams:
        os.close(stream)
    while True:
        ready, _, _ = select.select([connection, ended], [], [], 0.05)
        done, status = os.waitpid(script, os.WNOHANG)
        if done:
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            os._exit(0)
        if connection in ready:
            numbers = connection.recv(100)
            for number in numbers or (signal.SIGKILL,):
                os.kill(script, number)
            if not numbers:
                os._exit(1)


def become(request: dict[str, object], streams: list[int]) -> list[str]:
    """Set up this process as the command requested."""
    os.setsid()
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(str(request["folder"]))
    environment = request["environment"]
    assert isinstance(environment, dict)
    os.environ.clear()
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_NOFILE, tuple(request["files"]))  # type: ignore[arg-type]
    words = request["words"]
    assert isinstance(words, list)
    return words


def run(words: list[str]) -> None:
    """Run a python command line; single-letter options before the script are ignored."""
    sys.path[:0] = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    while words[0].startswith("-") and words[0] not in ("-m", "-c"):
        words = words[1:]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif Path(words[0]).resolve() == ROOT / "pretrain" / "fabric_train.py":
        from pretrain.fabric_train import leave, main  # its parser is already built

        sys.argv = words
        leave(main())
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def ask(address: str, words: list[str]) -> int:
    """The command: run a script and wait for it. Returns its status; if a signal killed it, dies by the same signal."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)

        def pass_on(number: int, frame: FrameType | None) -> None:
            connection.sendall(bytes([number]))

        request = {
            "words": words,
            "folder": os.getcwd(),
            "environment": dict(os.environ),
            "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        }
        content = (json.dumps(request) + "\n").encode()
        sent = socket.send_fds(connection, [content], [0, 1, 2])
        connection.sendall(content[sent:])
        for number in PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, pass_on)
        status = int(connection.makefile().readline())
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(ask(sys.argv[1], sys.argv[2:]))

"""A Python that has the heavy libraries loaded already: for scripts that start many short Python processes.

    with warm_python(folder) as python:      # an executable, to be given as PYTHON
        ...

A server imports them once, when it is first asked, and forks for every script; what the script gets (arguments,
environment, folder, files, exit code) is what it would get of its own interpreter. So it does for the launchers `-m
torch.distributed.run` and `-m deepspeed.launcher.…`, whose ranks are forked too. Anything else (`-c`, `-`, another
module) goes to the real Python.

For tests of interruptions: with STOP_AFTER=TEXT in its environment, the process that started a script is killed when a
script with TEXT in its arguments has ended; with DIE_AT_CHECKPOINT=TEXT, such a training dies when it has saved one.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import psutil

HEAVY = ("modeling.run_clm_distill_CDM", "transformers.trainer", "deepspeed", "datasets", "peft", "matplotlib.pyplot")
HEAVY += ("torch.distributed.run", "lm_eval.evaluator", "lm_eval.models.huggingface")

CLIENT = """
import json, os, signal, socket, sys

arguments = [argument for argument in sys.argv[1:2] if argument != "-u"] + sys.argv[2:]
launchers = ("torch.distributed.run", "deepspeed.launcher.")
if not (arguments[0].endswith(".py") or (arguments[0] == "-m" and arguments[1].startswith(launchers))):
    os.execv(sys.executable, [sys.executable, *arguments])
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
here = os.path.dirname(__file__)
connection.connect(os.path.join(here, "socket"))
request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
request["python"] = os.path.join(here, "python")
socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
code = connection.recv(1)
stop = os.environ.get("STOP_AFTER")
if stop and any(stop in argument for argument in arguments):
    os.kill(os.getppid(), signal.SIGKILL)
sys.exit(code[0] if code else 1)
"""


@contextlib.contextmanager
def warm_python(folder: Path) -> Iterator[str]:
    """The path of the executable; the server ends with the block, and with this process."""
    executable, client = folder / "python", folder / "client.py"
    client.write_text(CLIENT)
    executable.write_text(f"#!/bin/sh\nexec '{sys.executable}' -I -S '{client}' \"$@\"\n")
    executable.chmod(0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen()
        command = [sys.executable, "-m", "tests.end_to_end.warm_python", str(listener.fileno())]
        root = Path(__file__).parents[2]
        server = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, pass_fds=[listener.fileno()])
    try:
        yield str(executable)
    finally:
        server.stdin.close()
        server.wait()


def serve(listener: socket.socket) -> None:
    """Until the end of the standard input. A script may start others."""
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = listener.accept()
        with connection:
            for name in HEAVY:
                __import__(name)
            message, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
            if os.fork() == 0:
                attend(connection, json.loads(message), files)
            for file in files:
                os.close(file)


def attend(connection: socket.socket, request: dict, files: list[int]) -> None:
    """Runs the script in a process of its own, and tells the client its exit code. Does not return."""
    child = os.fork()
    if child == 0:
        run(request, files)
    for file in files:
        os.close(file)
    code = wait_for(child, connection)
    with contextlib.suppress(BrokenPipeError):
        connection.send(bytes([code]))
    os._exit(0)


def wait_for(child: int, connection: socket.socket) -> int:
    """The exit code of the child. Where the client is gone, the child is killed, and what it has started."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        gone, _, _ = select.select([connection], [], [], 0.01)
        if gone:
            kill_all(child)


def kill_all(pid: int) -> list[psutil.Process]:
    """SIGKILL to a process and to everything that it has started; returns them, itself first."""
    victims = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    return victims


def run(request: dict, files: list[int]) -> None:
    """Becomes the script. Does not return."""
    code = 1
    try:
        for target, file in enumerate(files):
            os.dup2(file, target)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        arguments = request["arguments"]
        is_launcher = arguments[0] == "-m"
        sys.argv = arguments[is_launcher:]
        sys.path[0] = request["folder"] if is_launcher else str(Path(arguments[0]).parent)
        if (text := os.environ.get("DIE_AT_CHECKPOINT")) and any(text in argument for argument in sys.argv):
            die_at_checkpoint()
        if is_launcher:
            sys.executable = request["python"]  # of its ranks
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def die_at_checkpoint() -> None:
    from transformers import Trainer

    save = Trainer._save_checkpoint

    def save_and_die(*args, **kwargs):
        save(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    Trainer._save_checkpoint = save_and_die


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

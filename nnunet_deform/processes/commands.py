"""nnU-Net's own commands as processes that end when we do: found in this environment, logged, interruptible."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_POLL_S = 0.2
_GRACE_S = 3.0  # between SIGTERM and SIGKILL


class CommandError(RuntimeError):
    """A command is missing."""


class Interrupts:
    """While entered, SIGINT, SIGTERM and SIGHUP raise, so that clean-up runs; in a ``held`` block they wait.

    Does nothing outside the main thread, where Python allows no signal handlers, and leaves ignored signals ignored.
    """

    def __init__(self) -> None:
        self._previous: dict[int, object] = {}
        self._held = False
        self._pending: int | None = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: object) -> None:
        if self._held:
            self._pending = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    @contextmanager
    def held(self) -> Iterator[None]:
        self._held = True
        try:
            yield
        finally:
            self._held = False
            if self._pending is not None:
                number, self._pending = self._pending, None
                self._receive(number, None)


def find_command(name: str) -> str:
    """Path of one of nnU-Net's commands.

    Raises:
        CommandError: it is not in this Python environment.
    """
    # The scripts beside the running interpreter, whatever PATH says: another environment's nnU-Net has no plugin.
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    folders = [sysconfig.get_path("scripts", scheme) for scheme in schemes]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise CommandError(f"{name} is not in {folders[0]}; install nnunetv2 into this Python environment.")
    return found


def _end_group(process: subprocess.Popen) -> None:
    """End the command and every process it started; returns when they are gone."""
    if not hasattr(os, "killpg"):  # Windows
        process.kill()
        process.wait()
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _GRACE_S
        try:
            os.killpg(process.pid, number)
            while time.monotonic() < deadline:
                process.poll()  # reaps the command, which would count as a member of its group otherwise
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        except (ProcessLookupError, PermissionError):  # the group is empty; macOS says EPERM while zombies are left
            return


def _follow(process: subprocess.Popen, log: Path, on_line: Callable[[str], None]) -> None:
    """Call ``on_line`` for every line the command writes to ``log`` until it ends."""
    rest = b""
    with log.open("rb") as stream:
        ended = False
        while not ended:
            ended = process.poll() is not None
            *lines, rest = re.split(rb"[\r\n]+", rest + stream.read())
            for line in lines:
                on_line(line.decode(errors="replace"))
            if not ended:
                time.sleep(_POLL_S)


def run_command(
    argv: Sequence[str],
    *,
    log: Path,
    cwd: Path,
    environment: dict[str, str],
    interrupts: Interrupts,
    on_line: Callable[[str], None],
    pass_fds: Sequence[int] = (),
) -> int:
    """Run one of nnU-Net's commands in a process group of its own, with its output in ``log``.

    When the caller is interrupted, and when the command fails, every process it started is ended.

    Args:
        argv: name and arguments.
        on_line: called with every line of output.
        pass_fds: file descriptors that the command inherits; a lock on them lasts as long as it runs, even when this
            process is killed.

    Returns:
        The exit code, negative for a signal.

    Raises:
        CommandError: the command is missing.
    """
    program = find_command(argv[0])
    process = None
    try:
        with log.open("wb") as output, interrupts.held():
            process = subprocess.Popen(
                [program, *argv[1:]],
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, which can be ended as a whole
                pass_fds=pass_fds,
            )
        _follow(process, log, on_line)
    except BaseException:
        if process is not None:
            with interrupts.held():
                _end_group(process)
        raise
    if process.returncode != 0:
        _end_group(process)
    return process.returncode


def last_lines(log: Path, count: int = 30) -> str:
    """The end of a log, which mostly says why a command failed."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])


def describe_exit(code: int) -> str:
    """How a process ended, in words: by its exit code, or by a signal where the code is negative."""
    return f"with exit code {code}" if code > 0 else f"by signal {-code}"

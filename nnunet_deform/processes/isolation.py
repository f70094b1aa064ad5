"""Code that may crash or hang, run in a process of its own, which is stopped when it takes too long."""

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen, TimeoutExpired
from typing import Any

# The process imports from where this one does, and not from the working directory.
_PROGRAM = (
    f"import sys; sys.path[:] = sys.argv[1].split({os.pathsep!r}); "
    "from nnunet_deform.processes.isolation import _serve; _serve(sys.argv[2])"
)
_POLL_S = 0.05
# A process in the middle of a call into a driver that hangs does not end even when it is killed.
_PATIENCE_S = 5.0
# Characters of what an error or a process says.
_LONGEST = 200


@dataclass(frozen=True)
class Task:
    """A function, "module:name", and its arguments, which like its result go through JSON."""

    function: str
    arguments: Sequence[Any] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a task: its result, or in one sentence without a full stop what it raised or how it ended its
    process."""

    result: Any = None
    error: str | None = None


def run_isolated(tasks: Sequence[Task], limit_s: float) -> Iterator[Outcome]:
    """The outcome of each task in turn, as soon as it is known.

    They share a process. After one that raises, ends the process or takes longer than ``limit_s`` the next ones get a
    new process: what is left of CUDA after an illegal access fails at everything. The start of a process, some seconds,
    counts with its first task.
    """
    done = 0
    while done < len(tasks):
        with _Process(tasks[done:]) as process:
            for outcome in process.outcomes(limit_s):
                done += 1
                yield outcome


class _Process:
    def __init__(self, tasks: Sequence[Task]) -> None:
        self._number = len(tasks)
        self._files = contextlib.ExitStack()
        # A folder, because Windows lets no two processes have a temporary file open.
        folder = Path(self._files.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        results = folder / "results"
        results.touch()
        request = {
            "tasks": [[task.function, *task.arguments] for task in tasks],
            "results": str(results),
        }
        self._results = self._files.enter_context(results.open(encoding="utf-8"))
        # No pipe: what the process starts would keep it open.
        self._log = self._files.enter_context((folder / "log").open("w+", encoding="utf-8", errors="replace"))
        self._process = Popen(
            [sys.executable, "-c", _PROGRAM, os.pathsep.join(sys.path), json.dumps(request)],
            stdin=DEVNULL,
            stdout=self._log,
            stderr=STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._files.close()

    def outcomes(self, limit_s: float) -> Iterator[Outcome]:
        """Up to the first task that fails."""
        for _ in range(self._number):
            deadline = time.monotonic() + limit_s
            while (line := self._line()) is None:
                code = self._process.poll()
                if code is not None:
                    # Written before it ended, perhaps after the look above.
                    line = self._line()
                    break
                if time.monotonic() > deadline:
                    yield Outcome(error=f"did not end within {limit_s:g} s")
                    return
                time.sleep(_POLL_S)
            if line is None:
                yield Outcome(error=self._epitaph(code))
                return
            outcome = Outcome(**json.loads(line))
            yield outcome
            if outcome.error is not None:
                return

    def _line(self) -> str | None:
        """The next whole line of results, None where there is none yet."""
        position = self._results.tell()
        line = self._results.readline()
        if line.endswith("\n"):
            return line
        self._results.seek(position)
        return None

    def _epitaph(self, code: int) -> str:
        how = f"ended its process with code {code}"
        if code < 0:
            with contextlib.suppress(ValueError):
                how = f"ended its process by {signal.Signals(-code).name}"
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return f"{how} ({lines[-1][:_LONGEST]})" if lines else how

    def _kill(self) -> None:
        if self._process.poll() is None:
            # With what it has started, such as compilers.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if hasattr(os, "killpg"):
                    os.killpg(self._process.pid, signal.SIGKILL)
                else:
                    self._process.kill()
            with contextlib.suppress(TimeoutExpired):
                self._process.wait(_PATIENCE_S)


def _serve(text: str) -> None:
    """In the process: each task's outcome as a line of the file of results."""
    request = json.loads(text)
    with open(request["results"], "a", encoding="utf-8") as results:
        for function, *arguments in request["tasks"]:
            module, name = function.split(":")
            try:
                outcome = {"result": getattr(importlib.import_module(module), name)(*arguments)}
            except Exception as error:
                outcome = {"error": described(error)}
            results.write(json.dumps(outcome) + "\n")
            results.flush()
            if "error" in outcome:
                return


def described(error: BaseException) -> str:
    """An error's kind and the beginning of what it says, in one line."""
    text = textwrap.shorten(str(error), _LONGEST, placeholder=" ...")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

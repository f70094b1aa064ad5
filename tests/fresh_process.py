"""Processes in which nnU-Net has been imported and nothing of this project.

Importing nnU-Net takes 7 seconds, so one process does it, as ``python fresh_process.py``, and forks for each that is
asked of it. Nothing else happens in it: no operator has run, and no thread was started.
"""

import json
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class FreshProcesses:
    """Starts them, in the place of ``subprocess.run``."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(
        self, arguments: Sequence[str], *, output: Path, environment: Mapping[str, str], cwd: Path | None = None
    ) -> str:
        """What Python prints with these arguments, which are a script's path or ``-c`` and code, and the script's own.

        Args:
            output: a file for what it prints.

        Raises:
            AssertionError: it ends with an error; the message has its exit code, negative for a signal, and what it
                printed.
        """
        cwd = cwd or Path.cwd()
        if hasattr(os, "fork"):
            if self._server is None:
                command = [sys.executable, __file__]
                self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert self._server.stdin is not None
            assert self._server.stdout is not None
            asked = {"arguments": list(arguments), "output": str(output), "environment": {**environment}}
            self._server.stdin.write(json.dumps({**asked, "cwd": str(cwd)}) + "\n")
            self._server.stdin.flush()
            code = self._server.stdout.readline().strip()
        else:
            with output.open("w") as stream:
                ended = subprocess.run(
                    [sys.executable, *arguments], env=environment, cwd=cwd, stdout=stream, stderr=subprocess.STDOUT
                )
            code = str(ended.returncode)
        printed = output.read_text()
        assert code == "0", f"ended with {code}: {printed[-5000:]}"
        return printed

    def end(self) -> None:
        if self._server is not None:
            self._server.communicate()


def _become(asked: dict[str, Any]) -> None:
    """Be a Python process that was started as asked."""
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["cwd"])
    stream = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, replacement in ((0, os.open(os.devnull, os.O_RDONLY)), (1, stream), (2, stream)):
        os.dup2(replacement, number)
    program, *rest = asked["arguments"]
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if program == "-c":
        sys.path[0] = ""
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0] = str(Path(program).parent)
        sys.argv = [program, *rest]
        runpy.run_path(program, run_name="__main__")


def _serve() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _become(json.loads(line))
                code = 0
            except SystemExit as ended:
                code = int(ended.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    import torch._inductor.utils  # noqa: F401 - the operators' registration does

    assert not [name for name in sys.modules if name.startswith("nnunet_deform")]
    _serve()

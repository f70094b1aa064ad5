"""The versions that people have: a quick selection of the tests with each torch and each Python.

    nox                          # every session whose interpreter is installed
    nox -s "torch(2.8)"          # one torch, on the Python of ``PYTHON_FOR_TORCH``
    nox -s "python-3.13"         # one Python, with the newest torch
    nox -s compile               # what torch.compile makes on a CPU, with the oldest and the newest torch; slow

Each session has an environment of its own and adds a row to ``docs/versions.md``: the date, the versions it got, and
how many tests passed. An environment takes about 7 GB and is removed when its session ends, unless ``NOX_KEEP=1``.
"""

import datetime
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = False

# 2.9 is excluded, in nnU-Net as here.
TORCHES = ("2.6", "2.8", "2.11", "newest")
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PYTHON_FOR_TORCH = "3.11"  # of which every torch here has a build
TABLE = Path(__file__).parent / "docs" / "versions.md"
END_OF_TABLE = "<!-- the next row goes above this line -->"

# All operators, the Triton kernels' machine code, the networks' contract, and a training, validation, continuation
# and prediction of each main trainer.
QUICK = (
    "tests/ops",
    "tests/benchmarks/test_triton_code.py",
    "tests/networks/test_compiled_networks.py",
    "tests/networks/test_network_contract.py",
    "tests/trainers/test_end_to_end.py::test_train_validate_continue_predict_share",
)
QUICK_CASES = "not test_end_to_end or (isotropic and not anisotropic)"
COMPILED = "inductor"

PRINT_VERSIONS = """
import importlib.metadata, json, platform
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"
print(json.dumps({"python": platform.python_version(), **{n: version(n) for n in ("torch", "triton", "nnunetv2")}}))
"""


@nox.session(python=PYTHON_FOR_TORCH)
@nox.parametrize("torch", TORCHES, ids=TORCHES)
def torch(session: nox.Session, torch: str) -> None:
    """The quick selection with one torch."""
    _install(session, torch)
    _test(session, "quick", *QUICK, "-k", QUICK_CASES)


@nox.session(python=PYTHONS)
def python(session: nox.Session) -> None:
    """The quick selection on one Python, with the newest torch."""
    _install(session, "newest")
    _test(session, "quick", *QUICK, "-k", QUICK_CASES)


@nox.session(python=PYTHON_FOR_TORCH)
@nox.parametrize("torch", (TORCHES[0], TORCHES[-1]), ids=(TORCHES[0], TORCHES[-1]))
def compile(session: nox.Session, torch: str) -> None:
    """Operators and networks compiled by inductor on a CPU, forward and backward."""
    _install(session, torch)
    _test(session, "inductor", "tests/ops", "tests/networks", "-m", "not gpu", "-k", COMPILED)


def _install(session: nox.Session, torch: str) -> None:
    pinned = () if torch == "newest" else (f"torch=={torch}.*",)
    session.install("-e", ".[test]", *pinned)


def _test(session: nox.Session, selection: str, *arguments: str) -> None:
    """Run pytest, and add a row to the table whatever it says."""
    versions = json.loads(session.run("python", "-c", PRINT_VERSIONS, silent=True))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("w") as output:
            # Other codes than 0 and 1 are errors of use, which are no result.
            session.run("pytest", "-q", "-n", "2", *arguments, *session.posargs, stdout=output, success_codes=[0, 1])
        *_, last = [line for line in log.read_text().splitlines() if " in " in line]
        session.log(last)
        counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
        failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
        row = [
            datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            *versions.values(),
            selection,
            str(counts.get("passed", 0)),
            str(failed),
            str(counts.get("skipped", 0)),
        ]
        text = TABLE.read_text()
        TABLE.write_text(text.replace(END_OF_TABLE, f"| {' | '.join(row)} |\n{END_OF_TABLE}"))
        if failed:
            session.error(log.read_text()[-4000:])
    if not os.environ.get("NOX_KEEP"):
        shutil.rmtree(session.virtualenv.location, ignore_errors=True)

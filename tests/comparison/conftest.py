from __future__ import annotations

import html
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import monai.metrics
import numpy as np
import pytest
import torch

from nnunet_deform.comparison.report import figures
from nnunet_deform.comparison.workflow import write
from nnunet_deform.processes import commands

# helper modules beside the tests
sys.path.insert(0, str(Path(__file__).parent))

from trial import Trial

# nnunet-deform as a command, which runs the stand-ins
OURS = """
import sys
from pathlib import Path
from nnunet_deform import cli
from nnunet_deform.processes import commands
fakes = Path(__file__).parent
commands.find_command = lambda name: str(fakes / ("cost" if name == sys.executable else name))
cli.app()
"""


@pytest.fixture(scope="session")
def fakes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fakes")
    text = (Path(__file__).parent / "fake_nnunet.py").read_text()
    for name in ("extract_fingerprint", "plan_experiment", "preprocess", "train", "predict", "evaluate_folder"):
        (folder / f"nnUNetv2_{name}").write_text(f"#!{sys.executable} -S\n{text}")  # without site: twice as fast
    (folder / "cost").write_text(f"#!{sys.executable} -S\n{text}")
    (folder / "nnunet-deform").write_text(f"#!{sys.executable}\n{OURS}")
    for script in folder.iterdir():
        script.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def undisturbed(fakes, tmp_path_factory) -> Trial:
    """A complete run, not to be changed, and its calls."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "find_command", lambda n: str(fakes / ("cost" if n == sys.executable else n)))
        patch.setattr(commands, "_POLL_S", 0.005)
        patch.setenv("FAKE_CALLS", str(folder / "calls.jsonl"))
        trial = Trial(folder / "work")
        trial.write()
        assert trial.run() == []
    return trial


@pytest.fixture(scope="session", autouse=True)
def _measured_once() -> Iterator[None]:
    """The stand-ins predict the same in each trial, of which MONAI takes its time to measure every structure."""

    def once(measure: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        known: dict[tuple, torch.Tensor] = {}

        def measured(y_pred: torch.Tensor, y: torch.Tensor, **options: object) -> torch.Tensor:
            key = (y.shape, y_pred.numpy().tobytes(), y.numpy().tobytes(), repr(options))
            if key not in known:
                known[key] = measure(y_pred=y_pred, y=y, **options)
            return known[key]

        return measured

    with pytest.MonkeyPatch.context() as patch:
        for name in ("compute_surface_dice", "compute_hausdorff_distance"):
            patch.setattr(monai.metrics, name, once(getattr(monai.metrics, name)))
        yield


class Paper:
    """Takes the place of a figure and of its axes: whatever is drawn leaves nothing."""

    def __getattr__(self, name: str) -> Paper:
        if name.startswith("__"):  # NumPy asks for these
            raise AttributeError(name)
        return self

    def __call__(self, *args: object, **kwargs: object) -> Paper:
        return self

    def __iter__(self) -> Iterator[Paper]:
        return iter(())

    def __getitem__(self, key: str) -> list[Paper]:
        return [self]


def _paper(width: float, height: float, nrows: int = 1, ncols: int = 1, **_: object) -> tuple[Paper, np.ndarray]:
    return Paper(), np.full((nrows, ncols), Paper(), dtype=object)


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Figures and pictures are not drawn, which takes most of a report's time, only described; test_report and
    test_figures look at drawn ones."""
    monkeypatch.setattr(figures, "new_figure", _paper)
    monkeypatch.setattr(
        figures, "svg", lambda figure, name, alt: f'<svg role="img" aria-label="{html.escape(alt)}"></svg>'
    )
    monkeypatch.setattr(figures, "overlay", lambda *_: "data:image/png;base64,")


@pytest.fixture
def use_fakes(fakes, tmp_path, monkeypatch) -> None:
    for module in (commands, write):
        monkeypatch.setattr(module, "find_command", lambda n: str(fakes / ("cost" if n == sys.executable else n)))
    monkeypatch.setattr(commands, "_GRACE_S", 0.5)
    monkeypatch.setattr(commands, "_POLL_S", 0.005)
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls.jsonl"))
    for variable in ("FAKE_SLOW", "FAKE_BAD", "FAKE_SKIP"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def trial(use_fakes, tmp_path) -> Trial:
    trial = Trial(tmp_path / "work")
    trial.write()
    return trial

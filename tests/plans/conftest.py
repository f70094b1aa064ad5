"""The datasets of known_shapes.py, planned by nnU-Net."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from known_shapes import PHANTOMS, MakePhantom, write_phantom
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)

from nnunet_deform.networks.without_values import without_values


@pytest.fixture(scope="session")
def _planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, type], Path]:
    """Returns planned(name, planner): the folder of a phantom's raw and preprocessed data with nnU-Net's plan, made
    once."""
    made: dict[tuple[str, type], Path] = {}

    def planned(name: str, planner: type[ExperimentPlanner]) -> Path:
        if (name, planner) not in made:
            root = tmp_path_factory.mktemp("planned")
            write_phantom(root, name, *PHANTOMS[name])
            # The planner builds networks to count their feature maps.
            with pytest.MonkeyPatch.context() as patch, without_values():
                _set_paths(patch, root)
                planner(name).plan_experiment()
            made[name, planner] = root
        return made[name, planner]

    return planned


def _set_paths(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setenv("nnUNet_raw", str(root / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(root / "preprocessed"))
    monkeypatch.setenv("nnUNet_results", str(root / "results"))
    monkeypatch.delenv("nnUNet_n_proc_DA", raising=False)


@pytest.fixture
def make_phantom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _planned: Callable[[str, type], Path]) -> MakePhantom:
    """Returns make(name, res_enc=False): the preprocessed folder of a fresh phantom with nnU-Net's plan, to which
    nnU-Net's paths point."""

    def make(name: str, *, res_enc: bool = False) -> Path:
        root = _planned(name, nnUNetPlannerResEncM if res_enc else ExperimentPlanner)
        shutil.copytree(root, tmp_path, dirs_exist_ok=True)
        _set_paths(monkeypatch, tmp_path)
        return tmp_path / "preprocessed" / name

    return make

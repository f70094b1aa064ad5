"""Two processes on a CPU train each network in DistributedDataParallel, which waits for every parameter's gradient."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fresh_process import FreshProcesses
from phantoms import SCENARIOS

from nnunet_deform import trainers

# One of each main network, of LightMedSeg that with another loss than nnU-Net's. That every parameter of all networks
# has a gradient is a test of their contract.
FAST = ("nnUNetTrainerDeformUX", "nnUNetTrainerLightMedSeg_paper", "nnUNetTrainerMAGIC")
# Swin UNETR and CoTr refuse the plan, those with BatchNorm its three axes; the others differ from one that is here in
# numbers.
NOT_HERE = (
    "nnUNetTrainerSwinUNETR",
    "nnUNetTrainerCoTr",
    *(name for name in trainers.__all__ if name.endswith("_BN")),
    "nnUNetTrainerNnFormer_96",
    "nnUNetTrainerUNesT_L",
    *(f"nnUNetTrainer{network}_{size}" for network in ("MedNeXt", "Primus", "PrimusV2", "PrimusV3") for size in "BML"),
)
OTHERS = tuple(name for name in trainers.__all__ if name not in (*FAST, *NOT_HERE))


@pytest.fixture(scope="module")
def results(prepared, fresh_processes, tmp_path_factory) -> Callable[[tuple[str, ...]], list[dict]]:
    """Returns results(names): of both processes, by trainer. They start once for all trainers of these names."""
    return functools.cache(
        lambda names: train(names, prepared(SCENARIOS["cascade"]), tmp_path_factory.mktemp("ddp"), fresh_processes)
    )


def train(names: tuple[str, ...], source: Path, folder: Path, fresh_processes: FreshProcesses) -> list[dict]:
    preprocessed = folder / "preprocessed" / "Dataset999_Phantom"
    preprocessed.parent.mkdir()
    preprocessed.symlink_to(source / "preprocessed" / "Dataset999_Phantom")
    environment = {
        **os.environ,
        **{f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")},
        "nnUNet_n_proc_DA": "0",
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("ddp_process.py")
    fresh_processes.run([str(script), str(folder), *names], output=folder / "printed", environment=environment)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("together", "name"),
    [
        *(pytest.param(FAST, name, id=name) for name in FAST),
        *(pytest.param(OTHERS, name, id=name, marks=pytest.mark.slow) for name in OTHERS),
    ],
)
def test_equal_weights_after_two_steps_on_different_batches(results, together, name) -> None:
    one, other = (result[name] for result in results(together))
    assert one["losses"][0] != other["losses"][0]
    assert one["end"] == other["end"]
    assert one["end"] != one["start"]
    assert one["single"] == other["single"] == [2, 3, 24, 24, 24]


def test_all_ranks_fall_back_from_a_compiler_that_fails(results) -> None:
    one, other = (result["falling back"] for result in results(FAST))
    assert not one["compiled"]
    assert not other["compiled"]
    assert one["end"] == other["end"] != one["start"]

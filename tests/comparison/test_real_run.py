"""A whole comparison with nnU-Net's real commands on the phantom, killed twice."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from nnunet_deform.comparison.files import fingerprint, read_json
from nnunet_deform.demo.phantom import write_phantom_dataset

EXPERIMENT = """\
name: phantom
datasets:
  - {{id: 501, batch_size: 2, splits: 2}}
arms:
  - {{name: LightMedSeg, trainer: nnUNetTrainerLightMedSeg}}
  - {{name: LightMedSeg-off, trainer: nnUNetTrainerLightMedSeg_opOff}}
folds: [0, 1]
budget: {{epochs: 3, iterations: 2}}
mirroring: false
hypotheses:
  - [LightMedSeg, LightMedSeg-off]
statistics: {{draws: 1000}}
device: cpu
resources: {{processes: 1, augmentation: 0}}
raw: raw
preprocessed: preprocessed
output: {output}
"""


def _command(file: Path) -> list[str]:
    return [str(Path(sys.executable).with_name("nnunet-deform")), "compare", "run", str(file)]


def _processes_of(folder: Path) -> list[int]:
    """What runs with this experiment's folders in its environment."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if f"nnUNet_results={folder}".encode() in (process / "environ").read_bytes():
                    found.append(int(process.name))
            except OSError:  # it has ended meanwhile
                continue
    return found


def _results(folder: Path) -> dict[str, str]:
    """Fingerprints of what finished trainings left."""
    files: dict[str, str] = {}
    for record in (folder / "records").glob("*/*.json"):
        if read_json(record)["finished"] is None:
            continue
        training = re.match(r"(.*)_seed1_fold(\d)", record.stem)
        trainer = "nnUNetTrainerLightMedSeg" + ("_opOff" if training[1].endswith("off") else "")
        (fold,) = folder.glob(f"nnUNet_results/*/{trainer}_3epochs*/fold_{training[2]}")
        files |= {str(file): fingerprint(file) for file in fold.rglob("*") if file.is_file()}
    return files


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks processes up in /proc")
def test_killed_twice_the_tables_equal_an_undisturbed_runs(tmp_path):
    (tmp_path / "raw").mkdir()
    write_phantom_dataset(tmp_path / "raw", 6, 0)
    for name in ("undisturbed", "killed"):
        (tmp_path / f"{name}.yaml").write_text(EXPERIMENT.format(output=name))
    subprocess.run(_command(tmp_path / "undisturbed.yaml"), check=True, stdout=subprocess.DEVNULL)

    folder = tmp_path / "killed"
    rng = random.Random(0)
    finished: dict[str, str] = {}
    for trainings in (1, 3):
        process = subprocess.Popen(_command(tmp_path / "killed.yaml"), stdout=subprocess.DEVNULL)
        # a checkpoint of this many trainings, then some more seconds
        while len(list(folder.glob("nnUNet_results/*/*/fold_*/checkpoint_*.pth"))) < trainings:
            assert process.poll() is None
            time.sleep(0.2)
        time.sleep(rng.uniform(0, 8))
        process.kill()
        process.wait()
        while processes := _processes_of(folder / "nnUNet_results"):
            for pid in processes:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
        finished |= {file: digest for file, digest in _results(folder).items() if file not in finished}
    subprocess.run(_command(tmp_path / "killed.yaml"), check=True, stdout=subprocess.DEVNULL)
    assert finished
    assert {file: fingerprint(Path(file)) for file in finished} == finished
    tables = [pd.read_parquet(tmp_path / name / "report" / "cases.parquet") for name in ("undisturbed", "killed")]
    assert len(tables[0]) == 2 * 6 * 5
    pd.testing.assert_frame_equal(*tables)

"""Which cases are of one patient, for gpu.yaml: writes hippocampus_patients.csv and acdc_patients.csv beside it.

    python docs/evidence/patients.py NNUNET_RAW

Hippocampus: case ids n (odd) and n + 1 look like two scans of one patient. ACDC: both phases of a heart have the
patient's number.
"""

import re
import sys
from pathlib import Path


def hippocampus(case: str) -> str:
    return str((int(case.removeprefix("hippocampus_")) + 1) // 2)


def acdc(case: str) -> str:
    return re.fullmatch(r"(patient\d{3})_frame\d{2}", case)[1]


RULES = {"Dataset004_Hippocampus": ("hippocampus", hippocampus), "Dataset027_ACDC": ("acdc", acdc)}


def write(raw: Path, folder: Path) -> list[Path]:
    """Of the datasets that are in ``raw``; returns the files."""
    written = []
    for dataset, (name, rule) in RULES.items():
        files = [*(raw / dataset / "labelsTr").glob("*.nii.gz"), *(raw / dataset / "labelsTs").glob("*.nii.gz")]
        if files:
            cases = sorted(file.name.removesuffix(".nii.gz") for file in files)
            rows = [f"{case},{rule(case)}" for case in cases]
            written.append(folder / f"{name}_patients.csv")
            written[-1].write_text("\n".join(["case,patient", *rows]) + "\n")
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    for file in write(Path(sys.argv[1]), Path(__file__).resolve().parent):
        print(file)

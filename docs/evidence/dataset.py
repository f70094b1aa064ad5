"""Hippocampus for docs/evidence: nnU-Net's raw dataset without the patients by whom the recipes were chosen.

    python docs/evidence/dataset.py --data FOLDER --raw nnUNet_raw

FOLDER holds Dataset004_Hippocampus, the Medical Segmentation Decathlon's Task04 as nnU-Net's own conversion makes it.
The test cases are copied as they are.
"""

import argparse
import csv
import json
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATASET = "Dataset004_Hippocampus"


def left_out() -> set[str]:
    """Cases of the patients by whom docs/recipes.md chose."""
    of_recipes = json.loads((HERE.parent / "recipes" / "patients.json").read_text())
    return {case for part in of_recipes.values() for cases in part.values() for case in cases}


def copy_dataset(data: Path, raw: Path) -> int:
    """
    Returns:
        The number of training cases.
    """
    source, target = data / DATASET, raw / DATASET
    if not (source / "dataset.json").exists():
        raise SystemExit(f"there is no {DATASET} in {data}; name its folder with --data.")
    if target.exists():
        raise SystemExit(f"{target} exists; name another folder with --raw.")
    wanted = {row["case"] for row in csv.DictReader((HERE / "patients.csv").open())} - left_out()
    for part, ending in (
        ("imagesTr", "_0000.nii.gz"),
        ("labelsTr", ".nii.gz"),
        ("imagesTs", "_0000.nii.gz"),
        ("labelsTs", ".nii.gz"),
    ):
        (target / part).mkdir(parents=True)
        for file in sorted((source / part).glob(f"*{ending}")):
            if file.name.removesuffix(ending) in wanted:
                shutil.copy(file, target / part)
    number = len(list((target / "labelsTr").iterdir()))
    about = json.loads((source / "dataset.json").read_text())
    (target / "dataset.json").write_text(json.dumps({**about, "numTraining": number}, indent=1))
    return number


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--raw", type=Path, required=True)
    options = parser.parse_args()
    print(f"{copy_dataset(options.data, options.raw)} training cases in {options.raw / DATASET}")

"""Seconds that a scan's sliding window takes through ONNX Runtime and through torch, and whether the labels agree.

    python benchmarks/predict_onnx.py [--only NAME ...] [--cases 5] [--threads 1 2] [--data FOLDER] [--work FOLDER]
                                      [--output FILE.json]

Each network is trained for a few steps on Hippocampus, 3d_fullres, and exported. Then each test scan is predicted with
nnU-Net's predictor on the CPU, as ``nnUNetv2_predict -device cpu`` sets it up, and with that of ``nnunet-deform
predict-onnx``, one after the other, mirrored along all axes. Preprocessing, resampling and export are the same code for
both, so they are timed once. The median over the scans is reported, in wall time and in CPU time, which other programs
disturb less. Of labels that differ, the margin is how much more probable torch's is to torch than ONNX Runtime's.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from recipes import DATASET, DEFAULT_DATA, NETWORKS, REPOSITORY, WORK, folders, prepare

from nnunet_deform.selftest.measuring import describe

RESULTS = REPOSITORY / "benchmarks" / "results" / "predict_onnx_cpu.json"
CONFIGURATION = "3d_fullres"
STEPS = 30
BATCH = 2


def trained(name: str, prepared: Path) -> Path:
    """The model's folder, trained if it is not there yet."""
    from nnunet_deform.trainers.variants import find_trainer

    base = prepared / "preprocessed" / DATASET
    plans = json.loads((base / "nnUNetPlans.json").read_text())
    folder = prepared / "results" / DATASET / f"{name}__nnUNetPlans__{CONFIGURATION}"
    if not (folder / "fold_0" / "checkpoint_final.pth").exists():
        plans["configurations"][CONFIGURATION]["batch_size"] = BATCH
        dataset_json = json.loads((base / "dataset.json").read_text())
        trainer = find_trainer(name)(
            plans | {"continue_training": False}, CONFIGURATION, 0, dataset_json, torch.device("cpu")
        )
        trainer.run_training()
    return folder


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float, float]:
    """What it returns, and the seconds of wall and of CPU time it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*arguments)
    return result, time.perf_counter() - wall, time.process_time() - cpu


def compare(model: Path, onnx_file: Path, scans: Sequence[Path], threads: int) -> dict[str, Any]:
    """A row of the result: seconds of each scan, and how many voxels are labelled otherwise."""
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunet_deform.deployment.exported import read_exported
    from nnunet_deform.deployment.scans import OnnxPredictor

    torch.set_num_threads(threads)
    theirs = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    theirs.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    ours = OnnxPredictor([read_exported(onnx_file, threads=threads)])
    predictors = {"torch": theirs, "onnx": ours}
    seconds: dict[str, list[tuple[float, float]]] = {"torch": [], "onnx": [], "rest": []}
    differing = voxels = 0
    margin, dice = 0.0, 1.0
    configuration = theirs.configuration_manager
    preprocessor = configuration.preprocessor_class(verbose=False)
    for scan in scans:
        arguments = ([str(scan)], None, theirs.plans_manager, configuration, theirs.dataset_json)
        (data, _, properties), *before = timed(preprocessor.run_case, *arguments)
        labels, probabilities = {}, {}
        for name, predictor in predictors.items():
            logits, *took = timed(predictor.predict_logits_from_preprocessed_data, torch.from_numpy(data))
            (labels[name], probabilities[name]), *after = timed(
                convert_predicted_logits_to_segmentation_with_correct_shape,
                *(logits.numpy(), theirs.plans_manager, configuration, theirs.label_manager, properties, True),
            )
            seconds[name].append(tuple(took))
        seconds["rest"].append((before[0] + after[0], before[1] + after[1]))
        where = labels["torch"] != labels["onnx"]
        differing += int(where.sum())
        voxels += where.size
        if where.any():
            by_label = (np.take_along_axis(probabilities["torch"], of[None], 0)[0][where] for of in labels.values())
            margin = max(margin, float(np.subtract(*by_label).max()))
        dice = min(dice, *(_dice(labels["torch"] == label, labels["onnx"] == label) for label in (1, 2)))
    medians = {
        f"{name}_{clock}": round(median(pair[index] for pair in pairs), 3)
        for name, pairs in seconds.items()
        for index, clock in enumerate(("s", "cpu_s"))
    }
    return {"threads": threads, **medians, "differing_voxels": differing, "voxels": voxels} | {
        "largest_margin": round(margin, 5),
        "lowest_dice": round(dice, 6),
    }


def _dice(first: np.ndarray, second: np.ndarray) -> float:
    """1 if neither has a voxel."""
    both = int(first.sum() + second.sum())
    return 2 * int((first & second).sum()) / both if both else 1.0


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row for each network and number of threads."""
    stock = {row["threads"]: row for row in rows if row["network"] == "stock"}
    heads = ["network", "threads", "torch", "ONNX Runtime", "torch / ONNX", "stock's torch / ONNX"]
    heads += ["other labels", "largest margin", "lowest Dice"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in rows:
        reference = stock.get(row["threads"])
        ratio = "" if reference is None else f"{reference['torch_s'] / row['onnx_s']:.1f}"
        lines.append(
            f"| {row['network']} | {row['threads']} | {row['torch_s']:.2f} s | {row['onnx_s']:.2f} s | "
            f"{row['torch_s'] / row['onnx_s']:.1f} | {ratio} | {row['differing_voxels']} of {row['voxels']} | "
            f"{row['largest_margin']:.4f} | {row['lowest_dice']:.5f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=["stock", "LightMedSeg", "MAGIC"])
    parser.add_argument("--cases", type=int, default=5, help="of the test set")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help=f"the folder that holds {DATASET}")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(argv)

    prepared = prepare(options.data, options.work)
    os.environ.update(folders(prepared), nnUNet_n_proc_DA="0", nnUNet_compile="f")
    scans = sorted((options.data / DATASET / "imagesTs").glob("*_0000.nii.gz"))[: options.cases]
    from nnunet_deform import activation
    from nnunet_deform.deployment.export import export_onnx

    activation.apply()
    rows = []
    for network in options.only:
        with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net and the exporter say what they do
            model = trained(f"{NETWORKS[network]}_AdamW_1epochs{STEPS}iters_seed0", prepared)
            onnx_file = prepared / "results" / f"{network}.onnx"
            export_onnx(model, onnx_file)
            found = [compare(model, onnx_file, scans, threads) for threads in options.threads]
        rows += [{"network": network, **row} for row in found]
        print(rows[-len(found) :], file=sys.stderr)
    about = describe() | {"onnxruntime": version("onnxruntime")}
    options.output.write_text(json.dumps({"about": about, "scans": len(scans), "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()

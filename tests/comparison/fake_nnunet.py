"""Stand-ins for nnU-Net's commands: seconds instead of hours, the same files in the same places.

A training takes three steps with a checkpoint after each and goes on from there with --c; its predictions depend on the
trainer's name and the fold only, as seeded trainings on a CPU do. FAKE_SLOW is the time of a step, FAKE_BAD a part of
the name of trainers that crash, FAKE_SKIP one of those that leave a case out ("preprocess": the preprocessing does).
With FAKE_BAD_TEST the prediction of test cases crashes. Every call is noted in FAKE_CALLS.
"""

import gzip
import json
import os
import pathlib
import pickle
import random
import shutil
import sys
import time

name, args = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
LABELS = [1, 2]


def option(*names):
    return next(args[args.index(n) + 1] for n in names if n in args)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content if isinstance(content, str) else json.dumps(content))
    partial.replace(path)


# To import numpy and SimpleITK would take longer than all the rest. The labels are NIfTI files of one byte a voxel.
HEADER = 352


def read(path):
    return gzip.decompress(path.read_bytes())[HEADER:]


def summarise(truths, predictions, file):
    entries = []
    for prediction in sorted(predictions.glob("*.nii.gz")):
        truth, mine = read(truths / prediction.name), read(prediction)
        metrics = {}
        for label in LABELS:
            a, b = truth.count(label), mine.count(label)
            both = sum(one == other == label for one, other in zip(truth, mine, strict=True))
            dice = 2 * both / (a + b) if a + b else float("nan")
            metrics[str(label)] = {"Dice": dice, "n_ref": a, "n_pred": b}
        files = {"reference_file": str(truths / prediction.name), "prediction_file": str(prediction)}
        entries.append({**files, "metrics": metrics})
    write(file, {"metric_per_case": entries, "mean": {}})


def predict(truth, path, strength, rng):
    content = gzip.decompress(truth.read_bytes())
    voxels = bytes(0 if rng.random() < strength else value for value in content[HEADER:])
    path.write_bytes(gzip.compress(content[:HEADER] + voxels, mtime=0))


with open(os.environ["FAKE_CALLS"], "a") as stream:
    keep = ("nnUNet_n_proc_DA", "nnUNet_def_n_proc", "nnUNet_extTrainer")
    stream.write(json.dumps({"name": name, "args": args, **{k: os.environ.get(k) for k in keep}}) + "\n")
if name == "cost":
    write(
        pathlib.Path(args[-1]),
        {"parameters": 1000, "macs": 10**9, "peak_bytes": 10**8, "seconds_per_iteration": 0.5, "seconds_per_case": 2.0},
    )
    sys.exit()
raw_base, preprocessed_base, results = (
    pathlib.Path(os.environ[f"nnUNet_{part}"]) for part in ("raw", "preprocessed", "results")
)
(raw,) = raw_base.glob("Dataset*")
preprocessed = preprocessed_base / raw.name
cases = sorted(path.name[:-7] for path in (raw / "labelsTr").iterdir())
if name == "nnUNetv2_extract_fingerprint":
    write(preprocessed / "dataset_fingerprint.json", {})
elif name == "nnUNetv2_plan_experiment":
    plans = "nnUNetPlans" if option("-pl") == "ExperimentPlanner" else "nnUNetResEncUNetMPlans"
    shutil.copy(raw / "dataset.json", preprocessed / "dataset.json")
    configurations = {"3d_fullres": {"data_identifier": "nnUNetPlans_3d_fullres", "batch_size": 7}}
    content = {"plans_name": plans, "image_reader_writer": "SimpleITKIO", "configurations": configurations}
    write(preprocessed / f"{plans}.json", {**content, "original_median_spacing_after_transp": [2.0, 1.0, 1.0]})
elif name == "nnUNetv2_preprocess":
    folder = preprocessed / "nnUNetPlans_3d_fullres"
    folder.mkdir()
    for case in cases[: -1 if os.environ.get("FAKE_SKIP") == "preprocess" else None]:
        (folder / f"{case}.pkl").write_bytes(pickle.dumps({}))
elif name == "nnUNetv2_train":
    dataset, configuration, fold = args[:3]
    trainer, plans = option("-tr"), option("-p")
    model = pathlib.Path(results, dataset, f"{trainer}__{plans}__{configuration}")
    folder = model / f"fold_{fold}"
    folder.mkdir(parents=True, exist_ok=True)
    bad, skip = os.environ.get("FAKE_BAD"), os.environ.get("FAKE_SKIP")
    if bad and bad in trainer:
        print("RuntimeError: [the] training went wrong")
        sys.exit(1)
    if "--val" not in args:
        latest = folder / "checkpoint_latest.pth"
        assert ("--c" in args) == latest.exists(), "continued without a checkpoint, or started over one"
        done = int(latest.read_text()) if latest.exists() else 0
        log = folder / f"training_log_2026_1_{1 + len(list(folder.glob('training_log*')))}.txt"
        with log.open("w") as lines:
            for epoch in range(done, 3):
                print(f"2026-01-01 00:00:00: Epoch {epoch} ", file=lines)
                print(f"2026-01-01 00:00:00: Epoch {epoch} ", flush=True)
                time.sleep(float(os.environ.get("FAKE_SLOW", "0")))
                print(f"2026-01-01 00:00:00: train_loss {1 - epoch / 10:.4f} ", file=lines)
                print(f"2026-01-01 00:00:00: val_loss {1 - epoch / 20:.4f} ", file=lines)
                write(latest, str(epoch + 1))
        latest.unlink()
        write(folder / "checkpoint_final.pth", f"weights of {trainer} {fold}")
    validation = folder / "validation"
    validation.mkdir(exist_ok=True)
    seen = json.loads((preprocessed / "splits_final.json").read_text())[int(fold)]["val"]
    rng = random.Random(f"{trainer} {fold}")
    strength = 0.05 if "DeformUX" in trainer else 0.45
    for case in seen[: -1 if skip and skip in trainer else None]:
        time.sleep(float(os.environ.get("FAKE_SLOW", "0")) / 4)
        predict(raw / "labelsTr" / f"{case}.nii.gz", validation / f"{case}.nii.gz", strength, rng)
    summarise(raw / "labelsTr", validation, validation / "summary.json")
elif name == "nnUNetv2_predict" and "FAKE_BAD_TEST" in os.environ:
    sys.exit("out of memory")
elif name == "nnUNetv2_predict":
    output = pathlib.Path(option("-o"))
    output.mkdir(parents=True, exist_ok=True)
    for truth in sorted((raw / "labelsTs").iterdir()):
        predict(truth, output / truth.name, 0.1, random.Random(option("-tr")))
    shutil.copy(raw / "dataset.json", output)
    shutil.copy(preprocessed / f"{option('-p')}.json", output / "plans.json")
elif name == "nnUNetv2_evaluate_folder":
    summarise(pathlib.Path(args[0]), pathlib.Path(args[1]), pathlib.Path(option("-o")))
else:
    sys.exit(f"no such command: {name}")

"""nnunet-deform predict-onnx."""

import contextlib
import io
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nnunet_deform.cli.messages import fail, print_note, require_nnunetv2


# The options that nnU-Net has, too, are spelled as there.
def predict_onnx(
    models: Annotated[
        list[Path], typer.Argument(metavar="MODEL.onnx", help="From export; several folds are averaged.")
    ],
    source: Annotated[Path, typer.Option("-i", help="Folder of scans, CASE_0000.nii.gz and so on for each channel.")],
    output: Annotated[Path, typer.Option("-o", help="Folder for the segmentations.")],
    step_size: Annotated[float, typer.Option("-step_size", help="Of the sliding window, relative to the patch.")] = 0.5,
    disable_tta: Annotated[bool, typer.Option("--disable_tta", help="No mirroring: 8 times as fast in 3D.")] = False,
    probabilities: Annotated[
        bool, typer.Option("--save_probabilities", help="Write what nnUNetv2_ensemble reads, too.")
    ] = False,
    keep_existing: Annotated[
        bool, typer.Option("--continue_prediction", help="Pass over cases that are there already.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Default: torch's, all cores or OMP_NUM_THREADS.")
    ] = None,
) -> None:
    """Predict whole scans with exported models: nnU-Net's prediction with ONNX Runtime in the place of torch.

    The ONNX file is all it needs of the model. It runs on the CPU. Needs the extra export.

    Example: nnunet-deform predict-onnx -i scans -o segmentations fold_0.onnx fold_1.onnx
    """
    require_nnunetv2()
    # nnU-Net prints where its folders are.
    with contextlib.redirect_stdout(io.StringIO()):
        import torch

        from nnunet_deform.deployment.exported import ExportedModelError, read_exported
        from nnunet_deform.deployment.scans import ScanError, ScanPrediction
        from nnunet_deform.processes.commands import Interrupts

    if threads is not None:
        torch.set_num_threads(threads)
    console = Console(soft_wrap=True, highlight=False)
    try:
        with Interrupts():
            prediction = ScanPrediction(
                [read_exported(path, threads=torch.get_num_threads()) for path in models],
                source,
                output,
                step_size=step_size,
                mirroring=not disable_tta,
                probabilities=probabilities,
                keep_existing=keep_existing,
                progress=sys.stderr.isatty(),
            )
            for case in prediction.run():
                for note in filter(None, [case.notes.strip()]):
                    print_note(console, note)
                print(
                    f"{case.name}: preprocessing {case.preprocessing_s:.1f} s, network {case.network_s:.1f} s, "
                    f"resampling and export {case.export_s:.1f} s"
                )
    except (ExportedModelError, ScanError) as error:
        raise fail(str(error)) from None
    there = prediction.found - len(prediction.cases)
    print(f"Wrote {len(prediction.cases)} segmentations into {output}" + (f"; {there} were there." if there else "."))

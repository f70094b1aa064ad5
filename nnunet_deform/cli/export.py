"""nnunet-deform export."""

import contextlib
import io
from pathlib import Path
from typing import Annotated

import typer

from nnunet_deform import activation
from nnunet_deform.cli.messages import fail


def export(
    model: Annotated[
        Path, typer.Option("-m", "--model", help="nnU-Net's model folder, <trainer>__<plans>__<configuration>.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The ONNX file to write.")],
    fold: Annotated[str, typer.Option("-f", "--fold", help='A number or "all".')] = "0",
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="Its name in the fold's folder.")] = (
        "checkpoint_final.pth"
    ),
) -> None:
    """Write a trained network as an ONNX file for predict-onnx, checked with ONNX Runtime. Needs the extra export.

    Example: nnunet-deform export -m nnUNetTrainerLightMedSeg__nnUNetPlans__3d_fullres -o model.onnx
    """
    from nnunet_deform.deployment.export import OPSET, ExportError, export_onnx

    try:
        activation.check_nnunetv2()
        # nnU-Net and the exporter print what they do.
        with contextlib.redirect_stdout(io.StringIO()):
            metadata = export_onnx(model, output, fold=fold, checkpoint=checkpoint)
    except (activation.ActivationError, ExportError) as error:
        raise fail(str(error)) from None
    print(f"Wrote {output}: patch {metadata['patch_size']}, spacing {metadata['spacing']}, opset {OPSET}.")

"""nnunet-deform export."""

import contextlib
import io
from pathlib import Path
from typing import Annotated

import typer

from nnunet_deform.cli.messages import fail, require_nnunetv2
from nnunet_deform.cli.models import CheckpointOption, FoldOption, ModelOption


def export(
    model: ModelOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="The ONNX file to write.")],
    fold: FoldOption = "0",
    checkpoint: CheckpointOption = "checkpoint_final.pth",
) -> None:
    """Write a trained network as an ONNX file for predict-onnx, checked with ONNX Runtime. Needs the extra export.

    Example: nnunet-deform export -m nnUNetTrainerLightMedSeg__nnUNetPlans__3d_fullres -o model.onnx
    """
    from nnunet_deform.deployment.export import OPSET, ExportError, export_onnx

    require_nnunetv2()
    try:
        # nnU-Net and the exporter print what they do.
        with contextlib.redirect_stdout(io.StringIO()):
            metadata = export_onnx(model, output, fold=fold, checkpoint=checkpoint)
    except ExportError as error:
        raise fail(str(error)) from None
    print(f"Wrote {output}: patch {metadata['patch_size']}, spacing {metadata['spacing']}, opset {OPSET}.")

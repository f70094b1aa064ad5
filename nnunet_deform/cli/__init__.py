"""The command line: activation, status, plans, demo, export, comparison. Training and prediction stay nnU-Net's.

One file a command, thin over the package it calls, which is imported only when the command runs: importing torch takes
seconds, and help and completion need none of it.
"""

from typing import Annotated

import typer

from nnunet_deform import __version__
from nnunet_deform.cli import (
    check_images,
    compare,
    demo,
    disable,
    enable,
    env,
    export,
    inspect,
    plan,
    predict_onnx,
    score,
    selftest,
    status,
)

# As the help lists them.
_COMMANDS = {
    "Set up": (enable.enable, disable.disable, env.env, status.status, selftest.selftest, demo.demo),
    "Before training": (check_images.check_images, plan.plan),
    "After training": (export.export, predict_onnx.predict_onnx, inspect.inspect, score.score),
}

app = typer.Typer(
    name="nnunet-deform",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"nnunet-deform {__version__}")
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """New segmentation networks for nnU-Net v2.

    After [bold]enable[/bold], train and predict with nnU-Net's own commands.

    Example: nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerDeformUX
    """


for _panel, _functions in _COMMANDS.items():
    for _function in _functions:
        app.command(rich_help_panel=_panel)(_function)
app.add_typer(compare.app, name="compare", rich_help_panel="After training")

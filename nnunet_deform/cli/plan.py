"""nnunet-deform plan."""

import contextlib
import io
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from nnunet_deform.cli.messages import fail, require_nnunetv2

if TYPE_CHECKING:
    from nnunet_deform.plans.planners import Choice, NetworkPlanner


class Arch(str, Enum):
    """The keys of nnunet_deform.plans.planners.PLANNERS, which takes seconds to import."""

    DEFORMUX = "deformux"
    LIGHTMEDSEG = "lightmedseg"
    MAGIC = "magic"
    MAGIC_RESENC = "magic-resenc"


class Again(str, Enum):
    """The values of ``recompute``, see nnunet_deform.layers.recomputation."""

    CHEAP = "cheap"
    BLOCKS = "blocks"


class Preset(str, Enum):
    """The keys of nnunet_deform.plans.planners.PRESETS."""

    M = "M"
    L = "L"
    XL = "XL"


def plan(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="The dataset's number or name.")],
    arch: Annotated[Arch, typer.Option("--arch", help="The network.")],
    base: Annotated[str, typer.Option("--base", help="The plan to start from.")] = "nnUNetPlans",
    preset: Annotated[
        Preset | None,
        typer.Option("--preset", help="Fit patch and batch to 8, 24 or 40 GB, as nnU-Net's ResEnc presets do."),
    ] = None,
    vram: Annotated[float | None, typer.Option("--vram", help="Fit patch and batch to this many GB.")] = None,
    recompute: Annotated[
        Again | None,
        typer.Option(
            "--recompute",
            help="What the backward pass computes again; blocks takes less memory and more time. By default cheap, or "
            "blocks where --preset or --vram would shrink the patch.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing plan of this name.")] = False,
) -> None:
    """Write a plan with one of our networks, for nnU-Net's own trainers (-p).

    Patch and batch are those of the base plan, so that only the network differs, unless you give --preset or --vram.

    Example: nnunet-deform plan -d 501 --arch deformux --preset L
    """
    if preset is not None and vram is not None:
        raise fail(f"--preset {preset.value} and --vram {vram:g} are two memory targets; give one.")
    require_nnunetv2()
    # nnU-Net prints where its folders are.
    with contextlib.redirect_stdout(io.StringIO()):
        from nnunet_deform.plans.planners import PLANNERS, PRESETS, PlanError
    planner_class = PLANNERS[arch.value]
    try:
        planner = planner_class(
            dataset,
            vram if preset is None else PRESETS[preset.value],
            plans_name=f"nnUNet{planner_class.label}{'' if preset is None else preset.value}Plans",
            base_plans_name=base,
            overwrite=overwrite,
            recompute=None if recompute is None else recompute.value,
        )
        planner.plan_experiment()
    except PlanError as error:
        raise fail(str(error)) from None
    _print_plan(planner)


def _print_plan(planner: "NetworkPlanner") -> None:
    from nnunet_deform.plans.preprocessed import preprocessed_folders, preprocessing_commands

    base = planner.base_plans["plans_name"]
    table = Table(
        *(Column(name, overflow="fold") for name in ("configuration", "plan", "patch", "batch", "levels", "GB"))
    )

    def cells(choice: "Choice") -> list[str]:
        gigabytes = "no estimate" if choice.gigabytes is None else f"{choice.gigabytes:.1f}"
        patch = " x ".join(map(str, choice.patch_size))
        return [patch, str(choice.batch_size), str(choice.levels), gigabytes]

    for configuration in planner.configurations:
        table.add_row(configuration.name, planner.plans_identifier, *cells(configuration.ours))
        table.add_row("", base, *cells(configuration.base))
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    if planner.refits:
        print(f"Patch and batch: as large as {planner.UNet_vram_target_GB:g} GB allow, by nnU-Net's search.")
    else:
        print(f"Patch and batch: those of {base}, so that only the network differs; --preset or --vram fits them.")
    for configuration in planner.configurations:
        if configuration.ours.levels < configuration.unet_levels:
            print(
                f"{configuration.name}: {configuration.ours.levels} levels, as many as {planner.label} has, in the "
                f"place of a U-Net's {configuration.unet_levels}."
            )
        if configuration.recomputed_because is not None:
            print(
                f"{configuration.name}: blocks at full resolution are computed again in the backward pass "
                f'(recompute="blocks"), because {configuration.recomputed_because}; a training step takes about '
                f"{planner.blocks_step_time:.2f} times as long."
            )
        if configuration.ours.levels < 3:
            print(
                f"{configuration.name}: with {configuration.ours.levels} levels nnU-Net's deep supervision gives NaN; "
                "train with nnUNetTrainerNoDeepSupervision, or with our trainers."
            )
    print(
        "GB: as nnU-Net's planner counts them, the GPU for which it would plan a network of its own whose training "
        "step holds as much, in mixed precision."
    )
    print(f"Wrote {planner.target}")

    folders = preprocessed_folders(planner.folder, planner.plans, base, planner.dataset)
    for folder in folders:
        state = "preprocessed already" if folder.complete else f"{folder.present} of {folder.expected} cases are there"
        print(f"{folder.identifier} ({', '.join(folder.configurations)}): {state}")
    commands = preprocessing_commands(planner.dataset_id, folders)
    if commands:
        print(f"To preprocess what is missing: {' && '.join(commands)}")
    else:
        print("Nothing is missing.")

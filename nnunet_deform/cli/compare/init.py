"""nnunet-deform compare init."""

from pathlib import Path
from typing import Annotated

import typer

from nnunet_deform.cli.compare.opening import comparison_errors
from nnunet_deform.cli.messages import fail


def init(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="nnU-Net's number or name of the dataset.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")] = Path("experiment.yaml"),
    configuration: Annotated[str, typer.Option("-c", "--configuration")] = "3d_fullres",
    device: Annotated[str, typer.Option("--device", help="cuda, cpu or mps.")] = "cuda",
) -> None:
    """Write a first experiment file for a dataset.

    Example: nnunet-deform compare init -d 501 -o experiment.yaml
    """
    with comparison_errors():
        from nnunet_deform.comparison.experiment_file import default_experiment, parse_experiment
        from nnunet_deform.comparison.files import write_text

        if output.exists():
            raise fail(f"{output} exists; give another name with -o.")
        identifier = int(dataset) if dataset.isdigit() else dataset
        text = default_experiment(identifier, output, configuration=configuration, device=device)
        parse_experiment(text, output)  # the options may not fit
        write_text(output, text)
    print(f"Wrote {output}. Look at its arms and hypotheses, then: nnunet-deform compare check {output}")

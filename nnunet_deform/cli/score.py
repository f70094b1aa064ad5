"""nnunet-deform score."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nnunet_deform.cli.compare.opening import comparison_errors
from nnunet_deform.cli.messages import fail, print_note
from nnunet_deform.cli.scoring import DatasetJson, Processes, Tolerance, processes_or_default, scoring_progress


def score(
    predictions: Annotated[Path, typer.Argument(help="A folder of predicted segmentations.", show_default=False)],
    labels: Annotated[Path, typer.Argument(help="The folder with the true ones, under the same names.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The CSV file to write.")],
    dataset_json: DatasetJson = None,
    tolerance: Tolerance = None,
    processes: Processes = None,
) -> None:
    """Score a folder of predictions case by case: Dice as nnU-Net's, surface Dice (NSD) and HD95.

    Needs the extra compare.

    Example: nnunet-deform score predictions labelsTs -o scores.csv
    """
    with comparison_errors("nothing was written"):
        from nnunet_deform.comparison.files import write_text
        from nnunet_deform.comparison.metrics import METRICS
        from nnunet_deform.comparison.scoring import score_folder, some

        if not output.parent.is_dir():
            raise fail(f"there is no folder {output.parent} to write {output.name} into.")
        with scoring_progress(None) as advance:
            scored = score_folder(
                predictions,
                labels,
                dataset_json=dataset_json,
                tolerance=tolerance or (),
                processes=processes_or_default(processes),
                on_case=advance,
            )
        write_text(output, scored.table.to_csv(index=False))
    console = Console(soft_wrap=True, highlight=False)
    means = scored.table.fillna({name: metric.perfect for name, metric in METRICS.items()}).groupby("label", sort=False)
    heads = [f"{name} ({metric.unit})" if metric.unit else name for name, metric in METRICS.items()]
    rows = Table("class", *heads, "NSD's tolerance (mm)")
    for name, row in means[list(METRICS)].mean().iterrows():
        values = [f"{row[metric.name]:.{metric.decimals}f}" for metric in METRICS.values()]
        rows.add_row(escape(str(name)), *values, f"{scored.tolerances[name]:g}")
    console.print(rows)
    neither = int(scored.table["Dice"].isna().sum())
    if neither:
        print(f"{neither} structures are in neither labels nor prediction: empty in the file, perfect in these means.")
    if scored.unpredicted:
        names = some(scored.unpredicted)
        print_note(console, f"labels without a prediction, left out: {names}.")
    print(f"Wrote {output}: {scored.table['case'].nunique()} cases.")

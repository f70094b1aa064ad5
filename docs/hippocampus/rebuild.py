"""The report of this folder, made anew from its scores by the statistics and the page of today.

The run's own folder is gone: with it its pictures, learning curves and commands, which the page leaves out. cases.csv
has the scores and costs.csv the costs, as the run's own page had them, rounded.

    python docs/hippocampus/rebuild.py
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from nnunet_deform.comparison.analysis import analyse
from nnunet_deform.comparison.cost import Cost
from nnunet_deform.comparison.design import design_of
from nnunet_deform.comparison.experiment_file import load_experiment
from nnunet_deform.comparison.report import DatasetContent, Provenance, ReportContent, write_report

HERE = Path(__file__).parent

CAUTIONS = (
    "The hypotheses were declared on 2026-11-22T08:35:32+00:00, before the first training.",
    "Trainings were of 8 epochs of 20 iterations, 0.00064 of nnU-Net's own 1000 of 250. What is found holds for this "
    "budget: an arm that learns slowly at first may be better in the end.",
    "This page was made anew from the scores of the run (cases.csv), by later statistics. Pictures, learning curves "
    "and commands of the run are gone.",
)


def main() -> None:
    file = HERE / "experiment.yaml"
    experiment = load_experiment(file).experiment
    design = design_of(experiment)
    table = pd.read_csv(HERE / "cases.csv", dtype={"patient": str})
    cases, test = (table[table["set"] == name].drop(columns="set") for name in ("out of fold", "test"))
    analysis = analyse(design, cases, {})
    (dataset,) = analysis.datasets
    costs = pd.read_csv(HERE / "costs.csv", index_col="arm").to_dict("index")
    content = ReportContent(
        name=experiment.name,
        design=design,
        analysis=analysis,
        cases=cases,
        test=test,
        datasets={
            (dataset.dataset, dataset.configuration): DatasetContent(
                tolerances=dict.fromkeys(dataset.labels, experiment.datasets[0].tolerance),
                patients_mapped=True,
                costs={arm: Cost(**cost) for arm, cost in costs.items()},
            )
        },
        command=f"nnunet-deform compare run {file.name}",
        source=file.read_text(encoding="utf-8"),
        provenance=(
            Provenance(
                dataset=dataset.dataset,
                plans="nnUNetPlans_batch2",
                trainings=f"25: {', '.join(design.arms)}",
                splits="b16dc2aa6ca3",
                plans_file="a5a1eda80f2d",
                dataset_file="d150170b6e06",
                versions="nnunet-deform 0.1.0, nnunetv2 2.8.1, torch 2.15.0, dynamic-network-architectures 0.4.4, "
                "numpy 2.4.6, monai 1.6.1, python 3.11.7",
                machine="AMD EPYC, Linux",
            ),
        ),
        measured="Measured on cpu, one process an arm: median of three training steps on a real batch, prediction of "
        "one case of median size without mirroring.",
        cautions=CAUTIONS,
    )
    write_report(HERE, content)
    (HERE / "cases.parquet").unlink()  # the same as cases.csv


if __name__ == "__main__":
    main()

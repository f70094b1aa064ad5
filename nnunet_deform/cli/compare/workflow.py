"""nnunet-deform compare workflow."""

import shlex

from nnunet_deform.cli.compare.opening import ExperimentFile, opened_comparison


def workflow(file: ExperimentFile) -> None:
    """Write the experiment as a Snakemake workflow, for one machine or a SLURM cluster.

    Example: nnunet-deform compare workflow experiment.yaml
    """
    with opened_comparison(file) as comparison:
        from nnunet_deform.comparison.workflow import PROFILES, write_workflow

        folder = write_workflow(comparison)
    print(f"Wrote {folder}. Look at its profiles, then run one of these where Snakemake is installed:")
    for name in PROFILES:
        print(f"  {shlex.join(['snakemake', '-s', str(folder / 'Snakefile'), '--profile', str(folder / name)])}")

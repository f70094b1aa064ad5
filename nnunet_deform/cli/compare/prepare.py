"""nnunet-deform compare prepare."""

from nnunet_deform.cli.compare.opening import ExperimentFile, opened_comparison


def prepare(file: ExperimentFile) -> None:
    """Only plan, preprocess and write the folds: the first job on a cluster.

    Example: nnunet-deform compare prepare experiment.yaml
    """
    with opened_comparison(file) as comparison:
        comparison.prepare()

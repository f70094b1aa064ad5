"""nnunet-deform compare cost."""

from nnunet_deform.cli.compare.opening import Arm, ExperimentFile, opened_comparison


def cost(file: ExperimentFile, arm: Arm) -> None:
    """Measure an arm's parameters, memory and times: one job on a cluster.

    Example: nnunet-deform compare cost experiment.yaml --arm Dataset501_X-3d_fullres/stock
    """
    with opened_comparison(file) as comparison:
        comparison.measure_cost(comparison.find_arm(arm))

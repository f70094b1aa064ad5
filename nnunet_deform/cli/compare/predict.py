"""nnunet-deform compare predict."""

from nnunet_deform.cli.compare.opening import Arm, ExperimentFile, opened_comparison


def predict(file: ExperimentFile, arm: Arm) -> None:
    """Predict and score the test set with an arm's folds: one job on a cluster.

    Example: nnunet-deform compare predict experiment.yaml --arm Dataset501_X-3d_fullres/stock
    """
    with opened_comparison(file) as comparison:
        comparison.predict_test(comparison.find_arm(arm))

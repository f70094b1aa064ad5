"""nnunet-deform compare jobs."""

from nnunet_deform.cli.compare.opening import ExperimentFile, opened_comparison


def jobs(file: ExperimentFile) -> None:
    """List the trainings with their numbers and whether they are done, for a cluster's job array.

    Example: nnunet-deform compare jobs experiment.yaml
    """
    with opened_comparison(file) as comparison:
        for number, training in enumerate(comparison.trainings):
            print(f"{number}\t{'done' if comparison.is_done(training) else 'to do'}\t{training.key}")

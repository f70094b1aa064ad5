import pytest
from rich.console import Console
from trial import NAME, Trial

from nnunet_deform.comparison.files import write_json
from nnunet_deform.comparison.prepare import prepare_dataset
from nnunet_deform.comparison.run import Comparison
from nnunet_deform.processes.commands import Interrupts


@pytest.mark.parametrize("folder", ["of_the_child", "of_the_parent"])
def test_a_configuration_overrides_what_it_inherits(tmp_path, folder):
    trial = Trial(tmp_path / "work")
    trial.write()
    trial.change("batch_size: 2, splits: 3", "configuration: child, splits: 3")
    trial.change("  - {name: ResEnc, trainer: nnUNetTrainer_AdamW, plans: nnUNetResEncUNetMPlans}\n", "")
    trial.change("  - [DeformUX, ResEnc]\n", "")
    preprocessed = trial.folder / "preprocessed" / NAME
    configurations = {
        "grandparent": {"data_identifier": "of_the_grandparent", "batch_size": 2},
        "parent": {"inherits_from": "grandparent", "data_identifier": "of_the_parent"},
        "child": {"inherits_from": "parent", "data_identifier": "of_the_child"},
    }
    if folder == "of_the_parent":
        del configurations["child"]["data_identifier"]
    write_json(preprocessed / "nnUNetPlans.json", {"plans_name": "nnUNetPlans", "configurations": configurations})
    comparison = Comparison(trial.file, Console(), Interrupts())
    (dataset,) = comparison.experiment.datasets
    calls = []

    def run(arguments: list[str]) -> None:
        calls.append(arguments)
        (preprocessed / folder).mkdir()
        for case in comparison.datasets[NAME].cases:
            (preprocessed / folder / f"{case}.pkl").touch()

    for _ in range(2):
        prepare_dataset(comparison.experiment, dataset, comparison.folders, comparison.file, run)
        assert calls == [["nnUNetv2_preprocess", "-d", "007", "-plans_name", "nnUNetPlans", "-c", "child", "-np", "1"]]

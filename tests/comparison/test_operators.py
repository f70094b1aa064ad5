"""What trainings wrote about their operators, in the report, and the caution beside a contrast that is empty."""

import math
from dataclasses import replace

import pytest

from nnunet_deform.comparison import operators
from nnunet_deform.comparison.report import figures
from nnunet_deform.comparison.trainings import Training, list_trainings
from nnunet_deform.networks.observation import write_epoch

ARMS = {
    "New": "nnUNetTrainerDeformUX_AdamW",
    "Off": "nnUNetTrainerDeformUX_opOff_AdamW",
    "Mixed": "nnUNetTrainerMAGIC_released",
    "Static": "nnUNetTrainerMAGIC_static",
    "ResEnc": "nnUNetTrainerMAGICResEnc",
    "Light": "nnUNetTrainerLightMedSeg",
    "LightOff": "nnUNetTrainerLightMedSeg_opOff",
    "Stock": "nnUNetTrainer",
}
NUMBERS = {
    "New": {"offset_mean_level1": 0.02, "offset_mean_level2": 0.3, "offset_max_level2": 9.0},
    "Mixed": {"mixing_spread_median": 0.05, "mixing_spread_min": 0.0, "mixing_entropy_median": 0.9},
    "Light": {"anchor_spread": 0.02, "anchor_distance": 0.4, "routing_entropy": 0.8},
}


def history(arm: str, fold: int = 0, seed: int = 1, **changes: float) -> operators.Histories:
    training = Training("Dataset501_Synthetic", "3d_fullres", arm, ARMS[arm], "nnUNetPlans", seed, fold)
    return {training: {0: dict.fromkeys(NUMBERS[arm], 0.0), 1: {**NUMBERS[arm], **changes}}}


@pytest.mark.parametrize(
    ("first", "second", "tested"),
    [
        ("New", "Off", "New"),
        ("Off", "New", "New"),
        ("Mixed", "Static", "Mixed"),
        ("Light", "LightOff", "Light"),
        ("ResEnc", "Static", None),
        ("New", "Stock", None),
        ("Stock", "Off", None),
        ("New", "Mixed", None),
    ],
)
def test_the_operator_that_a_contrast_is_about(first, second, tested):
    assert operators.operator_under_test(ARMS, first, second) == tested


@pytest.mark.parametrize(
    ("arm", "twin", "changes"),
    [
        ("New", "Off", {"offset_mean_level2": 0.0999}),
        ("Mixed", "Static", {"mixing_spread_median": 0.0099}),
        ("Light", "LightOff", {"anchor_spread": 0.0099}),
    ],
)
def test_the_caution_appears_and_disappears(arm, twin, changes):
    acting, idle = history(arm, 0), history(arm, 1, **changes)
    assert operators.caution(ARMS, acting, arm, twin) is None
    words = operators.caution(ARMS, acting | idle, twin, arm)
    (value,) = changes.values()
    assert words.startswith(f"Caution: {arm}'s operator does not act")
    assert f"in 1 of 2 trainings ({value:.4f} to {value:.4f})" in words
    assert operators.caution(ARMS, idle, arm, "Stock") is None
    found = operators.diagnose(ARMS, idle).cautions
    assert [pair for pair, words in found.items() if "not known" not in words] == [{arm, twin}]
    # Only the last epoch counts, and one at the threshold acts.
    threshold = 0.1 if arm == "New" else 0.01
    at_threshold = history(arm, 1, **dict.fromkeys(changes, threshold))
    assert operators.caution(ARMS, acting | at_threshold, arm, twin) is None


def test_what_is_not_known_is_said():
    assert "is not known, its trainings left no operators.jsonl" in operators.caution(ARMS, {}, "New", "Off")
    # One sample has no spread.
    unknown = history("Mixed", mixing_spread_median=math.nan)
    for epochs in unknown.values():
        del epochs[0]
    assert "is not known" in operators.caution(ARMS, unknown, "Mixed", "Static")
    assert operators.caution(ARMS, {}, "New", "Stock") is None


def test_files_of_trainings_are_read(tmp_path):
    training = next(iter(history("New")))
    assert operators.read_histories([training], tmp_path) == {}
    folder = training.folder(tmp_path)
    folder.mkdir(parents=True)
    for epoch in range(3):
        write_epoch(folder / "operators.jsonl", epoch, {"offset_mean_level1": epoch / 10, "offset_max_level1": 1.0})
    other = replace(training, configuration="2d")
    histories = operators.read_histories([training, other], tmp_path)
    assert list(histories) == [training]
    assert operators.of_dataset(histories, training.dataset, "2d") == {}
    assert operators.curves(histories, operators.MEASURES[0]) == {"New": [([0, 1, 2], [0.0, 0.1, 0.2])]}
    table = operators.last_epochs(histories)
    assert table[["arm", "epoch", "quantity", "value"]].values.tolist() == [
        ["New", 2, "offset_mean_level1", 0.2],
        ["New", 2, "offset_max_level1", 1.0],
    ]
    (row,) = operators.rows(histories | history("New", 1), list(ARMS))
    assert row == ("New", "mean |offset| at the best level (voxels)", 2, "0.2500 [0.2000, 0.3000]", "2")


def test_the_figure_has_a_line_for_each_training_and_the_limit():
    def lines(curves, limit) -> tuple[int, int]:
        """In the colour of B, and dashed."""
        svg = figures.operator_values(["A", "B"], [("spread", limit, curves)], "operators")
        assert svg.count(">spread<") == svg.count(">B<") == 1
        assert ">A<" not in svg
        return svg.lower().count(f"stroke: {figures.colour(1).lower()}"), svg.count("stroke-dasharray")

    long, other = (range(1000), [0.1] * 1000), (range(50), [0.2] * 50)
    # One of them in the legend.
    assert lines({"B": [long]}, None) == (2, 0)
    assert lines({"B": [long, other]}, None) == (3, 0)
    assert lines({"B": [long]}, 0.01) == (2, 1)


@pytest.mark.usefixtures("undrawn")
def test_the_report_shows_them_and_cautions(trial):
    trial.change("trainer: nnUNetTrainer_AdamW, plans: nnUNetResEncUNetMPlans", "trainer: nnUNetTrainerDeformUX_opOff")
    trial.change("seeds: {first: 1, repeats: [2, 3], folds: [0], arms: [stock, DeformUX]}", "seeds: {first: 1}")
    trial.change("folds: [0, 1, 2]", "folds: [0]")
    trial.change("patients.csv, test: true", "patients.csv, test: false")
    trial.run()
    comparison = trial.comparison()
    mine = [t for t in list_trainings(comparison.experiment, comparison.folders) if t.arm == "DeformUX"]
    page = trial.report()
    assert "What the operators do" not in page
    assert page.count("whether DeformUX&#39;s operator acts is not known") == 1
    for value, cautions in ((0.05, 2), (0.5, 0)):  # beside the hypothesis, and with the figure
        for training in mine:
            file = training.folder(comparison.folders.results) / "operators.jsonl"
            write_epoch(file, 0, {"offset_mean_level1": value})
        page = trial.report()
        assert "What the operators do" in page
        assert page.count("Caution: DeformUX&#39;s operator does not act, mean |offset|") == cautions
        assert "is not known, its trainings left" not in page
    table = (trial.output / "report" / "operators.csv").read_text().splitlines()
    assert len(table) == 1 + len(mine)
    assert table[1].endswith("3d_fullres,DeformUX,1,0,0,offset_mean_level1,0.5")

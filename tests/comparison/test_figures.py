import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread
from synthetic import make_experiment, make_scores

from nnunet_deform.comparison.analysis import analyse
from nnunet_deform.comparison.cost import Cost
from nnunet_deform.comparison.design import design_of
from nnunet_deform.comparison.report import figures

ARMS = ("New", "Old", "Third")


@pytest.fixture(scope="module")
def dataset():
    experiment = make_experiment(ARMS, statistics={"draws": 1000})
    return analyse(design_of(experiment), make_scores(experiment, {"New": 0.02}, patients=20), {}).datasets[0]


@pytest.mark.parametrize(
    ("costs", "scores", "front"),
    [
        ([1, 2, 3], [0.5, 0.6, 0.7], [0, 1, 2]),
        ([3, 2, 1], [0.5, 0.6, 0.7], [2]),
        ([1, 2, 3], [0.5, 0.4, 0.7], [0, 2]),
        ([1, 1, 2], [0.5, 0.6, 0.6], [1]),
        ([2], [0.1], [0]),
    ],
)
def test_pareto_front(costs, scores, front):
    assert figures.pareto_front(costs, scores) == front


def _all(dataset) -> dict[str, str]:
    dice = dataset.metrics["Dice"]
    costs = {arm: Cost(10**6, 10**9 * (n + 1), 10**8, 0.5 + n, 2.0) for n, arm in enumerate(ARMS)}
    curve = ([0, 1, 2], [1.0, 0.8, 0.7], [1.1, 0.9, 0.8])
    return {
        "distributions": figures.distributions(dataset, dice, "one"),
        "differences": figures.paired_differences(dataset, dice, {("New", "Old"): None}, 0.005, "two"),
        "ranking": figures.ranking_stability(dataset.arms, dice.ranking, "three"),
        "pareto": figures.pareto(dataset, dice, costs, "four"),
        "curves": figures.learning_curves(ARMS, {"New": [curve]}, "five"),
    }


def test_figures_take_the_pages_colour_and_share_no_identifiers(dataset):
    drawn = _all(dataset)
    identifiers = []
    for svg in drawn.values():
        assert svg.startswith("<svg")
        assert "currentColor" in svg
        assert "#010203" not in svg
        assert "<metadata" not in svg
        mine = re.findall(r'\bid="([^"]+)"', svg)
        assert set(re.findall(r'xlink:href="#([^"]+)"|url\(#([^)]+)\)', svg)) <= {
            pair for name in mine for pair in ((name, ""), ("", name))
        }
        identifiers += mine
    assert len(set(identifiers)) == len(identifiers)
    assert _all(dataset) == drawn  # nothing depends on the time or on chance


def test_figures_name_the_arms(dataset):
    drawn = _all(dataset)
    for name in ("distributions", "ranking", "pareto"):
        for arm in ARMS:
            assert f">{arm}<" in drawn[name]
    assert sorted(re.findall(r">(\w+ - \w+)<", drawn["differences"])) == ["New - Old", "New - Third", "Old - Third"]


def test_differences_are_drawn_as_they_are_tested(dataset):
    dice = dataset.metrics["Dice"]

    def drawn(metric):
        return figures.paired_differences(dataset, metric, {("New", "Old"): None}, None, "one")

    assert drawn(replace(dice, differences=dice.differences * 2)) != drawn(dice)
    assert drawn(replace(dice, scores=dice.scores * 2)) == drawn(dice)


def test_an_overlay_is_a_png():
    image = np.random.default_rng(0).normal(size=(20, 30))
    mask = np.zeros((20, 30), dtype=int)
    mask[5:10, 5:10] = 1
    empty, full = (figures.overlay(image, mask, prediction, [1, 2], (1.0, 2.0)) for prediction in (mask * 0, mask))
    assert empty.startswith("data:image/png;base64,iVBOR")
    assert empty != full
    # 20 x 60 mm: above and below the slice the page shows, whatever its colour
    pixels = imread(io.BytesIO(base64.b64decode(full.partition(",")[2])))
    assert (pixels[0, :, 3] == 0).all()
    assert (pixels[len(pixels) // 2, :, 3] == 1).all()

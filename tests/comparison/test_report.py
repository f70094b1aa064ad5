"""The page, made of scores with a known truth: parsed, and its numbers compared with those of the analysis."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from synthetic import CONFIGURATION, DATASET, make_experiment, make_scores

from nnunet_deform.comparison.analysis import analyse
from nnunet_deform.comparison.cost import Cost
from nnunet_deform.comparison.design import design_of
from nnunet_deform.comparison.metrics import METRICS
from nnunet_deform.comparison.parts import by_size, whole
from nnunet_deform.comparison.report import DatasetContent, ReportContent, Volumes, write_report
from nnunet_deform.comparison.report.cases import case_table
from nnunet_deform.comparison.report.cautions import cautions
from nnunet_deform.comparison.report.pictures import arm_row, case_rows, legend, pair_rows

ARMS = ("New", "Old", "Third")
_VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """Elements with their attributes and text; it fails where tags do not close as they opened."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data.strip()

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, *head: str) -> dict[str, list[str]]:
        """Of the first table whose heads begin so, the cells of each row by its first."""
        table = next(table for table in self.tables if tuple(table[0][: len(head)]) == head)
        return {row[0]: row[1:] for row in table[1:]}


def make_content(scores: pd.DataFrame | None = None, **changes) -> ReportContent:
    experiment = make_experiment(
        ARMS, hypotheses=[["New", "Old"], ["Third", "Old"]], statistics={"draws": 1000}, **changes
    )
    table = make_scores(experiment, {"New": 0.03}, patients=40) if scores is None else scores
    design = design_of(experiment)
    one_seed = table[(table["seed"] == 1) & table["case"].isin(sorted(set(table["case"]))[:12])]
    curve = ([0, 1], [1.0, 0.5], [1.1, 0.75])
    return ReportContent(
        name="synthetic <&>",
        design=design,
        analysis=analyse(design, table, {}),
        cases=table,
        test=one_seed.assign(fold=-1),
        datasets={
            (DATASET, CONFIGURATION): DatasetContent(
                labels={"front": 1, "back": 2},
                tolerances={"front": 1.0, "back": 2.5},
                costs={arm: Cost(10**6, 10**9, 10**8, 0.5 + n, 2.0) for n, arm in enumerate(ARMS)},
                curves={"New": [curve]},
            )
        },
        command="nnunet-deform compare run synthetic.yaml",
    )


@pytest.fixture(scope="module")
def content() -> ReportContent:
    return make_content()


@pytest.fixture(scope="module")
def folder(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, content)
    return folder


@pytest.fixture(scope="module")
def text(folder) -> str:
    return (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def test_the_page_is_well_formed_and_needs_nothing_else(page, text):
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    links = [attributes["href"] for attributes in page.of("a")]
    assert set(links) <= {f"#{identifier}" for identifier in identifiers}
    parts = [attributes["id"] for attributes in page.of("details")]
    assert {f"#{part}" for part in parts} <= set(links)
    # the parts of a dataset that are always there
    assert {f"d0-{part}" for part in (*METRICS, "sizes", "folds", "ranking", "cases", "test", "cost", "curves")} <= set(
        parts
    )
    assert not any("open" in attributes for attributes in page.of("details"))
    for _, attributes in page.elements:
        for key in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(key) or "#").startswith(("#", "data:"))
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "@import" not in text
    assert "synthetic &lt;&amp;&gt;" in text


def test_the_first_figure_says_what_was_declared_with_the_familys_intervals(content, page):
    alts = [attributes["aria-label"] for attributes in page.of("svg")]
    told = []
    for h in content.analysis.hypotheses:
        c = h.contrast
        kind = "New is better" if h.first == "New" else h.verdict.kind.value
        told.append(f"{h.first} - {h.second}, {kind}: {c.mean:+.4f} [{c.interval[0]:+.4f}, {c.interval[1]:+.4f}]")
    assert alts[0] == f"Declared differences in Dice with intervals. {'; '.join(told)}."
    cells = page.table("first - second")
    for h in content.analysis.hypotheses:
        low, high = h.contrast.interval
        assert cells[f"{h.first} - {h.second}"][1:3] == [f"{h.contrast.mean:+.4f}", f"{low:+.4f} to {high:+.4f}"]
    assert cells["New - Old"][0] == "better: New"
    assert cells["New - Old"][3] == "< 0.001"


def test_every_figure_is_described_with_numbers(page):
    alts = [attributes["aria-label"] for attributes in page.of("svg")]
    # verdicts; scores, classes and pairs of each metric; sizes, folds, ranks, cost, curves
    assert len(alts) == len(set(alts)) == 1 + 3 * len(METRICS) + 5
    assert all(re.search(r"\d", alt) and alt.endswith(".") for alt in alts)
    assert all(attributes["role"] == "img" for attributes in page.of("svg"))
    assert sum("New 0.500 and 0.750" in alt for alt in alts) == 1


def test_tables_show_the_analysis(content, page):
    (dataset,) = content.analysis.datasets
    arms, classes = page.table("arm", "Dice", "NSD at 1 mm (front), 2.5 mm (back)"), page.table("arm", "front")
    for position, arm in enumerate(ARMS):
        for column, (name, metric) in enumerate(dataset.metrics.items()):
            d = METRICS[name].decimals
            low, high = metric.intervals[:, position]
            assert arms[arm][column] == f"{metric.means[position]:.{d}f} [{low:.{d}f}, {high:.{d}f}]"
        dice = dataset.metrics["Dice"]
        for column in range(2):
            low, high = dice.by_class_intervals[:, position, column]
            assert classes[arm][column] == f"{dice.by_class[position, column]:.4f} [{low:.4f}, {high:.4f}]"
            assert low < dice.by_class[position, column] < high
    pairs = page.table("pair", "mean difference")
    for c in dataset.metrics["Dice"].contrasts:
        assert pairs[f"{c.first} - {c.second}"][:2] == [
            f"{c.mean:+.4f}",
            f"{c.interval[0]:+.4f} to {c.interval[1]:+.4f}",
        ]


def test_sizes_and_folds_and_the_test_set_are_estimated_as_all_is(content, page, folder):
    pairs = {("New", "Old"): False, ("Third", "Old"): False}
    sizes = by_size(content.cases, ARMS, pairs, "Dice", 0.05)[:1]  # all structures have one size here
    test = {name: whole(content.test, ARMS, pairs, name, 0.05) for name in METRICS}
    for head, parts in (
        (("arm", "small"), sizes),
        (("pair, difference", *("Dice", "NSD", "HD95 (mm)")), test.values()),
    ):
        cells = page.table(*head)
        for number, pair in enumerate(pairs):
            contrasts = [part.contrasts[number] for part in parts]
            assert cells[" - ".join(pair)] == [
                "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(c.mean, *c.interval, d=METRICS[c.metric].decimals)
                for c in contrasts
            ]
    assert len(page.table("arm", "fold 0", "fold 1", "fold 2", "fold 3", "fold 4")["New - Old"]) == 5
    rows = pd.read_csv(folder / "parts.csv")
    assert rows["of"].value_counts().to_dict() == {"fold": 10, "size": 6, "test set": 6}
    row = rows[(rows["of"] == "test set") & (rows["first"] == "New") & (rows["metric"] == "Dice")].iloc[0]
    assert (row["low"], row["high"]) == pytest.approx(test["Dice"].contrasts[0].interval)
    # one prediction each: nothing is known of how much trainings differ
    assert row["of trainings"] == 0
    assert math.isnan(row["smallest detectable"])


def test_the_table_of_cases_has_every_score(content, text):
    (dataset,) = content.analysis.datasets
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)[1])
    assert data["arms"] == list(ARMS)
    assert data["cases"] == list(dataset.cases)
    assert set(data["voxels"]) == {200}
    names = [choice["name"] for choice in data["choices"]]
    assert names == [
        "Dice, mean of classes",
        "Dice, front",
        "Dice, back",
        "NSD, mean of classes",
        "HD95, mean of classes",
    ]
    for choice in data["choices"]:
        name, _, question = choice["name"].partition(", ")
        scale = 10 ** choice["decimals"]
        assert choice["higher"] == METRICS[name].higher_is_better
        if question == "mean of classes":
            np.testing.assert_allclose(choice["scores"], scale * dataset.metrics[name].scores, atol=0.51)
    front = content.cases[(content.cases["label"] == "front") & (content.cases["arm"] == "Old")]
    means = front.groupby("case")["Dice"].mean().loc[list(dataset.cases)]
    np.testing.assert_allclose(data["choices"][1]["scores"][1], 1e4 * means, atol=0.51)


def test_without_a_script_the_worst_cases_are_there(content, page):
    (dataset,) = content.analysis.datasets
    cells = page.table("case", "patient")
    mean = dataset.metrics["Dice"].scores.mean(axis=0)
    worst = [dataset.cases[position] for position in np.argsort(mean)[:20]]
    assert list(cells) == worst
    assert cells[worst[0]][3:] == [f"{v:.4f}" for v in dataset.metrics["Dice"].scores[:, dataset.cases.index(worst[0])]]


def test_a_case_named_like_a_tag_stays_in_its_script(content):
    table = content.cases.assign(case=content.cases["case"] + "</script><b>")
    named = replace(content, cases=table)
    assert "</" not in case_table(named, content.analysis.datasets[0]).data


def test_patients_that_nobody_named_are_told(content, text):
    assert "no file says which cases belong to one patient" in text
    ((key, of_dataset),) = content.datasets.items()
    mapped = replace(content, datasets={key: replace(of_dataset, patients_mapped=True)})
    assert len(cautions(mapped)) == len(cautions(content)) - 1


def test_each_metric_has_its_own_band_and_nsd_its_tolerance(text):
    assert "band +-0.1 mm" in text
    assert "band +-0.005, tolerance 1 mm (front), 2.5 mm (back)" in text
    assert "Differences within +-0.1 mm count as equal." in text


def test_arms_that_hardly_learned_are_out_of_the_figures_scale(content, tmp_path):
    table = content.cases
    failed = table.assign(Dice=np.where(table["arm"] == "Third", table["Dice"] / 100, table["Dice"]))
    made = make_content(failed)
    page = Page(write_report(tmp_path, made).read_text())
    alts = [attributes["aria-label"] for attributes in page.of("svg")]
    assert alts[0].endswith("Third - Old, not comparable.")
    differences = next(alt for alt in alts if alt.startswith("Differences in Dice of pairs"))
    assert "Third" not in differences
    text = (tmp_path / "report.html").read_text()
    mean = made.analysis.datasets[0].metrics["Dice"].means[2]
    assert f"mean {mean:.4f}" in re.search(r"<svg.*?Scores of cases:", text, re.DOTALL)[0]
    assert "Without arms that hardly learned." in text


@pytest.mark.usefixtures("undrawn")
def test_several_datasets_are_ranked_one_by_one_and_then_together(content, tmp_path):
    experiment = make_experiment(ARMS)
    other = make_scores(experiment, {"Old": 0.05}, patients=20, seed=1).assign(dataset="Dataset502_Other")
    made = make_content(pd.concat([content.cases, other]))
    page = Page(write_report(tmp_path, made).read_text())
    ranks = page.table("arm", "mean rank")
    of_datasets = np.array([d.metrics["Dice"].ranking.ranks for d in made.analysis.datasets])
    for position, arm in enumerate(ARMS):
        mine = of_datasets[:, position]
        assert ranks[arm] == [f"{mine.mean():.2f}", *(f"{rank:g}" for rank in mine)]
    assert of_datasets[:, 0].tolist() == [1, 3] or of_datasets[0, 0] == 1
    assert len({attributes["id"] for attributes in page.of("details") if attributes["id"].startswith("d1-")}) >= 7


@pytest.mark.usefixtures("undrawn")
def test_parts_that_are_empty_are_left_out(content, tmp_path):
    design = replace(content.design, hypotheses=())
    analysis = analyse(design, content.cases, {})
    bare = replace(content, design=design, analysis=analysis, datasets={}, test=content.test[:0])
    page = Page(write_report(tmp_path, bare).read_text())
    parts = {attributes["id"] for attributes in page.of("details")}
    assert not parts & {f"d0-{part}" for part in ("pictures", "test", "cost", "curves", "operators")}
    assert not parts & {"numbers", "provenance", "source"}
    assert {"d0-cases", "method", "commands"} <= parts
    # without hypotheses there are differences and no verdicts
    assert "No comparison was declared" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "hypotheses.csv").exists()
    assert set(page.table("arm", "fold 0")) >= {"New - Old", "New - Third"}


@pytest.fixture
def drawn(content) -> tuple[DatasetContent, dict[tuple[str, str], int]]:
    """Volumes whose prediction errs in one slice, another for each arm, and how often each was asked for."""
    asked: dict[tuple[str, str], int] = {}
    truth = np.zeros((6, 8, 8), dtype=int)
    truth[1, 2:7, 2:7], truth[2, 2:4, 2:4] = 1, 2

    def volumes(arm: str, case: str) -> Volumes | None:
        asked[arm, case] = asked.get((arm, case), 0) + 1
        if arm == "Third":
            return None
        prediction = truth.copy()
        prediction[3 if arm == "New" else 4, 2:5, 2:5] = 1
        return Volumes(np.arange(384.0).reshape(6, 8, 8), truth, prediction, (3.0, 1.0, 1.0))

    ((_, of_dataset),) = content.datasets.items()
    return replace(of_dataset, volumes=volumes), asked


def test_worst_cases_are_those_of_the_scores(content, drawn):
    (dataset,), (mine, asked) = content.analysis.datasets, drawn
    dice = dataset.metrics["Dice"]
    worst, median = case_rows(dataset, dice, mine)
    order = np.argsort(dice.scores.mean(axis=0))
    assert {p.case for p in worst.pictures} == {dataset.cases[order[0]]}
    assert {p.case for p in median.pictures} == {dataset.cases[order[len(order) // 2]]}
    # of all arms: the slice with most of the truth
    assert [p.alt.split(":")[0] for p in worst.pictures[:2]] == [f"{worst.pictures[0].case}, slice 2"] * 2
    assert [p.url is None for p in worst.pictures] == [False, False, True]
    of_arms = arm_row(dataset, dice, mine).pictures
    assert [p.case for p in of_arms] == [dataset.cases[row.argmin()] for row in dice.scores]
    assert [p.score for p in of_arms] == [f"{row.min():.4f}" for row in dice.scores]
    # of one arm: the slice where it errs most
    assert [", slice 4:" in of_arms[0].alt, ", slice 5:" in of_arms[1].alt] == [True, True]
    (pair,) = pair_rows(dataset, dice, mine, [("New", "Old")])
    differences = dice.scores[0] - dice.scores[1]
    assert [(p.arm, p.case) for p in pair.pictures] == [
        ("New", dataset.cases[differences.argmin()]),
        ("Old", dataset.cases[differences.argmin()]),
        ("Old", dataset.cases[differences.argmax()]),
        ("New", dataset.cases[differences.argmax()]),
    ]
    assert [int(p.alt.split("slice ")[1].split(":")[0]) for p in pair.pictures] == [4, 4, 5, 5]
    assert len(asked) >= 6


def test_pictures_have_legends_and_alternative_texts(content, drawn, tmp_path):
    ((key, _),) = content.datasets.items()
    text = write_report(tmp_path, replace(content, datasets={key: drawn[0]})).read_text()
    page = Page(text)
    # three rows of all, each arm's worst, and two pairs of two cases each
    assert len(page.of("img")) == 2 + 2 + 2 + 4 + 2
    assert all(re.search(r"Dice 0\.\d{4}$", attributes["alt"]) for attributes in page.of("img"))
    assert text.count("The prediction is no longer there.") == 1 + 1 + 1 + 2
    names = legend(drawn[0])
    assert [name for name, _ in names] == ["front", "back"]
    for _, colours in names:
        assert text.count(f'<i style="background: {colours[0]}"></i>') == 2
    assert legend(replace(drawn[0], labels={"whole": (1, 2), "core": 2}))[0][1] == [names[0][1][0], names[1][1][0]]

"""The search for learning rates: equal tries, nothing trained twice, the best chosen, the same patients each time."""

import importlib
import json
import os
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("NNUNET_DEFORM_TEST_DATA") or REPOSITORY.parent / "shared" / "data")


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("recipes")


@pytest.fixture
def trained(recipes, monkeypatch) -> list:
    """The jobs that were trained, with a Dice that is highest at 5e-3, and higher with offsets at three times it."""
    jobs = []

    def run(job, prepared) -> dict:
        jobs.append(job)
        result = {**recipes.asdict(job), "trainer": job.trainer}
        if job.rate == 1.6e-2 and job.seed == 1:
            return {**result, "stopped": "Training stopped in epoch 0"}
        dice = 0.8 - abs(job.rate - 5e-3) + 0.001 * job.seed + {1: 0, 3: 0.01, 10: -0.01}[job.offset_factor]
        return {**result, "dice": dice, "loss": -dice, "seconds": {}, "cases": {}}

    monkeypatch.setattr(recipes, "run", run)
    return jobs


@pytest.mark.parametrize(
    ("network", "further", "chosen"),
    [
        ("stock", [(2.8e-3, 1), (8.9e-3, 1)], (5e-3, 1)),
        ("LightMedSeg", [(2.8e-3, 1), (8.9e-3, 1)], (5e-3, 1)),
        ("MAGIC", [(2.8e-3, 1), (8.9e-3, 1)], (5e-3, 1)),
        ("DeformUX", [(5e-3, 3), (5e-3, 10)], (5e-3, 3)),
    ],
)
def test_six_tries_for_every_network(recipes, trained, tmp_path, network, further, chosen) -> None:
    results = recipes.Results(tmp_path / "results" / "recipes.jsonl", 500, [0, 1])
    tries = recipes.search(network, results, tmp_path)
    assert [(one.rate, one.offset_factor) for one in tries] == [(rate, 1) for rate in recipes.RATES] + further
    assert [(job.rate, job.offset_factor, job.seed) for job in trained] == [
        (one.rate, one.offset_factor, seed) for one in tries for seed in (0, 1)
    ]
    assert results.best(tries) == recipes.Try(network, *chosen)
    (row,) = [line for line in recipes.table(tries, results).splitlines() if "**" in line]
    assert row.startswith(f"| **{network}** | **5e-3** | ")
    assert "| 1.6e-2 |" in recipes.table(tries, results)
    assert "stopped | 0.7890, stopped | " in recipes.table(tries, results)


def test_what_is_done_is_not_trained_again(recipes, trained, tmp_path) -> None:
    file = tmp_path / "recipes.jsonl"
    recipes.search("stock", recipes.Results(file, 500, [0, 1]), tmp_path)
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == len(trained) == 12
    # Killed after the fifth training.
    file.write_text("".join(lines[:5]))
    before = list(trained)
    trained.clear()
    recipes.search("stock", recipes.Results(file, 500, [0, 1]), tmp_path)
    assert trained == before[5:]
    # A different length is another search.
    recipes.search("stock", recipes.Results(file, 100, [0, 1]), tmp_path)
    assert {job.steps for job in trained[7:]} == {100}
    assert len(trained) == 7 + 12
    file.write_text(lines[0] + lines[1][:30])
    with pytest.raises(SystemExit, match=r"recipes\.jsonl:2 is no result"):
        recipes.search("stock", recipes.Results(file, 500, [0, 1]), tmp_path)


def test_the_trainers_of_all_tries_exist(recipes) -> None:
    from nnunet_deform.trainers.variants import find_trainer

    for network in recipes.NETWORKS:
        tries = [*(recipes.Try(network, rate) for rate in recipes.RATES), *recipes.further_tries(network, 4e-3)]
        for one in tries:
            name = recipes.Job(one.network, one.rate, one.offset_factor, seed=1, steps=500).trainer
            found = find_trainer(name)
            assert found.learning_rate == one.rate
            assert (found.variant_epochs, found.variant_iterations, found.seed) == (1, 500, 1)
            assert getattr(found, "offset_rate", 1) == one.offset_factor


def test_rates_are_spelled_in_two_digits(recipes) -> None:
    rates = [5e-4, 1e-3, 4e-3 / 2**0.5, 4e-3 * 2**0.5, 1.6e-2, 1.6e-2 * 2**0.5]
    assert [recipes.spelled(rate) for rate in rates] == ["5e-4", "1e-3", "2.8e-3", "5.7e-3", "1.6e-2", "2.3e-2"]


def test_the_listed_patients() -> None:
    listed = json.loads((REPOSITORY / "docs" / "recipes" / "patients.json").read_text())
    train, validation = listed["train"], listed["validation"]
    assert (len(train), len(validation)) == (20, 10)
    assert not train.keys() & validation.keys()
    for number, cases in (train | validation).items():
        assert cases
        assert {(int(case[-3:]) + 1) // 2 for case in cases} == {int(number)}


needs_data = pytest.mark.skipif(not (DATA / "Dataset004_Hippocampus").exists(), reason=f"no Hippocampus data in {DATA}")


@needs_data
def test_the_listed_patients_are_those_drawn(recipes) -> None:
    def cases(folder: str) -> list[str]:
        return [file.name.removesuffix(".nii.gz") for file in (DATA / recipes.DATASET / folder).iterdir()]

    drawn = recipes.draw_patients(cases("labelsTr"), cases("labelsTs"))
    assert drawn == json.loads(recipes.PATIENTS.read_text())
    tested = {(int(case[-3:]) + 1) // 2 for case in cases("labelsTs")}
    assert not tested & {int(number) for people in drawn.values() for number in people}


@pytest.mark.slow
@needs_data
def test_a_real_search_of_two_steps(recipes, tmp_path, monkeypatch, capsys) -> None:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path))
    monkeypatch.setattr(recipes, "RATES", (1e-3,))
    output = tmp_path / "recipes.jsonl"
    arguments = [
        "--data",
        str(DATA),
        "--work",
        str(tmp_path / "work"),
        "--output",
        str(output),
        "--only",
        "LightMedSeg",
    ]
    recipes.main([*arguments, "--steps", "2", "--seeds", "0"])
    printed = capsys.readouterr().out
    assert printed.count("\n| LightMedSeg |") + printed.count("\n| **LightMedSeg** |") == 3
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [result["rate"] for result in results] == [1e-3, 7.1e-4, 1.4e-3]
    assert all(len(result["cases"]) == 16 for result in results)
    # The same command trains nothing, and gives the same table.
    monkeypatch.setattr(recipes, "run", None)
    recipes.main([*arguments, "--steps", "2", "--seeds", "0"])
    assert capsys.readouterr().out == printed

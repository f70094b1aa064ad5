"""Made-up tasks: they have the property they are made for, mutants do nothing, and verdicts are right."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from nnunet_deform.comparison.verdicts import Kind

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("phantom_tasks")


@pytest.fixture
def training(tasks) -> ModuleType:
    return importlib.import_module("phantom_training")


@pytest.fixture
def evidence(tasks) -> ModuleType:
    return importlib.import_module("phantom_evidence")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nearby(changed: torch.Tensor, reach: int) -> torch.Tensor:
    """Pixels [n, height, width] with a changed one in the square of 2 reach + 1 pixels around them."""
    return torch.nn.functional.max_pool2d(changed.float().unsqueeze(1), 2 * reach + 1, 1, reach)[:, 0] > 0


@pytest.mark.parametrize("name", ["distortion", "contrast changes"])
def test_the_twin_reaches_as_far_as_the_task_says(tasks, name) -> None:
    task = tasks.TASKS[name]
    twin = task.network(0, operator=False, norms=False)
    farthest = 0
    for row, column in [(12, 30), (12, 31), (13, 30), (13, 31)]:
        images = task.draw(1, generator()).images.requires_grad_()
        (gradient,) = torch.autograd.grad(twin(images)[0, :, row, column].square().sum(), images)
        rows, columns = torch.nonzero(gradient[0].abs().sum(0), as_tuple=True)
        farthest = max(farthest, int((rows - row).abs().max()), int((columns - column).abs().max()))
    assert farthest == task.reach


def test_a_distorted_disc_is_beyond_the_twins_reach(tasks) -> None:
    task = tasks.TASKS["distortion"]
    count = 40
    shift = task.draw(count, generator()).cause
    # As the task draws them.
    centres = torch.rand(count, 2, 2, generator=generator(2)) * torch.tensor([24, 28]) + torch.tensor([0, 18])
    radii = 2.5 + 1.5 * torch.rand(count, 2, generator=generator(3))
    noise = task.noise * torch.randn(shift.shape, generator=generator(1))
    two, one = (task.rendered(centres[:, :discs], radii[:, :discs], shift, noise) for discs in (2, 1))
    asked = (two.labels != one.labels)[:, 0]
    unseen = asked & ~nearby((two.images != one.images).any(1), task.reach)
    # Half of the pixels of the disc that is taken away have nothing of it in reach: only their label changes.
    assert unseen.sum() > 0.5 * asked.sum()
    twin = task.network(0, operator=False, norms=False).eval()
    network = task.network(0, norms=False).eval()
    torch.nn.init.normal_(network.encoder.stages[0][0].branches[0][1].offset.weight, std=3, generator=generator())
    with torch.no_grad():
        changes = [(net(two.images) - net(one.images)).abs().sum(1)[unseen] for net in (twin, network)]
    assert changes[0].max() < 1e-6
    assert changes[1].max() > 1e-3
    # The map says where to look: along the row, as many pixels away.
    phantoms = task.draw(8, generator())
    assert torch.equal(phantoms.images[:, 1] * task.largest_shift, phantoms.cause)
    there = (torch.arange(task.size[1]) + phantoms.cause).round().long().clamp(0, task.size[1] - 1)
    found = (phantoms.images[:, 0].gather(2, there) > 0).unsqueeze(1)
    assert (found == phantoms.labels).float().mean() > 0.98
    assert phantoms.cause.abs().max() == pytest.approx(task.largest_shift, abs=0.05)


def test_an_undistorted_disc_is_where_it_is_seen(tasks) -> None:
    phantoms = tasks.TASKS["no distortion"].draw(8, generator())
    assert ((phantoms.images[:, :1] > 0) == phantoms.labels).float().mean() > 0.98
    distorted = tasks.TASKS["distortion"].draw(8, generator())
    assert torch.equal(distorted.labels, phantoms.labels)
    assert torch.equal(distorted.cause, phantoms.cause)


@pytest.mark.parametrize("name", ["contrast changes", "large tube"])
def test_only_the_tube_tells_which_structures_are_diseased(tasks, name) -> None:
    task = tasks.TASKS[name]
    count = 4
    tube = torch.ones(count)
    structures = torch.where(torch.rand(count, 12, generator=generator()) < 0.5, 1.0, -1.0)
    jitter = torch.zeros(count, 12, 2)
    radii = torch.full((count, 12), 4.0)
    noise = task.noise * torch.randn(count, *task.size, generator=generator(1))
    bright, dark = (task.rendered(sign * tube, structures, jitter, radii, noise) for sign in (1, -1))
    asked = (bright.labels + dark.labels)[:, 0]
    # Every structure is diseased in exactly one of the two scans, and neither scan shows it otherwise than the other.
    assert set(asked.unique().tolist()) == {0, 1}
    assert torch.equal(task.rendered(tube, tube[:, None].expand(-1, 12), jitter, radii, noise).labels[:, 0], asked)
    changed = (bright.images != dark.images).any(1)
    assert changed.any()
    assert not (nearby(changed, task.reach) & (asked > 0)).any()
    twin, network = (task.network(0, operator=operator, norms=False).eval() for operator in (False, True))
    with torch.no_grad():
        changes = [(one(bright.images) - one(dark.images)).abs().sum(1)[asked > 0] for one in (twin, network)]
    assert changes[0].max() < 1e-6
    assert changes[1].min() > 1e-6
    assert changes[1].max() > 1e-3


def test_instance_norm_tells_the_twin_of_the_tube_and_batch_norm_does_not(tasks) -> None:
    changes = []
    for name in ("large tube", "large tube, BatchNorm"):
        task = tasks.TASKS[name]
        phantoms = task.draw(4, generator())
        other = phantoms.images.clone()
        other[:, :, :12, :12] *= -1
        twin = task.network(0, operator=False).eval()
        with torch.no_grad():
            changes.append((twin(other) - twin(phantoms.images)).abs()[..., task.free :].max())
    assert changes[0] > 0.05
    assert changes[1] == 0


def test_the_tube_means_nothing_where_contrast_stays(tasks) -> None:
    changing, fixed = (tasks.TASKS[name].draw(16, generator()) for name in ("contrast changes", "contrast stays"))
    assert torch.equal(changing.images, fixed.images)
    same = (changing.labels == fixed.labels).all(3).all(2)[:, 0]
    assert torch.equal(same, changing.cause == 1)
    assert 0 < same.sum() < 16
    assert (changing.labels.sum((1, 2, 3)) > 0).all()
    assert (fixed.labels.sum((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("name", ["distortion", "contrast changes"])
def test_the_mutant_is_the_twin_whatever_its_operator_has_learned(tasks, name) -> None:
    task = tasks.TASKS[name]
    network, twin = (task.network(5, operator=operator).eval() for operator in (True, False))
    ours = dict(network.named_parameters())
    shared = [parameter.equal(ours[key]) for key, parameter in twin.named_parameters() if "attention" not in key]
    assert len(shared) > 10
    assert all(shared)
    for key, parameter in ours.items():
        if ".offset." in key or "fusion" in key:
            torch.nn.init.normal_(parameter, generator=generator())
    images = task.draw(2, generator()).images
    with torch.no_grad():
        with task.switched_off():
            broken = network(images)
        alike, different = twin(images), network(images)
    torch.testing.assert_close(broken, alike, rtol=1e-3, atol=1e-3)
    assert (different - alike).abs().max() > 0.1


def test_what_an_operator_has_found_out(tasks, training) -> None:
    task = tasks.TASKS["distortion"]
    phantoms = task.draw(4, generator())
    assert training.observed(task, task.network(0, operator=False), phantoms) == {}
    network = task.network(0)
    conv = network.encoder.stages[0][0].branches[0][1]
    # Tap 4 follows the shift to the half, and all others move by two pixels across the rows.
    conv.offsets = lambda x: _offsets(phantoms.cause)
    found = training.observed(task, network, phantoms)
    assert found["follows"] == pytest.approx([0] * 4 + [0.5] + [0] * 4)
    assert found["across"] == pytest.approx(16 / 9)
    task = tasks.TASKS["contrast changes"]
    shares = np.array(training.observed(task, task.network(0), task.draw(16, generator()))["shares"])
    assert shares.shape == (2, 4)
    assert shares.sum(1) == pytest.approx([1, 1])
    assert np.abs(shares[0] - shares[1]).max() > 0


def _offsets(shift: torch.Tensor) -> torch.Tensor:
    values = torch.zeros(len(shift), 9, 2, *shift.shape[1:])
    values[:, :, 0] = 2
    values[:, 4, 0] = 0
    values[:, 4, 1] = shift / 2
    return values.flatten(1, 2)


def test_dice(training) -> None:
    labels = torch.zeros(2, 1, 4, 4)
    labels[:, :, :2] = 1
    prediction = torch.zeros(2, 1, 4, 4, dtype=torch.int64)
    prediction[0, :, 1:3] = 1
    assert training.dice_of(prediction, labels) == pytest.approx([0.5, 0])


def scores(mean: float, seed: int) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    values = (
        mean + rng.normal(0, 0.001, (7, 1)) + np.random.default_rng(0).normal(0, 0.05, 40) + rng.normal(0, 0.002, 40)
    )
    return values.tolist()


def test_verdicts_are_those_of_a_comparison(evidence) -> None:
    kinds = {}
    for gain in (0.1, 0.0, -0.1):
        contrast, verdict = evidence.verdict_of("network", scores(0.7 + gain, 1), scores(0.7, 2), evidence.FAMILY)
        kinds[gain] = (verdict.kind, verdict.winner)
        assert contrast.mean == pytest.approx(gain, abs=0.002)
        assert (contrast.patients, contrast.training_freedoms, contrast.family) == (40, (6,), 6)
    assert kinds == {0.1: (Kind.BETTER, "network"), 0.0: (Kind.EQUIVALENT, None), -0.1: (Kind.BETTER, "twin")}
    assert evidence.verdict_of("network", scores(0.9, 1)[:6], scores(0.7, 2)[:6], 6)[1].kind is Kind.UNDECIDED
    nothing = [[0.0] * 40] * 7
    assert evidence.verdict_of("network", scores(0.9, 1), nothing, 6)[1].kind is Kind.NOT_COMPARABLE
    helped, harmless = evidence.PAIRS[0], evidence.PAIRS[1]
    better = evidence.verdict_of("network", scores(0.8, 1), scores(0.7, 2), 6)[1]
    worse = evidence.verdict_of("network", scores(0.6, 1), scores(0.7, 2), 6)[1]
    same = evidence.verdict_of("network", scores(0.7, 1), scores(0.7, 2), 6)[1]
    assert [helped.is_right(verdict) for verdict in (better, worse, same)] == [True, False, False]
    assert [harmless.is_right(verdict) for verdict in (better, worse, same)] == [False, False, True]


@pytest.fixture
def fake_runs(evidence, monkeypatch) -> list[tuple[str, str, int]]:
    """The trainings that were asked for, each with a Dice by its arm."""
    runs = []

    def run(name: str, task, arm: str, seed: int) -> dict:
        runs.append((name, arm, seed))
        helps = task.needed and arm == "network"
        settings = {"task": name, "arm": arm, "seed": seed, **evidence.asdict(task)}
        return {**settings, "dice": scores(0.9 if helps else 0.7, seed)[0], "operator": {}, "seconds": 1.0}

    monkeypatch.setattr(evidence, "run", run)
    return runs


def test_what_is_done_is_not_trained_again(evidence, fake_runs, tmp_path, capsys) -> None:
    output = tmp_path / "results" / "phantoms.jsonl"
    evidence.main(["--output", str(output)])
    printed = capsys.readouterr().out
    # Six tasks with network and twin, two of them with a mutant.
    assert len(fake_runs) == len(set(fake_runs)) == 14 * 7
    assert printed.count("**network better**") == 4
    assert printed.count("| yes |") == 6
    assert "NO" not in printed
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:10]))
    assert evidence.table(evidence.read(output), evidence.PAIRS).count("not trained yet") == len(evidence.PAIRS)
    fake_runs.clear()
    evidence.main(["--output", str(output)])
    assert capsys.readouterr().out == printed
    assert len(fake_runs) == 14 * 7 - 10
    dice = {seed: float(np.mean(scores(0.9, seed)[0])) for seed in evidence.TASKS["distortion"].seeds}
    median = evidence.median_seed(evidence.read(output), "distortion")
    assert sorted(dice.values())[3] == dice[median]
    changed = {**json.loads(lines[0]), "steps": 7}
    output.write_text(json.dumps(changed) + "\n")
    with pytest.raises(SystemExit, match=r"phantoms\.jsonl:1 has other settings"):
        evidence.main(["--output", str(output)])


def test_the_page_shows_what_the_committed_trainings_say(evidence) -> None:
    done = evidence.read(evidence.OUTPUT)
    assert evidence.table(done, evidence.PAIRS) in evidence.PAGE.read_text()
    assert all(seed in evidence.TASKS[name].seeds for name, _, seed in done)


def test_pictures(evidence, training, tmp_path, monkeypatch) -> None:
    pictures = importlib.import_module("phantom_pictures")

    def untrained(task, arm, seed):
        return task.network(seed, operator=arm != "twin").eval()

    monkeypatch.setattr(pictures, "trained", untrained)
    pictures.draw_pictures(tmp_path, {"distortion": 1, "contrast changes": 2})
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert sizes.keys() == {"phantoms_distortion.png", "phantoms_contrast.png"}
    assert all(20_000 < size < 300_000 for size in sizes.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distortion", "contrast changes"])
def test_the_operator_helps_where_it_must_and_the_mutant_does_not(evidence, training, name) -> None:
    """The page's trainings of both tasks once more, 6 minutes of a core: with fewer steps some seeds learn nothing."""
    task = evidence.TASKS[name]
    dice = {
        arm: [training.run(name, task, arm, seed)["dice"] for seed in task.seeds]
        for arm in ("network", "mutant", "twin")
    }
    verdicts = {arm: evidence.verdict_of(arm, dice[arm], dice["twin"], evidence.FAMILY)[1] for arm in dice}
    assert (verdicts["network"].kind, verdicts["network"].winner) == (Kind.BETTER, "network")
    assert verdicts["mutant"].kind in evidence.NO_HELP

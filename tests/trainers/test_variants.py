import os
import pickle
import random

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_deform import activation, trainers
from nnunet_deform.trainers.checkpoints import AtomicCheckpoints
from nnunet_deform.trainers.numerical_guard import NumericalGuard
from nnunet_deform.trainers.variants import find_trainer

VARIANTS = [
    "nnUNetTrainer_AdamW",
    "nnUNetTrainer_AdamW_4epochs20iters_seed1",
    "nnUNetTrainerDeformUX_3epochs",
    "nnUNetTrainerDeformUX_seed0",
    "nnUNetTrainerDeformUX_paper_2epochs3iters",
    "nnUNetTrainerNoDeepSupervision_AdamW_7epochs_seed12",
    "nnUNetTrainerLightMedSeg_AdamW_3epochs_seed2",
    "nnUNetTrainerLightMedSegStandard_4epochs20iters",
    "nnUNetTrainer_unmirrored",
    "nnUNetTrainer_AdamW_4epochs20iters_seed1_unmirrored",
    "nnUNetTrainer_lr1e-3",
    "nnUNetTrainerDeformUX_recompute",
    "nnUNetTrainerLightMedSeg_w2_recompute_AdamW_lr8e-3_4epochs20iters_seed1_unmirrored",
    "nnUNetTrainerLightMedSeg_AdamW_lr8e-3",
    "nnUNetTrainerDeformUX_AdamW_lr1.6e-2_4epochs20iters_seed1_unmirrored",
    "nnUNetTrainerMAGIC_AdamW_lr0.016_4epochs20iters_seed1",
]


@pytest.fixture(autouse=True)
def _active(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(activation.VARIABLE, activation.extension_folder())


@pytest.mark.parametrize("name", [*trainers.__all__, *VARIANTS])
def test_a_name_is_the_same_picklable_class_each_time(name: str) -> None:
    found = find_trainer(name)
    assert found.__name__ == name
    assert issubclass(found, nnUNetTrainer)
    assert issubclass(found, AtomicCheckpoints)
    assert issubclass(found, NumericalGuard)
    assert find_trainer(name) is found
    assert pickle.loads(pickle.dumps(found)) is found


# nnU-Net walks through its own folder each time, and then asks find_trainer: a trainer of a network, of a baseline and
# of a rival, and variants of ours and of nnU-Net's.
FOUND = ("nnUNetTrainerDeformUX", "nnUNetTrainerSwinUNETR", "nnUNetTrainerCoTr", *VARIANTS[:2], VARIANTS[-1])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FOUND else pytest.mark.slow) for name in (*trainers.__all__, *VARIANTS)],
)
def test_nnunet_finds_the_same_class(name: str) -> None:
    assert recursive_find_trainer_class_by_name(name) is find_trainer(name)


# As a process that has imported nothing of ours reads pickled classes.
ELSEWHERE = """
import pickle, sys
assert not [name for name in sys.modules if name.startswith("nnunet_deform")]
print([getattr(one, sys.argv[2]) for one in pickle.loads(bytes.fromhex(sys.argv[1]))])
"""


def test_another_process_unpickles_variants_also_of_a_trainer_in_the_users_own_folder(
    fresh_processes, tmp_path, monkeypatch
) -> None:
    """README's example; without this it could be no arm of a comparison, which appends ``_seed``."""
    names = ["nnUNetTrainerDeformUX_AdamW_2epochs3iters_seed5", "nnUNetTrainerDeformUX_AdamW_lr1.6e-2_2epochs_seed5"]

    def read_elsewhere(folders: str, classes: list[type], attribute: str) -> str:
        return fresh_processes.run(
            ["-c", ELSEWHERE, pickle.dumps(classes).hex(), attribute],
            output=tmp_path / "printed",
            environment={**os.environ, activation.VARIABLE: folders},
        ).splitlines()[-1]

    classes = [find_trainer(name) for name in names]
    assert read_elsewhere(activation.extension_folder(), classes, "__name__") == str(names)
    mine = """
from nnunet_deform.trainers import nnUNetTrainerDeformUX


class nnUNetTrainerDeformUX_k5(nnUNetTrainerDeformUX):
    network_options = {"kernel_size": 5}
"""
    (tmp_path / "mine.py").write_text(mine)
    for folders in ([activation.extension_folder(), str(tmp_path)], [str(tmp_path), activation.extension_folder()]):
        monkeypatch.setenv(activation.VARIABLE, os.pathsep.join(folders))
        classes = []
        for name in (
            "nnUNetTrainerDeformUX_k5_seed3",
            "nnUNetTrainerDeformUX_k5_AdamW_4epochs20iters_seed1_unmirrored",
        ):
            found = recursive_find_trainer_class_by_name(name)
            assert found.__name__ == name
            assert found.network_options == {"kernel_size": 5}
            assert recursive_find_trainer_class_by_name(name) is found
            classes.append(found)
    assert read_elsewhere(os.environ[activation.VARIABLE], classes, "network_options") == str([{"kernel_size": 5}] * 2)


@pytest.mark.parametrize(
    "name",
    [
        "nnUNetTrainerNobody",
        "nnUNetTrainerNobody_AdamW",
        "nnUNetTrainer_seed1_AdamW",
        "nnUNetTrainerDeformUX_4epochs_AdamW",
        "nnUNetTrainerDeformUX_seed1_4epochs",
        "nnUNetTrainerDeformUX_0epochs",
        "nnUNetTrainerDeformUX_4epochs0iters",
        "nnUNetTrainerDeformUX_20iters",
        "nnUNetTrainerDeformUX_seed01",
        "nnUNetTrainerDeformUX_seed",
        "nnUNetTrainerDeformUX__AdamW",
        "nnUNetTrainerDeformUX_unmirrored_seed1",
        "nnUNetTrainerDeformUX_lr8e-3_AdamW",
        "nnUNetTrainerDeformUX_AdamW_recompute",
        "nnUNetTrainerDeformUX_4epochs_lr8e-3",
        "nnUNetTrainerDeformUX_lr8e-3_lr8e-3",
        "nnUNetTrainerNobody_lr8e-3",
        "DeformUX_AdamW",
    ],
)
def test_other_names_are_left_to_other_folders(name: str) -> None:
    with pytest.raises(AttributeError, match=name.split("_")[0]):
        find_trainer(name)


@pytest.mark.parametrize("rate", ["", "fast", "0", "0.0e-3", "-1e-3", "nan", "inf", "1e999", "1e-999", "8e", "1,6e-2"])
def test_a_rate_that_is_no_positive_number(rate) -> None:
    for suffixes in ("_AdamW_lr{}", "_lr{}_4epochs_seed1"):
        name = "nnUNetTrainerLightMedSeg" + suffixes.format(rate)
        with pytest.raises(AttributeError, match=f"^the learning rate '{rate}' after _lr is not a positive"):
            find_trainer(name)


def test_recompute_is_an_option_of_the_network() -> None:
    assert find_trainer("nnUNetTrainerDeformUX_recompute_seed1").network_options == {"recompute": "blocks"}
    base = trainers.nnUNetTrainerMAGICResEnc
    assert find_trainer("nnUNetTrainerMAGICResEnc_recompute").network_options == {
        **base.network_options,
        "recompute": "blocks",
    }
    assert "recompute" not in base.network_options


@pytest.mark.parametrize("base", ["nnUNetTrainer", "nnUNetTrainerNnFormer", "nnUNetTrainerPrimusV2_S"])
def test_networks_that_recompute_no_blocks(base) -> None:
    with pytest.raises(AttributeError, match=f"^the network of {base} does not recompute blocks; leave out _recompute"):
        find_trainer(f"{base}_recompute_seed1")


def test_built_in_names_win() -> None:
    assert recursive_find_trainer_class_by_name("nnUNetTrainer_5epochs").__module__.startswith("nnunetv2.")


@pytest.mark.parametrize(
    ("name", "epochs", "iterations", "validation_iterations", "save_every"),
    [
        ("nnUNetTrainerDeformUX", 1000, 250, 50, 50),
        ("nnUNetTrainerDeformUX_paper", 160, 250, 50, 50),
        ("nnUNetTrainerDeformUX_3epochs", 3, 250, 50, 1),
        ("nnUNetTrainerDeformUX_4epochs20iters", 4, 20, 4, 1),
        ("nnUNetTrainerDeformUX_100epochs3iters", 100, 3, 1, 25),
        ("nnUNetTrainer_1000epochs7iters_seed2", 1000, 7, 1, 50),
        ("nnUNetTrainer_2000epochs", 2000, 250, 50, 50),
    ],
)
def test_lengths(make_trainer, name, epochs, iterations, validation_iterations, save_every) -> None:
    trainer = make_trainer(find_trainer(name))
    assert trainer.num_epochs == epochs
    assert trainer.num_iterations_per_epoch == iterations
    assert trainer.num_val_iterations_per_epoch == validation_iterations
    assert trainer.save_every == save_every


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("name", "warmup"),
    [
        ("nnUNetTrainer_AdamW", 10),
        ("nnUNetTrainerDeformUX_AdamW_4epochs20iters", 0.4),
        ("nnUNetTrainerDeformUX_AdamW_100epochs", 10),
        ("nnUNetTrainerDeformUX_AdamW_2000epochs", 10),
    ],
)
def test_adamw_recipe(make_trainer, name, warmup) -> None:
    trainer = make_trainer(find_trainer(name))
    trainer.initialize()
    assert trainer.warmup_epochs == warmup
    assert trainer.initial_lr == 1e-3
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    decayed, exempt = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (1e-4, 0.0)
    names = {id(p): n for n, p in trainer.network.named_parameters()}
    assert {names[id(p)] for p in exempt["params"]} == {n for n, p in trainer.network.named_parameters() if p.ndim <= 1}
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)


def test_adamw_rate_changes_with_each_iteration(make_trainer) -> None:
    trainer = make_trainer(find_trainer("nnUNetTrainer_AdamW_2epochs5iters"))
    rates = []
    stock_step = nnUNetTrainer.train_step

    def record(self, batch):
        rates.append(self.optimizer.param_groups[0]["lr"])
        return stock_step(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nnUNetTrainer, "train_step", record)
        trainer.run_training()
    # A warm-up of 0.2 epochs is one iteration: the first has the full rate, the tenth is the cosine's end.
    cosine = [1e-6 + (1e-3 - 1e-6) * (1 + torch.cos(torch.tensor(torch.pi * i / 9)).item()) / 2 for i in range(10)]
    assert rates == pytest.approx(cosine, rel=1e-6)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("name", "optimizer", "rate"),
    [
        ("nnUNetTrainer_AdamW_lr8e-3", torch.optim.AdamW, 8e-3),
        ("nnUNetTrainer_AdamW_lr0.008_4epochs20iters_seed1", torch.optim.AdamW, 8e-3),
        ("nnUNetTrainerLightMedSeg_AdamW_lr1.6e-2", torch.optim.AdamW, 1.6e-2),
        ("nnUNetTrainerLightMedSeg_lr2e-3", torch.optim.AdamW, 2e-3),
        ("nnUNetTrainer_lr1e-3", torch.optim.SGD, 1e-3),
        ("nnUNetTrainerDeformUX_lr1", torch.optim.SGD, 1.0),
        ("nnUNetTrainerDeformUX_paper_lr5e-5", torch.optim.AdamW, 5e-5),
        ("nnUNetTrainerVanillaAdam3en4_lr1e-3_2epochs", torch.optim.Adam, 1e-3),
        ("nnUNetTrainerCosAnneal_lr1e-3", torch.optim.SGD, 1e-3),
        ("nnUNetTrainer_warmup_lr1e-3", torch.optim.SGD, 1e-3),
    ],
)
def test_rate(make_trainer, name, optimizer, rate) -> None:
    trainer = make_trainer(find_trainer(name))
    trainer.initialize()
    assert type(trainer.optimizer) is optimizer
    assert trainer.initial_lr == rate
    if "warmup" not in name:  # which starts below it
        assert {group["lr"] for group in trainer.optimizer.param_groups} == {rate}


@pytest.mark.parametrize("name", ["nnUNetTrainerLightMedSeg_AdamW_lr8e-3", "nnUNetTrainerLightMedSeg_lr8e-3"])
def test_a_rate_is_all_that_its_suffix_changes(make_trainer, name) -> None:
    """Also at each iteration: the schedule is that of the recipe times 8."""
    rates = {}
    for variant in (name, name.replace("8e-3", "1e-3")):
        trainer = make_trainer(find_trainer(f"{variant}_2epochs5iters"))
        trainer.initialize()
        assert trainer.warmup_epochs == 0.2
        assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [1e-4, 0.0]
        rates[variant] = [trainer.lr_scheduler.rate(i) - 1e-6 for i in range(10)]
    ratio = (8e-3 - 1e-6) / (1e-3 - 1e-6)
    assert rates[name] == pytest.approx([ratio * rate for rate in rates[name.replace("8e-3", "1e-3")]], abs=1e-12)


@pytest.mark.parametrize(("name", "axes"), [("nnUNetTrainer_2epochs", (0, 1, 2)), ("nnUNetTrainer_unmirrored", None)])
def test_unmirrored_changes_the_validation_only(make_trainer, monkeypatch, name, axes) -> None:
    validated = []
    monkeypatch.setattr(
        nnUNetTrainer,
        "perform_actual_validation",
        lambda self, save_probabilities: validated.append((self.inference_allowed_mirroring_axes, save_probabilities)),
    )
    trainer = make_trainer(find_trainer(name))
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert trainer.inference_allowed_mirroring_axes == (0, 1, 2)
    trainer.perform_actual_validation(True)
    assert validated == [(axes, True)]
    assert trainer.inference_allowed_mirroring_axes == (0, 1, 2)  # checkpoints keep them


def test_each_fold_of_a_seed_has_random_numbers_of_its_own(make_trainer) -> None:
    def draws(fold: int | str, seed: int = 3) -> list[float]:
        """Of the first weights, and of the generators' first numbers in the second epoch."""
        trainer = make_trainer(find_trainer(f"nnUNetTrainer_2epochs1iters_seed{seed}"))
        trainer.fold = fold
        trainer.initialize()
        first = next(trainer.network.parameters()).flatten()[0].item()
        trainer.current_epoch = 1
        trainer.on_epoch_start()
        return [first, random.random(), np.random.random_sample(), torch.rand(()).item()]  # noqa: NPY002

    assert draws(0) == draws(0) == draws("all")
    for other in (draws(1), draws(4), draws(0, seed=4)):
        assert all(a != b for a, b in zip(draws(0), other, strict=True))
    assert all(a != b for a, b in zip(draws(1), draws(4), strict=True))

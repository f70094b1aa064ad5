import copy
import json
from pathlib import Path

import pytest
import torch
from known_shapes import MakePhantom, plan_file
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_deform import trainers
from nnunet_deform.plans import estimated_gigabytes, planners
from nnunet_deform.plans.memory import elements_for, estimated_elements
from nnunet_deform.plans.planners import PLANNERS, PRESETS, PlanError, nnUNetPlannerDeformUX, nnUNetPlannerLightMedSeg

every_planner = pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS)


def differences(ours: dict, base: dict, path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """Where two plans differ."""
    if isinstance(ours, dict) and isinstance(base, dict) and path[-1:] != ("architecture",):
        missing = object()
        return {
            place
            for key in ours.keys() | base.keys()
            for place in differences(ours.get(key, missing), base.get(key, missing), (*path, key))
        }
    return set() if ours == base else {path}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@every_planner
@pytest.mark.parametrize(
    ("phantom", "patches"),
    [
        ("Dataset501_Prostate", {"2d": [320, 320], "3d_fullres": [20, 320, 256]}),
        ("Dataset502_Heart", {"2d": [256, 224], "3d_fullres": [10, 256, 224]}),
        ("Dataset503_Body", {"2d": [320, 320], "3d_lowres": [128] * 3, "3d_fullres": [128] * 3}),
        ("Dataset504_Slide", {"2d": [512, 512]}),
        ("Dataset505_Hippocampus", {"2d": [56, 40], "3d_fullres": [40, 56, 40]}),
    ],
)
def test_by_default_only_the_network_differs(make_phantom: MakePhantom, planner, phantom, patches):
    folder = make_phantom(phantom)
    planner(phantom).plan_experiment()
    base, ours = plan_file(folder), plan_file(folder, f"nnUNet{planner.label}Plans")
    networks = {("configurations", name, "architecture") for name in patches}
    assert differences(ours, base) == {*networks, ("plans_name",), ("experiment_planner_used",)}
    assert ours["plans_name"] == f"nnUNet{planner.label}Plans"
    assert {name: ours["configurations"][name]["patch_size"] for name in patches} == patches
    # The trainer of this name makes the same network of the stock plan, and of ours.
    trainer = getattr(trainers, f"nnUNetTrainer{planner.label}")
    for name in ours["configurations"]:
        ours_resolved = PlansManager(ours).get_configuration(name)
        expected = trainer.planned_architecture(PlansManager(base).get_configuration(name))
        assert ours_resolved.configuration["architecture"] == expected
        assert trainer.planned_architecture(ours_resolved) == expected


@every_planner
def test_nnunets_own_trainer_builds_the_network(make_phantom: MakePhantom, planner):
    folder = make_phantom("Dataset505_Hippocampus")
    planner(505).plan_experiment()
    plans = PlansManager(str(folder / f"nnUNet{planner.label}Plans.json"))
    configuration = plans.get_configuration("3d_fullres")
    with torch.device("meta"):
        network = nnUNetTrainer.build_network_architecture(plans, configuration, 1, 3, True)
        outputs = network(torch.empty(1, 1, 40, 56, 40))
    assert type(network).__module__.startswith("nnunet_deform.networks")
    assert [tuple(output.shape[2:]) for output in outputs] == [(40, 56, 40), (20, 28, 20), (10, 14, 10)]


@pytest.mark.parametrize(
    ("planner", "preset"),
    [
        pytest.param(planner, preset, id=f"{arch}-{preset}", marks=() if arch in fast else pytest.mark.slow)
        for preset, fast in (("M", ("deformux", "lightmedseg", "magic")), ("L", ("deformux",)))
        for arch, planner in PLANNERS.items()
    ],
)
def test_fitted_plans_fill_the_target(make_phantom: MakePhantom, planner, preset):
    folder = make_phantom("Dataset502_Heart")
    plan = planner(502, PRESETS[preset], plans_name=f"nnUNet{planner.label}{preset}Plans")
    plan.plan_experiment()
    written = plan_file(folder, f"nnUNet{planner.label}{preset}Plans")
    base = plan_file(folder)
    for configuration in plan.configurations:
        entry = written["configurations"][configuration.name]
        stock = base["configurations"][configuration.name]
        assert differences(entry, stock) <= {("patch_size",), ("batch_size",), ("architecture",)}
        assert (configuration.ours.patch_size, configuration.ours.batch_size) == (
            entry["patch_size"],
            entry["batch_size"],
        )
        estimate = estimated_gigabytes(
            entry["architecture"], entry["patch_size"], entry["batch_size"], 1, 3, mixed_precision=True
        )
        one_more = estimated_gigabytes(
            entry["architecture"], entry["patch_size"], entry["batch_size"] + 1, 1, 3, mixed_precision=True
        )
        assert configuration.ours.gigabytes == estimate <= PRESETS[preset]
        # The patch is the whole image as far as it fits, and then the batch is as large as fits.
        assert one_more > PRESETS[preset]


def test_what_the_presets_choose(make_phantom: MakePhantom):
    make_phantom("Dataset502_Heart")
    chosen = {}
    for name, gigabytes in PRESETS.items():
        plan = nnUNetPlannerDeformUX(502, gigabytes, plans_name=f"nnUNetDeformUX{name}Plans")
        plan.plan_experiment()
        chosen[name] = {c.name: (c.ours.patch_size, c.ours.batch_size) for c in plan.configurations}
    assert chosen == {
        # 10 x 256 x 224 keeps as much as 308 M elements of nnU-Net's own; 1120 M are 8 GB, 4200 M 24 GB, 7200 M 40.
        "M": {"2d": ([256, 224], 31), "3d_fullres": ([10, 256, 224], 3)},
        "L": {"2d": ([256, 224], 141), "3d_fullres": ([10, 256, 224], 13)},
        "XL": {"2d": ([256, 224], 207), "3d_fullres": ([10, 256, 224], 23)},
    }


def test_less_memory_smaller_patch(make_phantom: MakePhantom):
    make_phantom("Dataset503_Body")
    patches = []
    for gigabytes in (2, 8):
        plan = nnUNetPlannerDeformUX(503, gigabytes, overwrite=True)
        plan.plan_experiment()
        chosen = {configuration.name: configuration for configuration in plan.configurations}
        assert chosen["3d_cascade_fullres"].ours.patch_size == chosen["3d_fullres"].ours.patch_size
        assert chosen["3d_fullres"].base.patch_size == [128] * 3
        assert chosen["3d_fullres"].ours.gigabytes <= gigabytes
        patches.append(chosen["3d_fullres"].ours.patch_size)
        # The cascade's second stage inherits; nothing of it is written.
        assert plan.plans["configurations"]["3d_cascade_fullres"] == {
            "inherits_from": "3d_fullres",
            "previous_stage": "3d_lowres",
        }
    assert patches == [[80] * 3, [128] * 3]


def fitted(planner: type[planners.NetworkPlanner], gigabytes: float, **options) -> planners.PlannedConfiguration:
    """3d_fullres of Dataset503_Body, whose base plan has patches of 128^3."""
    plan = planner(503, gigabytes, overwrite=True, **options)
    plan.base_plans["configurations"] = {"3d_fullres": plan.base_plans["configurations"]["3d_fullres"]}
    plan.plan_experiment()
    (chosen,) = plan.configurations
    written = plan.plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    because = chosen.recomputed_because
    assert written.get("recompute") == ("blocks" if because else options.get("recompute"))
    assert chosen.ours.gigabytes <= gigabytes
    return chosen


def test_blocks_are_recomputed_where_the_patch_would_shrink(make_phantom: MakePhantom):
    make_phantom("Dataset503_Body")
    enough = fitted(nnUNetPlannerDeformUX, 10)
    assert (enough.ours.patch_size, enough.recomputed_because) == ([128] * 3, None)
    less = fitted(nnUNetPlannerDeformUX, 8)
    without = fitted(nnUNetPlannerDeformUX, 8, recompute="cheap")
    assert less.ours.patch_size == [128] * 3
    assert without.ours.patch_size < [128] * 3
    size = " x ".join(map(str, without.ours.patch_size))
    assert less.recomputed_because == f"the patch would be {size} without it"
    assert without.recomputed_because is None


@pytest.mark.slow
def test_blocks_that_save_nothing_are_kept(make_phantom: MakePhantom):
    make_phantom("Dataset503_Body")
    chosen = fitted(nnUNetPlannerLightMedSeg, 2)
    assert chosen.ours.patch_size < [128] * 3
    assert chosen.recomputed_because is None


def test_blocks_are_recomputed_where_else_no_patch_fits(make_phantom: MakePhantom):
    make_phantom("Dataset503_Body")
    with pytest.raises(PlanError, match=r"0\.015 GB are too few for DeformUX: even a patch of"):
        fitted(nnUNetPlannerDeformUX, 0.015, recompute="cheap")
    assert fitted(nnUNetPlannerDeformUX, 0.015).recomputed_because == "no patch fits without it"


def test_recomputed_blocks_on_request_change_nothing_else(make_phantom: MakePhantom):
    folder = make_phantom("Dataset505_Hippocampus")
    for planner in PLANNERS.values():
        default = planner(505).plan_experiment()
        plan = planner(505, overwrite=True, recompute="blocks")
        asked = plan.plan_experiment()
        assert {configuration.recomputed_because for configuration in plan.configurations} == {"it was asked for"}
        for entry in asked["configurations"].values():
            assert entry["architecture"]["arch_kwargs"].pop("recompute") == "blocks"
        assert asked == default
    before = files(folder)
    with pytest.raises(ValueError, match=r"^recompute='all' must be 'cheap' or 'blocks'\.$"):
        nnUNetPlannerDeformUX(505, overwrite=True, recompute="all")
    assert files(folder) == before


def test_a_resenc_plan_as_base(make_phantom: MakePhantom):
    folder = make_phantom("Dataset505_Hippocampus", res_enc=True)
    for planner in PLANNERS.values():
        planner(505, base_plans_name="nnUNetResEncUNetMPlans").plan_experiment()
        ours = plan_file(folder, f"nnUNet{planner.label}Plans")
        base = plan_file(folder, "nnUNetResEncUNetMPlans")
        networks = {("configurations", name, "architecture") for name in ours["configurations"]}
        assert differences(ours, base) == {*networks, ("plans_name",), ("experiment_planner_used",)}
        assert ours["configurations"]["3d_fullres"]["data_identifier"] == "nnUNetPlans_3d_fullres"
    residual = plan_file(folder, "nnUNetMAGICResEncPlans")["configurations"]["3d_fullres"]["architecture"]
    stock = base["configurations"]["3d_fullres"]["architecture"]
    assert residual == {**stock, "network_class_name": "nnunet_deform.networks.MagicResidualEncoderUNet"}


def test_configurations_of_the_users_own(make_phantom: MakePhantom):
    folder = make_phantom("Dataset505_Hippocampus")
    base = plan_file(folder)
    base["configurations"]["3d_bs2"] = {"inherits_from": "3d_fullres", "batch_size": 2}
    base["configurations"]["3d_named"] = {"inherits_from": "3d_fullres"}
    (folder / "nnUNetPlans.json").write_text(json.dumps(base))
    nnUNetPlannerLightMedSeg(505).plan_experiment()
    ours = plan_file(folder, "nnUNetLightMedSegPlans")
    assert ours["configurations"]["3d_bs2"] == base["configurations"]["3d_bs2"]
    fitted = nnUNetPlannerLightMedSeg(505, 0.5, overwrite=True).plan_experiment()
    # What inherits everything is left alone; a batch of its own would not be fitted, so it is planned too.
    assert fitted["configurations"]["3d_named"] == base["configurations"]["3d_named"]
    assert fitted["configurations"]["3d_bs2"]["batch_size"] == fitted["configurations"]["3d_fullres"]["batch_size"]


def test_data_that_differ_from_their_owners_get_a_folder_of_their_own(make_phantom: MakePhantom):
    folder = make_phantom("Dataset505_Hippocampus")
    base = plan_file(folder)
    other = copy.deepcopy(base)
    other["plans_name"] = "nnUNetOtherPlans"
    other["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 1.0]
    (folder / "nnUNetOtherPlans.json").write_text(json.dumps(other))
    ours = nnUNetPlannerLightMedSeg(505, base_plans_name="nnUNetOtherPlans").plan_experiment()
    identifiers = {name: entry["data_identifier"] for name, entry in ours["configurations"].items()}
    assert identifiers == {"2d": "nnUNetPlans_2d", "3d_fullres": "nnUNetLightMedSegPlans_3d_fullres"}
    # Other intensities concern all data of the plan.
    other["foreground_intensity_properties_per_channel"]["0"]["mean"] = 7.0
    (folder / "nnUNetOtherPlans.json").write_text(json.dumps(other))
    ours = nnUNetPlannerLightMedSeg(505, base_plans_name="nnUNetOtherPlans", overwrite=True).plan_experiment()
    assert ours["configurations"]["2d"]["data_identifier"] == "nnUNetLightMedSegPlans_2d"


def test_nnunets_planning_interface_takes_our_planners(make_phantom: MakePhantom):
    folder = make_phantom("Dataset505_Hippocampus")
    plans, name = plan_experiment_dataset(505, nnUNetPlannerDeformUX, gpu_memory_target_in_gb=2)
    assert name == "nnUNetDeformUXPlans"
    assert plans == plan_file(folder, name)
    with pytest.raises(PlanError, match="spacing, axis order and preprocessor are the base plan's"):
        plan_experiment_dataset(505, nnUNetPlannerDeformUX, overwrite_target_spacing=(1, 1, 1))


def without_strides(architecture: dict) -> None:
    del architecture["arch_kwargs"]["strides"]


def one_level(architecture: dict) -> None:
    for key in ("strides", "kernel_sizes"):
        architecture["arch_kwargs"][key] = architecture["arch_kwargs"][key][:1]


def without_arguments(architecture: dict) -> None:
    del architecture["arch_kwargs"]


def of_another_network(architecture: dict) -> None:
    architecture["network_class_name"] = "some.where.Primus"


@pytest.mark.parametrize(
    ("arch", "spoil", "message"),
    [
        (
            "deformux",
            without_strides,
            r"configuration 3d_fullres of nnUNetPlans: the plan's architecture .* no strides",
        ),
        ("lightmedseg", one_level, "configuration 3d_fullres of nnUNetPlans: the plan has 1 level"),
        ("deformux", without_arguments, "configuration 3d_fullres of nnUNetPlans: its architecture has no arch_kwargs"),
        ("magic", of_another_network, r"some\.where\.Primus is none of nnU-Net's own U-Nets"),
    ],
)
@pytest.mark.parametrize("gigabytes", [None, 8])
def test_architectures_that_cannot_be_followed(make_phantom: MakePhantom, arch, spoil, message, gigabytes):
    folder = make_phantom("Dataset505_Hippocampus")
    base = plan_file(folder)
    spoil(base["configurations"]["3d_fullres"]["architecture"])
    (folder / "nnUNetPlans.json").write_text(json.dumps(base))
    before = files(folder)
    with pytest.raises(PlanError, match=message):
        PLANNERS[arch](505, gigabytes).plan_experiment()
    assert files(folder) == before


@pytest.mark.parametrize("gigabytes", [0, -8, float("nan"), float("inf")])
def test_memory_targets_that_are_none(make_phantom: MakePhantom, gigabytes):
    make_phantom("Dataset505_Hippocampus")
    with pytest.raises(PlanError, match=f"a memory target of {gigabytes} GB is not positive and finite"):
        nnUNetPlannerDeformUX(505, gigabytes)


@every_planner
@pytest.mark.parametrize(
    "phantom",
    [
        "Dataset505_Hippocampus",
        pytest.param("Dataset502_Heart", marks=pytest.mark.slow),
        pytest.param("Dataset504_Slide", marks=pytest.mark.slow),
    ],
)
def test_too_little_memory_for_any_patch(make_phantom: MakePhantom, planner, phantom):
    folder = make_phantom(phantom)
    before = files(folder)
    with pytest.raises(
        PlanError, match=r"0\.0001 GB are too few for .*: even a patch of \[.*\] takes .* GB at batch 2"
    ):
        planner(phantom, 0.0001).plan_experiment()
    assert files(folder) == before


def test_images_too_small_to_fit_anything(make_phantom: MakePhantom):
    folder = make_phantom("Dataset505_Hippocampus")
    base = plan_file(folder)
    base["configurations"]["3d_fullres"]["median_image_size_in_voxels"] = [12.0, 10.0, 9.0]
    (folder / "nnUNetPlans.json").write_text(json.dumps(base))
    with pytest.raises(
        PlanError, match=r"its images give a patch of \[12, 10, 10\] with 2 levels, and fitting needs 3"
    ):
        nnUNetPlannerLightMedSeg(505, 8).plan_experiment()


def test_what_is_missing_is_named(make_phantom: MakePhantom, monkeypatch):
    folder = make_phantom("Dataset505_Hippocampus")
    before = files(folder)
    for dataset, message in (
        (7, "there is no dataset with number 7"),
        ("hippocampus", "'hippocampus' is neither a dataset's number nor its name"),
        ("Dataset007_None", "there is no dataset Dataset007_None: .*dataset.json does not exist"),
    ):
        with pytest.raises(PlanError, match=message):
            nnUNetPlannerDeformUX(dataset)
    (folder.parent / "Dataset505_Twin").mkdir()
    with pytest.raises(PlanError, match="2 datasets have number 505: Dataset505_Hippocampus, Dataset505_Twin; give"):
        nnUNetPlannerDeformUX(505)
    with pytest.raises(PlanError, match=r"there is no base plan .*nnUNetMyPlans\.json; make it with"):
        nnUNetPlannerDeformUX("Dataset505_Hippocampus", base_plans_name="nnUNetMyPlans")
    with pytest.raises(PlanError, match="nnUNetPlans is both the base plan and the plan to write"):
        nnUNetPlannerDeformUX("Dataset505_Hippocampus", plans_name="nnUNetPlans", overwrite=True)
    (folder / "nnUNetEmptyPlans.json").write_text("{}")
    with pytest.raises(PlanError, match=r"nnUNetEmptyPlans\.json has no plans_name and no configurations and no"):
        nnUNetPlannerDeformUX("Dataset505_Hippocampus", base_plans_name="nnUNetEmptyPlans")
    for configurations in (3, {"2d": 3}):
        damaged = {**plan_file(folder), "configurations": configurations}
        (folder / "nnUNetEmptyPlans.json").write_text(json.dumps(damaged))
        with pytest.raises(PlanError, match=r"nnUNetEmptyPlans\.json is damaged: its configurations are"):
            nnUNetPlannerDeformUX("Dataset505_Hippocampus", base_plans_name="nnUNetEmptyPlans")
    (folder / "nnUNetEmptyPlans.json").unlink()
    assert files(folder) == before
    (folder / "dataset_fingerprint.json").unlink()
    with pytest.raises(PlanError, match=r"has no dataset_fingerprint\.json; run nnUNetv2_extract_fingerprint first"):
        nnUNetPlannerDeformUX("Dataset505_Hippocampus")
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(PlanError, match="the environment variable nnUNet_raw is not set"):
        nnUNetPlannerDeformUX(505)


def test_an_existing_plan_is_only_replaced_on_request(make_phantom: MakePhantom):
    folder = make_phantom("Dataset505_Hippocampus")
    target = folder / "nnUNetDeformUXPlans.json"
    target.write_text("mine")
    with pytest.raises(PlanError, match=r"nnUNetDeformUXPlans\.json already exists; --overwrite"):
        nnUNetPlannerDeformUX(505)
    assert target.read_text() == "mine"
    nnUNetPlannerDeformUX(505, overwrite=True).plan_experiment()
    assert plan_file(folder, "nnUNetDeformUXPlans")["plans_name"] == "nnUNetDeformUXPlans"


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: "", lambda text: "[]"])
@pytest.mark.parametrize(
    "name", ["nnUNetPlans.json", "dataset_fingerprint.json", "dataset.json", "nnUNetOwnerPlans.json"]
)
def test_a_damaged_file_is_named(make_phantom: MakePhantom, name, damage):
    folder = make_phantom("Dataset505_Hippocampus")
    base = (folder / "nnUNetPlans.json").read_text()
    (folder / "nnUNetPlans.json").write_text(base.replace("nnUNetPlans_3d_fullres", "nnUNetOwnerPlans_3d_fullres"))
    (folder / "nnUNetOwnerPlans.json").write_text(base)
    raw = folder.parents[1] / "raw" / folder.name
    path = (raw if name == "dataset.json" else folder) / name
    path.write_text(damage(path.read_text()))
    before = files(folder.parents[1])
    with pytest.raises(PlanError, match=rf"{path} is damaged \("):
        nnUNetPlannerDeformUX(505).plan_experiment()
    assert files(folder.parents[1]) == before


@pytest.mark.parametrize("gigabytes", [None, 8])
@pytest.mark.parametrize(
    ("missing", "of_configuration"),
    [(key, False) for key in planners._PLAN_KEYS]
    + [(key, True) for key in (*planners._CONFIGURATION_KEYS, "architecture")],
)
def test_an_incomplete_base_plan(make_phantom: MakePhantom, missing, of_configuration, gigabytes):
    folder = make_phantom("Dataset505_Hippocampus")
    base = plan_file(folder)
    del (base["configurations"]["3d_fullres"] if of_configuration else base)[missing]
    (folder / "nnUNetPlans.json").write_text(json.dumps(base))
    before = files(folder)
    where = "configuration 3d_fullres of nnUNetPlans: it" if of_configuration else r"the base plan .*nnUNetPlans\.json"
    with pytest.raises(PlanError, match=rf"{where} has no {missing}"):
        nnUNetPlannerLightMedSeg(505, gigabytes).plan_experiment()
    assert files(folder) == before


def test_a_failed_write_leaves_the_old_plan(make_phantom: MakePhantom, monkeypatch):
    folder = make_phantom("Dataset505_Hippocampus")
    nnUNetPlannerDeformUX(505).plan_experiment()
    before = files(folder)
    assert "nnUNetDeformUXPlans.json" in before

    def full(source, target):
        assert json.loads(Path(source).read_text())["plans_name"] == "nnUNetDeformUXPlans"
        raise OSError("disk full")

    monkeypatch.setattr(planners.os, "replace", full)
    with pytest.raises(PlanError, match=r"cannot write .*nnUNetDeformUXPlans\.json \(disk full\); nothing was changed"):
        nnUNetPlannerDeformUX(505, 2, overwrite=True).plan_experiment()
    assert files(folder) == before


@pytest.mark.parametrize(("preset", "planner"), [("M", "ExperimentPlanner"), ("L", "ResEncL"), ("XL", "ResEncXL")])
def test_presets_give_as_much_as_nnunets(make_phantom: MakePhantom, preset, planner):
    """nnU-Net's own references, read from its planners."""
    from nnunetv2.experiment_planning.experiment_planners.residual_unets import residual_encoder_unet_planners as own

    make_phantom("Dataset505_Hippocampus")
    stock = getattr(own, planner if planner == "ExperimentPlanner" else f"nnUNetPlanner{planner}")(505)
    assert stock.UNet_vram_target_GB == stock.UNet_reference_val_corresp_GB == PRESETS[preset]
    assert elements_for(PRESETS[preset], 2) == 12 * stock.UNet_reference_val_2d
    assert elements_for(PRESETS[preset], 3) == 2 * stock.UNet_reference_val_3d
    assert stock.UNet_reference_val_corresp_bs_2d == 12
    assert stock.UNet_reference_val_corresp_bs_3d == 2


def test_the_search_sees_our_networks_memory(make_phantom: MakePhantom):
    folder = make_phantom("Dataset505_Hippocampus")
    planner = nnUNetPlannerDeformUX(505, 8)
    unet = plan_file(folder)["configurations"]["3d_fullres"]["architecture"]
    patch = (40, 56, 40)
    seen = planner.static_estimate_VRAM_usage(patch, 1, 3, *unet.values())
    ours = planner.architecture(unet, patch)
    assert seen == estimated_elements(ours, patch, 1, 3, mixed_precision=True)
    # 59.6 M counted, of which a compiled step keeps 2.10 bytes each, and one of nnU-Net's own network 3.95.
    assert seen == pytest.approx(59.6e6 * 2.10 / 3.95, rel=1e-3)

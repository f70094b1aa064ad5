import json
from pathlib import Path

import pytest
from known_shapes import CASES, MakePhantom, plan_file

from nnunet_deform.plans.planners import nnUNetPlannerLightMedSeg
from nnunet_deform.plans.preprocessed import preprocessed_folders, preprocessing_commands


def preprocess(folder: Path, identifier: str, cases=CASES) -> None:
    (folder / identifier).mkdir()
    for case in cases:
        (folder / identifier / f"{case}.pkl").touch()


def folders_of(folder: Path, base: str = "nnUNetPlans"):
    plans = nnUNetPlannerLightMedSeg(folder.name, base_plans_name=base, overwrite=True).plan_experiment()
    return preprocessed_folders(folder, plans, base, CASES)


def test_shared_folders_are_preprocessed_by_their_owner(make_phantom: MakePhantom):
    folder = make_phantom("Dataset503_Body")
    found = folders_of(folder)
    assert {f.identifier: f.configurations for f in found} == {
        "nnUNetPlans_2d": ["2d"],
        "nnUNetPlans_3d_lowres": ["3d_lowres"],
        "nnUNetPlans_3d_fullres": ["3d_fullres", "3d_cascade_fullres"],
    }
    assert preprocessing_commands(503, found) == [
        "nnUNetv2_preprocess -d 503 -plans_name nnUNetPlans -c 2d 3d_lowres 3d_fullres"
    ]
    preprocess(folder, "nnUNetPlans_3d_fullres")
    preprocess(folder, "nnUNetPlans_2d", CASES[:2])
    found = folders_of(folder)
    assert {f.identifier: (f.present, f.expected) for f in found} == {
        "nnUNetPlans_2d": (2, 3),
        "nnUNetPlans_3d_lowres": (0, 3),
        "nnUNetPlans_3d_fullres": (3, 3),
    }
    assert [f.identifier for f in found if f.complete] == ["nnUNetPlans_3d_fullres"]
    assert preprocessing_commands(503, found) == ["nnUNetv2_preprocess -d 503 -plans_name nnUNetPlans -c 2d 3d_lowres"]
    preprocess(folder, "nnUNetPlans_3d_lowres")
    (folder / "nnUNetPlans_2d" / f"{CASES[2]}.pkl").touch()
    assert preprocessing_commands(503, folders_of(folder)) == []


@pytest.mark.parametrize("stock_plan_too", [True, False])
def test_of_a_resenc_plan(make_phantom: MakePhantom, stock_plan_too):
    folder = make_phantom("Dataset505_Hippocampus", res_enc=True)
    base = plan_file(folder, "nnUNetResEncUNetMPlans")
    if stock_plan_too:
        (folder / "nnUNetPlans.json").write_text(json.dumps({**base, "plans_name": "nnUNetPlans"}))
    # As nnU-Net's planner names it.
    base["configurations"]["3d_lowres"] = {
        **base["configurations"]["3d_fullres"],
        "data_identifier": "nnUNetResEncUNetMPlans_3d_lowres",
        "spacing": [2.0, 2.0, 2.0],
    }
    (folder / "nnUNetResEncUNetMPlans.json").write_text(json.dumps(base))
    commands = preprocessing_commands(505, folders_of(folder, "nnUNetResEncUNetMPlans"))
    if stock_plan_too:
        assert commands == [
            "nnUNetv2_preprocess -d 505 -plans_name nnUNetPlans -c 2d 3d_fullres",
            "nnUNetv2_preprocess -d 505 -plans_name nnUNetResEncUNetMPlans -c 3d_lowres",
        ]
    else:
        # The owner of nnUNetPlans_3d_fullres is gone, but the base plan names the same folder.
        assert commands == [
            "nnUNetv2_preprocess -d 505 -plans_name nnUNetResEncUNetMPlans -c 2d 3d_fullres 3d_lowres",
        ]


def test_a_folder_of_our_own_is_preprocessed_with_our_plan(make_phantom: MakePhantom):
    folder = make_phantom("Dataset505_Hippocampus")
    other = {**plan_file(folder), "plans_name": "nnUNetOtherPlans"}
    other["configurations"]["3d_fullres"]["normalization_schemes"] = ["NoNormalization"]
    (folder / "nnUNetOtherPlans.json").write_text(json.dumps(other))
    assert preprocessing_commands(505, folders_of(folder, "nnUNetOtherPlans")) == [
        "nnUNetv2_preprocess -d 505 -plans_name nnUNetPlans -c 2d",
        "nnUNetv2_preprocess -d 505 -plans_name nnUNetLightMedSegPlans -c 3d_fullres",
    ]

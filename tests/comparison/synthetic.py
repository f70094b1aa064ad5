"""Tables of scores with a known truth, as :func:`nnunet_deform.comparison.collect.collect` returns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from nnunet_deform.comparison.collect import columns
from nnunet_deform.comparison.experiment import Experiment

DATASET, CONFIGURATION = "Dataset501_Synthetic", "3d_fullres"


def make_experiment(arms: Sequence[str], **changes) -> Experiment:
    content = {
        "name": "synthetic",
        "datasets": [{"id": 501}],
        "arms": [{"name": arm, "trainer": f"nnUNetTrainer{arm}"} for arm in arms],
        "folds": [0, 1, 2, 3, 4],
        "seeds": {"first": 1, "repeats": [2, 3]},
        "hypotheses": [list(arms[:2])],
        "device": "cpu",
        **changes,
    }
    return Experiment.model_validate(content)


def make_scores(
    experiment: Experiment,
    effects: Mapping[str, float],
    *,
    patients: int = 60,
    per_patient: int = 2,
    labels: Sequence[str] = ("front", "back"),
    seed_sd: float = 0.001,
    seed: int = 0,
) -> pd.DataFrame:
    """Dice around 0.8 plus the arm's effect; patients differ by 0.05, arms on a patient by 0.02, cases by 0.01."""
    rng = np.random.default_rng(seed)
    of_patient = rng.normal(0, 0.05, patients)
    arms = {arm.name: rng.normal(0, 0.02, patients) for arm in experiment.arms}
    for name in arms:
        arms[name] -= arms[name].mean()
    tables = []
    for _, arm, seed_number, fold in experiment.trainings():
        mine = np.repeat(np.arange(fold, patients, len(experiment.folds)), per_patient)
        numbers = np.tile(np.arange(per_patient), len(mine) // per_patient)
        base = 0.8 + effects.get(arm.name, 0.0) + of_patient[mine] + arms[arm.name][mine] + rng.normal(0, seed_sd)
        dice = np.clip(base[:, None] + rng.normal(0, 0.01, (len(mine), len(labels))), 0, 1).ravel()
        rows = np.repeat(np.arange(len(mine)), len(labels))
        tables.append(
            pd.DataFrame(
                {
                    "dataset": DATASET,
                    "configuration": CONFIGURATION,
                    "arm": arm.name,
                    "seed": seed_number,
                    "fold": fold,
                    "case": [f"c{mine[row]:04d}_{numbers[row]}" for row in rows],
                    "patient": [f"p{mine[row]:04d}" for row in rows],
                    "label": np.tile(labels, len(mine)),
                    "Dice": dice,
                    "NSD": np.clip(dice + 0.1, 0, 1),
                    "HD95": 40 * (1 - dice),
                    "voxels_truth": 100,
                    "voxels_prediction": 100,
                }
            )
        )
    return pd.concat(tables, ignore_index=True)[columns()]

"""Which preprocessed folders a plan uses, whose they are, and what is missing.

nnU-Net names a folder ``<plans_name>_<configuration>`` after the plan that made it, its owner; other plans that need
the same data name the same folder. ``nnUNetv2_preprocess`` deletes and rebuilds the folder that the given plan names,
so it should be given the owner.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

# What the preprocessed data depend on: of a configuration, and of a whole plan.
_OF_CONFIGURATION = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)
_OF_PLAN = ("image_reader_writer", "transpose_forward", "foreground_intensity_properties_per_channel")


@dataclass(frozen=True)
class PreprocessedFolder:
    """A folder that a plan uses.

    Attributes:
        identifier: its name.
        configurations: of the plan, that use it.
        present, expected: numbers of cases.
        owner, owner_configuration: what to preprocess it with.
    """

    identifier: str
    configurations: list[str]
    present: int
    expected: int
    owner: str
    owner_configuration: str

    @property
    def complete(self) -> bool:
        return 0 < self.expected <= self.present


def read_json(path: Path) -> dict[str, Any]:
    """One of nnU-Net's descriptions of a dataset or a plan.

    Raises:
        ValueError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); make it again, or take it from a copy.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it holds a {type(content).__name__}); make it again.")
    return content


def owner_of(
    folder: Path, identifier: str, configurations: Sequence[str]
) -> tuple[PlansManager, ConfigurationManager] | None:
    """The plan that owns a preprocessed folder, and its configuration.

    Args:
        folder: the dataset's, with its plans.
        identifier: the preprocessed folder's name.
        configurations: names that the owner's configuration may have.

    Returns:
        None if no plan of that name in the folder uses it.

    Raises:
        ValueError: the owner's file is damaged.
    """
    for configuration in configurations:
        path = folder / f"{identifier.removesuffix(f'_{configuration}')}.json"
        if identifier.endswith(f"_{configuration}") and path.is_file():
            plans = PlansManager(read_json(path))
            if configuration in plans.available_configurations:
                resolved = plans.get_configuration(configuration)
                if resolved.data_identifier == identifier:
                    return plans, resolved
    return None


def same_preprocessing(
    plans: PlansManager,
    configuration: ConfigurationManager,
    other: PlansManager,
    other_configuration: ConfigurationManager,
) -> bool:
    """Whether two configurations need the same preprocessed data."""
    return all(
        configuration.configuration.get(key) == other_configuration.configuration.get(key) for key in _OF_CONFIGURATION
    ) and all(plans.plans.get(key) == other.plans.get(key) for key in _OF_PLAN)


def preprocessed_folders(
    folder: Path, plans: Mapping[str, Any], base_plans_name: str, cases: Collection[str]
) -> list[PreprocessedFolder]:
    """The preprocessed folders of a plan.

    Args:
        folder: the dataset's, in ``nnUNet_preprocessed``.
        plans: the plan.
        base_plans_name: the plan to preprocess with where a folder's owner is gone.
        cases: names of the training cases.
    """
    manager = PlansManager(dict(plans))
    users: dict[str, list[str]] = {}
    for name in manager.available_configurations:
        users.setdefault(manager.get_configuration(name).data_identifier, []).append(name)
    folders = []
    for identifier, names in users.items():
        owner = base_plans_name
        owner_configuration = names[0]
        found = owner_of(folder, identifier, manager.available_configurations)
        if found is not None:
            owner = found[0].plans_name
            owner_configuration = identifier.removeprefix(f"{owner}_")
        present = sum(_is_preprocessed(folder / identifier, case) for case in cases)
        folders.append(PreprocessedFolder(identifier, names, present, len(cases), owner, owner_configuration))
    return folders


def _is_preprocessed(folder: Path, case: str) -> bool:
    """nnU-Net writes a case's properties last."""
    return (folder / f"{case}.pkl").is_file()


def preprocessing_commands(dataset_id: int, folders: Sequence[PreprocessedFolder]) -> list[str]:
    """nnU-Net's commands for the folders that are not complete, one for each owner."""
    missing: dict[str, list[str]] = {}
    for folder in folders:
        if not folder.complete:
            missing.setdefault(folder.owner, []).append(folder.owner_configuration)
    return [
        f"nnUNetv2_preprocess -d {dataset_id} -plans_name {owner} -c {' '.join(configurations)}"
        for owner, configurations in missing.items()
    ]

"""nnU-Net experiment planners that put our networks into a plan that nnU-Net has made.

A planner starts from a plan on disk and changes nothing that preprocessing depends on, so the base plan's preprocessed
data serve the new plan as well. Without a memory target patch and batch are the base plan's too, and only the network
differs; with one, nnU-Net's own search fits them to our network's memory. Where the patch would shrink below the base
plan's, blocks are computed again in the backward pass if that gives a larger one.

nnU-Net's ``nnUNetv2_plan_experiment -pl`` looks for planners in its own package only; use ``nnunet-deform plan``, or
``plan_experiment_dataset(501, nnUNetPlannerDeformUX)``.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id, find_candidate_datasets
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_deform.layers.recomputation import Recompute, check_recompute
from nnunet_deform.plans.architecture import Architecture
from nnunet_deform.plans.deformux import deformux_architecture
from nnunet_deform.plans.lightmedseg import lightmedseg_architecture
from nnunet_deform.plans.magic import magic_architecture
from nnunet_deform.plans.memory import elements_for, estimated_elements, estimated_gigabytes, gigabytes_for
from nnunet_deform.plans.preprocessed import owner_of, read_json, same_preprocessing

# The memory targets of nnU-Net's ResEnc presets, in GB.
PRESETS = {"M": 8, "L": 24, "XL": 40}
# nnU-Net's trainer weights the coarsest output with zero, and so a single one with 0 / 0.
_MIN_LEVELS = 3
_ARCHITECTURE_KEYS = ("network_class_name", "arch_kwargs", "_kw_requires_import")
_BLOCKS = {"recompute": "blocks"}
# Without these there is nothing to plan from.
_PLAN_KEYS = ("plans_name", "configurations", "original_median_shape_after_transp")
_CONFIGURATION_KEYS = ("data_identifier", "patch_size", "batch_size", "spacing", "median_image_size_in_voxels")


class PlanError(Exception):
    """A plan cannot be made; the message says why and what to do."""


class _TooLittleMemoryError(ValueError):
    """No patch fits the target."""


@dataclass(frozen=True)
class Choice:
    """What a plan says of one configuration, and the memory of a training step in mixed precision."""

    patch_size: list[int]
    batch_size: int
    levels: int
    gigabytes: float | None


@dataclass(frozen=True)
class PlannedConfiguration:
    """A configuration as planned, and as the base plan has it."""

    name: str
    ours: Choice
    base: Choice
    # Of the U-Net that nnU-Net plans for our patch; our network may keep fewer.
    unet_levels: int
    # Why blocks are computed again in the backward pass; None where they are not, or the base plan has it so.
    recomputed_because: str | None


class NetworkPlanner(ExperimentPlanner):
    """Puts the network of ``architecture`` into a plan.

    Args:
        dataset_name_or_id: as for every planner.
        gpu_memory_target_in_gb: None keeps the base plan's patch and batch; else both are fitted to this, by nnU-Net's
            search, from the base plan's spacing and median shape. As in nnU-Net's ResEnc presets, a batch may be any
            part of the dataset.
        plans_name: by default ``nnUNet<label>Plans``.
        preprocessor_name, overwrite_target_spacing, suppress_transpose: part of nnU-Net's interface; the base plan
            decides these.
        base_plans_name: the plan to start from, in the dataset's folder of ``nnUNet_preprocessed``.
        overwrite: replace a plan of this name.
        recompute: of the network, what its backward pass computes again, "cheap" or "blocks". None is the base plan's
            or "cheap", and with a memory target "blocks" where only that keeps the patch from shrinking as far.

    Raises:
        ValueError: an unknown ``recompute``.
        PlanError: the dataset, its fingerprint or the base plan is missing or damaged; the plan exists; the memory
            target is not positive; the base plan decides what was asked for. Raised by ``plan_experiment``: the base
            plan's architecture cannot be followed, the memory target is too small, or the plan cannot be written.
            Nothing is written then.
    """

    label: ClassVar[str]
    architecture: ClassVar[Callable[..., Architecture]]
    # How many times as long as by default a training step takes with recompute="blocks": docs/planning.md. The residual
    # encoder's was not measured, and is the plain one's.
    blocks_step_time: ClassVar[float]

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float | None = None,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str | None = None,
        overwrite_target_spacing: Sequence[float] | None = None,
        suppress_transpose: bool = False,
        *,
        base_plans_name: str = "nnUNetPlans",
        overwrite: bool = False,
        recompute: Recompute | None = None,
    ) -> None:
        if recompute is not None:
            check_recompute(recompute)
        plans_name = f"nnUNet{self.label}Plans" if plans_name is None else plans_name
        if overwrite_target_spacing is not None or suppress_transpose or preprocessor_name != "DefaultPreprocessor":
            raise PlanError(
                "spacing, axis order and preprocessor are the base plan's; plan with nnU-Net's own planner first, and "
                f"give that plan as base_plans_name in the place of {base_plans_name}."
            )
        if gpu_memory_target_in_gb is not None and not 0 < gpu_memory_target_in_gb < math.inf:
            raise PlanError(f"a memory target of {gpu_memory_target_in_gb} GB is not positive and finite.")
        dataset_name = _find_dataset(dataset_name_or_id)
        self.folder = Path(nnUNet_preprocessed.require(), dataset_name)
        fingerprint = self.folder / "dataset_fingerprint.json"
        if not fingerprint.is_file():
            raise PlanError(f"{self.folder} has no dataset_fingerprint.json; run nnUNetv2_extract_fingerprint first.")
        try:
            for path in (Path(nnUNet_raw.require(), dataset_name, "dataset.json"), fingerprint):
                read_json(path)
            self.base_plans = self._read_base(base_plans_name)
        except ValueError as error:
            raise PlanError(str(error)) from error
        self.target = self.folder / f"{plans_name}.json"
        if plans_name == base_plans_name:
            raise PlanError(f"{plans_name} is both the base plan and the plan to write; choose another base.")
        if self.target.exists() and not overwrite:
            raise PlanError(f"{self.target} already exists; --overwrite (overwrite=True) replaces it.")

        super().__init__(dataset_name, gpu_memory_target_in_gb or PRESETS["M"], preprocessor_name, plans_name)
        self.refits = gpu_memory_target_in_gb is not None
        self.UNet_reference_val_corresp_GB = self.UNet_vram_target_GB
        self.UNet_reference_val_2d = elements_for(self.UNet_vram_target_GB, 2) / self.UNet_reference_val_corresp_bs_2d
        self.UNet_reference_val_3d = elements_for(self.UNet_vram_target_GB, 3) / self.UNet_reference_val_corresp_bs_3d
        self.max_dataset_covered = 1
        self.configurations: list[PlannedConfiguration] = []
        self.recompute = recompute
        self._search_options = self._asked_for
        self._smallest_tried: tuple[list[int], float] | None = None

    @property
    def _asked_for(self) -> dict[str, Any]:
        """Further arguments of ``architecture``."""
        return {} if self.recompute is None else {"recompute": self.recompute}

    @property
    def dataset_id(self) -> int:
        return convert_dataset_name_to_id(self.dataset_name)

    def _read_base(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        if not path.is_file():
            raise PlanError(
                f"there is no base plan {path}; make it with nnUNetv2_plan_experiment, or name another plan as base."
            )
        plans = read_json(path)
        missing = [key for key in _PLAN_KEYS if not plans.get(key)]
        if missing:
            raise PlanError(f"the base plan {path} has no {' and no '.join(missing)}; name another plan as base.")
        configurations = plans["configurations"]
        if not isinstance(configurations, dict) or not all(isinstance(c, dict) for c in configurations.values()):
            raise PlanError(f"the base plan {path} is damaged: its configurations are not as nnU-Net writes them.")
        return plans

    def plan_experiment(self) -> dict[str, Any]:
        """Makes the plan, writes it and returns it; ``configurations`` then holds what was chosen."""
        base = PlansManager(deepcopy(self.base_plans))
        plans = deepcopy(self.base_plans)
        plans["plans_name"] = self.plans_identifier
        plans["experiment_planner_used"] = type(self).__name__
        self.configurations = []
        for name, entry in plans["configurations"].items():
            try:
                self._plan_configuration(base, name, entry)
            except (ValueError, NotImplementedError) as error:
                raise PlanError(f"configuration {name} of {base.plans_name}: {error}") from error
        self.plans = plans
        self.save_plans(plans)
        return plans

    def _plan_configuration(self, base: PlansManager, name: str, entry: dict[str, Any]) -> None:
        """Changes the entry of one configuration."""
        try:
            resolved = base.get_configuration(name)
        except KeyError as error:  # nnU-Net looks for what its older plans had in the place of an architecture
            raise ValueError("it has no architecture.") from error
        missing = [key for key in _CONFIGURATION_KEYS if key not in resolved.configuration]
        if missing:
            raise ValueError(f"it has no {' and no '.join(missing)}.")
        unet = resolved.configuration["architecture"]
        missing = [key for key in _ARCHITECTURE_KEYS if key not in unet]
        if missing:
            raise ValueError(f"its architecture has no {' and no '.join(missing)}.")
        ours = {
            **resolved.configuration,
            "architecture": self.architecture(unet, resolved.patch_size, **self._asked_for),
        }
        recomputed_because = "it was asked for" if self.recompute == "blocks" else None
        inherits = "inherits_from" in entry
        if self.refits:
            if self.recompute is None:
                ours, unet, recomputed_because = self._refit_with_blocks_if_larger(base, resolved)
            else:
                ours, unet = self._refit(base, resolved, self._asked_for)
            changed = ("patch_size", "batch_size", "architecture")
            own = {"spacing", "median_image_size_in_voxels", *changed} & entry.keys()
            if own or not inherits:
                entry.update({key: ours[key] for key in changed})
        elif "architecture" in entry or not inherits:
            entry["architecture"] = ours["architecture"]
        if "data_identifier" in entry:
            owner = owner_of(self.folder, entry["data_identifier"], base.available_configurations)
            if owner is not None and not same_preprocessing(base, resolved, *owner):
                entry["data_identifier"] = self.generate_data_identifier(name)
        self.configurations.append(
            PlannedConfiguration(
                name,
                self._choice(base, resolved, ours),
                self._choice(base, resolved, resolved.configuration),
                len(unet["arch_kwargs"]["strides"]),
                recomputed_because,
            )
        )

    def _refit_with_blocks_if_larger(
        self, base: PlansManager, resolved: ConfigurationManager
    ) -> tuple[dict[str, Any], Architecture, str | None]:
        """As ``_refit``, and why blocks are computed again, if so."""
        try:
            found = self._refit(base, resolved, {})
        except _TooLittleMemoryError:
            if not self._blocks_take_less(base, resolved):
                raise
            return *self._refit(base, resolved, _BLOCKS), "no patch fits without it"
        patch_size = found[0]["patch_size"]
        if math.prod(patch_size) < math.prod(resolved.patch_size) and self._blocks_take_less(base, resolved):
            with_blocks = self._refit(base, resolved, _BLOCKS)
            if math.prod(with_blocks[0]["patch_size"]) > math.prod(patch_size):
                return *with_blocks, f"the patch would be {' x '.join(map(str, patch_size))} without it"
        return *found, None

    def _blocks_take_less(self, base: PlansManager, resolved: ConfigurationManager) -> bool:
        """Whether the step of the base plan's patch would hold less memory with recomputed blocks."""
        unet, patch_size = resolved.configuration["architecture"], resolved.patch_size
        cheap, blocks = (
            estimated_elements(
                self.architecture(unet, patch_size, recompute=recompute),
                patch_size,
                *self._channels(base, resolved),
                mixed_precision=True,
            )
            for recompute in ("cheap", "blocks")
        )
        return blocks < cheap

    def _refit(
        self, base: PlansManager, resolved: ConfigurationManager, options: dict[str, Any]
    ) -> tuple[dict[str, Any], Architecture]:
        """The configuration with patch and batch fitted to the target, and the U-Net that nnU-Net plans for them; with
        further arguments of ``architecture``."""
        voxels = math.prod(resolved.median_image_size_in_voxels)
        if len(resolved.patch_size) == 2:
            voxels *= base.original_median_shape_after_transp[0]
        self._search_options, self._smallest_tried = options, None
        planned = super().get_plans_for_configuration(
            resolved.spacing,
            resolved.median_image_size_in_voxels,
            resolved.data_identifier,
            voxels * self.dataset_json["numTraining"],
            {},
        )
        recursive_fix_for_json_export(planned)
        patch_size, unet = [int(size) for size in planned["patch_size"]], planned["architecture"]
        ours = {
            **resolved.configuration,
            "patch_size": patch_size,
            "batch_size": planned["batch_size"],
            "architecture": self.architecture(unet, patch_size, **options),
        }
        # nnU-Net rounds the batch to the nearest, which may be above the target.
        one = estimated_elements(
            ours["architecture"], patch_size, *self._channels(base, resolved), mixed_precision=True
        )
        fitting = int(elements_for(self.UNet_vram_target_GB, len(patch_size)) / one)
        ours["batch_size"] = max(self.UNet_min_batch_size, min(ours["batch_size"], fitting))
        return ours, unet

    def static_estimate_VRAM_usage(
        self,
        patch_size: Sequence[int],
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict[str, Any],
        arch_kwargs_req_import: Sequence[str],
    ) -> float:
        """Of our network in the place of the given U-Net, in elements that nnU-Net's own would count."""
        levels = len(arch_kwargs["strides"])
        if levels < _MIN_LEVELS:
            raise self._too_small(patch_size, levels)
        unet = dict(zip(_ARCHITECTURE_KEYS, (arch_class_name, arch_kwargs, arch_kwargs_req_import), strict=True))
        ours = self.architecture(unet, patch_size, **self._search_options)
        patch_size = [int(size) for size in patch_size]
        estimate = estimated_elements(ours, patch_size, input_channels, output_channels, mixed_precision=True)
        self._smallest_tried = patch_size, estimate
        return estimate

    def _too_small(self, patch_size: Sequence[int], levels: int) -> ValueError:
        if self._smallest_tried is None:
            return ValueError(
                f"its images give a patch of {[int(size) for size in patch_size]} with {levels} levels, and fitting "
                f"needs {_MIN_LEVELS}; plan without a memory target."
            )
        smallest, elements = self._smallest_tried
        gigabytes = gigabytes_for(elements * self.UNet_min_batch_size, len(smallest))
        return _TooLittleMemoryError(
            f"{self.UNet_vram_target_GB:g} GB are too few for {self.label}: even a patch of {smallest} takes "
            f"{gigabytes:.2g} GB at batch {self.UNet_min_batch_size}; give more, or keep the base plan's patch."
        )

    def _choice(self, base: PlansManager, resolved: ConfigurationManager, configuration: dict[str, Any]) -> Choice:
        return Choice(
            list(configuration["patch_size"]),
            configuration["batch_size"],
            len(configuration["architecture"]["arch_kwargs"]["strides"]),
            self._gigabytes(base, resolved, configuration),
        )

    def _gigabytes(
        self, base: PlansManager, resolved: ConfigurationManager, configuration: dict[str, Any]
    ) -> float | None:
        return estimated_gigabytes(
            configuration["architecture"],
            configuration["patch_size"],
            configuration["batch_size"],
            *self._channels(base, resolved),
            mixed_precision=True,
        )

    def _channels(self, base: PlansManager, resolved: ConfigurationManager) -> tuple[int, int]:
        """Of the network's input and output."""
        return (
            determine_num_input_channels(base, resolved, self.dataset_json),
            base.get_label_manager(self.dataset_json).num_segmentation_heads,
        )

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Writes the plan under its name only when it is complete."""
        recursive_fix_for_json_export(plans)
        partial_file = self.target.with_suffix(".partial")
        try:
            partial_file.write_text(json.dumps(plans, indent=4))
            os.replace(partial_file, self.target)
        except OSError as error:
            raise PlanError(f"cannot write {self.target} ({error}); nothing was changed.") from error
        finally:
            with suppress(FileNotFoundError):
                partial_file.unlink()


class nnUNetPlannerDeformUX(NetworkPlanner):
    """DeformUX-Net."""

    label = "DeformUX"
    blocks_step_time = 1.19
    architecture = staticmethod(deformux_architecture)


class nnUNetPlannerLightMedSeg(NetworkPlanner):
    """LightMedSeg."""

    label = "LightMedSeg"
    blocks_step_time = 1.11
    architecture = staticmethod(lightmedseg_architecture)


class nnUNetPlannerMAGIC(NetworkPlanner):
    """MAGIC in nnU-Net's plain U-Net."""

    label = "MAGIC"
    blocks_step_time = 1.03
    architecture = staticmethod(magic_architecture)


class nnUNetPlannerMAGICResEnc(NetworkPlanner):
    """MAGIC in nnU-Net's residual encoder U-Net."""

    label = "MAGICResEnc"
    blocks_step_time = 1.03
    architecture = staticmethod(partial(magic_architecture, encoder="residual"))


PLANNERS = {
    "deformux": nnUNetPlannerDeformUX,
    "lightmedseg": nnUNetPlannerLightMedSeg,
    "magic": nnUNetPlannerMAGIC,
    "magic-resenc": nnUNetPlannerMAGICResEnc,
}


def _find_dataset(dataset_name_or_id: str | int) -> str:
    """The dataset's name, which nnUNet_raw holds."""
    for variable, path in (("nnUNet_raw", nnUNet_raw), ("nnUNet_preprocessed", nnUNet_preprocessed)):
        if not path.is_set():
            raise PlanError(f"the environment variable {variable} is not set.")
    name = str(dataset_name_or_id)
    if not name.startswith("Dataset"):
        if not name.isdecimal():
            raise PlanError(f"{name!r} is neither a dataset's number nor its name (Dataset501_Name).")
        found = [str(candidate) for candidate in find_candidate_datasets(int(name))]
        if len(found) != 1:
            several = f"{len(found)} datasets have number {name}: {', '.join(found)}; give the name"
            raise PlanError(f"{several if found else f'there is no dataset with number {name}'}.")
        name = found[0]
    path = Path(nnUNet_raw.require(), name, "dataset.json")
    if not path.is_file():
        raise PlanError(f"there is no dataset {name}: {path} does not exist.")
    return name

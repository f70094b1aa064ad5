"""Whole scans through ONNX Runtime: everything but the network is nnU-Net's own code.

Reader, preprocessing, sliding window, mirroring, resampling and export are called as ``nnUNetv2_predict`` calls them,
with the plans and the dataset.json in the ONNX file, so labels differ from its own only where two logits tie within
rounding.
"""

import io
import itertools
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# nnU-Net prints where its folders are.
with redirect_stdout(io.StringIO()):
    from nnunetv2.inference.export_prediction import export_prediction_from_logits
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_deform import __version__
from nnunet_deform.deployment.exported import INPUT, OUTPUT, ExportedModel, ExportedModelError
from nnunet_deform.diagnosis.images import incompleteness

SUMMARY = "predict_onnx.json"


class ScanError(RuntimeError):
    """A scan, or the folders, cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class PredictedCase:
    """A finished case. Seconds of wall time; ``notes`` is what nnU-Net's reader had to say."""

    name: str
    preprocessing_s: float
    network_s: float
    export_s: float
    notes: str


class _RuntimeNetwork(torch.nn.Module):
    """A session in the place of a network: [1, C, *patch] -> [1, classes, *patch]."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self._session = session

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        (logits,) = self._session.run([OUTPUT], {INPUT: image.numpy()})
        return torch.from_numpy(logits)


class OnnxPredictor(nnUNetPredictor):
    """nnU-Net's predictor with ONNX Runtime in the place of torch's network.

    Args:
        models: folds of one model; their logits are averaged, as nnU-Net does.
        step_size: of the sliding window, relative to the patch.
        mirroring: average over mirrored images, along the axes that the trainer allowed.
        progress: show a bar for the tiles of each scan.

    Raises:
        ExportedModelError: they are not folds of one model, or the second stage of a cascade.
    """

    def __init__(
        self, models: Sequence[ExportedModel], *, step_size: float = 0.5, mirroring: bool = True, progress: bool = False
    ) -> None:
        _check_one_model(models)
        first = models[0]
        with redirect_stdout(io.StringIO()):  # what a CPU cannot do
            super().__init__(
                tile_step_size=step_size, use_mirroring=mirroring, device=torch.device("cpu"), allow_tqdm=progress
            )
        self.plans_manager = PlansManager(first.plans)
        self.configuration_manager = self.plans_manager.get_configuration(first.configuration)
        self.dataset_json = first.dataset_json
        self.label_manager = self.plans_manager.get_label_manager(first.dataset_json)
        self.trainer_name = first.trainer
        # nnU-Net takes None for no axes, and fails on an empty list.
        self.allowed_mirroring_axes = first.mirror_axes or None
        self._networks = [_RuntimeNetwork(model.session) for model in models]

    @torch.inference_mode()
    def predict_logits_from_preprocessed_data(self, data: torch.Tensor) -> torch.Tensor:
        """[C, *spatial], preprocessed -> [classes, *spatial], in half precision, as nnU-Net's."""
        threads = torch.get_num_threads()
        # torch only flips and adds here, and its idle threads would spin beside ONNX Runtime's.
        torch.set_num_threads(1)
        try:
            total = None
            for network in self._networks:
                self.network = network
                logits = self.predict_sliding_window_return_logits(data)
                total = logits if total is None else total.add_(logits)
            return total if len(self._networks) == 1 else total.div_(len(self._networks))
        finally:
            torch.set_num_threads(threads)


def _check_one_model(models: Sequence[ExportedModel]) -> None:
    first = models[0]
    for number, model in enumerate(models):
        for what, attribute in _SHARED.items():
            ours, theirs = getattr(first, attribute), getattr(model, attribute)
            if ours != theirs:
                values = "" if isinstance(ours, dict) else f" ({ours} and {theirs})"
                raise ExportedModelError(
                    f"{first.path} and {model.path} have different {what}{values}; only folds of one model are "
                    "averaged here. Predict with each, with --save_probabilities, and average with nnUNetv2_ensemble."
                )
        if (same := next((other for other in models[:number] if other.fold == model.fold), None)) is not None:
            raise ExportedModelError(f"{same.path} and {model.path} are both fold {model.fold}; give each fold once.")
    configuration = PlansManager(first.plans).get_configuration(first.configuration)
    if configuration.preprocessor_class is None:
        raise ExportedModelError(
            f"{first.path} was trained on data of the preprocessor {configuration.preprocessor_name}, which this "
            "nnU-Net does not have; put it into nnunetv2/preprocessing, where it was for the training."
        )
    previous = configuration.previous_stage_name
    if previous is not None:
        raise ExportedModelError(
            f"{first.path} is {first.configuration}, the second stage of a cascade: besides the image it takes the "
            f"segmentation of {previous}, which an ONNX file does not hold. Predict with nnUNetv2_predict, or export "
            "a configuration that is no cascade."
        )


# What folds of one model share, by its name in a message.
_SHARED = {
    "trainers": "trainer",
    "configurations": "configuration",
    "plans": "plans",
    "dataset.json": "dataset_json",
    "mirror axes": "mirror_axes",
}


@dataclass(frozen=True)
class Case:
    """Its name, and its files by channel."""

    name: str
    files: tuple[Path, ...]


def find_cases(folder: Path, dataset_json: dict[str, Any]) -> list[Case]:
    """The cases of a folder in nnU-Net's naming, CASE_0000.nii.gz, one file for each channel of the model.

    Raises:
        ScanError: there are none, or a channel is missing or too many.
    """
    ending = dataset_json["file_ending"]
    channels = list((dataset_json.get("channel_names") or dataset_json["modality"]).values())
    wanted = ", ".join(f"_{number:04d}{ending} ({name})" for number, name in enumerate(channels))
    if not folder.is_dir():
        raise ScanError(f"{folder} is not a folder; give the folder that holds the scans.")
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()):
        if not path.name.endswith(ending):
            continue
        match = re.fullmatch(r"(.+)_(\d{4})", path.name.removesuffix(ending))
        if match is None:
            raise ScanError(f"{path} does not end with a channel; the model wants {wanted} of each case. Rename it.")
        found.setdefault(match[1], {})[int(match[2])] = path
    if not found:
        raise ScanError(f"{folder} holds no scans; the model wants {wanted} of each case.")
    for name, files in found.items():
        if list(files) != list(range(len(channels))):
            has = ", ".join(f"_{number:04d}" for number in files)
            raise ScanError(f"{name} in {folder} has {has}, but the model wants {wanted} of each case.")
    return [Case(name, tuple(files.values())) for name, files in found.items()]


def _refuse_damaged(cases: Sequence[Case]) -> None:
    for path in (path for case in cases for path in case.files):
        if path.name.endswith((".nii", ".nii.gz")) and (reason := incompleteness(path)) is not None:
            raise ScanError(f"{path} is damaged: {reason}; copy or download it again.")


class ScanPrediction:
    """The cases of a folder, to be predicted into another.

    Args:
        models: folds of one model, from :func:`read_exported`.
        source: with the scans, in nnU-Net's naming.
        output: for the segmentations, named like the cases; made if it is missing.
        probabilities: write CASE.npz and CASE.pkl as well, which ``nnUNetv2_ensemble`` reads.
        keep_existing: pass over cases that ``output`` has already.
        step_size, mirroring, progress: see :class:`OnnxPredictor`.

    Raises:
        ExportedModelError: the models do not go together.
        ScanError: the scans or the folders cannot be used. Nothing has been written.
    """

    def __init__(
        self,
        models: Sequence[ExportedModel],
        source: Path,
        output: Path,
        *,
        step_size: float = 0.5,
        mirroring: bool = True,
        probabilities: bool = False,
        keep_existing: bool = False,
        progress: bool = False,
    ) -> None:
        if not 0 < step_size <= 1:
            raise ScanError(f"-step_size {step_size:g} must be more than 0 and at most 1, the whole patch.")
        if output.exists() and source.exists() and output.samefile(source):
            raise ScanError(f"-o {output} is the folder of the scans; name another folder.")
        if output.exists() and not output.is_dir():
            raise ScanError(f"-o {output} is a file; name a folder.")
        self.predictor = OnnxPredictor(models, step_size=step_size, mirroring=mirroring, progress=progress)
        self.output = output
        self.probabilities = probabilities
        self._about = {
            "nnunet-deform": __version__,
            "models": [
                {"file": str(model.path), "trainer": model.trainer, "fold": model.fold, "sha256": model.sha256}
                for model in models
            ],
            "configuration": models[0].configuration,
            "step_size": step_size,
            "mirror_axes": self.predictor.allowed_mirroring_axes if mirroring else None,
        }
        cases = find_cases(source, self.predictor.dataset_json)
        self.found = len(cases)
        self.cases = [case for case in cases if not (keep_existing and self._is_done(case))]
        _refuse_damaged(self.cases)

    def _files(self, case: Case) -> list[str]:
        endings = [self.predictor.dataset_json["file_ending"], *([".npz", ".pkl"] if self.probabilities else [])]
        return [f"{case.name}{ending}" for ending in endings]

    def _is_done(self, case: Case) -> bool:
        return all((self.output / name).is_file() for name in self._files(case))

    def run(self) -> Iterator[PredictedCase]:
        """Predict case after case. A case's files appear when it is finished.

        Raises:
            ScanError: a scan cannot be read, or a result cannot be written; those before it are complete.
        """
        existed = self.output.exists()
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=self.output) as partial:
                self._write_about(Path(partial))
                for case in self.cases:
                    yield self._predict(case, Path(partial))
        except OSError as error:
            raise ScanError(f"cannot write into {self.output} ({error.strerror or error}).") from error
        finally:
            compute_gaussian.cache_clear()
            if not existed:
                with suppress(OSError):  # unless there is something in it
                    self.output.rmdir()

    def _write_about(self, partial: Path) -> None:
        """What nnU-Net's commands for ensembles and postprocessing look for beside predictions, and what made them."""
        contents = {
            "dataset.json": self.predictor.dataset_json,
            "plans.json": self.predictor.plans_manager.plans,
            SUMMARY: self._about,
        }
        for name, content in contents.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _predict(self, case: Case, partial: Path) -> PredictedCase:
        predictor = self.predictor
        times = [time.perf_counter()]
        said = io.StringIO()
        try:
            with redirect_stdout(said):
                data, _, properties = predictor.configuration_manager.preprocessor_class(verbose=False).run_case(
                    [str(file) for file in case.files],
                    None,
                    predictor.plans_manager,
                    predictor.configuration_manager,
                    predictor.dataset_json,
                )
        except Exception as error:  # whatever a reader makes of a damaged file
            reason = (str(error) or said.getvalue()).strip().splitlines()
            raise ScanError(
                f"nnU-Net cannot read {case.name} ({reason[-1] if reason else type(error).__name__}); check the files "
                f"{', '.join(file.name for file in case.files)}."
            ) from error
        times.append(time.perf_counter())
        try:
            logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data))
        except RuntimeError as error:  # logits that are infinite in half precision
            raise ScanError(f"{case.name} cannot be predicted ({str(error).splitlines()[0]}).") from error
        times.append(time.perf_counter())
        export_prediction_from_logits(
            logits,
            properties,
            predictor.configuration_manager,
            predictor.plans_manager,
            predictor.dataset_json,
            str(partial / case.name),
            self.probabilities,
            torch.get_num_threads(),
        )
        # The first case brings what describes all of them.
        for path in sorted(partial.iterdir()):
            os.replace(path, self.output / path.name)
        times.append(time.perf_counter())
        seconds = [end - start for start, end in itertools.pairwise(times)]
        return PredictedCase(case.name, *seconds, notes=said.getvalue())

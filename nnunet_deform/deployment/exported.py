"""What an exported ONNX file says of itself: the model's plans and dataset.json, so that the file alone suffices."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INPUT, OUTPUT = "image", "logits"
# Keys of the file's metadata that hold a whole file of nnU-Net's.
PLANS, DATASET_JSON = "plans.json", "dataset.json"


class ExportedModelError(RuntimeError):
    """An ONNX file cannot be used for a prediction; the message says why and what to do."""


@dataclass(frozen=True)
class ExportedModel:
    """One fold of a trained model, ready to run.

    Args:
        path, sha256: of the file.
        session: ONNX Runtime's; ``image`` [1, channels, *patch_size] -> ``logits`` [1, classes, *patch_size], float32.
        trainer: the name of the trainer.
        configuration: of the plans.
        fold: a number, or "all".
        plans, dataset_json: the files of these names, as nnU-Net reads them.
        mirror_axes: spatial axes along which predictions may be mirrored, or None.
    """

    path: Path
    sha256: str
    session: Any
    trainer: str
    configuration: str
    fold: str
    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    mirror_axes: tuple[int, ...] | None


def read_exported(path: Path, *, threads: int) -> ExportedModel:
    """A file that ``nnunet-deform export`` wrote.

    Args:
        threads: that ONNX Runtime computes with.

    Raises:
        ExportedModelError: there is no such file, ONNX Runtime cannot read it, or it does not say what it is.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportedModelError(f"{error.name} is not installed; run: pip install 'nnunet-deform[export]'") from error

    if not path.is_file():
        raise ExportedModelError(f"{path} does not exist; give the file that nnunet-deform export wrote.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only
    # Threads that wait busily take the cores of other programs, and of each other where those are fewer.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no public base class
        reason = str(error).splitlines()[0]
        raise ExportedModelError(f"ONNX Runtime cannot read {path} ({reason}); export the model again.") from error
    values = _metadata(session, path)
    axes = values["mirror_axes"]
    return ExportedModel(
        path=path,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        session=session,
        trainer=values["trainer"],
        configuration=values["configuration"],
        fold=values["fold"],
        plans=values[PLANS],
        dataset_json=values[DATASET_JSON],
        mirror_axes=None if axes is None else tuple(axes),
    )


_NEEDED = ("trainer", "configuration", "fold", "mirror_axes", PLANS, DATASET_JSON)


def _metadata(session: Any, path: Path) -> dict[str, Any]:
    texts = session.get_modelmeta().custom_metadata_map
    missing = [name for name in _NEEDED if name not in texts]
    if missing:
        raise ExportedModelError(
            f"{path} does not hold {', '.join(missing)}: it was not written by nnunet-deform export, or by a version "
            "that left it out; export the model with this version."
        )
    try:
        # Other programs add what they like.
        return {name: json.loads(texts[name]) for name in _NEEDED}
    except json.JSONDecodeError as error:
        raise ExportedModelError(f"the metadata of {path} is damaged ({error}); export the model again.") from error

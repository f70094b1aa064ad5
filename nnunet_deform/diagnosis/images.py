"""Whether image files are complete. ITK, and so nnU-Net, reads a truncated NIfTI file without an error."""

import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import nibabel
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

_CHUNK = 1 << 24


def incomplete_images(folder: Path) -> Iterator[str]:
    """One sentence for every ``.nii`` and ``.nii.gz`` file in a folder and below that is shorter than its header says.

    Compressed files are read to their end, which also finds damaged ones.
    """
    for path in sorted([*folder.rglob("*.nii.gz"), *folder.rglob("*.nii")]):
        reason = incompleteness(path)
        if reason is not None:
            yield f"{path} is damaged: {reason}; copy or download it again, before nnU-Net reads what is left of it."


def incompleteness(path: Path) -> str | None:
    """What is missing or damaged in a ``.nii`` or ``.nii.gz`` file, or None."""
    try:
        voxels = nibabel.load(path).dataobj
        expected = voxels.offset + math.prod(voxels.shape) * voxels.dtype.itemsize
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            length = 0
            while chunk := file.read(_CHUNK):
                length += len(chunk)
    except (ImageFileError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        return f"it ends early or cannot be read ({error})"
    except (HeaderDataError, ValueError) as error:
        return f"its header is invalid ({error})"
    return None if length >= expected else f"it has {length} bytes of {expected}"

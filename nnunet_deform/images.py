"""Whether image files are complete. ITK, and so nnU-Net, reads a truncated NIfTI file without a word."""

import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_CHUNK = 1 << 24


def incomplete_images(folder: Path) -> Iterator[str]:
    """One sentence for every ``.nii`` and ``.nii.gz`` file in a folder and below that is shorter than its header says.

    Compressed files are read to their end, which also finds damaged ones.
    """
    for path in sorted([*folder.rglob("*.nii.gz"), *folder.rglob("*.nii")]):
        reason = _incomplete(path)
        if reason is not None:
            yield f"{path} is damaged: {reason}; copy or download it again, before nnU-Net reads what is left of it."


def _incomplete(path: Path) -> str | None:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            header = file.read(540)
            expected = _expected_length(header)
            if expected is None:
                return "it has no complete NIfTI header"
            length = len(header)
            while chunk := file.read(_CHUNK):
                length += len(chunk)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        return f"its compressed data end early or are broken ({error})"
    return None if length >= expected else f"it has {length} bytes of {expected}"


def _expected_length(header: bytes) -> int | None:
    """Offset and size of the voxels, from a NIfTI-1 or NIfTI-2 header in either byte order."""
    for order in "<>":
        if len(header) >= 348 and struct.unpack_from(f"{order}i", header)[0] == 348:
            dimensions = struct.unpack_from(f"{order}8h", header, 40)
            bits = struct.unpack_from(f"{order}h", header, 72)[0]
            offset = int(struct.unpack_from(f"{order}f", header, 108)[0])
        elif len(header) >= 540 and struct.unpack_from(f"{order}i", header)[0] == 540:
            dimensions = struct.unpack_from(f"{order}8q", header, 16)
            bits = struct.unpack_from(f"{order}h", header, 14)[0]
            offset = struct.unpack_from(f"{order}q", header, 168)[0]
        else:
            continue
        voxels = 1
        for size in dimensions[1 : 1 + dimensions[0]]:
            voxels *= size
        return offset + voxels * bits // 8
    return None

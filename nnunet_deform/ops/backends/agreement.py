"""When two results of the deformable convolution agree."""

from collections.abc import Iterable

import torch
from torch import Tensor

# Norm of the error over the norm of the truth, by the dtype of the result; README.md of the operators has the table.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}

RESULTS = (
    "output",
    "gradient of the input",
    "gradient of the offset",
    "gradient of the weight",
    "gradient of the bias",
)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``, in float64; the norm itself where nothing is expected."""
    expected = expected.double()
    difference = torch.linalg.vector_norm(result.to(expected.device).double() - expected)
    scale = torch.linalg.vector_norm(expected)
    return float(difference / scale) if scale else float(difference)


def disagreement(
    results: Iterable[Tensor], expected: Iterable[Tensor], times: float = 1, names: Iterable[str] = RESULTS
) -> str | None:
    """Which result is off and by how much, or None where all are within ``times`` the tolerance of their dtypes."""
    for name, result, truth in zip(names, results, expected, strict=True):
        if result.shape != truth.shape:
            return f"the {name} has shape {tuple(result.shape)} in the place of {tuple(truth.shape)}"
        if not result.isfinite().all():
            return f"the {name} is not finite"
        error, allowed = relative_error(result, truth), times * TOLERANCE[result.dtype]
        if not error <= allowed:
            return f"the {name} is off by {error:.1e} of its norm, where {allowed:.1e} is allowed"
    return None

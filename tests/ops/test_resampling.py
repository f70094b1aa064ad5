"""Linear resampling: torch's interpolation, also where it is compiled as one operation."""

import pytest
import torch
import torch.nn.functional as F

from nnunet_deform.ops import CHANNELS_LAST, resample_linear

SIZES = [((4, 6, 8), (8, 6, 4)), ((5, 3, 2), (10, 9, 2)), ((6, 4), (3, 8)), ((5, 7), (4, 11))]


@pytest.mark.parametrize(("before", "after"), SIZES, ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("channels", [1, 5])
def test_equals_torchs_interpolation(before, after, compiled, channels):
    torch.compiler.reset()
    mode = {2: "bilinear", 3: "trilinear"}[len(before)]
    image = torch.randn(2, channels, *before, dtype=torch.float64)
    image = image.contiguous(memory_format=CHANNELS_LAST[len(before)]).requires_grad_()
    resample = torch.compile(resample_linear, fullgraph=True, backend="aot_eager") if compiled else resample_linear
    ours, theirs = resample(image, after), F.interpolate(image, size=after, mode=mode, align_corners=False)
    assert torch.equal(ours, theirs)
    assert ours.is_contiguous(memory_format=CHANNELS_LAST[len(before)])
    gradient = torch.randn_like(theirs)
    assert torch.equal(*(torch.autograd.grad(output, image, gradient)[0] for output in (ours, theirs)))


@pytest.mark.parametrize(("before", "after"), SIZES, ids=str)
def test_passes_torchs_checks_of_operators(before, after):
    image = torch.randn(2, 3, *before, requires_grad=True)
    torch.library.opcheck(torch.ops.nnunet_deform.resample_linear, (image, list(after)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_under_autocast_is_eager_modes(dtype):
    torch.compiler.reset()
    image = torch.randn(1, 2, 4, 6, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        eager = resample_linear(image, (8, 3, 4))
        compiled = torch.compile(resample_linear, fullgraph=True, backend="aot_eager")(image, (8, 3, 4))
    assert compiled.dtype == eager.dtype
    assert torch.equal(compiled, eager)

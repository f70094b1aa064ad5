"""Argument checks shared by the operators. Every message prints the offending value and says what was expected."""

from collections.abc import Sequence

from torch import Tensor

AXES = {2: ("height", "width"), 3: ("depth", "height", "width")}


def spatial_argument(name: str, value: int | Sequence[int], ndim: int, minimum: int) -> list[int]:
    """One integer for all axes, or one for each, as a list of ``ndim``.

    Raises:
        ValueError: the wrong number of values, or one below ``minimum``.
        TypeError: a value that is no integer.
    """
    values = list(value) if isinstance(value, (tuple, list)) else [value] * ndim
    if not all(isinstance(v, int) for v in values):
        raise TypeError(f"{name}={value!r} must be an integer, or a tuple of {ndim}.")
    if len(values) != ndim:
        raise ValueError(f"{name}={value} has {len(values)} values, but there are {ndim} axes; give one or {ndim}.")
    if any(v < minimum for v in values):
        raise ValueError(f"{name}={value} must be at least {minimum} on every axis.")
    return values


def convolved_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """The output's spatial size, as for an ordinary convolution."""
    return [
        (s + 2 * p - d * (k - 1) - 1) // step + 1
        for s, k, step, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


def check_deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """Shapes, dtypes and devices of a deformable convolution with ``len(stride)`` axes.

    Raises:
        ValueError: a shape does not fit.
        TypeError: dtypes do not go together.
        RuntimeError: the tensors are on different devices.
    """
    ndim = len(stride)
    for name, tensor in (("input", input), ("offset", offset), ("weight", weight)):
        if tensor.ndim != ndim + 2:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; a {ndim}D deformable convolution needs {ndim + 2} dimensions."
            )
    tensors = {"input": input, "offset": offset, "weight": weight, **({} if bias is None else {"bias": bias})}
    if any(tensor.device != input.device for tensor in tensors.values()):
        devices = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise RuntimeError(f"the tensors are on different devices ({devices}); move them to one.")
    check_deform_conv_dtypes(input, offset, weight, bias)

    channels = input.shape[1]
    out_channels, group_channels, *kernel = weight.shape
    if 0 in (group_channels, out_channels, *kernel):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; no axis of it may be empty.")
    if channels == 0 or channels % group_channels:
        raise ValueError(
            f"weight has {group_channels} channels per group (shape {tuple(weight.shape)}), which does not divide the "
            f"input's {channels} channels."
        )
    groups = channels // group_channels
    if out_channels % groups:
        raise ValueError(
            f"weight has {out_channels} output channels, which the {groups} groups (input channels {channels} / "
            f"{group_channels} per group) do not divide."
        )
    if bias is not None and tuple(bias.shape) != (out_channels,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({out_channels},), one per output channel.")

    per_group = ndim
    for k in kernel:
        per_group *= k
    if offset.shape[1] == 0 or offset.shape[1] % per_group:
        raise ValueError(
            f"offset has {offset.shape[1]} channels; a kernel of {'x'.join(map(str, kernel))} needs {per_group} "
            f"({ndim} for each tap) for each deformable group."
        )
    offset_groups = offset.shape[1] // per_group
    if channels % offset_groups:
        raise ValueError(
            f"offset has {offset.shape[1]} channels, that is {offset_groups} deformable groups, which do not divide "
            f"the input's {channels} channels."
        )
    if offset.shape[0] != input.shape[0]:
        raise ValueError(f"offset has batch size {offset.shape[0]}, but input has {input.shape[0]}.")

    size = input.shape[2:]
    if 0 in size:
        raise ValueError(f"input has spatial size {tuple(size)}; no axis may be empty.")
    out_size = convolved_size(size, kernel, stride, padding, dilation)
    for axis, length in zip(AXES[ndim], out_size, strict=True):
        if length < 1:
            raise ValueError(
                f"the output would have {axis} {length}: the kernel {tuple(kernel)} with dilation {tuple(dilation)} "
                f"does not fit into the input {tuple(size)} with padding {tuple(padding)}."
            )
    if list(offset.shape[2:]) != out_size:
        raise ValueError(
            f"offset has spatial size {tuple(offset.shape[2:])}, but the output has {tuple(out_size)}; they must agree."
        )


def check_deform_conv_dtypes(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Values share one floating dtype; the offset has it too, or is float32 beside half-precision values."""
    if not input.is_floating_point():
        raise TypeError(f"input is {input.dtype}; a deformable convolution needs a floating dtype.")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, but input is {input.dtype}; convert one of them.")
    half = input.dtype.itemsize == 2
    if offset.dtype != input.dtype and not (half and offset.dtype.itemsize == 4 and offset.is_floating_point()):
        raise TypeError(
            f"offset is {offset.dtype}, but input is {input.dtype}; they must agree, or the offset be torch.float32 "
            "beside half-precision input."
        )


def check_dynamic_conv(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int, ndim: int) -> None:
    """Shapes of a convolution with a kernel for each sample.

    Raises:
        ValueError: a shape does not fit.
    """
    if input.ndim != ndim + 2 or weight.ndim != ndim + 3:
        raise ValueError(
            f"input has shape {tuple(input.shape)} and weight {tuple(weight.shape)}; a {ndim}D dynamic convolution "
            f"needs {ndim + 2} and {ndim + 3} dimensions."
        )
    batch, channels = input.shape[:2]
    if batch == 0 or weight.shape[0] != batch:
        raise ValueError(f"weight has kernels for {weight.shape[0]} samples, but input has {batch}; give at least one.")
    out_channels, group_channels = weight.shape[1:3]
    if groups < 1 or out_channels % groups or group_channels * groups != channels:
        raise ValueError(
            f"groups={groups} does not go with {channels} input and {out_channels} output channels and a weight of "
            f"shape {tuple(weight.shape)}, [B, C_out, C/groups, *kernel]."
        )
    if bias is not None and tuple(bias.shape) != (batch, out_channels):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected {(batch, out_channels)}, one for each sample.")

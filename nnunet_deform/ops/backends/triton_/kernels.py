"""The Triton kernels: feature maps are channels last, and a 2D problem is a 3D one of depth 1 with ``AXES`` 2.

In every kernel a program has as many voxels (or samples) as threads: their positions are then computed once each and
handed to the threads that share the channels. With fewer, Triton computes them anew in all of those threads.

Interpolation is explicit ``tl.fma``: whether the compiler may fuse a product into a sum by itself depends on the
version of Triton and on torch.compile.
"""

import triton
import triton.language as tl

# Larger than any volume. Regular grid, place in the kernel and offset, so limited, still add up in an int32.
_FAR = tl.constexpr(2**29 - 1)
_FAR_OFFSET = tl.constexpr(2.0**30)

_UNSPECIALISED = ["in_d", "in_h", "in_w", "out_d", "out_h", "out_w"]


@triton.jit
def trial_kernel(place):
    """Compiled to see whether anything can be."""
    tl.store(place, tl.load(place) + 1)


@triton.jit
def _limited(place):
    """A regular coordinate in 32 bits; one that does not fit stays outside every volume."""
    return tl.minimum(tl.maximum(place.to(tl.int64), -_FAR), _FAR).to(tl.int32)


@triton.jit
def _voxels(tile, out_d, out_h, out_w, BRICK_D: tl.constexpr, BRICK_H: tl.constexpr, BRICK_W: tl.constexpr):
    """The voxels of one brick: coordinates, index, and which are in the volume.

    Neighbours in all directions share corners, and so the first-level cache.
    """
    bricks_w = tl.cdiv(out_w, BRICK_W)
    bricks_h = tl.cdiv(out_h, BRICK_H)
    lane = tl.arange(0, BRICK_D * BRICK_H * BRICK_W)
    x = tile % bricks_w * BRICK_W + lane % BRICK_W
    y = tile // bricks_w % bricks_h * BRICK_H + lane // BRICK_W % BRICK_H
    z = tile // bricks_w // bricks_h * BRICK_D + lane // (BRICK_W * BRICK_H)
    valid = (x < out_w) & (y < out_h) & (z < out_d)
    return z, y, x, (z * out_h + y) * out_w + x, valid


@triton.jit
def _along(at, mask, voxel, stride, padding, place, dilation, size):
    """One coordinate of a tap's positions: the cell, and for its lower and upper end the weight and whether it counts.

    Cell and fraction are those of the offset alone, and the regular grid is added as an integer: the fraction is as
    exact at voxel 500 as at voxel 0. An end outside the volume does not count and weighs 0; where neither counts, the
    position is not in (-1, size).
    """
    offset = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    # Of NaN and a number these return the number.
    offset = tl.minimum(tl.maximum(offset, -_FAR_OFFSET), _FAR_OFFSET)
    floor = tl.floor(offset)
    fraction = offset - floor
    regular = _limited(voxel.to(tl.int64) * stride - padding)
    cell = regular + _limited(place.to(tl.int64) * dilation) + floor.to(tl.int32)
    has_lower = (cell >= 0) & (cell < size)
    has_upper = (cell >= -1) & (cell < size - 1) & (has_lower | (fraction > 0))
    return cell, tl.where(has_lower, 1 - fraction, 0.0), tl.where(has_upper, fraction, 0.0), has_lower, has_upper


@triton.jit
def _place(voxel, size, stride, WIDE: tl.constexpr):
    """Where one end of a cell is in memory; for one outside the volume, the nearest voxel.

    In a cell that touches the volume that is the other end, whose value the sample has anyway.
    """
    nearest = tl.minimum(tl.maximum(voxel, 0), size - 1)
    return nearest.to(tl.int64) * stride if WIDE else nearest * stride


@triton.jit
def _channels(block, group, group_channels, BLOCK_C: tl.constexpr):
    """A block of a deformable group's channels, and which of them exist."""
    in_group = block * BLOCK_C + tl.arange(0, BLOCK_C)
    return group * group_channels + in_group, in_group < group_channels


@triton.jit
def _load(at, mask, MASKED: tl.constexpr):
    """In float32. A mask costs an instruction for every value, so one that is always true is left out."""
    if MASKED:
        return tl.load(at, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.load(at).to(tl.float32)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def forward_kernel(
    input,
    input_batch_stride,
    input_d_stride,
    input_h_stride,
    input_w_stride,
    offset,
    offset_batch_stride,
    offset_channel_stride,
    offset_voxel_stride,
    weight,  # [taps, channels]
    bias,  # [channels], or None
    output,  # [batch, voxels, channels]
    in_d,
    in_h,
    in_w,
    out_d,
    out_h,
    out_w,
    stride_d,
    stride_h,
    stride_w,
    padding_d,
    padding_h,
    padding_w,
    dilation_d,
    dilation_h,
    dilation_w,
    groups,
    group_channels,
    AXES: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
    BRICK_D: tl.constexpr,
    BRICK_H: tl.constexpr,
    BRICK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: bricks of output voxels; batch items x deformable groups; blocks of a group's channels."""
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    VOXELS: tl.constexpr = BRICK_D * BRICK_H * BRICK_W
    item = (tl.program_id(1) // groups).to(tl.int64)
    group = tl.program_id(1) % groups
    z, y, x, voxel, valid = _voxels(tl.program_id(0), out_d, out_h, out_w, BRICK_D, BRICK_H, BRICK_W)
    channel, has_channel = _channels(tl.program_id(2), group, group_channels, BLOCK_C)
    channels = groups * group_channels
    from_input = input + item * input_batch_stride + channel[None, :]
    from_offset = offset + item * offset_batch_stride + voxel.to(tl.int64) * offset_voxel_stride

    total = tl.zeros([VOXELS, BLOCK_C], tl.float32)
    for tap in range(TAPS):
        at = from_offset + (group * TAPS + tap).to(tl.int64) * AXES * offset_channel_stride
        tap_z = tap // (KERNEL_H * KERNEL_W)
        tap_y = tap // KERNEL_W % KERNEL_H
        tap_x = tap % KERNEL_W
        inside = valid
        if AXES == 3:
            cell, z_lower, z_upper, has_lower, has_upper = _along(
                at, valid, z, stride_d, padding_d, tap_z, dilation_d, in_d
            )
            inside &= has_lower | has_upper
            z0 = _place(cell, in_d, input_d_stride, WIDE)
            z1 = _place(cell + 1, in_d, input_d_stride, WIDE)
            at += offset_channel_stride
        cell, y_lower, y_upper, has_lower, has_upper = _along(
            at, valid, y, stride_h, padding_h, tap_y, dilation_h, in_h
        )
        inside &= has_lower | has_upper
        y0 = _place(cell, in_h, input_h_stride, WIDE)
        y1 = _place(cell + 1, in_h, input_h_stride, WIDE)
        at += offset_channel_stride
        cell, x_lower, x_upper, has_lower, has_upper = _along(
            at, valid, x, stride_w, padding_w, tap_x, dilation_w, in_w
        )
        inside &= has_lower | has_upper
        x0 = _place(cell, in_w, input_w_stride, WIDE)
        x1 = _place(cell + 1, in_w, input_w_stride, WIDE)

        sample = tl.zeros([VOXELS, BLOCK_C], tl.float32)
        for corner in tl.static_range(2**AXES):
            row = (y1 if corner // 2 % 2 else y0) + (x1 if corner % 2 else x0)
            share = (y_upper if corner // 2 % 2 else y_lower) * (x_upper if corner % 2 else x_lower)
            if AXES == 3:
                row += z1 if corner // 4 else z0
                share *= z_upper if corner // 4 else z_lower
            value = _load(from_input + row[:, None], has_channel[None, :], MASKED)
            sample = tl.fma(value, share[:, None], sample)
        # A product with 0 would make NaN of an infinite voxel.
        sample = tl.where(inside[:, None], sample, 0.0)
        tap_weight = _load(weight + tap * channels + channel, has_channel, MASKED)
        total = tl.fma(sample, tap_weight[None, :], total)

    if bias is not None:
        total += _load(bias + channel, has_channel, MASKED)[None, :]
    at = output + (item * (out_d * out_h * out_w) + voxel)[:, None] * channels + channel[None, :]
    tl.store(at, total.to(output.dtype.element_ty), mask=valid[:, None] & has_channel[None, :])


@triton.jit(do_not_specialize=[*_UNSPECIALISED, "bricks_per_run"])
def offset_weight_gradient_kernel(
    grad_output,  # [batch, voxels, channels]
    input,
    input_batch_stride,
    input_d_stride,
    input_h_stride,
    input_w_stride,
    offset,
    offset_batch_stride,
    offset_channel_stride,
    offset_voxel_stride,
    weight,  # [taps, channels]
    grad_offset,  # [batch, groups, taps, AXES, voxels], or None
    grad_weight,  # one summand for each run, [runs, batch, groups, taps, group_channels], or None
    bricks_per_run,
    in_d,
    in_h,
    in_w,
    out_d,
    out_h,
    out_w,
    stride_d,
    stride_h,
    stride_w,
    padding_d,
    padding_h,
    padding_w,
    dilation_d,
    dilation_h,
    dilation_w,
    groups,
    group_channels,
    AXES: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
    BRICK_D: tl.constexpr,
    BRICK_H: tl.constexpr,
    BRICK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: runs of bricks; batch items x deformable groups; taps.

    The offset gradient of a tap in a brick belongs to one program, so nothing is added atomically.
    """
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    VOXELS: tl.constexpr = BRICK_D * BRICK_H * BRICK_W
    item = (tl.program_id(1) // groups).to(tl.int64)
    group = tl.program_id(1) % groups
    tap = tl.program_id(2)
    channels = groups * group_channels
    voxels = out_d * out_h * out_w
    bricks = tl.cdiv(out_d, BRICK_D) * tl.cdiv(out_h, BRICK_H) * tl.cdiv(out_w, BRICK_W)
    first = tl.program_id(0) * bricks_per_run
    last = tl.minimum(first + bricks_per_run, bricks)
    tap_z = tap // (KERNEL_H * KERNEL_W)
    tap_y = tap // KERNEL_W % KERNEL_H
    tap_x = tap % KERNEL_W
    offset_channel = (group * TAPS + tap).to(tl.int64) * AXES
    from_offset = offset + item * offset_batch_stride + offset_channel * offset_channel_stride

    for block in range(tl.cdiv(group_channels, BLOCK_C)):
        channel, has_channel = _channels(block, group, group_channels, BLOCK_C)
        from_input = input + item * input_batch_stride + channel[None, :]
        tap_weight = _load(weight + tap * channels + channel, has_channel, MASKED)
        weight_products = tl.zeros([VOXELS, BLOCK_C], tl.float32)
        for brick in range(first, last):
            z, y, x, voxel, valid = _voxels(brick, out_d, out_h, out_w, BRICK_D, BRICK_H, BRICK_W)
            at = from_offset + voxel.to(tl.int64) * offset_voxel_stride
            inside = valid
            if AXES == 3:
                cell_z, z_lower, z_upper, has_z0, has_z1 = _along(
                    at, valid, z, stride_d, padding_d, tap_z, dilation_d, in_d
                )
                inside &= has_z0 | has_z1
                z0_counts, z1_counts = has_z0.to(tl.float32), has_z1.to(tl.float32)
                at += offset_channel_stride
            cell, y_lower, y_upper, has_y0, has_y1 = _along(at, valid, y, stride_h, padding_h, tap_y, dilation_h, in_h)
            inside &= has_y0 | has_y1
            y0_counts, y1_counts = has_y0.to(tl.float32), has_y1.to(tl.float32)
            y0 = _place(cell, in_h, input_h_stride, WIDE)
            y1 = _place(cell + 1, in_h, input_h_stride, WIDE)
            at += offset_channel_stride
            cell, x_lower, x_upper, has_x0, has_x1 = _along(at, valid, x, stride_w, padding_w, tap_x, dilation_w, in_w)
            inside &= has_x0 | has_x1
            x0_counts, x1_counts = has_x0.to(tl.float32), has_x1.to(tl.float32)
            x0 = _place(cell, in_w, input_w_stride, WIDE)
            x1 = _place(cell + 1, in_w, input_w_stride, WIDE)

            at = grad_output + (item * voxels + voxel)[:, None] * channels + channel[None, :]
            grad = tl.load(at, mask=valid[:, None] & has_channel[None, :], other=0.0).to(tl.float32)
            grad_sample = grad * tap_weight[None, :]
            sample = tl.zeros([VOXELS, BLOCK_C], tl.float32)
            grad_z = tl.zeros([VOXELS], tl.float32)
            grad_y = tl.zeros([VOXELS], tl.float32)
            grad_x = tl.zeros([VOXELS], tl.float32)
            # Not unrolled: eight corners' values at once are more than a thread has registers.
            for end_z in range(AXES - 1):
                plane = tl.zeros([VOXELS], tl.float32)
                plane_y = tl.zeros([VOXELS], tl.float32)
                plane_x = tl.zeros([VOXELS], tl.float32)
                for end_y in tl.static_range(2):
                    row = y1 if end_y else y0
                    along_y = y_upper if end_y else y_lower
                    share = along_y
                    if AXES == 3:
                        row += _place(cell_z + end_z, in_d, input_d_stride, WIDE)
                        share *= tl.where(end_z == 1, z_upper, z_lower)
                    lower = _load(from_input + (row + x0)[:, None], has_channel[None, :], MASKED)
                    upper = _load(from_input + (row + x1)[:, None], has_channel[None, :], MASKED)
                    if grad_weight is not None:
                        sample = tl.fma(lower, (share * x_lower)[:, None], sample)
                        sample = tl.fma(upper, (share * x_upper)[:, None], sample)
                    if grad_offset is not None:
                        lower = tl.sum(lower * grad_sample, 1)
                        upper = tl.sum(upper * grad_sample, 1)
                        line = tl.fma(upper, x_upper, lower * x_lower)
                        line_x = tl.fma(upper, x1_counts, -lower * x0_counts)
                        plane = tl.fma(line, along_y, plane)
                        plane_x = tl.fma(line_x, along_y, plane_x)
                        plane_y = tl.fma(line, y1_counts if end_y else -y0_counts, plane_y)
                if AXES == 3:
                    along_z = tl.where(end_z == 1, z_upper, z_lower)
                    grad_x = tl.fma(plane_x, along_z, grad_x)
                    grad_y = tl.fma(plane_y, along_z, grad_y)
                    grad_z = tl.fma(plane, tl.where(end_z == 1, z1_counts, -z0_counts), grad_z)
                else:
                    grad_x = plane_x
                    grad_y = plane_y

            # A product with 0 would make NaN of an infinite voxel.
            if grad_weight is not None:
                weight_products = tl.fma(grad, tl.where(inside[:, None], sample, 0.0), weight_products)
            if grad_offset is not None:
                at = grad_offset + (item * groups * TAPS * AXES + offset_channel) * voxels + voxel
                for axis in tl.static_range(3 - AXES, 3):
                    gradient = grad_z if axis == 0 else (grad_y if axis == 1 else grad_x)
                    gradient = tl.where(inside, gradient, 0.0)
                    # The earlier blocks of channels.
                    gradient += tl.load(at, mask=valid & (block > 0), other=0.0)
                    tl.store(at, gradient, mask=valid)
                    at += voxels
        if grad_weight is not None:
            row = ((tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * TAPS + tap).to(tl.int64)
            at = grad_weight + row * group_channels + channel - group * group_channels
            tl.store(at, tl.sum(weight_products, 0), mask=has_channel)
        # The next block reads what other threads of this program have stored.
        tl.debug_barrier()


@triton.jit(do_not_specialize=_UNSPECIALISED)
def scatter_input_gradient_kernel(
    grad_output,  # [batch, voxels, channels]
    offset,
    offset_batch_stride,
    offset_channel_stride,
    offset_voxel_stride,
    weight,  # [taps, channels]
    grad_input,  # float32 [batch, input voxels, channels], zero at first
    in_d,
    in_h,
    in_w,
    out_d,
    out_h,
    out_w,
    stride_d,
    stride_h,
    stride_w,
    padding_d,
    padding_h,
    padding_w,
    dilation_d,
    dilation_h,
    dilation_w,
    groups,
    group_channels,
    AXES: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
    BRICK_D: tl.constexpr,
    BRICK_H: tl.constexpr,
    BRICK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The input gradient by atomic additions. Grid: as the forward pass."""
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    item = (tl.program_id(1) // groups).to(tl.int64)
    group = tl.program_id(1) % groups
    z, y, x, voxel, valid = _voxels(tl.program_id(0), out_d, out_h, out_w, BRICK_D, BRICK_H, BRICK_W)
    channel, has_channel = _channels(tl.program_id(2), group, group_channels, BLOCK_C)
    channels = groups * group_channels
    h_stride = in_w.to(tl.int64) * channels if WIDE else in_w * channels
    d_stride = in_h * h_stride
    into = grad_input + item * in_d * in_h * in_w * channels + channel[None, :]
    from_offset = offset + item * offset_batch_stride + voxel.to(tl.int64) * offset_voxel_stride
    from_grad = grad_output + (item * (out_d * out_h * out_w) + voxel)[:, None] * channels + channel[None, :]
    grad = tl.load(from_grad, mask=valid[:, None] & has_channel[None, :], other=0.0).to(tl.float32)

    for tap in range(TAPS):
        at = from_offset + (group * TAPS + tap).to(tl.int64) * AXES * offset_channel_stride
        tap_z = tap // (KERNEL_H * KERNEL_W)
        tap_y = tap // KERNEL_W % KERNEL_H
        tap_x = tap % KERNEL_W
        if AXES == 3:
            cell, z_lower, z_upper, _, _ = _along(at, valid, z, stride_d, padding_d, tap_z, dilation_d, in_d)
            z0 = _place(cell, in_d, d_stride, WIDE)
            z1 = _place(cell + 1, in_d, d_stride, WIDE)
            at += offset_channel_stride
        cell, y_lower, y_upper, _, _ = _along(at, valid, y, stride_h, padding_h, tap_y, dilation_h, in_h)
        y0 = _place(cell, in_h, h_stride, WIDE)
        y1 = _place(cell + 1, in_h, h_stride, WIDE)
        at += offset_channel_stride
        cell, x_lower, x_upper, _, _ = _along(at, valid, x, stride_w, padding_w, tap_x, dilation_w, in_w)
        x0 = _place(cell, in_w, channels, WIDE)
        x1 = _place(cell + 1, in_w, channels, WIDE)

        grad_sample = grad * _load(weight + tap * channels + channel, has_channel, MASKED)[None, :]
        for corner in tl.static_range(2**AXES):
            row = (y1 if corner // 2 % 2 else y0) + (x1 if corner % 2 else x0)
            share = (y_upper if corner // 2 % 2 else y_lower) * (x_upper if corner % 2 else x_lower)
            if AXES == 3:
                row += z1 if corner // 4 else z0
                share *= z_upper if corner // 4 else z_lower
            # Corners that do not count weigh 0; of integer positions 7 of 8 do.
            mask = (valid & (share > 0))[:, None] & has_channel[None, :]
            tl.atomic_add(into + row[:, None], grad_sample * share[:, None], mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=[*_UNSPECIALISED, "first_tap"])
def cell_kernel(
    offset,
    offset_batch_stride,
    offset_channel_stride,
    offset_voxel_stride,
    cells,  # [taps of this launch, batch, groups, voxels]
    first_tap,
    in_d,
    in_h,
    in_w,
    out_d,
    out_h,
    out_w,
    stride_d,
    stride_h,
    stride_w,
    padding_d,
    padding_h,
    padding_w,
    dilation_d,
    dilation_h,
    dilation_w,
    groups,
    AXES: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    BRICK_D: tl.constexpr,
    BRICK_H: tl.constexpr,
    BRICK_W: tl.constexpr,
):
    """The number of every sample's cell, counted over batch, groups and cells; the first number beyond for one outside.

    Cells begin at -1, so there is one more than voxels along an axis. Grid: bricks; batch items x groups; taps.
    """
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    item = (tl.program_id(1) // groups).to(tl.int64)
    group = tl.program_id(1) % groups
    tap = first_tap + tl.program_id(2)
    z, y, x, voxel, valid = _voxels(tl.program_id(0), out_d, out_h, out_w, BRICK_D, BRICK_H, BRICK_W)
    from_offset = offset + item * offset_batch_stride + voxel.to(tl.int64) * offset_voxel_stride
    at = from_offset + (group * TAPS + tap).to(tl.int64) * AXES * offset_channel_stride

    number = tl.program_id(1).to(tl.int64)
    beyond = tl.num_programs(1).to(tl.int64)
    inside = valid
    if AXES == 3:
        tap_z = tap // (KERNEL_H * KERNEL_W)
        cell, _, _, has_lower, has_upper = _along(at, valid, z, stride_d, padding_d, tap_z, dilation_d, in_d)
        inside &= has_lower | has_upper
        number = number * (in_d + 1) + cell + 1
        beyond *= in_d + 1
        at += offset_channel_stride
    tap_y = tap // KERNEL_W % KERNEL_H
    cell, _, _, has_lower, has_upper = _along(at, valid, y, stride_h, padding_h, tap_y, dilation_h, in_h)
    inside &= has_lower | has_upper
    number = number * (in_h + 1) + cell + 1
    at += offset_channel_stride
    cell, _, _, has_lower, has_upper = _along(at, valid, x, stride_w, padding_w, tap % KERNEL_W, dilation_w, in_w)
    inside &= has_lower | has_upper
    number = number * (in_w + 1) + cell + 1
    number = tl.where(inside, number, beyond * (in_h + 1) * (in_w + 1))

    row = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    tl.store(cells + row * (out_d * out_h * out_w) + voxel, number.to(cells.dtype.element_ty), mask=valid)


@triton.jit
def _add_at(into, z, y, x, in_d, in_h, in_w, channels, has_channel, values):
    """Adds to the channels of one voxel, if it is in the volume."""
    if (z >= 0) & (z < in_d) & (y >= 0) & (y < in_h) & (x >= 0) & (x < in_w):
        at = into + ((z.to(tl.int64) * in_h + y) * in_w + x) * channels
        tl.store(at, tl.load(at, mask=has_channel, other=0.0) + values, mask=has_channel)


@triton.jit(do_not_specialize=[*_UNSPECIALISED, "first_tap", "parity_d", "parity_h", "parity_w"])
def gather_input_gradient_kernel(
    grad_output,  # [batch, voxels, channels]
    offset,
    offset_batch_stride,
    offset_channel_stride,
    offset_voxel_stride,
    weight,  # [taps, channels]
    order,  # the samples sorted by cell: places in the array that cell_kernel filled
    starts,  # where each cell's samples begin in it
    grad_input,  # float32 [batch, input voxels, channels]
    first_tap,
    parity_d,
    parity_h,
    parity_w,
    in_d,
    in_h,
    in_w,
    out_d,
    out_h,
    out_w,
    stride_d,
    stride_h,
    stride_w,
    padding_d,
    padding_h,
    padding_w,
    dilation_d,
    dilation_h,
    dilation_w,
    groups,
    group_channels,
    AXES: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    MASKED: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The input gradient by cells of one parity. No two of them share a corner, so nothing is added atomically.

    Grid: the cells; batch items x deformable groups; blocks of a group's channels.
    """
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    cells_d = in_d + 1 if AXES == 3 else 1
    cells_h = in_h + 1
    cells_w = in_w + 1
    per_row = (cells_w - parity_w + 1) // 2
    per_slice = (cells_h - parity_h + 1) // 2 * per_row
    z = tl.program_id(0) // per_slice * 2 + parity_d
    y = tl.program_id(0) % per_slice // per_row * 2 + parity_h
    x = tl.program_id(0) % per_row * 2 + parity_w
    number = ((tl.program_id(1).to(tl.int64) * cells_d + z) * cells_h + y) * cells_w + x
    first = tl.load(starts + number)
    last = tl.load(starts + number + 1)
    if first == last:
        return

    item = (tl.program_id(1) // groups).to(tl.int64)
    group = tl.program_id(1) % groups
    channel, has_channel = _channels(tl.program_id(2), group, group_channels, BLOCK_C)
    channels = groups * group_channels
    voxels = out_d * out_h * out_w
    # For each corner, its ends along (depth,) height and width.
    total000 = tl.zeros([BLOCK_C], tl.float32)
    total001 = tl.zeros([BLOCK_C], tl.float32)
    total010 = tl.zeros([BLOCK_C], tl.float32)
    total011 = tl.zeros([BLOCK_C], tl.float32)
    total100 = tl.zeros([BLOCK_C], tl.float32)
    total101 = tl.zeros([BLOCK_C], tl.float32)
    total110 = tl.zeros([BLOCK_C], tl.float32)
    total111 = tl.zeros([BLOCK_C], tl.float32)
    for start in range(first, last, SAMPLES):
        place = start + tl.arange(0, SAMPLES)
        valid = place < last
        sample = tl.load(order + place, mask=valid, other=0)
        voxel = (sample % voxels).to(tl.int32)
        tap = first_tap + (sample // voxels // tl.num_programs(1)).to(tl.int32)
        at = offset + item * offset_batch_stride + voxel.to(tl.int64) * offset_voxel_stride
        at += (group * TAPS + tap).to(tl.int64) * AXES * offset_channel_stride
        if AXES == 3:
            tap_z = tap // (KERNEL_H * KERNEL_W)
            along_d = voxel // (out_h * out_w)
            _, z_lower, z_upper, _, _ = _along(at, valid, along_d, stride_d, padding_d, tap_z, dilation_d, in_d)
            at += offset_channel_stride
        tap_y = tap // KERNEL_W % KERNEL_H
        along_h = voxel // out_w % out_h
        _, y_lower, y_upper, _, _ = _along(at, valid, along_h, stride_h, padding_h, tap_y, dilation_h, in_h)
        at += offset_channel_stride
        along_w = voxel % out_w
        _, x_lower, x_upper, _, _ = _along(at, valid, along_w, stride_w, padding_w, tap % KERNEL_W, dilation_w, in_w)

        mask = valid[:, None] & has_channel[None, :]
        at = grad_output + (item * voxels + voxel)[:, None] * channels + channel[None, :]
        grad = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        at = weight + (tap * channels)[:, None] + channel[None, :]
        grad_sample = grad * tl.load(at, mask=mask, other=0.0).to(tl.float32)
        share00 = y_lower * x_lower
        share01 = y_lower * x_upper
        share10 = y_upper * x_lower
        share11 = y_upper * x_upper
        if AXES == 3:
            total100 += tl.sum(grad_sample * (z_upper * share00)[:, None], 0)
            total101 += tl.sum(grad_sample * (z_upper * share01)[:, None], 0)
            total110 += tl.sum(grad_sample * (z_upper * share10)[:, None], 0)
            total111 += tl.sum(grad_sample * (z_upper * share11)[:, None], 0)
            share00 *= z_lower
            share01 *= z_lower
            share10 *= z_lower
            share11 *= z_lower
        total000 += tl.sum(grad_sample * share00[:, None], 0)
        total001 += tl.sum(grad_sample * share01[:, None], 0)
        total010 += tl.sum(grad_sample * share10[:, None], 0)
        total011 += tl.sum(grad_sample * share11[:, None], 0)

    into = grad_input + item * in_d * in_h * in_w * channels + channel
    if AXES == 3:
        _add_at(into, z, y, x, in_d, in_h, in_w, channels, has_channel, total111)
        _add_at(into, z, y, x - 1, in_d, in_h, in_w, channels, has_channel, total110)
        _add_at(into, z, y - 1, x, in_d, in_h, in_w, channels, has_channel, total101)
        _add_at(into, z, y - 1, x - 1, in_d, in_h, in_w, channels, has_channel, total100)
        z -= 1
    _add_at(into, z, y, x, in_d, in_h, in_w, channels, has_channel, total011)
    _add_at(into, z, y, x - 1, in_d, in_h, in_w, channels, has_channel, total010)
    _add_at(into, z, y - 1, x, in_d, in_h, in_w, channels, has_channel, total001)
    _add_at(into, z, y - 1, x - 1, in_d, in_h, in_w, channels, has_channel, total000)

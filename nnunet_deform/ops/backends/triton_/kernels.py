"""The Triton kernels: feature maps are channels last, and a 2D problem is a 3D one of depth 1 with ``AXES`` 2.

In every kernel a program has as many voxels (or samples) as threads: their positions are then computed once each and
handed to the threads that share the channels. With fewer, Triton computes them anew in all of those threads.

Channels come in blocks that divide their number, so that nothing is masked, and a thread takes LANE_C neighbours of a
block at once: as many as Triton believes to be aligned, which is what ``tl.multiple_of`` tells it, in bytes.

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
def _ends(at, mask, voxel, stride, padding, place, dilation, size, memory_stride, WIDE: tl.constexpr):
    """Of the positions along one axis the ends' places in memory, their weights, and whether they count."""
    cell, lower, upper, has_lower, has_upper = _along(at, mask, voxel, stride, padding, place, dilation, size)
    first = _place(cell, size, memory_stride, WIDE)
    second = _place(cell + 1, size, memory_stride, WIDE)
    return first, second, lower, upper, has_lower, has_upper


@triton.jit
def _corners(
    at,
    axis_stride,
    valid,
    z,
    y,
    x,
    tap,
    in_d,
    in_h,
    in_w,
    stride_d,
    stride_h,
    stride_w,
    padding_d,
    padding_h,
    padding_w,
    dilation_d,
    dilation_h,
    dilation_w,
    d_memory_stride,
    h_memory_stride,
    w_memory_stride,
    AXES: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The cells of one tap's positions: for the ends along each axis places in memory, weights, and whether they count;
    and which positions are sampled. In 2D, what is said of depth repeats height and is not used.
    """
    tap_y = tap // KERNEL_W % KERNEL_H
    tap_x = tap % KERNEL_W
    at_y = at + (AXES - 2) * axis_stride
    y0, y1, y_lower, y_upper, has_y0, has_y1 = _ends(
        at_y, valid, y, stride_h, padding_h, tap_y, dilation_h, in_h, h_memory_stride, WIDE
    )
    x0, x1, x_lower, x_upper, has_x0, has_x1 = _ends(
        at_y + axis_stride, valid, x, stride_w, padding_w, tap_x, dilation_w, in_w, w_memory_stride, WIDE
    )
    z0, z1, z_lower, z_upper, has_z0, has_z1 = y0, y1, y_lower, y_upper, has_y0, has_y1
    if AXES == 3:
        tap_z = tap // (KERNEL_H * KERNEL_W)
        z0, z1, z_lower, z_upper, has_z0, has_z1 = _ends(
            at, valid, z, stride_d, padding_d, tap_z, dilation_d, in_d, d_memory_stride, WIDE
        )
    inside = valid & (has_z0 | has_z1) & (has_y0 | has_y1) & (has_x0 | has_x1)
    return (
        z0,
        z1,
        y0,
        y1,
        x0,
        x1,
        z_lower,
        z_upper,
        y_lower,
        y_upper,
        x_lower,
        x_upper,
        has_z0,
        has_z1,
        has_y0,
        has_y1,
        has_x0,
        has_x1,
        inside,
    )


@triton.jit
def _row(corner: tl.constexpr, z0, z1, y0, y1, x0, x1, AXES: tl.constexpr):
    """Where a corner is in memory; corners count in binary: (depth,) height, width."""
    row = (y1 if corner // 2 % 2 else y0) + (x1 if corner % 2 else x0)
    if AXES == 3:
        row += z1 if corner // 4 else z0
    return row


@triton.jit
def _share(corner: tl.constexpr, z_lower, z_upper, y_lower, y_upper, x_lower, x_upper, AXES: tl.constexpr):
    """What a corner weighs."""
    share = (y_upper if corner // 2 % 2 else y_lower) * (x_upper if corner % 2 else x_lower)
    if AXES == 3:
        share *= z_upper if corner // 4 else z_lower
    return share


@triton.jit
def _add_tap(
    total, block, from_input, from_weight, inside,
    z0, z1, y0, y1, x0, x1, z_lower, z_upper, y_lower, y_upper, x_lower, x_upper,
    AXES: tl.constexpr, LANE_C: tl.constexpr,
):  # fmt: skip
    """The output's sum for one block of channels, with one more tap."""
    LANE_BYTES: tl.constexpr = LANE_C * from_input.dtype.element_ty.primitive_bitwidth // 8
    sample = tl.zeros(total.shape, tl.float32)
    for corner in tl.static_range(2**AXES):
        row = _row(corner, z0, z1, y0, y1, x0, x1, AXES)
        share = _share(corner, z_lower, z_upper, y_lower, y_upper, x_lower, x_upper, AXES)
        address = tl.multiple_of(from_input + row[:, None] + block, [LANE_BYTES, LANE_BYTES])
        value = tl.load(address).to(tl.float32)
        sample = tl.fma(value, share[:, None], sample)
    # A product with 0 would make NaN of an infinite voxel.
    sample = tl.where(inside[:, None], sample, 0.0)
    tap_weight = tl.load(tl.multiple_of(from_weight + block, LANE_BYTES)).to(tl.float32)
    return tl.fma(sample, tap_weight[None, :], total)


@triton.jit
def _store_block(into, from_bias, block, total, valid, LANE_C: tl.constexpr):
    LANE_BYTES: tl.constexpr = LANE_C * into.dtype.element_ty.primitive_bitwidth // 8
    if from_bias is not None:
        total += tl.load(tl.multiple_of(from_bias + block, LANE_BYTES)).to(tl.float32)[None, :]
    address = tl.multiple_of(into + block, [LANE_BYTES, LANE_BYTES])
    tl.store(address, total.to(into.dtype.element_ty), mask=valid[:, None])


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
    BRICK_D: tl.constexpr,
    BRICK_H: tl.constexpr,
    BRICK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LANE_C: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Grid: bricks of output voxels; batch items x deformable groups; runs of BLOCKS (at most 6) blocks of channels."""
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    VOXELS: tl.constexpr = BRICK_D * BRICK_H * BRICK_W
    item = (tl.program_id(1) // groups).to(tl.int64)
    group = tl.program_id(1) % groups
    channels = groups * group_channels
    z, y, x, voxel, valid = _voxels(tl.program_id(0), out_d, out_h, out_w, BRICK_D, BRICK_H, BRICK_W)
    # The last run begins early rather than mask what is beyond: what two runs share, both compute.
    first = tl.minimum(tl.program_id(2) * (BLOCKS * BLOCK_C), group_channels - BLOCKS * BLOCK_C)
    channel = group * group_channels + first + tl.arange(0, BLOCK_C)
    from_input = input + item * input_batch_stride + channel[None, :]
    from_offset = offset + item * offset_batch_stride + voxel.to(tl.int64) * offset_voxel_stride

    total0 = tl.zeros([VOXELS, BLOCK_C], tl.float32)
    total1, total2, total3, total4, total5 = total0, total0, total0, total0, total0
    for tap in range(TAPS):
        at = from_offset + (group * TAPS + tap).to(tl.int64) * AXES * offset_channel_stride
        from_weight = weight + tap * channels + channel
        (
            z0, z1, y0, y1, x0, x1, z_lower, z_upper, y_lower, y_upper, x_lower, x_upper,
            _, _, _, _, _, _, inside,
        ) = _corners(
            at, offset_channel_stride, valid, z, y, x, tap, in_d, in_h, in_w, stride_d, stride_h, stride_w,
            padding_d, padding_h, padding_w, dilation_d, dilation_h, dilation_w,
            input_d_stride, input_h_stride, input_w_stride, AXES, KERNEL_H, KERNEL_W, WIDE,
        )  # fmt: skip
        total0 = _add_tap(
            total0, 0, from_input, from_weight, inside,
            z0, z1, y0, y1, x0, x1, z_lower, z_upper, y_lower, y_upper, x_lower, x_upper, AXES, LANE_C,
        )  # fmt: skip
        if BLOCKS > 1:
            total1 = _add_tap(
                total1, BLOCK_C, from_input, from_weight, inside,
                z0, z1, y0, y1, x0, x1, z_lower, z_upper, y_lower, y_upper, x_lower, x_upper, AXES, LANE_C,
            )  # fmt: skip
        if BLOCKS > 2:
            total2 = _add_tap(
                total2, 2 * BLOCK_C, from_input, from_weight, inside,
                z0, z1, y0, y1, x0, x1, z_lower, z_upper, y_lower, y_upper, x_lower, x_upper, AXES, LANE_C,
            )  # fmt: skip
        if BLOCKS > 3:
            total3 = _add_tap(
                total3, 3 * BLOCK_C, from_input, from_weight, inside,
                z0, z1, y0, y1, x0, x1, z_lower, z_upper, y_lower, y_upper, x_lower, x_upper, AXES, LANE_C,
            )  # fmt: skip
        if BLOCKS > 4:
            total4 = _add_tap(
                total4, 4 * BLOCK_C, from_input, from_weight, inside,
                z0, z1, y0, y1, x0, x1, z_lower, z_upper, y_lower, y_upper, x_lower, x_upper, AXES, LANE_C,
            )  # fmt: skip
        if BLOCKS > 5:
            total5 = _add_tap(
                total5, 5 * BLOCK_C, from_input, from_weight, inside,
                z0, z1, y0, y1, x0, x1, z_lower, z_upper, y_lower, y_upper, x_lower, x_upper, AXES, LANE_C,
            )  # fmt: skip

    into = output + (item * (out_d * out_h * out_w) + voxel)[:, None] * channels + channel[None, :]
    from_bias = None
    if bias is not None:
        from_bias = bias + channel
    _store_block(into, from_bias, 0, total0, valid, LANE_C)
    if BLOCKS > 1:
        _store_block(into, from_bias, BLOCK_C, total1, valid, LANE_C)
    if BLOCKS > 2:
        _store_block(into, from_bias, 2 * BLOCK_C, total2, valid, LANE_C)
    if BLOCKS > 3:
        _store_block(into, from_bias, 3 * BLOCK_C, total3, valid, LANE_C)
    if BLOCKS > 4:
        _store_block(into, from_bias, 4 * BLOCK_C, total4, valid, LANE_C)
    if BLOCKS > 5:
        _store_block(into, from_bias, 5 * BLOCK_C, total5, valid, LANE_C)


@triton.jit
def _dot(product, LANE_C: tl.constexpr):
    """Sums over the channels that one thread has; those of different threads wait until there are no more to come."""
    return tl.sum(tl.reshape(product, [product.shape[0], product.shape[1] // LANE_C, LANE_C]), 2)


@triton.jit
def _interpolated(
    dot00, dot01, dot10, dot11, y_lower, y_upper, x_lower, x_upper, has_y0, has_y1, has_x0, has_x1
):  # fmt: skip
    """From four corners: the value between them and its derivatives along height and width.

    The derivative of a weight is -1 or 1 where that end counts, else 0.
    """
    line0 = tl.fma(dot01, x_upper, dot00 * x_lower)
    line1 = tl.fma(dot11, x_upper, dot10 * x_lower)
    slope0 = tl.where(has_x1, dot01, 0.0) - tl.where(has_x0, dot00, 0.0)
    slope1 = tl.where(has_x1, dot11, 0.0) - tl.where(has_x0, dot10, 0.0)
    return (
        tl.fma(line1, y_upper, line0 * y_lower),
        tl.where(has_y1, line1, 0.0) - tl.where(has_y0, line0, 0.0),
        tl.fma(slope1, y_upper, slope0 * y_lower),
    )


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
    BRICK_D: tl.constexpr,
    BRICK_H: tl.constexpr,
    BRICK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LANE_C: tl.constexpr,
):
    """Grid: runs of bricks; batch items x deformable groups; taps.

    The offset gradient of a tap in a brick belongs to one program, which sees all channels: no atomic additions.
    """
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    VOXELS: tl.constexpr = BRICK_D * BRICK_H * BRICK_W
    item = (tl.program_id(1) // groups).to(tl.int64)
    group = tl.program_id(1) % groups
    channels = groups * group_channels
    LANE_BYTES: tl.constexpr = LANE_C * input.dtype.element_ty.primitive_bitwidth // 8
    tap = tl.program_id(2)
    voxels = out_d * out_h * out_w
    bricks = tl.cdiv(out_d, BRICK_D) * tl.cdiv(out_h, BRICK_H) * tl.cdiv(out_w, BRICK_W)
    first = tl.program_id(0) * bricks_per_run
    last = tl.minimum(first + bricks_per_run, bricks)
    in_block = tl.arange(0, BLOCK_C)
    channel = group * group_channels + in_block
    from_input = input + item * input_batch_stride + channel[None, :]
    from_weight = weight + tap * channels + channel
    offset_channel = (group * TAPS + tap).to(tl.int64) * AXES
    from_offset = offset + item * offset_batch_stride + offset_channel * offset_channel_stride
    summand = ((tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * TAPS + tap).to(tl.int64)

    for brick in range(first, last):
        z, y, x, voxel, valid = _voxels(brick, out_d, out_h, out_w, BRICK_D, BRICK_H, BRICK_W)
        at = from_offset + voxel.to(tl.int64) * offset_voxel_stride
        (
            z0, z1, y0, y1, x0, x1, z_lower, z_upper, y_lower, y_upper, x_lower, x_upper,
            has_z0, has_z1, has_y0, has_y1, has_x0, has_x1, inside,
        ) = _corners(
            at, offset_channel_stride, valid, z, y, x, tap, in_d, in_h, in_w, stride_d, stride_h, stride_w,
            padding_d, padding_h, padding_w, dilation_d, dilation_h, dilation_w,
            input_d_stride, input_h_stride, input_w_stride, AXES, KERNEL_H, KERNEL_W, WIDE,
        )  # fmt: skip
        from_grad = grad_output + (item * voxels + voxel)[:, None] * channels + channel[None, :]

        # For each corner, its ends along (depth,) height and width: its values times the gradient of the sample.
        dot000 = tl.zeros([VOXELS, BLOCK_C // LANE_C], tl.float32)
        dot001, dot010, dot011 = dot000, dot000, dot000
        dot100, dot101, dot110, dot111 = dot000, dot000, dot000, dot000
        for block in range(0, group_channels, BLOCK_C):
            address = tl.multiple_of(from_grad + block, [LANE_BYTES, LANE_BYTES])
            grad = tl.load(address, mask=valid[:, None], other=0.0).to(tl.float32)
            tap_weight = tl.load(tl.multiple_of(from_weight + block, LANE_BYTES)).to(tl.float32)
            grad_sample = grad * tap_weight[None, :]
            sample = tl.zeros([VOXELS, BLOCK_C], tl.float32)
            for corner in tl.static_range(2**AXES):
                row = _row(corner, z0, z1, y0, y1, x0, x1, AXES)
                address = tl.multiple_of(from_input + row[:, None] + block, [LANE_BYTES, LANE_BYTES])
                value = tl.load(address).to(tl.float32)
                if grad_weight is not None:
                    share = _share(corner, z_lower, z_upper, y_lower, y_upper, x_lower, x_upper, AXES)
                    sample = tl.fma(value, share[:, None], sample)
                if grad_offset is not None:
                    dot = _dot(value * grad_sample, LANE_C)
                    if corner == 0:
                        dot000 += dot
                    elif corner == 1:
                        dot001 += dot
                    elif corner == 2:
                        dot010 += dot
                    elif corner == 3:
                        dot011 += dot
                    elif corner == 4:
                        dot100 += dot
                    elif corner == 5:
                        dot101 += dot
                    elif corner == 6:
                        dot110 += dot
                    else:
                        dot111 += dot
            if grad_weight is not None:
                # A product with 0 would make NaN of an infinite voxel.
                summed = tl.sum(grad * tl.where(inside[:, None], sample, 0.0), 0)
                into = grad_weight + summand * group_channels + block + in_block
                # What the run's earlier bricks have left. Triton 3.9's interpreter takes no mask that is a scalar.
                summed += tl.load(into, mask=in_block < (brick - first) * BLOCK_C, other=0.0)
                tl.store(into, summed)

        if grad_offset is not None:
            grad_z, grad_y, grad_x = _interpolated(
                tl.sum(dot000, 1), tl.sum(dot001, 1), tl.sum(dot010, 1), tl.sum(dot011, 1),
                y_lower, y_upper, x_lower, x_upper, has_y0, has_y1, has_x0, has_x1,
            )  # fmt: skip
            if AXES == 3:
                plane, plane_y, plane_x = _interpolated(
                    tl.sum(dot100, 1), tl.sum(dot101, 1), tl.sum(dot110, 1), tl.sum(dot111, 1),
                    y_lower, y_upper, x_lower, x_upper, has_y0, has_y1, has_x0, has_x1,
                )  # fmt: skip
                grad_z = tl.where(has_z1, plane, 0.0) - tl.where(has_z0, grad_z, 0.0)
                grad_y = tl.fma(plane_y, z_upper, grad_y * z_lower)
                grad_x = tl.fma(plane_x, z_upper, grad_x * z_lower)
            at = grad_offset + (item * groups * TAPS * AXES + offset_channel) * voxels + voxel
            for axis in tl.static_range(3 - AXES, 3):
                gradient = grad_z if axis == 0 else (grad_y if axis == 1 else grad_x)
                tl.store(at, tl.where(inside, gradient, 0.0), mask=valid)
                at += voxels
        # The next brick reads what this one has stored.
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
    BRICK_D: tl.constexpr,
    BRICK_H: tl.constexpr,
    BRICK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LANE_C: tl.constexpr,
):
    """The input gradient by atomic additions. Grid: bricks; batch items x deformable groups; taps.

    A thread adds to LANE_C neighbouring channels at once. Without instructions that do (before compute capability 9.0)
    that is one, so that neighbouring threads add to neighbouring channels: L2 takes sectors of 32 bytes.
    """
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    item = (tl.program_id(1) // groups).to(tl.int64)
    group = tl.program_id(1) % groups
    channels = groups * group_channels
    tap = tl.program_id(2)
    z, y, x, voxel, valid = _voxels(tl.program_id(0), out_d, out_h, out_w, BRICK_D, BRICK_H, BRICK_W)
    h_memory_stride = in_w.to(tl.int64) * channels if WIDE else in_w * channels
    d_memory_stride = in_h * h_memory_stride
    at = offset + item * offset_batch_stride + voxel.to(tl.int64) * offset_voxel_stride
    at += (group * TAPS + tap).to(tl.int64) * AXES * offset_channel_stride
    (
        z0, z1, y0, y1, x0, x1, z_lower, z_upper, y_lower, y_upper, x_lower, x_upper,
        _, _, _, _, _, _, _,
    ) = _corners(
        at, offset_channel_stride, valid, z, y, x, tap, in_d, in_h, in_w, stride_d, stride_h, stride_w,
        padding_d, padding_h, padding_w, dilation_d, dilation_h, dilation_w,
        d_memory_stride, h_memory_stride, channels, AXES, KERNEL_H, KERNEL_W, WIDE,
    )  # fmt: skip
    channel = group * group_channels + tl.arange(0, BLOCK_C)
    LANE_BYTES: tl.constexpr = LANE_C * grad_output.dtype.element_ty.primitive_bitwidth // 8
    into = grad_input + item * in_d * in_h * in_w * channels + channel[None, :]
    from_grad = grad_output + (item * (out_d * out_h * out_w) + voxel)[:, None] * channels + channel[None, :]
    from_weight = weight + tap * channels + channel
    for block in range(0, group_channels, BLOCK_C):
        address = tl.multiple_of(from_grad + block, [LANE_BYTES, LANE_BYTES])
        grad = tl.load(address, mask=valid[:, None], other=0.0).to(tl.float32)
        tap_weight = tl.load(tl.multiple_of(from_weight + block, LANE_BYTES)).to(tl.float32)
        grad_sample = grad * tap_weight[None, :]
        for corner in tl.static_range(2**AXES):
            row = _row(corner, z0, z1, y0, y1, x0, x1, AXES)
            share = _share(corner, z_lower, z_upper, y_lower, y_upper, x_lower, x_upper, AXES)[:, None]
            address = tl.multiple_of(into + row[:, None] + block, [4 * LANE_C, 4 * LANE_C])
            # Corners that do not count weigh 0; of integer positions 7 of 8 do.
            tl.atomic_add(address, grad_sample * share, mask=(share > 0) & valid[:, None], sem="relaxed")


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
def _add_at(at, step, exists, values, LANE_C: tl.constexpr):
    """Adds to channels of one voxel, if it is in the volume."""
    if exists:
        address = tl.multiple_of(at - step, 4 * LANE_C)
        tl.store(address, tl.load(address) + values)


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
    SAMPLES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LANE_C: tl.constexpr,
):
    """The input gradient by cells of one parity. No two of them share a corner, so nothing is added atomically.

    Grid: the cells; batch items x deformable groups.
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
    channels = groups * group_channels
    voxels = out_d * out_h * out_w
    channel = group * group_channels + tl.arange(0, BLOCK_C)
    LANE_BYTES: tl.constexpr = LANE_C * grad_output.dtype.element_ty.primitive_bitwidth // 8
    from_grad = grad_output + item * voxels * channels + channel[None, :]
    from_weight = weight + channel[None, :]
    # From the corner at the upper ends of the cell to the others.
    h_step = in_w.to(tl.int64) * channels
    d_step = in_h * h_step
    into = grad_input + item * in_d * d_step + z * d_step + y * h_step + x * channels + channel
    has_x0, has_x1 = x > 0, x < in_w
    has_y0, has_y1 = y > 0, y < in_h
    for start in range(first, last, SAMPLES):
        place = start + tl.arange(0, SAMPLES)
        valid = place < last
        sample = tl.load(order + place, mask=valid, other=0)
        # Division in 64 bits takes a hundred instructions; in float32 it is off by one at most.
        plane = (sample.to(tl.float32) / voxels.to(tl.float32)).to(tl.int32)
        voxel = sample - plane.to(tl.int64) * voxels
        plane += (voxel >= voxels).to(tl.int32) - (voxel < 0).to(tl.int32)
        voxel = (sample - plane.to(tl.int64) * voxels).to(tl.int32)
        tap = first_tap + plane // tl.num_programs(1)
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
        share00 = y_lower * x_lower
        share01 = y_lower * x_upper
        share10 = y_upper * x_lower
        share11 = y_upper * x_upper
        if AXES == 3:
            share100 = z_upper * share00
            share101 = z_upper * share01
            share110 = z_upper * share10
            share111 = z_upper * share11
            share00 *= z_lower
            share01 *= z_lower
            share10 *= z_lower
            share11 *= z_lower

        from_grads = from_grad + (voxel.to(tl.int64) * channels)[:, None]
        from_weights = from_weight + (tap * channels)[:, None]
        for block in range(0, group_channels, BLOCK_C):
            address = tl.multiple_of(from_grads + block, [LANE_BYTES, LANE_BYTES])
            grad = tl.load(address, mask=valid[:, None], other=0.0).to(tl.float32)
            address = tl.multiple_of(from_weights + block, [LANE_BYTES, LANE_BYTES])
            grad_sample = grad * tl.load(address, mask=valid[:, None], other=0.0).to(tl.float32)
            corner = into + block
            if AXES == 3:
                has = z < in_d
                _add_at(corner, 0, has & has_y1 & has_x1, tl.sum(grad_sample * share111[:, None], 0), LANE_C)
                _add_at(corner, channels, has & has_y1 & has_x0, tl.sum(grad_sample * share110[:, None], 0), LANE_C)
                _add_at(corner, h_step, has & has_y0 & has_x1, tl.sum(grad_sample * share101[:, None], 0), LANE_C)
                step = h_step + channels
                _add_at(corner, step, has & has_y0 & has_x0, tl.sum(grad_sample * share100[:, None], 0), LANE_C)
                corner -= d_step
            has = z > 0 if AXES == 3 else z == 0
            _add_at(corner, 0, has & has_y1 & has_x1, tl.sum(grad_sample * share11[:, None], 0), LANE_C)
            _add_at(corner, channels, has & has_y1 & has_x0, tl.sum(grad_sample * share10[:, None], 0), LANE_C)
            _add_at(corner, h_step, has & has_y0 & has_x1, tl.sum(grad_sample * share01[:, None], 0), LANE_C)
            _add_at(corner, h_step + channels, has & has_y0 & has_x0, tl.sum(grad_sample * share00[:, None], 0), LANE_C)
        # The next samples add to what these have stored.
        tl.debug_barrier()

// Where the taps sample: cells, interpolation weights and their derivatives.
#pragma once

#include "deform_conv.h"

namespace {

constexpr int kTile = 16;  // neighbouring output voxels whose positions are computed together
constexpr int kTaps = 9;   // and how many of their taps: few enough for the first-level cache

// Numbers beyond this are far outside any volume; the sum of three within it fits an int32_t.
constexpr int32_t kFar = 1 << 29;

inline int32_t limited(int64_t place) {
    return static_cast<int32_t>(place < -kFar ? -kFar : place > kFar ? kFar : place);
}

inline int64_t product(const int64_t* sizes, int64_t axes) {
    int64_t result = 1;
    for (int64_t a = 0; a < axes; ++a) result *= sizes[a];
    return result;
}

// A row-major index as one number for each axis.
template <int AXES>
struct Counter {
    const int64_t* size;
    int64_t at[AXES];

    Counter(const int64_t* size, int64_t flat) : size(size) {
        for (int a = AXES - 1; a >= 0; --a) {
            at[a] = flat % size[a];
            flat /= size[a];
        }
    }

    void next() {
        for (int a = AXES - 1; a >= 0; --a) {
            if (++at[a] < size[a]) return;
            at[a] = 0;
        }
    }
};

// Up to kTile output voxels of one batch item, in memory order.
template <int AXES>
struct Tile {
    int64_t item;
    int64_t begin;
    int count;
    int32_t regular[AXES][kTile];  // v * stride - padding

    static int64_t number_in_item(const DeformConvShape& shape) {
        return (product(shape.out_size, AXES) + kTile - 1) / kTile;
    }

    Tile(const DeformConvShape& shape, int64_t number)
        : item(number / number_in_item(shape)), begin(number % number_in_item(shape) * kTile) {
        const int64_t left = product(shape.out_size, AXES) - begin;
        count = static_cast<int>(left < kTile ? left : kTile);
        Counter<AXES> voxel(shape.out_size, begin);
        for (int i = 0; i < kTile; ++i, voxel.next()) {
            for (int a = 0; a < AXES; ++a) {
                regular[a][i] = limited(voxel.at[a] * shape.stride[a] - shape.padding[a]);
            }
        }
    }

    // One channel of the offset. Lanes beyond the last voxel repeat it.
    void load_offset(const DeformConvShape& shape, const float* offset, int64_t channel, float* to) const {
        const int64_t stride = shape.offset_voxel_stride;
        const float* from =
            offset + item * shape.offset_batch_stride + channel * shape.offset_channel_stride + begin * stride;
        if (count == kTile && stride == 1) {
            for (int i = 0; i < kTile; ++i) to[i] = from[i];
        } else {
            for (int i = 0; i < kTile; ++i) to[i] = from[(i < count ? i : count - 1) * stride];
        }
    }
};

// One coordinate of a tap's positions in a tile. Cell and fraction are those of the offset alone, and the regular grid
// is added as an integer: the fraction is as exact at voxel 500 as at voxel 0.
struct Coordinate {
    int32_t lower[kTile];     // voxel at the lower end of the cell, or the nearest in the volume
    int32_t step[kTile];      // 1, or 0 where that is also the voxel at the upper end
    int32_t inside[kTile];    // the position is in (-1, size)
    float factor[2][kTile];   // interpolation weight of the lower and of the upper end
    float present[2][kTile];  // 0 where that end is not in the volume or the position not inside, and so is factor

    void locate(const float* offset, const int32_t* regular, int32_t place, int32_t size) {
        for (int i = 0; i < kTile; ++i) {
            const bool near = offset[i] > -static_cast<float>(kFar) && offset[i] < static_cast<float>(kFar);
            const float o = near ? offset[i] : 0;  // a huge number, or none at all, has no defined integer
            const int32_t truncated = static_cast<int32_t>(o);
            const int32_t floor = truncated - (static_cast<float>(truncated) > o ? 1 : 0);
            const float fraction = o - static_cast<float>(floor);
            const int32_t cell = regular[i] + place + floor;

            const bool in = near && cell < size && (cell >= 0 || (cell == -1 && fraction > 0));
            const bool has_lower = in && cell >= 0;
            const bool has_upper = in && cell < size - 1;
            lower[i] = cell < 0 ? 0 : cell < size ? cell : size - 1;
            step[i] = has_lower && has_upper ? 1 : 0;
            inside[i] = in ? 1 : 0;
            factor[0][i] = has_lower ? 1 - fraction : 0;
            factor[1][i] = has_upper ? fraction : 0;
            present[0][i] = has_lower ? 1 : 0;
            present[1][i] = has_upper ? 1 : 0;
        }
    }
};

inline int upper(int corner, int axis, int axes) { return corner >> (axes - 1 - axis) & 1; }

// The positions of up to kTaps taps of one deformable group in a tile. A cell has 2^n corners; the bits of a corner's
// number say for each axis, the last one lowest, which end it is.
template <int AXES>
struct Samples {
    static constexpr int kCorners = 1 << AXES;

    const DeformConvShape& shape;
    const Tile<AXES>& tile;
    int64_t group;
    int64_t first_tap;
    int taps;
    int32_t inside[kTaps][kTile];
    int32_t voxel[kTaps][kTile];            // the lowest corner
    int32_t step[kTaps][AXES][kTile];       // from a lower to an upper corner, in voxels
    float weight[kTaps][kCorners][kTile];   // of each corner; all 0 when not inside

    Samples(const DeformConvShape& shape, const Tile<AXES>& tile, const float* offset, int64_t group, int64_t first_tap)
        : shape(shape), tile(tile), group(group), first_tap(first_tap) {
        const int64_t left = product(shape.kernel, AXES) - first_tap;
        taps = static_cast<int>(left < kTaps ? left : kTaps);
        Counter<AXES> place(shape.kernel, first_tap);
        for (int t = 0; t < taps; ++t, place.next()) {
            Coordinate along[AXES];
            locate(offset, t, place, along);
            for (int i = 0; i < kTile; ++i) {
                int32_t all = 1, lowest = 0;
                for (int a = 0; a < AXES; ++a) {
                    all &= along[a].inside[i];
                    lowest = lowest * static_cast<int32_t>(shape.size[a]) + along[a].lower[i];
                }
                inside[t][i] = all;
                voxel[t][i] = lowest;
            }
            int32_t voxels = 1;
            for (int a = AXES - 1; a >= 0; --a) {
                for (int i = 0; i < kTile; ++i) step[t][a][i] = along[a].step[i] * voxels;
                voxels *= static_cast<int32_t>(shape.size[a]);
            }
            for (int c = 0; c < kCorners; ++c) {
                for (int i = 0; i < kTile; ++i) {
                    float w = 1;
                    for (int a = 0; a < AXES; ++a) w *= along[a].factor[upper(c, a, AXES)][i];
                    weight[t][c][i] = w;
                }
            }
        }
    }

    // The channel of the offset that moves a tap along an axis.
    int64_t offset_channel(int t, int axis) const {
        return (group * product(shape.kernel, AXES) + first_tap + t) * AXES + axis;
    }

    void locate(const float* offset, int t, const Counter<AXES>& place, Coordinate* along) const {
        for (int a = 0; a < AXES; ++a) {
            float o[kTile];
            tile.load_offset(shape, offset, offset_channel(t, a), o);
            along[a].locate(
                o, tile.regular[a], limited(place.at[a] * shape.dilation[a]), static_cast<int32_t>(shape.size[a]));
        }
    }

    // Offset gradient [AXES][kTile] of tap t, from the products of corners and gradient summed over the channels.
    void offset_gradient(const float* offset, int t, const float (*dots)[kTile], float (*gradient)[kTile]) const {
        Coordinate along[AXES];
        locate(offset, t, Counter<AXES>(shape.kernel, first_tap + t), along);
        for (int a = 0; a < AXES; ++a) {
            for (int i = 0; i < kTile; ++i) gradient[a][i] = 0;
            for (int c = 0; c < kCorners; ++c) {
                for (int i = 0; i < kTile; ++i) {
                    float slope = upper(c, a, AXES) ? along[a].present[1][i] : -along[a].present[0][i];
                    for (int b = 0; b < AXES; ++b) {
                        if (b != a) slope *= along[b].factor[upper(c, b, AXES)][i];
                    }
                    gradient[a][i] += slope * dots[c][i];
                }
            }
        }
    }

    // The corners of one sample as places in a channels-last feature map, in floats.
    void corners(int t, int i, int64_t* places) const {
        places[0] = voxel[t][i] * shape.channels;
        int known = 1;
        for (int a = AXES - 1; a >= 0; --a) {
            const int64_t further = step[t][a][i] * shape.channels;
            for (int c = 0; c < known; ++c) places[known + c] = places[c] + further;
            known *= 2;
        }
    }
};

}  // namespace

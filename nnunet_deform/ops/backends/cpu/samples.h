// Where the taps sample: cells, interpolation weights and their derivatives.
#pragma once

#include "deform_conv.h"
#include "vectors.h"

#include <cstring>

namespace {

constexpr int kTile = 16;  // neighbouring output voxels whose positions are computed together
constexpr int kTaps = 9;   // and how many of their taps: few enough for the first-level cache

// More voxels than any volume has (the caller sees to that). Twice this and two numbers limited to it, regular grid and
// place in the kernel, still add up in an int32_t, and to a voxel outside.
constexpr int32_t kMostVoxels = 1 << 29;

inline int32_t limited(int64_t place) {
    return static_cast<int32_t>(place <= -kMostVoxels ? 1 - kMostVoxels : place >= kMostVoxels ? kMostVoxels - 1 : place);
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
            std::memcpy(to, from, kTile * sizeof(float));
#if defined(__GNUC__)
            __builtin_prefetch(from + kTile);  // the next tile's: there are more channels than hardware follows
#endif
        } else {
            for (int i = 0; i < kTile; ++i) to[i] = from[(i < count ? i : count - 1) * stride];
        }
    }
};

// One coordinate of N positions of a tap. Cell and fraction are those of the offset alone, and the regular grid is added
// as an integer: the fraction is as exact at voxel 500 as at voxel 0.
template <int N>
struct Coordinate {
    Integers<N> lower;    // voxel at the lower end of the cell, or the nearest in the volume
    Integers<N> step;     // all bits where the upper end is the next voxel, none where it is not in the volume
    Integers<N> inside;   // all bits where the position is in (-1, size)
    Vector<N> factor[2];  // interpolation weight of the lower and of the upper end
    Vector<N> slope[2];   // its derivative; both are 0 where that end is not in the volume or the position not inside

    Coordinate(const Vector<N>& offset, const Integers<N>& regular, int32_t place, int32_t size) {
        const Vector<N> zero = {}, one = all<N>(1.0f), far = all<N>(2.0f * kMostVoxels);
        const Integers<N> no = {}, yes = all<N>(-1), end = all<N>(size - 1);

        const Vector<N> limited_above = where(offset < far, offset, far);  // so is what is not a number
        const Vector<N> o = where(limited_above > -far, limited_above, -far);
        const Integers<N> toward_zero = truncated<N>(o);
        const Integers<N> floor = toward_zero + where(as_floats<N>(toward_zero) > o, yes, no);
        const Vector<N> fraction = o - as_floats<N>(floor);
        const Integers<N> cell = regular + place + floor;

        const Integers<N> has_lower = where(cell > yes, yes, no) & where(cell > end, no, yes);
        const Integers<N> has_upper =
            where(end > cell, yes, no) & where(cell < yes, no, yes) & (has_lower | where(fraction > zero, yes, no));
        inside = has_lower | has_upper;
        step = has_lower & has_upper;
        const Integers<N> not_below = where(cell > no, cell, no);
        lower = where(not_below < end, not_below, end);
        factor[0] = where(has_lower != no, one - fraction, zero);
        factor[1] = where(has_upper != no, fraction, zero);
        slope[0] = where(has_lower != no, -one, zero);
        slope[1] = where(has_upper != no, one, zero);
    }
};

// Which end of the cell a corner is at along an axis: the bits of a corner's number, the last axis lowest.
constexpr int end_of(int corner, int axis, int axes) { return corner >> (axes - 1 - axis) & 1; }

// The positions of up to kTaps taps of one deformable group in a tile.
template <int AXES>
struct Samples {
    static constexpr int kCorners = 1 << AXES;

    const DeformConvShape& shape;
    const Tile<AXES>& tile;
    int64_t group;
    int64_t first_tap;
    int taps;
    int32_t inside[kTaps][kTile];
    int32_t voxel[kTaps][kTile];           // the lowest corner
    int32_t step[kTaps][AXES][kTile];      // from a lower to an upper corner, in voxels
    float weight[kTaps][kCorners][kTile];  // of each corner; all 0 when not inside

    Samples(const DeformConvShape& shape, const Tile<AXES>& tile, const float* offset, int64_t group, int64_t first_tap)
        : shape(shape), tile(tile), group(group), first_tap(first_tap) {
        const int64_t left = product(shape.kernel, AXES) - first_tap;
        taps = static_cast<int>(left < kTaps ? left : kTaps);
        for_positions(offset, [&](int t, int i, const Coordinate<kLanes>* along) {
            Integers<kLanes> all_inside = along[0].inside, lowest = along[0].lower;
            for (int a = 1; a < AXES; ++a) {
                all_inside &= along[a].inside;
                lowest = lowest * static_cast<int32_t>(shape.size[a]) + along[a].lower;
            }
            store(&inside[t][i], all_inside);
            store(&voxel[t][i], lowest);
            int32_t voxels = 1;
            for (int a = AXES - 1; a >= 0; --a) {
                store(&step[t][a][i], along[a].step & voxels);
                voxels *= static_cast<int32_t>(shape.size[a]);
            }
            for (int c = 0; c < kCorners; ++c) {
                Vector<kLanes> w = along[0].factor[end_of(c, 0, AXES)];
                for (int a = 1; a < AXES; ++a) w *= along[a].factor[end_of(c, a, AXES)];
                store(&weight[t][c][i], w);
            }
        });
    }

    // Calls use(t, i, axis, gradient) with the offset gradient of tap t at the voxels i to i + kLanes, given for each
    // corner the product of its values and the samples' gradients, summed over the channels.
    template <typename F>
    void for_offset_gradients(const float* offset, const float (*dots)[kTile][kCorners], const F& use) const {
        for_positions(offset, [&](int t, int i, const Coordinate<kLanes>* along) {
            Vector<kLanes> dot[kCorners];
            transpose<kLanes, kCorners>(dots[t][i], dot);
            for (int a = 0; a < AXES; ++a) {
                Vector<kLanes> gradient = {};
                for (int c = 0; c < kCorners; ++c) {
                    Vector<kLanes> slope = along[a].slope[end_of(c, a, AXES)];
                    for (int b = 0; b < AXES; ++b) {
                        if (b != a) slope *= along[b].factor[end_of(c, b, AXES)];
                    }
                    gradient += slope * dot[c];
                }
                use(t, i, a, gradient);
            }
        });
    }

    // The corners of one sample as places in a channels-last feature map, in floats.
    void corners(int t, int i, int64_t (&places)[kCorners]) const {
        const int64_t lowest = voxel[t][i] * shape.channels;
        for (int c = 0; c < kCorners; ++c) {
            places[c] = lowest;
            for (int a = 0; a < AXES; ++a) {
                if (end_of(c, a, AXES)) places[c] += step[t][a][i] * shape.channels;
            }
        }
    }

    // The channel of the offset that moves tap t along an axis.
    int64_t offset_channel(int t, int axis) const {
        return (group * product(shape.kernel, AXES) + first_tap + t) * AXES + axis;
    }

   private:
    // Calls use(t, i, coordinates) for every tap and the voxels i to i + kLanes.
    template <typename F>
    void for_positions(const float* offset, const F& use) const {
        Counter<AXES> place(shape.kernel, first_tap);
        for (int t = 0; t < taps; ++t, place.next()) {
            float o[AXES][kTile];
            for (int a = 0; a < AXES; ++a) tile.load_offset(shape, offset, offset_channel(t, a), o[a]);
            for (int i = 0; i < kTile; i += kLanes) {
                if constexpr (AXES == 2) {
                    const Coordinate<kLanes> along[] = {coordinate(o, place, 0, i), coordinate(o, place, 1, i)};
                    use(t, i, along);
                } else {
                    const Coordinate<kLanes> along[] = {
                        coordinate(o, place, 0, i), coordinate(o, place, 1, i), coordinate(o, place, 2, i)};
                    use(t, i, along);
                }
            }
        }
    }

    Coordinate<kLanes> coordinate(const float (*offset)[kTile], const Counter<AXES>& place, int axis, int i) const {
        return {
            load<kLanes>(&offset[axis][i]), load<kLanes>(&tile.regular[axis][i]),
            limited(place.at[axis] * shape.dilation[axis]), static_cast<int32_t>(shape.size[axis])};
    }
};

}  // namespace

// The kernel, compiled once for each instruction set; NNUNET_DEFORM_SUFFIX tells the objects apart.
//
// Everything but the two entry points has internal linkage: of a function shared between the objects the linker would
// keep one copy, perhaps one that this processor cannot run. For the same reason there are no containers.

#include "deform_conv.h"
#include "samples.h"
#include "vectors.h"

#include <cstdlib>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// Runs work(thread) on all threads; on the caller's own when there is one, so that a forked process needs no others.
template <typename F>
void on_threads(int threads, const F& work) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        for (int t = omp_get_thread_num(); t < threads; t += omp_get_num_threads()) work(t);
        return;
    }
#endif
    for (int t = 0; t < threads; ++t) work(t);
}

// Where a thread's part of the work begins; it ends where the next one's begins.
inline int64_t share(int64_t work, int thread, int threads) {
    return work / threads * thread + work % threads * thread / threads;
}

// M vectors of one output voxel, in registers over the taps.
template <int N, int M, int AXES>
inline void forward_block(
    const Samples<AXES>& samples, int i, const float* input, const float* weight, const float* initial, float* output) {
    constexpr int corners = Samples<AXES>::kCorners;
    const int64_t channels = samples.shape.channels;
    Vector<N> total[M];
    for (int m = 0; m < M; ++m) total[m] = initial ? load<N>(initial + m * N) : Vector<N>{};
    for (int t = 0; t < samples.taps; ++t) {
        if (!samples.inside[t][i]) continue;
        int64_t places[corners];
        samples.corners(t, i, places);
        Vector<N> sample[M] = {};
        for (int c = 0; c < corners; ++c) {
            const float w = samples.weight[t][c][i];
            for (int m = 0; m < M; ++m) sample[m] += w * load<N>(input + places[c] + m * N);
        }
        for (int m = 0; m < M; ++m) total[m] += load<N>(weight + t * channels + m * N) * sample[m];
    }
    for (int m = 0; m < M; ++m) store(output + m * N, total[m]);
}

template <int AXES>
void forward_tile(
    const DeformConvShape& shape, int64_t number, const float* input, const float* offset, const float* weight,
    const float* bias, float* output) {
    const int64_t channels = shape.channels;
    const int64_t per_group = channels / shape.groups;
    const Tile<AXES> tile(shape, number);
    input += tile.item * product(shape.size, AXES) * channels;
    output += (tile.item * product(shape.out_size, AXES) + tile.begin) * channels;

    for (int64_t group = 0; group < shape.groups; ++group) {
        for (int64_t tap = 0; tap < product(shape.kernel, AXES); tap += kTaps) {
            const Samples<AXES> samples(shape, tile, offset, group, tap);
            for (int i = 0; i < tile.count; ++i) {
                float* out = output + i * channels;
                const float* initial = tap == 0 ? bias : out;
                by_width(group * per_group, (group + 1) * per_group, [&](auto width, int64_t begin, int64_t end) {
                    constexpr int n = decltype(width)::value;
                    const auto block = [&](auto vectors, int64_t c) {
                        forward_block<n, decltype(vectors)::value>(
                            samples, i, input + c, weight + tap * channels + c, initial ? initial + c : nullptr,
                            out + c);
                    };
                    int64_t c = begin;
                    for (; c + 4 * n <= end; c += 4 * n) block(Constant<4>(), c);
                    if (c + 3 * n <= end) {
                        block(Constant<3>(), c);
                    } else if (c + 2 * n <= end) {
                        block(Constant<2>(), c);
                    } else if (c + n <= end) {
                        block(Constant<1>(), c);
                    }
                });
            }
        }
    }
}

template <int AXES>
void forward(
    int threads, const DeformConvShape& shape, const float* input, const float* offset, const float* weight,
    const float* bias, float* output) {
    const int64_t tiles = shape.batch * Tile<AXES>::number_in_item(shape);
    on_threads(threads, [&](int thread) {
        for (int64_t n = share(tiles, thread, threads); n < share(tiles, thread + 1, threads); ++n) {
            forward_tile<AXES>(shape, n, input, offset, weight, bias, output);
        }
    });
}

// Sums over many voxels, in float32 for some tiles and then in float64, so that a large volume costs no digits.
struct WeightGradient {
    int64_t length;
    float* recent;
    double* total;
    int tiles = 0;

    void tile_done() {
        if (length && ++tiles % 32 == 0) flush();
    }

    void flush() {
        for (int64_t i = 0; i < length; ++i) {
            total[i] += recent[i];
            recent[i] = 0;
        }
    }
};

// The part of the backward pass that one thread does: of the tiles that it is given, what they add to the rows of
// grad_input that it owns. The thread that owns the row of a sample's lowest corner also computes the sample's share of
// the other gradients.
template <int AXES>
struct Backward {
    static constexpr int kCorners = 1 << AXES;

    const DeformConvShape& shape;
    const float* grad_output;
    const float* input;
    const float* offset;
    const float* weight;
    float* grad_input;
    float* grad_offset;
    WeightGradient grad_weight;
    int64_t first;  // the rows owned, as voxels of the whole batch
    int64_t last;

    // owns_all says that the samples of the tile touch no row of another thread.
    void tile(int64_t number, bool owns_all) {
        const int64_t channels = shape.channels;
        const int64_t voxels = product(shape.size, AXES);
        const int64_t out_voxels = product(shape.out_size, AXES);
        const int64_t taps = product(shape.kernel, AXES);
        const Tile<AXES> tile(shape, number);
        const int64_t in_begin = tile.item * voxels;
        const Item item{
            input + in_begin * channels,
            grad_input ? grad_input + in_begin * channels : nullptr,
            first - in_begin,
            last - in_begin,
            owns_all,
            channels / shape.groups,
        };
        const float* grad = grad_output + (tile.item * out_voxels + tile.begin) * channels;
        for (int64_t group = 0; group < shape.groups; ++group) {
            for (int64_t tap = 0; tap < taps; tap += kTaps) {
                const Samples<AXES> samples(shape, tile, offset, group, tap);
                float dots[kTaps][kTile][kCorners] = {};
                for (int i = 0; i < tile.count; ++i) {
                    for (int t = 0; t < samples.taps; ++t) {
                        if (samples.inside[t][i]) sample(samples, t, i, item, grad + i * channels, dots[t][i]);
                    }
                }
                if (grad_offset) store_offset_gradient(samples, item, dots);
            }
        }
        grad_weight.tile_done();
    }

   private:
    // A batch item, and the voxels of it whose rows are owned.
    struct Item {
        const float* input;
        float* grad_input;
        int64_t first;
        int64_t last;
        bool owns_all;
        int64_t group_channels;

        bool owns(int64_t voxel) const { return owns_all || (first <= voxel && voxel < last); }
    };

    void sample(
        const Samples<AXES>& samples, int t, int i, const Item& item, const float* grad, float* dots) {
        const int64_t begin = samples.group * item.group_channels;
        const int64_t end = begin + item.group_channels;
        const int64_t tap = (samples.first_tap + t) * shape.channels;
        int64_t places[kCorners];
        samples.corners(t, i, places);
        const float* weights = &samples.weight[t][0][i];

        int64_t highest = samples.voxel[t][i];
        for (int a = 0; a < AXES; ++a) highest += samples.step[t][a][i];
        const bool home = item.owns(samples.voxel[t][i]);
        const bool read = home && (grad_offset || grad_weight.length);
        const bool whole = read && item.grad_input && item.owns(highest);
        float* gw = grad_weight.length ? grad_weight.recent + tap : nullptr;

        if (read) {
            by_width(begin, end, [&](auto width, int64_t from, int64_t to) {
                constexpr int n = decltype(width)::value;
                if (whole) {
                    gather<n, true>(item, places, weights, from, to, grad, weight + tap, gw, dots);
                } else {
                    gather<n, false>(item, places, weights, from, to, grad, weight + tap, gw, dots);
                }
            });
        }
        if (item.grad_input && !whole) {
            for (int c = 0; c < kCorners; c += 2) {
                int64_t row = samples.voxel[t][i];
                for (int a = 0; a < AXES - 1; ++a) row += end_of(c, a, AXES) * samples.step[t][a][i];
                if (!item.owns(row)) continue;
                by_width(begin, end, [&](auto width, int64_t from, int64_t to) {
                    scatter<decltype(width)::value>(item, places + c, weights + c * kTile, from, to, grad, weight + tap);
                });
            }
        }
    }

    // What a sample adds to the gradients of the weight and, as sums over the channels for each corner, of the offset;
    // with SCATTER also to that of the input, all its rows being owned. The corners' weights are kTile apart.
    template <int N, bool SCATTER>
    void gather(
        const Item& item, const int64_t* places, const float* weights, int64_t from, int64_t to, const float* grad,
        const float* weight, float* grad_weight, float* dots) {
        constexpr int at_once = kLanes == 16 ? kCorners : 4;  // as many as there are registers for
        for (int first = 0; first < kCorners; first += at_once) {
            Vector<N> products[at_once] = {};
            Vector<N> w[at_once];  // before the loop: for all the compiler knows, its stores could change the weights
            for (int c = 0; c < at_once; ++c) w[c] = all<N>(weights[(first + c) * kTile]);
            for (int64_t channel = from; channel < to; channel += N) {
                const Vector<N> g = load<N>(grad + channel);
                const Vector<N> grad_sample = g * load<N>(weight + channel);
                Vector<N> sample = {};
                for (int c = 0; c < at_once; ++c) {
                    const int64_t place = places[first + c] + channel;
                    const Vector<N> corner = load<N>(item.input + place);
                    products[c] += grad_sample * corner;
                    sample += w[c] * corner;
                    if constexpr (SCATTER) {
                        store(item.grad_input + place, load<N>(item.grad_input + place) + w[c] * grad_sample);
                    }
                }
                if (grad_weight) store(grad_weight + channel, load<N>(grad_weight + channel) + g * sample);
            }
            add_sums<N>(products, dots + first);
        }
    }

    // What a sample adds to the input's gradient at the two corners of one row.
    template <int N>
    void scatter(
        const Item& item, const int64_t* places, const float* weights, int64_t from, int64_t to, const float* grad,
        const float* weight) {
        for (int64_t channel = from; channel < to; channel += N) {
            const Vector<N> grad_sample = load<N>(grad + channel) * load<N>(weight + channel);
            for (int c = 0; c < 2; ++c) {
                float* to = item.grad_input + places[c] + channel;
                store(to, load<N>(to) + weights[c * kTile] * grad_sample);
            }
        }
    }

    void store_offset_gradient(
        const Samples<AXES>& samples, const Item& item, const float (*dots)[kTile][kCorners]) {
        const int64_t out_voxels = product(shape.out_size, AXES);
        const int64_t offset_channels = shape.groups * product(shape.kernel, AXES) * AXES;
        const Tile<AXES>& tile = samples.tile;
        samples.for_offset_gradients(offset, dots, [&](int t, int i, int axis, const Vector<kLanes>& gradient) {
            const int64_t channel = tile.item * offset_channels + samples.offset_channel(t, axis);
            float* to = grad_offset + channel * out_voxels + tile.begin + i;
            if (item.owns_all && i + kLanes <= tile.count) {
                store(to, gradient);
                return;
            }
            float lanes[kLanes];
            store(lanes, gradient);
            for (int lane = 0; lane < kLanes && i + lane < tile.count; ++lane) {
                if (item.owns(samples.voxel[t][i + lane])) to[lane] = lanes[lane];
            }
        });
    }
};

// Input voxels that the samples of a tile can touch, as whole planes of the first axis.
struct Reach {
    int64_t first;
    int64_t last;
};

template <int AXES>
Reach reach_of(const DeformConvShape& shape, const float* offset, int64_t number) {
    const Tile<AXES> tile(shape, number);
    const int64_t taps = product(shape.kernel, AXES);
    const int64_t taps_of_plane = taps / shape.kernel[0];
    int32_t first = static_cast<int32_t>(shape.size[0]);
    int32_t last = 0;
    for (int64_t channel = 0; channel < shape.groups * taps; ++channel) {
        float o[kTile];
        tile.load_offset(shape, offset, channel * AXES, o);
        const int32_t place = limited(channel % taps / taps_of_plane * shape.dilation[0]);
        for (int i = 0; i < kTile; ++i) {
            const Coordinate<1> along(o[i], tile.regular[0][i], place, static_cast<int32_t>(shape.size[0]));
            const int32_t upper = along.lower - along.step;
            first = along.lower < first ? along.lower : first;
            last = upper > last ? upper : last;
        }
    }
    const int64_t plane = product(shape.size, AXES) / shape.size[0];
    const int64_t begin = tile.item * shape.size[0];
    return {(begin + first) * plane, (begin + last + 1) * plane};
}

// Memory for plain numbers, zero at first and null when there is none.
template <typename T>
struct Buffer {
    T* data;

    explicit Buffer(int64_t length)
        : data(length ? static_cast<T*>(std::calloc(static_cast<size_t>(length), sizeof(T))) : nullptr) {}
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
};

// How the threads of a backward pass add to one grad_input without atomics, so that every sum has the same order at
// every run: in two turns, or else by rows.
//
// In turns, the tiles are divided into two slabs for each worker; first all work on their first slab, then on their
// second. It takes slabs that touch no row of the next but one, so it is for offsets short beside the volume. By rows,
// each worker owns a share of the rows, and does the tiles that touch them, in part again what its neighbour does.
struct Division {
    int workers;
    bool in_turns;

    Division(const Reach* reach, int64_t tiles, int64_t voxels, int64_t row, int most) : workers(most), in_turns(false) {
        int64_t longest = 0;  // tiles of the busiest worker
        for (int worker = 0; most > 1 && worker < most; ++worker) {
            const int64_t first = share(voxels / row, worker, most) * row;
            const int64_t last = share(voxels / row, worker + 1, most) * row;
            int64_t touching = 0;
            for (int64_t n = 0; n < tiles; ++n) touching += reach[n].first < last && first < reach[n].last;
            longest = touching > longest ? touching : longest;
        }
        for (int w = most; w > 1 && (tiles + w - 1) / w < longest; --w) {
            if (!apart(reach, tiles, 2 * w)) continue;
            workers = w;
            in_turns = true;
            return;
        }
    }

   private:
    static bool apart(const Reach* reach, int64_t tiles, int slabs) {
        int64_t end[2] = {0, 0};
        for (int slab = 0; slab < slabs; ++slab) {
            int64_t& last = end[slab % 2];
            const int64_t before = last;
            for (int64_t n = share(tiles, slab, slabs); n < share(tiles, slab + 1, slabs); ++n) {
                if (reach[n].first < before) return false;
                last = reach[n].last > last ? reach[n].last : last;
            }
        }
        return true;
    }
};

template <int AXES>
int backward(
    int threads, const DeformConvShape& shape, const float* grad_output, const float* input, const float* offset,
    const float* weight, float* grad_input, float* grad_offset, float* grad_weight) {
    const int64_t taps = product(shape.kernel, AXES);
    const int64_t voxels = shape.batch * product(shape.size, AXES);
    const int64_t tiles = shape.batch * Tile<AXES>::number_in_item(shape);
    const int64_t length = grad_weight ? taps * shape.channels : 0;

    // Each worker's sums of the weight's gradient take 3 floats a number; together at most the memory of the input.
    const int64_t affordable = length ? voxels / (3 * taps) : threads;
    const int most = static_cast<int>(affordable < 1 ? 1 : affordable < threads ? affordable : threads);
    const bool shared = grad_input && most > 1;

    const Buffer<float> recent(most * length);
    const Buffer<double> total(most * length);
    const Buffer<Reach> reach(shared ? tiles : 0);
    if ((length && !(recent.data && total.data)) || (shared && !reach.data)) return 1;

    const auto for_share = [&](int thread, int64_t work, const auto& use) {
        for (int64_t n = share(work, thread, threads); n < share(work, thread + 1, threads); ++n) use(n);
    };
    on_threads(threads, [&](int thread) {
        if (shared) for_share(thread, tiles, [&](int64_t n) { reach.data[n] = reach_of<AXES>(shape, offset, n); });
        if (grad_input) for_share(thread, voxels * shape.channels, [&](int64_t i) { grad_input[i] = 0; });
    });

    const int64_t row = shape.size[AXES - 1];
    const Division division(reach.data, tiles, voxels, row, shared ? most : 1);
    const int workers = shared ? division.workers : most;
    const bool by_row = shared && !division.in_turns;
    const int turns = division.in_turns ? 2 : 1;
    for (int turn = 0; turn < turns; ++turn) {
        on_threads(workers, [&](int worker) {
            const int64_t first = by_row ? share(voxels / row, worker, workers) * row : 0;
            const int64_t last = by_row ? share(voxels / row, worker + 1, workers) * row : voxels;
            Backward<AXES> mine{
                shape, grad_output, input, offset, weight, grad_input, grad_offset,
                WeightGradient{length, recent.data + worker * length, total.data + worker * length}, first, last,
            };
            if (by_row) {
                for (int64_t n = 0; n < tiles; ++n) {
                    const Reach& r = reach.data[n];
                    if (r.first < last && first < r.last) mine.tile(n, first <= r.first && r.last <= last);
                }
            } else {
                const int slab = worker * turns + turn, slabs = workers * turns;
                for (int64_t n = share(tiles, slab, slabs); n < share(tiles, slab + 1, slabs); ++n) mine.tile(n, true);
            }
            mine.grad_weight.flush();
        });
    }

    for (int64_t i = 0; i < length; ++i) {
        double all = 0;
        for (int w = 0; w < workers; ++w) all += total.data[w * length + i];
        grad_weight[i] = static_cast<float>(all);
    }
    return 0;
}

}  // namespace

extern "C" void NNUNET_DEFORM_ENTRY(deform_conv_forward)(
    int threads, const DeformConvShape* shape, const float* input, const float* offset, const float* weight,
    const float* bias, float* output) {
    (shape->axes == 2 ? forward<2> : forward<3>)(threads, *shape, input, offset, weight, bias, output);
}

extern "C" int NNUNET_DEFORM_ENTRY(deform_conv_backward)(
    int threads, const DeformConvShape* shape, const float* grad_output, const float* input, const float* offset,
    const float* weight, float* grad_input, float* grad_offset, float* grad_weight) {
    return (shape->axes == 2 ? backward<2> : backward<3>)(
        threads, *shape, grad_output, input, offset, weight, grad_input, grad_offset, grad_weight);
}

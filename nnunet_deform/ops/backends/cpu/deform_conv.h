// Depthwise deformable convolution in float32 on the CPU: what the instruction sets' objects and the library share.
//
// All sums and positions follow reference.py: a position outside (-1, size) on any axis, or one that is not a number,
// samples zero and passes no gradient; the cell is the floor, so derivatives at integers are those from the right.
//
// B batch, C channels, S input voxels, V output voxels, K taps, G deformable groups, n axes (2 or 3).
#pragma once

#include <cstdint>

extern "C" {

struct DeformConvShape {
    int64_t axes;
    int64_t batch;
    int64_t channels;
    int64_t groups;
    int64_t size[3];
    int64_t out_size[3];
    int64_t kernel[3];
    int64_t stride[3];
    int64_t padding[3];
    int64_t dilation[3];
    // The offset is [B, G*K*n, V]; these are its strides in elements, so that it is read planar or channels last.
    int64_t offset_batch_stride;
    int64_t offset_channel_stride;
    int64_t offset_voxel_stride;
};

// input [B, S, C], weight [K, C], bias [C] or null, output [B, V, C].
typedef void DeformConvForward(
    int threads, const DeformConvShape* shape, const float* input, const float* offset, const float* weight,
    const float* bias, float* output);

// grad_output [B, V, C]; grad_input [B, S, C], grad_offset [B, G*K*n, V], grad_weight [K, C]: null where nobody asks,
// else overwritten. Returns 0, or 1 when there is no memory for the threads' sums.
//
// The same numbers at every run with the same number of threads; output and grad_offset at any number.
typedef int DeformConvBackward(
    int threads, const DeformConvShape* shape, const float* grad_output, const float* input, const float* offset,
    const float* weight, float* grad_input, float* grad_offset, float* grad_weight);

}

// The two entry points of one instruction set's object.
#define NNUNET_DEFORM_JOIN_(name, suffix) name##_##suffix
#define NNUNET_DEFORM_JOIN(name, suffix) NNUNET_DEFORM_JOIN_(name, suffix)
#define NNUNET_DEFORM_ENTRY(name) NNUNET_DEFORM_JOIN(name, NNUNET_DEFORM_SUFFIX)

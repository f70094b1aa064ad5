// The library's exported functions: which instruction sets there are, and the kernel in one of them.

#include "deform_conv.h"

#if defined(_WIN32)
#define NNUNET_DEFORM_EXPORT extern "C" __declspec(dllexport)
#else
#define NNUNET_DEFORM_EXPORT extern "C" __attribute__((visibility("default")))
#endif

extern "C" {

DeformConvForward deform_conv_forward_baseline;
DeformConvBackward deform_conv_backward_baseline;
#ifdef NNUNET_DEFORM_X86
DeformConvForward deform_conv_forward_avx2, deform_conv_forward_avx512;
DeformConvBackward deform_conv_backward_avx2, deform_conv_backward_avx512;
#endif

}

namespace {

struct InstructionSet {
    const char* name;
    bool (*supported)();
    DeformConvForward* forward;
    DeformConvBackward* backward;
};

#ifdef NNUNET_DEFORM_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

bool always() { return true; }

// The fastest first.
const InstructionSet kInstructionSets[] = {
#ifdef NNUNET_DEFORM_X86
    {"avx512", has_avx512, deform_conv_forward_avx512, deform_conv_backward_avx512},
    {"avx2", has_avx2, deform_conv_forward_avx2, deform_conv_backward_avx2},
#endif
    {"baseline", always, deform_conv_forward_baseline, deform_conv_backward_baseline},
};

}  // namespace

// The name of an instruction set, the fastest first; empty where this processor lacks it, null after the last.
NNUNET_DEFORM_EXPORT const char* nnunet_deform_instruction_set(int index) {
    const int length = sizeof kInstructionSets / sizeof *kInstructionSets;
    if (index < 0 || index >= length) return nullptr;
    return kInstructionSets[index].supported() ? kInstructionSets[index].name : "";
}

NNUNET_DEFORM_EXPORT void nnunet_deform_conv_forward(
    int instruction_set, int threads, const DeformConvShape* shape, const float* input, const float* offset,
    const float* weight, const float* bias, float* output) {
    kInstructionSets[instruction_set].forward(threads, shape, input, offset, weight, bias, output);
}

NNUNET_DEFORM_EXPORT int nnunet_deform_conv_backward(
    int instruction_set, int threads, const DeformConvShape* shape, const float* grad_output, const float* input,
    const float* offset, const float* weight, float* grad_input, float* grad_offset, float* grad_weight) {
    return kInstructionSets[instruction_set].backward(
        threads, shape, grad_output, input, offset, weight, grad_input, grad_offset, grad_weight);
}

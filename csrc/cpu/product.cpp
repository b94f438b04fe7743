// Entry point of the bfloat16 product on a CPU: shares C among threads.
#include <algorithm>

#include "../abi.h"
#include "parallel.h"
#include "product_bf16.h"

#ifdef FASTALIGN_X86
#include <cpuid.h>

namespace {

bool has_amx() {
    unsigned int eax, ebx, ecx, edx = 0;
    constexpr unsigned int AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    return (edx & AMX_BF16) && (edx & AMX_TILE) && fastalign::request_amx();
}

}  // namespace
#endif

int32_t fastalign_product_bf16_usable_cpu(void) {
#ifdef FASTALIGN_X86
    if (!fastalign::isa_usable(2) || !__builtin_cpu_supports("avx512bf16")) return 0;
    static const bool amx = has_amx();
    return amx ? 2 : 1;
#else
    return 0;
#endif
}

int32_t fastalign_product_bf16_cpu(const void* a, int64_t a_row_stride, int64_t a_column_stride,
                                   const void* b, int64_t b_row_stride, int64_t b_column_stride,
                                   float* c, int64_t c_stride, int64_t num_rows,
                                   int64_t num_columns, int64_t depth, int32_t accumulate,
                                   int32_t num_threads, int32_t isa) {
    const int32_t usable = fastalign_product_bf16_usable_cpu();
    if (!usable || (isa != -1 && isa != 2)) return 1;
#ifdef FASTALIGN_X86
    const auto run = usable == 2 && isa == -1 ? fastalign::run_product_amx : fastalign::run_product;
    const fastalign::Product product = {
        {static_cast<const uint16_t*>(a), a_row_stride, a_column_stride},
        {static_cast<const uint16_t*>(b), b_row_stride, b_column_stride},
        c,
        num_rows,
        num_columns,
        depth,
        c_stride,
        accumulate != 0};
    // The longer side of C is shared: each thread packs the whole of the other operand.
    if (num_rows >= num_columns) {
        fastalign::for_each_span(
            num_rows, num_columns * depth, num_threads,
            [&](int64_t first, int64_t last) { run(product, first, last, 0, num_columns); });
    } else {
        fastalign::for_each_span(
            num_columns, num_rows * depth, num_threads,
            [&](int64_t first, int64_t last) { run(product, 0, num_rows, first, last); });
    }
#endif
    return 0;
}

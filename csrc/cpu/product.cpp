// Entry point of the bfloat16 product on a CPU: shares C among threads.
#include <algorithm>

#include "../abi.h"
#include "parallel.h"
#include "product_bf16.h"

int32_t fastalign_product_bf16_usable_cpu(void) {
#ifdef FASTALIGN_X86
    return fastalign::isa_usable(2) && __builtin_cpu_supports("avx512bf16");
#else
    return 0;
#endif
}

int32_t fastalign_product_bf16_cpu(const void* a, int64_t a_row_stride, int64_t a_column_stride,
                                   const void* b, int64_t b_row_stride, int64_t b_column_stride,
                                   float* c, int64_t c_stride, int64_t num_rows,
                                   int64_t num_columns, int64_t depth, int32_t accumulate,
                                   int32_t num_threads, int32_t isa) {
    if (!fastalign_product_bf16_usable_cpu() || (isa != -1 && isa != 2)) return 1;
#ifdef FASTALIGN_X86
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
        fastalign::for_each_span(num_rows, num_columns * depth, num_threads,
                                 [&](int64_t first, int64_t last) {
                                     fastalign::run_product(product, first, last, 0, num_columns);
                                 });
    } else {
        fastalign::for_each_span(num_columns, num_rows * depth, num_threads,
                                 [&](int64_t first, int64_t last) {
                                     fastalign::run_product(product, 0, num_rows, first, last);
                                 });
    }
#endif
    return 0;
}

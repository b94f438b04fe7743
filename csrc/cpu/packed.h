// Divides packed responses among threads.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace fastalign {

// Calls visit(response, begin, end) for each, its tokens begin..end. The visits are plain C++, and
// an instruction set is only checked.
template <typename Visit>
int32_t for_each_response(const int64_t* bounds, int64_t num_responses, int32_t num_threads,
                          int32_t isa, const Visit& visit) {
    if (isa != -1 && !isa_usable(isa)) return 1;
    if (num_responses == 0) return 0;
    const int64_t tokens_each = bounds[num_responses] / num_responses + 1;
    for_each_span(num_responses, tokens_each, num_threads, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) visit(r, bounds[r], bounds[r + 1]);
    });
    return 0;
}

}  // namespace fastalign

// Shapes of logits, and what their rows come with.
#pragma once

#include <cstdint>
#include <vector>

#include "sanitized_array.h"

struct Shape {
    int64_t num_rows, num_columns, gap;
    int64_t row_stride() const { return num_columns + gap; }
    // The last row has no gap behind it.
    int64_t size() const { return num_rows ? num_rows * row_stride() - gap : 0; }
};
// No row, one column, vectors with a rest, more than one of BLOCK.
inline const std::vector<Shape> SMALL = {{0, 5, 0},  {1, 1, 0},   {3, 1, 2},   {5, 17, 0},
                                         {4, 63, 3}, {2, 130, 0}, {2, 4099, 1}};
// Enough for threads; smaller ones are left to one thread, however many there may be.
inline const std::vector<Shape> LARGE = {{67, 3001, 1}};
inline const std::vector<Shape>& shapes_for(int32_t num_threads) {
    return num_threads > 1 ? LARGE : SMALL;
}

// What rows come with; the second is ignored.
struct Rows {
    Array<int64_t> targets;
    Array<float> temperature, grad_logprob, grad_entropy, logprob, entropy;

    explicit Rows(const Shape& shape)
        : targets(shape.num_rows),
          temperature(shape.num_rows),
          grad_logprob(numbers(shape.num_rows)),
          grad_entropy(numbers(shape.num_rows)),
          logprob(shape.num_rows),
          entropy(shape.num_rows) {
        for (int64_t i = 0; i < shape.num_rows; ++i) {
            targets[i] = i == 1 ? -100 : (shape.num_columns - 1 + 7 * i) % shape.num_columns;
            temperature[i] = 0.5f + 0.25f * (i % 5);
        }
    }
};

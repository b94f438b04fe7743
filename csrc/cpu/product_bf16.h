// A product of bfloat16 matrices, accumulated and returned in float32.
#pragma once

#include <cstdint>

namespace fastalign {

// A matrix whose element (row, column) is at data[row * row_stride + column * column_stride]; one
// of the strides is 1.
struct Matrix {
    const uint16_t* data;
    int64_t row_stride, column_stride;
};

// C (num_rows, num_columns) = A (num_rows, depth) B (depth, num_columns), or C += A B.
struct Product {
    Matrix a, b;
    float* c;
    int64_t num_rows, num_columns, depth, c_stride;
    bool accumulate;
};

// Compute the part of C in the given rows and columns, by AVX-512's bfloat16 instructions or by
// AMX.
void run_product(const Product& product, int64_t first_row, int64_t last_row, int64_t first_column,
                 int64_t last_column);
void run_product_amx(const Product& product, int64_t first_row, int64_t last_row,
                     int64_t first_column, int64_t last_column);

// Asks the system for AMX's registers; false where it does not grant them.
bool request_amx();

}  // namespace fastalign

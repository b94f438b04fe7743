// Whole vectors and the rest of a row, for one instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vector.h"

namespace fastalign {
namespace FASTALIGN_ISA {

typedef std::integral_constant<int64_t, WIDTH> WholeVector;

// True if a target is a column of the row.
inline bool holds(int64_t target, int64_t num_columns) {
    return target >= 0 && target < num_columns;
}

// Calls visit(column, count) for whole vectors, whose count the compiler knows, and for the rest.
template <typename Visit>
inline void visit_vectors(int64_t start, int64_t stop, const Visit& visit) {
    int64_t column = start;
    for (; column + WIDTH <= stop; column += WIDTH) visit(column, WholeVector{});
    if (column < stop) visit(column, stop - column);
}

// The first `count` of a vector's elements; the others are `padding`.
template <typename Type>
__attribute__((always_inline)) inline Float load_count(const typename Type::Element* from,
                                                       int64_t count, float padding = 0) {
    return count == WIDTH ? Type::load(from) : load_tail<Type>(from, count, padding);
}

template <typename Type>
__attribute__((always_inline)) inline void store_count(typename Type::Element* to, Float value,
                                                       int64_t count) {
    if (count == WIDTH) {
        Type::store(to, value);
        return;
    }
    typename Type::Element buffer[WIDTH];
    Type::store(buffer, value);
    memcpy(to, buffer, count * sizeof(*to));
}

}  // namespace FASTALIGN_ISA
}  // namespace fastalign

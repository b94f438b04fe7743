// Arrays for sanitized_driver.cpp: on the heap and of the exact size, so that the sanitizers see an
// access to one element more.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>

inline void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "sanitized_driver: %s\n", what);
    std::exit(1);
}

// `size` elements behind BEFORE more, so that it does not begin where vectors do. All are filled
// with a NaN that no kernel makes: what is still filled was not written.
template <typename T>
class Array {
  public:
    explicit Array(int64_t size) : size_(size), data_(new T[BEFORE + size]) {
        std::memset(data_.get(), FILL, sizeof(T) * (BEFORE + size));
    }
    T* get() { return data_.get() + BEFORE; }
    T& operator[](int64_t i) { return get()[i]; }
    int64_t size() const { return size_; }

    // That the first `columns` of each `stride` elements were written, and no others.
    void check_written(int64_t columns = 1, int64_t stride = 1) {
        require(is_filled(*data_.get()), "written before an array");
        for (int64_t i = 0; i < size_; ++i)
            require(is_filled(get()[i]) == (i % stride >= columns), "not written, or beside a row");
    }

    // That all were, and that no NaN from beside an array was read for it.
    void check_finite() {
        check_written();
        for (int64_t i = 0; i < size_; ++i) require(std::isfinite(get()[i]), "not finite");
    }

  private:
    static constexpr int FILL = 0xff;
    static constexpr int64_t BEFORE = 1;
    static bool is_filled(const T& value) {
        T fill;
        std::memset(&fill, FILL, sizeof(T));
        return std::memcmp(&value, &fill, sizeof(T)) == 0;
    }
    int64_t size_;
    std::unique_ptr<T[]> data_;
};

// A small number: a float, or the bits of a bfloat16 (dtype 1) or a float16 (2).
template <typename T>
T number(int64_t i, int32_t dtype) {
    const float value = static_cast<float>(i * 37 % 101) / 20 - 2.5f;
    if constexpr (std::is_same<T, float>::value) {
        return value;
    } else if (dtype == 1) {
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof(bits));
        return static_cast<T>(bits >> 16);
    } else {
        return static_cast<T>(0x3000 + i * 37 % 0xc00);
    }
}

// Numbers in the first `columns` of each `stride` elements, NaNs beside them.
template <typename T = float>
Array<T> numbers(int64_t size, int32_t dtype = 0, int64_t columns = 1, int64_t stride = 1) {
    Array<T> result(size);
    for (int64_t i = 0; i < size; ++i)
        if (i % stride < columns) result[i] = number<T>(i, dtype);
    return result;
}

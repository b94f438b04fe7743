// Arrays for sanitized_driver.cpp, in which an access to one element more stops the program.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

inline void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "sanitized_driver: %s\n", what);
    std::exit(1);
}

// Whether arrays made from now on begin, in place of end, beside memory that may not be touched.
inline bool guard_starts = false;

// `size` elements between two stretches of memory that may not be touched: they end where the
// second begins, or begin where the first ends. AddressSanitizer's own heap would watch both sides,
// but it does not see what vector instructions load and store under a mask. Filled with a NaN that
// no kernel makes: what is still filled was not written.
template <typename T>
class Array {
  public:
    explicit Array(int64_t size)
        : size_(size), num_bytes_((size * sizeof(T) / PAGE + 3) * PAGE), memory_(allocate()) {
        data_ = reinterpret_cast<T*>(memory_ + PAGE);
        if (!guard_starts) data_ = reinterpret_cast<T*>(memory_ + num_bytes_ - PAGE) - size;
        std::memset(data_, FILL, size * sizeof(T));
    }
    Array(Array&& other) { *this = std::move(other); }
    Array& operator=(Array&& other) {
        std::swap(size_, other.size_);
        std::swap(num_bytes_, other.num_bytes_);
        std::swap(memory_, other.memory_);
        std::swap(data_, other.data_);
        return *this;
    }
    ~Array() {
        if (memory_ != nullptr) munmap(memory_, num_bytes_);
    }

    T* get() { return data_; }
    T& operator[](int64_t i) { return get()[i]; }

    // That the first `columns` of each `stride` elements were written, and no others.
    void check_written(int64_t columns = 1, int64_t stride = 1) {
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
    static constexpr int64_t PAGE = 1 << 16;  // the system's own are 4 to 64 KiB

    char* allocate() {
        void* memory =
            mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        require(memory != MAP_FAILED, "no memory");
        char* start = static_cast<char*>(memory);
        for (char* guard : {start, start + num_bytes_ - PAGE})
            require(mprotect(guard, PAGE, PROT_NONE) == 0, "no guard");
        return start;
    }
    static bool is_filled(const T& value) {
        T fill;
        std::memset(&fill, FILL, sizeof(T));
        return std::memcmp(&value, &fill, sizeof(T)) == 0;
    }
    int64_t size_ = 0, num_bytes_ = 0;
    char* memory_ = nullptr;
    T* data_ = nullptr;
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

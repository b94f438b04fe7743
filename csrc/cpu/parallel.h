// Shares the rows of an operation among threads, and chooses the instruction set at run time.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace fastalign {

// A thread with fewer elements than this takes longer to start than to compute them.
constexpr int64_t MIN_ELEMENTS_PER_THREAD = 1 << 16;

// Runs a function on each of a team's threads.
typedef void (*Team)(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);

// The entry point of the OpenMP library that is in the process, torch's, or NULL. Its threads may
// still wait for work on the cores that threads of our own would need.
inline Team openmp_team() {
    static const Team team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return team;
}

template <typename Function>
struct Tasks {
    const Function& function;
    int64_t count;
    std::atomic<int64_t> next;

    // A team may be smaller than was asked for.
    void work() {
        for (int64_t i = next++; i < count; i = next++) function(i);
    }
    static void work_of(void* tasks) { static_cast<Tasks*>(tasks)->work(); }
};

// Calls function(i) for 0 <= i < count; each thread takes the next one.
template <typename Function>
void for_each_task(int64_t count, int64_t num_threads, const Function& function) {
    Tasks<Function> tasks = {function, count, {0}};
    num_threads = std::min(num_threads, count);
    if (num_threads <= 1) {
        tasks.work();
    } else if (const Team team = openmp_team()) {
        team(tasks.work_of, &tasks, static_cast<unsigned>(num_threads), 0);
    } else {
        std::vector<std::thread> threads;
        for (int64_t i = 1; i < num_threads; ++i) threads.emplace_back([&] { tasks.work(); });
        tasks.work();
        for (auto& thread : threads) thread.join();
    }
}

// Calls function(first, last) on spans of 0..num_rows, each `elements_per_row` elements of work.
template <typename Function>
void for_each_span(int64_t num_rows, int64_t elements_per_row, int32_t num_threads,
                   const Function& function) {
    const int64_t worth = num_rows * elements_per_row / MIN_ELEMENTS_PER_THREAD;
    const int64_t count = std::max<int64_t>(1, std::min<int64_t>({num_threads, worth, num_rows}));
    for_each_task(count, count,
                  [&](int64_t i) { function(num_rows * i / count, num_rows * (i + 1) / count); });
}

// True if this build has the instruction set and this processor runs it.
inline bool isa_usable(int32_t isa) {
    switch (isa) {
        case 0:
            return true;
#ifdef FASTALIGN_X86
        case 1:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case 2:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
        default:
            return false;
    }
}

// Returns the function for `isa` (-1: the best) of those for portable, AVX2 and AVX-512, or NULL.
template <typename Function>
Function choose_isa(int32_t isa, Function portable, Function avx2, Function avx512) {
    const Function functions[3] = {portable, avx2, avx512};
    if (isa == -1) {
        isa = 2;
        while (!isa_usable(isa)) --isa;
    }
    return isa_usable(isa) ? functions[isa] : nullptr;
}

}  // namespace fastalign

// Declares `name` in the namespaces of the instruction sets; FASTALIGN_CHOOSE names the three.
#define FASTALIGN_DECLARE(result, name, arguments) \
    namespace fastalign {                          \
    namespace portable {                           \
    result name arguments;                         \
    }                                              \
    namespace avx2 {                               \
    result name arguments;                         \
    }                                              \
    namespace avx512 {                             \
    result name arguments;                         \
    }                                              \
    }

#ifdef FASTALIGN_X86
#define FASTALIGN_CHOOSE(isa, name)                                              \
    fastalign::choose_isa(isa, fastalign::portable::name, fastalign::avx2::name, \
                          fastalign::avx512::name)
#else
#define FASTALIGN_CHOOSE(isa, name)                                                  \
    fastalign::choose_isa(isa, fastalign::portable::name, fastalign::portable::name, \
                          fastalign::portable::name)
#endif

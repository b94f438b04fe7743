// Runs CUDA kernels on a CPU. A block's threads are fibers: between two barriers each runs alone,
// in an order that FASTALIGN_EMULATION_ORDER chooses (forward, reverse, or a seed), so that a
// missing barrier shows as a wrong result in some order. A barrier or a shuffle that only some
// threads reach, an unaligned 16-byte access, and a launch that no GPU would accept fail the
// launch, as an error that cudaGetErrorString explains.
//
// Shared memory is filled with NaNs before a block begins, and when it has ended, which another
// block of its cluster may notice. Not modelled: the reordering of memory accesses, occupancy,
// shuffles of a part of a warp.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

struct Index {
    unsigned x, y, z;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr int WARP = 32;
constexpr size_t DEFAULT_SHARED_BYTES = 48 * 1024;
constexpr size_t MAX_SHARED_BYTES = 227 * 1024;  // of sm_90, where a kernel asks for it
constexpr int PORTABLE_CLUSTER_SIZE = 8;

enum class Waits { NOT, FOR_LANES, FOR_BLOCK, FOR_CLUSTER };

// A thread of a block, and, when that is done, of the next one. It is begun as a context and goes
// on by jumps, which make no system call; AddressSanitizer follows contexts alone.
struct Fiber {
    ucontext_t context;
    jmp_buf place;
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
    Waits waits = Waits::NOT;
    bool begun = false, done = true, arrived = false;
    unsigned num_shuffles = 0;
};

struct Block {
    unsigned index, rank;  // in the grid, and in its cluster
    bool done;
    std::vector<std::unique_ptr<Fiber>> fibers;  // they do not move
    std::map<int, std::vector<char>> shared;     // by the number of the variable
    std::vector<char> dynamic;
    char exchange[2][1024 / WARP][WARP][8];  // parity, warp, lane

    void fill_shared() {
        for (auto& [_, bytes] : shared) std::fill(bytes.begin(), bytes.end(), char(0xff));
        std::fill(dynamic.begin(), dynamic.end(), char(0xff));
    }
    int count(Waits why) const {
        return std::count_if(fibers.begin(), fibers.end(),
                             [why](auto& one) { return !one->done && one->waits == why; });
    }
    void release() {
        for (auto& one : fibers) one->waits = Waits::NOT;
    }
};

// The launch that runs; there is one at a time.
inline std::vector<std::unique_ptr<Block>> cluster;
inline Block* block = nullptr;
inline int thread = 0;
inline std::function<void()> body;
inline ucontext_t scheduler;
inline jmp_buf scheduler_place;
inline const char* failure = nullptr;
inline int error = 0;  // of the last launch, until it is asked for
inline std::map<const void*, size_t> shared_limits;

inline int setting(const char* name, int otherwise) {
    const char* value = getenv(name);
    return value ? atoi(value) : otherwise;
}

// The order in which threads, warps and blocks have their turn.
struct Order {
    enum { FORWARD, REVERSE, RANDOM } kind = FORWARD;
    std::mt19937 random;

    Order() {
        const char* wanted = getenv("FASTALIGN_EMULATION_ORDER");
        if (!wanted || !strcmp(wanted, "forward")) return;
        kind = strcmp(wanted, "reverse") ? RANDOM : REVERSE;
        random.seed(atoi(wanted));
    }
    std::vector<int> of(int count) {
        std::vector<int> order(count);
        std::iota(order.begin(), order.end(), 0);
        if (kind == REVERSE) std::reverse(order.begin(), order.end());
        if (kind == RANDOM) std::shuffle(order.begin(), order.end(), random);
        return order;
    }
};

inline Fiber& current_fiber() { return *block->fibers[thread]; }

// Runs a fiber until it yields. Not inlined, as the next: a jump restores registers.
__attribute__((noinline)) inline void resume(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
    fiber.begun = true;
    swapcontext(&scheduler, &fiber.context);
#else
    if (_setjmp(scheduler_place)) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
#endif
}

__attribute__((noinline)) inline void yield(Waits why) {
    Fiber& fiber = current_fiber();
    fiber.waits = why;
#ifdef __SANITIZE_ADDRESS__
    swapcontext(&fiber.context, &scheduler);
#else
    if (!_setjmp(fiber.place)) _longjmp(scheduler_place, 1);
#endif
}

// Ends the launch from within a thread.
inline void fail(const char* message) {
    failure = message;
    yield(Waits::NOT);
}

inline void run_threads() {
    for (;;) {
        body();
        current_fiber().done = true;
        yield(Waits::NOT);
    }
}

// Runs the lanes of a warp until each is done or waits for other warps.
inline void run_warp(int warp, Order& order) {
    for (bool released = true; released && !failure;) {
        int num_waiting = 0;
        for (int lane : order.of(WARP)) {
            thread = warp * WARP + lane;
            Fiber& fiber = current_fiber();
            threadIdx = {unsigned(thread), 0, 0};
            if (!fiber.done && fiber.waits == Waits::NOT) resume(fiber);
            if (failure) return;
            num_waiting += !fiber.done && fiber.waits == Waits::FOR_LANES;
        }
        released = num_waiting == WARP;
        for (int lane = 0; released && lane < WARP; ++lane)
            block->fibers[warp * WARP + lane]->waits = Waits::NOT;
    }
}

// Runs a block until all its threads are done or wait for the other blocks of the cluster.
inline void run_block(Block& current, Order& order) {
    block = &current;
    blockIdx = {block->index, 0, 0};
    const int num_threads = int(block->fibers.size());
    while (!failure) {
        for (int warp : order.of(num_threads / WARP)) run_warp(warp, order);
        if (failure || block->count(Waits::FOR_CLUSTER) == num_threads) return;
        if (block->count(Waits::FOR_BLOCK) == num_threads) {
            block->release();
            continue;
        }
        const auto& fibers = block->fibers;
        block->done =
            std::all_of(fibers.begin(), fibers.end(), [](auto& one) { return one->done; });
        if (block->done) return block->fill_shared();
        failure = block->count(Waits::FOR_LANES) ? "a shuffle that some lanes leave out"
                                                 : "a barrier that some threads leave out";
    }
}

inline void begin_block(Block& one, unsigned index, unsigned rank) {
    one.index = index;
    one.rank = rank;
    one.done = false;
    one.fill_shared();
    for (auto& fiber : one.fibers) {
        // one that a failed launch has left in the middle begins anew
        if (!fiber || !fiber->done) fiber = std::make_unique<Fiber>();
        fiber->waits = Waits::NOT;
        fiber->done = fiber->arrived = false;
        fiber->num_shuffles = 0;
        if (fiber->begun) continue;
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack.get();
        fiber->context.uc_stack.ss_size = STACK_BYTES;
        fiber->context.uc_link = nullptr;
        makecontext(&fiber->context, run_threads, 0);
    }
}

// Runs the blocks of a cluster, each as far as it comes without the others.
inline void run_cluster(unsigned first_block, Order& order) {
    const int size = int(cluster.size());
    for (int rank = 0; rank < size; ++rank) begin_block(*cluster[rank], first_block + rank, rank);
    while (!failure) {
        int num_done = 0;
        for (int rank : order.of(size)) {
            if (!cluster[rank]->done && !failure) run_block(*cluster[rank], order);
            num_done += cluster[rank]->done;
        }
        if (failure || num_done == size) return;
        if (num_done > 0) failure = "a cluster's barrier that some blocks leave out";
        for (auto& one : cluster) one->release();
    }
}

struct Shape {
    unsigned num_blocks, num_threads, cluster_size;
    size_t dynamic_bytes;
};

// Returns CUDA's error of a launch that a GPU would refuse.
inline int refusal(const Shape& shape, const void* kernel) {
    const auto limit = shared_limits.find(kernel);
    const size_t most = limit == shared_limits.end() ? DEFAULT_SHARED_BYTES : limit->second;
    const bool sizes = shape.num_blocks > 0 && shape.num_threads > 0 && shape.num_threads <= 1024;
    if (!sizes || shape.num_threads % WARP != 0) return 9;  // cudaErrorInvalidConfiguration
    if (shape.dynamic_bytes > most) return 1;               // cudaErrorInvalidValue
    if (shape.cluster_size > 1 && setting("FASTALIGN_EMULATION_CAPABILITY", 9) < 9) return 1;
    if (shape.cluster_size > PORTABLE_CLUSTER_SIZE) return 912;  // cudaErrorInvalidClusterSize
    if (shape.num_blocks % shape.cluster_size != 0) return 9;
    return setting("FASTALIGN_EMULATION_ERROR", 0);
}

inline void launch(const Shape& shape, const void* kernel, std::function<void()> call) {
    error = refusal(shape, kernel);
    if (error) return;
    Order order;
    failure = nullptr;
    body = std::move(call);
    blockDim = {shape.num_threads, 1, 1};
    gridDim = {shape.num_blocks, 1, 1};
    cluster.resize(shape.cluster_size);
    for (auto& one : cluster) {
        if (!one) one = std::make_unique<Block>();
        one->fibers.resize(shape.num_threads);
        one->shared.clear();
        one->dynamic = std::vector<char>(shape.dynamic_bytes);
    }
    for (int index : order.of(int(shape.num_blocks / shape.cluster_size)))
        if (!failure) run_cluster(index * shape.cluster_size, order);
    if (failure) error = 719;  // cudaErrorLaunchFailure
}

// What build.py makes of kernel<<<blocks, threads, bytes, stream>>>(arguments).
template <typename... Parameters>
auto launcher(void (*kernel)(Parameters...), unsigned num_blocks, unsigned num_threads,
              size_t dynamic_bytes, void*) {
    return [=](Parameters... arguments) {
        launch({num_blocks, num_threads, 1, dynamic_bytes}, reinterpret_cast<const void*>(kernel),
               [=] { kernel(arguments...); });
    };
}

// What build.py makes of `__shared__ T name` and of `extern __shared__ T name[]`.
template <typename T, int NUMBER>
T& shared() {
    std::vector<char>& bytes = block->shared[NUMBER];
    if (bytes.empty()) bytes.assign(sizeof(T), char(0xff));
    return *reinterpret_cast<T*>(bytes.data());
}
inline void* dynamic_shared() { return block->dynamic.data(); }

template <typename T>
T exchanged(unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= 8, "a shuffle of at most 8 bytes");
    if (mask != 0xffffffffu) fail("a shuffle of a part of a warp, which is not modelled");
    auto& slots = block->exchange[current_fiber().num_shuffles++ % 2][thread / WARP];
    memcpy(slots[thread % WARP], &value, sizeof(T));
    yield(Waits::FOR_LANES);
    if (source < 0 || source >= WARP) return value;
    memcpy(&value, slots[source], sizeof(T));
    return value;
}

// Not inlined: the compiler could take the alignment of a type for granted.
__attribute__((noinline)) inline void check_aligned(const void* place) {
    if (reinterpret_cast<uintptr_t>(place) % 16 != 0) fail("a 16-byte access that is not aligned");
}

// float4 and uint4, whose accesses are checked.
template <typename T>
struct alignas(16) Vector {
    T x, y, z, w;
    Vector() = default;
    Vector(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
    Vector(const Vector& from) { *this = from; }
    Vector& operator=(const Vector& from) {
        check_aligned(&from);
        check_aligned(this);
        memcpy(this, &from, sizeof(*this));
        return *this;
    }
};

}  // namespace emulated

// Returns the number of blocks in each cluster of the last launch, for the tests.
extern "C" __attribute__((visibility("default"), used)) inline int fastalign_emulated_cluster() {
    return int(emulated::cluster.size());
}

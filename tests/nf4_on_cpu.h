// A CPU in place of a GPU for nf4.cu: one thread of the system for each of a block's, blocks one after the other.
// `run` launches; tensor cores, lanes and shared memory are done as CUDA's documentation defines them, slowly.

#include <barrier>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __constant__ static const
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct Index {
    int x;
};
struct uint4 {
    uint32_t x, y, z, w;
};
static uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

constexpr int THREADS = 256;
thread_local Index threadIdx, blockIdx;
static std::barrier<> block(THREADS);
static std::barrier<> warps[THREADS / 32] = {std::barrier<>(32), std::barrier<>(32), std::barrier<>(32),
                                             std::barrier<>(32), std::barrier<>(32), std::barrier<>(32),
                                             std::barrier<>(32), std::barrier<>(32)};
static uint32_t lanes[THREADS][6];  // what each thread shows to the others of its warp

static void meet() { warps[threadIdx.x / 32].arrive_and_wait(); }
static void __syncthreads() { block.arrive_and_wait(); }
static uint4 __ldcs(const uint4 *at) { return *at; }

static float __shfl_xor_sync(uint32_t, float value, int mask) {
    std::memcpy(lanes[threadIdx.x], &value, 4);
    meet();
    float other;
    std::memcpy(&other, lanes[threadIdx.x ^ mask], 4);
    meet();
    return other;
}

static char anchor;  // addresses in shared memory have 32 bits: here, how far from this
static uint32_t __cvta_generic_to_shared(const void *at) { return (uint32_t)((const char *)at - &anchor); }
static uint32_t pair(uint32_t word, int at, uint32_t own) {
    return *(const uint32_t *)(&anchor + (int32_t)((word >> 8 * at & 0xff) * 128 + own));
}

static float number(uint16_t bits) {
#if defined(BFLOAT16)
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
#else
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return value;
#endif
}

static uint16_t rounded(float value) {
#if defined(BFLOAT16)
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#else
    const _Float16 narrow = value;
    uint16_t bits;
    std::memcpy(&bits, &narrow, 2);
    return bits;
#endif
}

// mma.m16n8k16: c += a (16, 16) b (16, 8), of which each lane holds parts (PTX ISA, "Matrix Fragments for mma.m16n8k16").
static void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
    std::memcpy(lanes[threadIdx.x], mine, sizeof mine);
    meet();
    const int first = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
    auto part = [&](int of, int word, int half) { return number(lanes[first + of][word] >> 16 * half); };
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++)
            c[i] += part(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2) *
                    part(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    }
    meet();
}

extern "C" void product(const uint16_t *, int, const uint4 *, const float *, uint16_t *, int, const uint4 *,
                        const float *, uint16_t *, int, const uint4 *, const float *, uint16_t *, int);

extern "C" void run(int blocks, const uint16_t *x, int k, const uint4 *w0, const float *s0, uint16_t *o0, int t0,
                    const uint4 *w1, const float *s1, uint16_t *o1, int t1, const uint4 *w2, const float *s2,
                    uint16_t *o2, int t2) {
    std::vector<std::thread> threads;
    for (int number = 0; number < THREADS; number++)
        threads.emplace_back([=] {
            threadIdx.x = number;
            for (int each = 0; each < blocks; each++) {
                blockIdx.x = each;
                product(x, k, w0, s0, o0, t0, w1, s1, o1, t1, w2, s2, o2, t2);
                __syncthreads();
            }
        });
    for (std::thread &thread : threads) thread.join();
}

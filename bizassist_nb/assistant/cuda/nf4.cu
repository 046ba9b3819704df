// Products of a few vectors with 4-bit matrices: out (ROWS, n) = x (ROWS, k) W^T, W (n, k) in bitsandbytes' NF4.
//
// Such a product reads its matrix once and should take no longer than that. So the work on each weight is kept small:
// one look-up in shared memory turns a byte into two 16-bit values, and tensor cores multiply them with all vectors at
// once. A block computes 16 outputs; its warps share k among them, 128 weights of each of the 16 matrix rows at a time.
//
// One `mma` multiplies 16 rows of a matrix with 8 columns. Four columns are the vectors, restricted to the first 64 of
// the 128 weights, and the other four the same vectors restricted to the last 64. Each 64 weights have one scale, so
// what a column sums up is multiplied by that, in float32: the matrix is never rounded with its scales.
//
// Defined from outside: ROWS, TABLE (the 16 values as 16-bit numbers), BFLOAT16 or not (float16), TURING or not.

typedef unsigned short u16;
typedef unsigned int u32;

constexpr int WARPS = 8;
constexpr int CHUNK = 128;                  // weights of a matrix row that a warp takes at a time
constexpr int AHEAD = 2;                    // chunks that are on their way from memory at once
constexpr int BLOCKS = 3;                   // on a multiprocessor at once: with more registers each, fewer fit
constexpr int GROUPS = (ROWS + 3) / 4;      // vectors by fours

__constant__ u16 table[16] = {TABLE};

struct Matrix {
    const uint4 *weights;   // 32 to a uint4, the first of two in the higher half of a byte
    const float *scales;    // of 64 weights each
    u16 *out;
    int tiles;              // n / 16
};

// What CUDA's C++ has no words for; the tests bring their own, for a CPU.
#if defined(__CUDACC__)

__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if defined(TURING)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a2), "r"(a3), "r"(b1));
#elif defined(BFLOAT16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

__device__ __forceinline__ u16 rounded(float value) {
    u16 bits;
#if defined(BFLOAT16)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
    return bits;
}

// The two values of byte `at` (0 to 3) of a word, from this lane's own of 32 tables side by side: each lies in a bank of
// its own, so that no lane waits for another. `own` is its address.
__device__ __forceinline__ u32 pair(u32 word, int at, u32 own) {
    u32 both;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(both) : "r"(__byte_perm(word, 0, 0x4440 | at) * 128 + own));
    return both;
}

#endif

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
product(const u16 *x, int k, const uint4 *w0, const float *s0, u16 *o0, int t0, const uint4 *w1, const float *s1,
        u16 *o1, int t1, const uint4 *w2, const float *s2, u16 *o2, int t2) {
    __shared__ __align__(128) u32 values[256 * 32];
    __shared__ float sums[WARPS][16][4 * GROUPS];

    int tile = blockIdx.x;
    Matrix matrix = {w0, s0, o0, t0};
    if (tile >= t0) {
        tile -= t0;
        matrix = {w1, s1, o1, t1};
        if (tile >= t1) {
            tile -= t1;
            matrix = {w2, s2, o2, t2};
        }
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, upper = lane / 4, quarter = lane % 4;
    const int chunks = k / CHUNK, first = chunks * warp / WARPS, last = chunks * (warp + 1) / WARPS;
    // This lane's rows of the matrix are `upper` and `upper` + 8 of the tile; of a chunk, its weights the quarter'th 32.
    const int row = tile * 16 + upper;
    const uint4 *low = matrix.weights + (size_t)row * (k / 32) + quarter, *high = low + (size_t)8 * (k / 32);
    const float *scale_low = matrix.scales + (size_t)row * (k / 64) + quarter / 2;
    const float *scale_high = scale_low + (size_t)8 * (k / 64);
    // Its column of the product is vector upper % 4 (of each group), restricted to one half of the chunk.
    const bool mine = upper / 4 == quarter / 2;
    const uint4 *column = reinterpret_cast<const uint4 *>(x) + (size_t)(upper % 4) * (k / 8) + quarter * 4;

    uint4 a[AHEAD], b[AHEAD];
    float sa[AHEAD], sb[AHEAD];
    auto fetch = [&](int chunk, int slot) {
        if (chunk < last) {
            a[slot] = __ldcs(low + chunk * 4);
            b[slot] = __ldcs(high + chunk * 4);
            sa[slot] = scale_low[chunk * 2];
            sb[slot] = scale_high[chunk * 2];
        }
    };
#pragma unroll
    for (int slot = 0; slot < AHEAD; slot++) fetch(first + slot, slot);

    for (int byte = warp; byte < 256; byte += WARPS)  // while the first weights are on their way
        values[byte * 32 + lane] = table[byte >> 4] | (u32)table[byte & 15] << 16;
    __syncthreads();

    float total[GROUPS][4] = {};
    const u32 own = (u32)__cvta_generic_to_shared(values + lane);
    for (int chunk = first; chunk < last; chunk += AHEAD) {
#pragma unroll
        for (int slot = 0; slot < AHEAD; slot++) {
            if (chunk + slot >= last) break;
            const u32 wa[4] = {a[slot].x, a[slot].y, a[slot].z, a[slot].w};
            const u32 wb[4] = {b[slot].x, b[slot].y, b[slot].z, b[slot].w};
            const float scale_a = sa[slot], scale_b = sb[slot];
            fetch(chunk + slot + AHEAD, slot);
            float part[GROUPS][4] = {};
#pragma unroll
            for (int word = 0; word < 4; word++) {  // 8 weights of each row, 16 bytes of each vector
                uint4 v[GROUPS];
#pragma unroll
                for (int group = 0; group < GROUPS; group++) {
                    v[group] = make_uint4(0, 0, 0, 0);
                    if (mine && group * 4 + upper % 4 < ROWS)
                        v[group] = column[(size_t)group * 4 * (k / 8) + (chunk + slot) * 16 + word];
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const u32 a0 = pair(wa[word], 2 * half, own), a1 = pair(wb[word], 2 * half, own);
                    const u32 a2 = pair(wa[word], 2 * half + 1, own), a3 = pair(wb[word], 2 * half + 1, own);
#pragma unroll
                    for (int group = 0; group < GROUPS; group++)
                        multiply(part[group], a0, a1, a2, a3, half ? v[group].z : v[group].x,
                                 half ? v[group].w : v[group].y);
                }
            }
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                total[group][0] += scale_a * part[group][0];
                total[group][1] += scale_a * part[group][1];
                total[group][2] += scale_b * part[group][2];
                total[group][3] += scale_b * part[group][3];
            }
        }
    }

    // Both halves of the chunks belong together: columns c and c + 4, which lanes two quarters apart hold.
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float both = total[group][i] + __shfl_xor_sync(0xffffffff, total[group][i], 2);
            if (quarter < 2) sums[warp][upper + i / 2 * 8][group * 4 + quarter * 2 + i % 2] = both;
        }
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * ROWS; i += 32 * WARPS) {
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += sums[w][i % 16][i / 16];
        matrix.out[(size_t)(i / 16) * matrix.tiles * 16 + tile * 16 + i % 16] = rounded(sum);
    }
}

// What a tile is made of: 16-bit types, asynchronous copies, swizzled shared memory, tensor-core fragments, dropout masks.
// The only file with inline PTX. Everything is one path for sm_80 and later.
//
// A tile lies in shared memory in rows of 16-byte chunks. A row has kRowBytes = 32, 64, 128 or a multiple of 128; chunk c of
// row r is stored at `swizzle<kRowBytes>(r, c)`, so that the eight 16-byte rows of one ldmatrix matrix, the same chunk of eight
// neighbouring rows, fall into eight different groups of banks, and so do eight neighbouring chunks of a row.
//
// The fragments of mma m16n8k16, D (16, 8) += A (16, 16) B (16, 8), with row = lane / 4 and col = 2 * (lane % 4):
//
//     A   a[0] (row, col)  a[1] (row + 8, col)  a[2] (row, col + 8)  a[3] (row + 8, col + 8)     and the column after it
//     B   b0 (col, row)    b1 (col + 8, row)                                                     and the row after it
//     D   d[0], d[1] (row, col), (row, col + 1)      d[2], d[3] the same of row + 8
#pragma once

#include <cstdint>

#include "../philox.h"

namespace lora_ops {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;    // a chunk: what one thread copies, and one row of an ldmatrix matrix
constexpr int kVectorElements = 8;  // 16-bit elements of it
constexpr int kMmaM = 16, kMmaN = 8, kMmaK = 16;

// ceil(size / each), where neither is negative, which the compiler is told by way of their type.
__device__ constexpr int steps_of(int size, unsigned each) {
  return (static_cast<unsigned>(size) + each - 1) / each;
}

// --- 16-bit types -----------------------------------------------------------------------------------------------------
//
// T is Bf16 or Half: its storage, and as static functions what differs between the two. A pair is two neighbouring elements,
// the first one in the low half. Rounding is to nearest, ties to even.

struct Bf16 {
  uint16_t bits;

  static __device__ __forceinline__ uint32_t pair(float first, float second) {
    uint32_t p;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(p) : "f"(second), "f"(first));
    return p;
  }
  static __device__ __forceinline__ float first(uint32_t pair) { return __uint_as_float(pair << 16); }
  static __device__ __forceinline__ float second(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct Half {
  uint16_t bits;

  static __device__ __forceinline__ uint32_t pair(float first, float second) {
    uint32_t p;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(p) : "f"(second), "f"(first));
    return p;
  }
  static __device__ __forceinline__ float first(uint32_t pair) { return widen(static_cast<uint16_t>(pair)); }
  static __device__ __forceinline__ float second(uint32_t pair) { return widen(static_cast<uint16_t>(pair >> 16)); }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }

 private:
  static __device__ __forceinline__ float widen(uint16_t bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
  }
};

static_assert(sizeof(Bf16) == 2 && sizeof(Half) == 2);

template <class T>
__device__ __forceinline__ float to_float(T v) {
  return T::first(v.bits);
}
template <>
__device__ __forceinline__ float to_float(float v) {
  return v;
}

template <class T>
__device__ __forceinline__ T from_float(float v) {
  return {static_cast<uint16_t>(T::pair(v, 0.f))};
}
template <>
__device__ __forceinline__ float from_float(float v) {
  return v;
}

// v = hi + lo, two parts of T, to 16 (Bf16) or 22 (Half) bits. Finite values within T's range only.
template <class T>
__device__ __forceinline__ void split(float first, float second, uint32_t& hi, uint32_t& lo) {
  hi = T::pair(first, second);
  lo = T::pair(first - T::first(hi), second - T::second(hi));
}

// --- global memory ----------------------------------------------------------------------------------------------------

// What is read once: it leaves the caches first. Addresses are aligned to the vector.
__device__ __forceinline__ uint4 load_streaming(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.cs.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ uint2 load_streaming(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.cs.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

// The same number, but the compiler does not know: what a loop computes from it is not kept in registers across iterations.
__device__ __forceinline__ int recomputed(int v) {
  asm volatile("mov.b32 %0, %0;" : "+r"(v));
  return v;
}

// --- shared memory ----------------------------------------------------------------------------------------------------
//
// Addresses are 32-bit numbers: half the registers of a pointer, and what the instructions take.

// The kernel's dynamic shared memory, the only shared memory it has: aligned to 128 bytes.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char bytes[];
  return bytes;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Byte offset of chunk `chunk` of row `row`.
template <int kRowBytes>
__device__ __forceinline__ uint32_t swizzle(int row, int chunk) {
  static_assert(kRowBytes == 32 || kRowBytes == 64 || kRowBytes % 128 == 0, "a row fills, or rows fill, all 32 banks");
  constexpr int kRowsPerLine = kRowBytes < 128 ? 128 / kRowBytes : 1;
  constexpr int kMask = kRowBytes < 128 ? kRowBytes / kVectorBytes - 1 : 7;
  return row * kRowBytes + (chunk ^ (row / kRowsPerLine & kMask)) * kVectorBytes;
}

// 16 bytes of which `bytes` (0 ... 16) are read and the rest is zero. Both addresses are multiples of 16, even where bytes is
// 0.
__device__ __forceinline__ void cp_async16(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `kPending` of this thread's groups are under way. Other threads' copies take a __syncthreads().
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t shared, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t shared, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(shared), "r"(v.x), "r"(v.y) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t shared, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared), "r"(v) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t shared, uint16_t v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(shared), "h"(v) : "memory");
}
__device__ __forceinline__ uint32_t load_shared2(uint32_t shared) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(shared) : "memory");
  return v;
}
__device__ __forceinline__ uint32_t load_shared4(uint32_t shared) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load_shared16(uint32_t shared) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(shared) : "memory");
  return v;
}

// From a table that nobody writes any more once its addresses are known: free to be moved.
__device__ __forceinline__ float lookup_shared(uint32_t shared) {
  float v;
  asm("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(shared));
  return v;
}

// --- fragments --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int lane_id() {
  return threadIdx.x % kWarp;
}
__device__ __forceinline__ int fragment_row(int lane) {
  return lane / 4;
}
__device__ __forceinline__ int fragment_col(int lane) {
  return 2 * (lane % 4);
}

// Which of the 16 rows and 2 chunks of a 16 x 16 tile a lane addresses for ldmatrix x4.
struct LaneChunk {
  int row, chunk;
};
// Matrices 0 and 1 above each other: an A fragment of a tile [m][k]; transposed, two B fragments {r0, r1}, {r2, r3} of [k][n].
__device__ __forceinline__ LaneChunk rows_first(int lane) {
  return {lane % 16, lane / 16};
}
// Matrices 0 and 1 side by side: two B fragments {r0, r1}, {r2, r3} of a tile [n][k]; transposed, an A fragment of [k][m].
__device__ __forceinline__ LaneChunk chunks_first(int lane) {
  return {lane % 8 + lane / 16 * 8, lane / 8 % 2};
}

template <bool kTranspose>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
  }
}

// --- dropout ----------------------------------------------------------------------------------------------------------

// The random bits of eight elements of a row: v[w] has those of columns col + 32 w and, in its upper half, col + 32 w + 1.
// col is even and in the first 32 columns of its group of 128, as a fragment's pairs are in every fourth 32 columns.
__device__ __forceinline__ Philox4 dropout_bits(uint64_t seed, uint64_t row, uint64_t col) {
  const uint32_t counter = static_cast<uint32_t>(col / kDropoutGroup) * kDropoutCounters + static_cast<uint32_t>(col % 32) / 2;
  return philox(counter, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), 0, seed);
}
__device__ __forceinline__ bool keep_first(uint32_t bits, uint32_t threshold) {
  return (bits & 0xffffu) >= threshold;
}
__device__ __forceinline__ bool keep_second(uint32_t bits, uint32_t threshold) {
  return bits >> 16 >= threshold;
}
// To be and-ed with a pair of T.
__device__ __forceinline__ uint32_t keep_pair(uint32_t bits, uint32_t threshold) {
  return (keep_first(bits, threshold) ? 0x0000ffffu : 0u) | (keep_second(bits, threshold) ? 0xffff0000u : 0u);
}

}  // namespace lora_ops

// Everything that kernels ask of the hardware in more than plain C++: PTX here, the emulated machine where a CPU's compiler
// reads this. The kernels themselves are the same text in both.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#if !defined(__CUDACC__)
#include "emulator/device.h"
#else

namespace sra {

struct float16 {};
struct bfloat16 {};

// The block's dynamic shared memory; shared addresses are bytes in a window of 32 bits.
__device__ __forceinline__ uint32_t shared_memory() {
  extern __shared__ __align__(128) unsigned char sra_shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(sra_shared));
}

// 16 bytes from global to shared memory, asynchronously and past the L1; zeros where not `live` (nothing is read then).
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, bool live) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(live ? 16 : 0) : "memory");
}
// Closes a group of copies; groups land in order.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most GROUPS of this thread's groups are in flight. Other threads see what landed after a barrier.
template <int GROUPS>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(GROUPS) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + r says where row r of the i-th begins.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8] by one warp, float32 sums; emulator/fragments.h says who holds what.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The value that lane (lane ^ mask) brings.
__device__ __forceinline__ float shfl_xor(float x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }

// The value that lane `lane` brings.
__device__ __forceinline__ int shfl(int x, int lane) { return __shfl_sync(0xFFFFFFFFu, x, lane); }

template <typename T>
__device__ __forceinline__ T load_global(const T* from) {
  return __ldg(from);
}
template <typename T>
__device__ __forceinline__ void store_global(T* to, T x) {
  *to = x;
}
__device__ __forceinline__ float load_shared(uint32_t at) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];\n" : "=f"(x) : "r"(at) : "memory");
  return x;
}
__device__ __forceinline__ void store_shared(uint32_t at, float x) {
  asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(at), "f"(x) : "memory");
}

// Two float32 rounded to nearest into one register, and back.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<float16>(float low, float high) {
  uint32_t x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
template <>
__device__ __forceinline__ uint32_t pack<bfloat16>(float low, float high) {
  uint32_t x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
template <typename T>
__device__ __forceinline__ float low_of(uint32_t x);
template <>
__device__ __forceinline__ float low_of<float16>(uint32_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(y) : "h"(static_cast<uint16_t>(x)));
  return y;
}
template <>
__device__ __forceinline__ float low_of<bfloat16>(uint32_t x) {
  return __uint_as_float(x << 16);
}
template <typename T>
__device__ __forceinline__ float high_of(uint32_t x);
template <>
__device__ __forceinline__ float high_of<float16>(uint32_t x) {
  return low_of<float16>(x >> 16);
}
template <>
__device__ __forceinline__ float high_of<bfloat16>(uint32_t x) {
  return __uint_as_float(x & 0xFFFF0000u);
}

// 2^x, with 2^-inf = 0, and log2 x, by the hardware's approximations.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace sra

#endif

// Steps that the attention kernels share. A block is WARPS warps; each owns STRIPS strips of 16 rows of the scores.
//
// A tile is rows of C 16-bit channels in shared memory. Its 16-byte chunks are swizzled, so that eight rows of one column
// lie in eight different banks. Scores travel *raw* (before the scale) and exponents are of base 2: with
// scale2 = scale * log2(e) one fused multiply-add makes s * scale2 - pivot. That needs scale > 0.
//
// A thread holds, of a strip's scores s[STRIPS][BLOCK_N / 8][4], rows g and g + 8 (g = lane / 4), columns 8 n + 2 t and
// 8 n + 2 t + 1 (t = lane % 4): elements 0, 1 of row g and 2, 3 of row g + 8. Four lanes together hold a row.
#pragma once

#include "device.cuh"

namespace sra {

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / 32; }

// Byte of chunk `chunk` (8 channels) of row `row` of a tile.
template <int C>
__device__ __forceinline__ uint32_t tile_at(int row, int chunk) {
  return (row * (C / 8) + (chunk ^ row % 8)) * 16;
}

// What this lane gives ldmatrix for the 16 rows from `row` on and the 16 channels from chunk `chunk` on: of the four 8 x 8
// matrices the first two lie one above the other, and the last two beside them.
template <int C>
__device__ __forceinline__ uint32_t matrices_at(int row, int chunk) {
  return tile_at<C>(row + lane_id() % 16, chunk + lane_id() / 16);
}

// The x-th of contiguous integers of 4 or 8 bytes.
__device__ __forceinline__ int64_t element(const void* data, bool wide, int64_t x) {
  return wide ? load_global(static_cast<const long long*>(data) + x) : load_global(static_cast<const int*>(data) + x);
}

// This warp's ROWS rows of a tile, asynchronously: lane l names the l-th of them, -1 for zeros.
template <int C, int ROWS>
__device__ __forceinline__ void copy_rows(uint32_t tile, const uint16_t* x, int64_t x_row, int row) {
  constexpr int CHUNKS = C / 8, AT_ONCE = 32 / CHUNKS;
  static_assert(ROWS <= 32 && ROWS % AT_ONCE == 0, "a lane names one row");
  const int chunk = lane_id() % CHUNKS;
#pragma unroll
  for (int i = 0; i < ROWS; i += AT_ONCE) {
    const int r = i + lane_id() / CHUNKS;
    const int from = shfl(row, r);
    const bool live = from >= 0;
    cp_async_16(tile + tile_at<C>(warp_id() * ROWS + r, chunk), x + (live ? from : 0) * x_row + chunk * 8, live);
  }
}

// s [rows of a, BLOCK_N] = <a, b>, of this warp's rows of tile a and every row of tile b.
template <typename T, int C, int STRIPS, int BLOCK_N>
__device__ __forceinline__ void scores(float (&s)[STRIPS][BLOCK_N / 8][4], uint32_t a_tile, uint32_t b_tile) {
#pragma unroll
  for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
    for (int n = 0; n < BLOCK_N / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) s[strip][n][i] = 0.0f;
#pragma unroll
  for (int c = 0; c < C / 16; c++) {  // 16 channels at a time
    uint32_t a[STRIPS][4];
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++)
      ldmatrix_x4(a[strip], a_tile + matrices_at<C>((warp_id() * STRIPS + strip) * 16, c * 2));
#pragma unroll
    for (int n = 0; n < BLOCK_N / 16; n++) {
      uint32_t b[4];
      ldmatrix_x4(b, b_tile + matrices_at<C>(n * 16, c * 2));
#pragma unroll
      for (int strip = 0; strip < STRIPS; strip++) {
        mma_m16n8k16<T>(s[strip][2 * n], a[strip], b[0], b[2]);
        mma_m16n8k16<T>(s[strip][2 * n + 1], a[strip], b[1], b[3]);
      }
    }
  }
}

// Columns from `live` on get no weight.
template <int STRIPS, int N>
__device__ __forceinline__ void mask_from(float (&s)[STRIPS][N][4], int live) {
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (n * 8 + lane_id() % 4 * 2 + i % 2 >= live)
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++) s[strip][n][i] = -INFINITY;
}

// Sum over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
  x += shfl_xor(x, 1);
  return x + shfl_xor(x, 2);
}

// The running softmax of this thread's rows: their maximum raw score, and this thread's part of their sum of weights.
template <int STRIPS>
struct Softmax {
  float m[STRIPS][2], total[STRIPS][2];

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
      for (int i = 0; i < 2; i++) m[strip][i] = -INFINITY, total[strip][i] = 0.0f;
  }

  // One tile of raw scores joins: s becomes its weights against the new maximum, alpha the factor for what was summed before.
  template <int N>
  __device__ __forceinline__ void step(float (&s)[STRIPS][N][4], float (&alpha)[STRIPS][2], float scale2) {
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float most = m[strip][i];
#pragma unroll
        for (int n = 0; n < N; n++) most = fmaxf(most, fmaxf(s[strip][n][2 * i], s[strip][n][2 * i + 1]));
        most = fmaxf(most, shfl_xor(most, 1));
        most = fmaxf(most, shfl_xor(most, 2));
        // a row with no live key keeps a finite pivot: -inf - -inf would be NaN
        const float pivot = most == -INFINITY ? 0.0f : most * scale2;
        alpha[strip][i] = fast_exp2(fmaf(m[strip][i], scale2, -pivot));
        m[strip][i] = most;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int j = 2 * i; j < 2 * i + 2; j++) sum += s[strip][n][j] = fast_exp2(fmaf(s[strip][n][j], scale2, -pivot));
        total[strip][i] = fmaf(total[strip][i], alpha[strip][i], sum);
      }
  }
};

// The natural-log LSE of a row with maximum raw score m and sum `total`, from the very pivot that the weights were taken
// against; -inf for a row without keys.
__device__ __forceinline__ float natural_lse(float m, float total, float scale2) {
  return total == 0.0f ? -INFINITY : fmaf(m * scale2, LN2, fast_log2(total) * LN2);
}

}  // namespace sra

// What the entry point gives to a kernel: some queries side by side, and the keys that all of them attend to.
#pragma once

#include <stdint.h>
#include <string.h>

namespace sra_cpu {

constexpr int LANES = 64;       // queries of a block at most
constexpr int KEYS = 32;        // keys whose scores are held at once
constexpr int SPARE = 8;        // room for keys beyond them: several are taken at once up to the end
constexpr int MULTIPLE = 8;     // channels are a multiple of it
constexpr int ALIGNMENT = 64;   // bytes

// Keys and values (count, C), or those of their rows that are named. Strides in floats.
struct Segment {
  const float* k;
  const float* v;
  int64_t k_row;
  int64_t v_row;
  const void* rows;   // integers of `row_bytes`, 4 or 8; nullptr: rows 0 to count
  int64_t row_bytes;
  int64_t count;
  const float* bias;  // added to the scaled scores, one a key; nullptr: none
};

// Query i is the C channels at q[i]; its result goes to out[i] and lse[i].
struct Block {
  int queries;
  int64_t channels;
  bool half;   // q and out are bfloat16, else float32
  bool carry;  // out and lse hold the result of other keys, which these join
  float scale;
  const void* q[LANES];
  void* out[LANES];
  float* lse[LANES];
  int segments;
  Segment segment[2];
};

// Floats that a kernel works in: queries and results, scores, the state of the softmax.
constexpr int64_t room_of(int64_t channels) { return (2 * channels + KEYS + SPARE + 2) * LANES; }

// One source, compiled for each of these; the processor decides which is called. `room` is aligned.
void attend_baseline(const Block& block, float* room);
void attend_avx2(const Block& block, float* room);
void attend_avx512(const Block& block, float* room);

// y = 2^x for x <= 0, as the kernels compute it; `count` is a multiple of 16, x and y are aligned.
void exp2_baseline(const float* x, float* y, int64_t count);
void exp2_avx2(const float* x, float* y, int64_t count);
void exp2_avx512(const float* x, float* y, int64_t count);

// bfloat16, as bits.
struct Half {
  uint16_t bits;
};

static inline float widened(float x) { return x; }

static inline float widened(Half x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

}  // namespace sra_cpu

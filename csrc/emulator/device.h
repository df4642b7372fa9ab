// The device functions of ../device.cuh on the emulated machine, one for one.
#pragma once

#include <type_traits>

#include "emulator.h"
#include "fragments.h"

#define EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace sra {

struct float16 {};
struct bfloat16 {};

namespace emulated {

template <typename To, typename From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

template <typename T>
float widen(uint16_t x) {
  if constexpr (std::is_same_v<T, float16>) return static_cast<float>(bits<_Float16>(x));
  return bits<float>(static_cast<uint32_t>(x) << 16);
}

template <typename T>
uint16_t round_to(float x) {
  if constexpr (std::is_same_v<T, float16>) return bits<uint16_t>(static_cast<_Float16>(x));
  const uint32_t u = bits<uint32_t>(x);
  return x != x ? 0x7FFF : static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

template <typename T>
void multiply(emulator::Lane (&lanes)[emulator::WARP], emulator::Site) {
  using namespace emulator;
  float A[16][16], B[16][8], D[16][8];
  for (int lane = 0; lane < WARP; lane++) {
    const uint32_t* in = lanes[lane].in;
    for (int half = 0; half < 2; half++) {
      for (int r = 0; r < 4; r++) {
        const Place p = a_place(lane, r, half);
        A[p.row][p.column] = widen<T>(static_cast<uint16_t>(in[r] >> 16 * half));
      }
      for (int r = 0; r < 2; r++) {
        const Place p = b_place(lane, r, half);
        B[p.row][p.column] = widen<T>(static_cast<uint16_t>(in[4 + r] >> 16 * half));
      }
    }
  }
  memset(D, 0, sizeof D);
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 8; n++) D[m][n] += A[m][k] * B[k][n];
  for (int lane = 0; lane < WARP; lane++)
    for (int r = 0; r < 4; r++) {
      const Place p = c_place(lane, r);
      lanes[lane].out[r] = bits<uint32_t>(D[p.row][p.column]);
    }
  count("mma");
}

template <bool TRANSPOSED>
void load_matrices(emulator::Lane (&lanes)[emulator::WARP], emulator::Site site) {
  using namespace emulator;
  const int warp = this_thread() / WARP * WARP;
  for (int matrix = 0; matrix < 4; matrix++) {
    uint16_t rows[8][8];
    unsigned banks = 0;
    for (int r = 0; r < 8; r++) {
      const int lane = 8 * matrix + r;
      memcpy(rows[r], read_shared(lanes[lane].in[0], 16, warp + lane, site), 16);
      banks |= 1u << (lanes[lane].in[0] / 16 % 8);
    }
    if (banks != 0xFF) count("bank conflict");
    for (int lane = 0; lane < WARP; lane++) {
      const Place low = ldmatrix_place(lane, 0, TRANSPOSED), high = ldmatrix_place(lane, 1, TRANSPOSED);
      lanes[lane].out[matrix] = rows[low.row][low.column] | static_cast<uint32_t>(rows[high.row][high.column]) << 16;
    }
  }
  count("ldmatrix");
}

// What lane `from` brings.
inline uint32_t exchange(uint32_t x, int from, emulator::Site site) {
  emulator::Lane& lane = emulator::my_lane();
  lane.in[0] = x;
  lane.in[1] = static_cast<uint32_t>(from);
  const auto take = [](emulator::Lane(&lanes)[emulator::WARP], emulator::Site) {
    for (emulator::Lane& each : lanes) each.out[0] = lanes[each.in[1] % emulator::WARP].in[0];
    emulator::count("shfl");
  };
  return emulator::collective("shfl.sync", site, take).out[0];
}

}  // namespace emulated

inline uint32_t shared_memory() { return 0; }

inline void cp_async_16(uint32_t to, const void* from, bool live, EMULATOR_SITE) {
  emulator::copy_async(to, from, live, {file, line});
}
inline void cp_async_commit() { emulator::copy_commit(); }
template <int GROUPS>
void cp_async_wait(EMULATOR_SITE) {
  emulator::copy_wait(GROUPS, {file, line});
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t row, EMULATOR_SITE) {
  emulator::my_lane().in[0] = row;
  memcpy(r, emulator::collective("ldmatrix", {file, line}, emulated::load_matrices<false>).out, sizeof r);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row, EMULATOR_SITE) {
  emulator::my_lane().in[0] = row;
  memcpy(r, emulator::collective("ldmatrix.trans", {file, line}, emulated::load_matrices<true>).out, sizeof r);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATOR_SITE) {
  uint32_t* in = emulator::my_lane().in;
  memcpy(in, a, sizeof a);
  in[4] = b0;
  in[5] = b1;
  const emulator::Lane& lane = emulator::collective("mma.sync", {file, line}, emulated::multiply<T>);
  for (int r = 0; r < 4; r++) d[r] += emulated::bits<float>(lane.out[r]);
}

inline float shfl_xor(float x, int mask, EMULATOR_SITE) {
  const int lane = emulator::this_thread() % emulator::WARP;
  return emulated::bits<float>(emulated::exchange(emulated::bits<uint32_t>(x), lane ^ mask, {file, line}));
}
inline int shfl(int x, int lane, EMULATOR_SITE) {
  return static_cast<int>(emulated::exchange(static_cast<uint32_t>(x), lane, {file, line}));
}

template <typename T>
T load_global(const T* from, EMULATOR_SITE) {
  emulator::read_global(from, sizeof(T), {file, line});
  return *from;
}
template <typename T>
void store_global(T* to, T x, EMULATOR_SITE) {
  emulator::write_global(to, sizeof(T), {file, line});
  *to = x;
}

inline float load_shared(uint32_t at, EMULATOR_SITE) {
  float x;
  memcpy(&x, emulator::read_shared(at, sizeof x, emulator::this_thread(), {file, line}), sizeof x);
  return x;
}
inline void store_shared(uint32_t at, float x, EMULATOR_SITE) {
  emulator::write_shared(at, &x, sizeof x, {file, line});
}

template <typename T>
uint32_t pack(float low, float high) {
  return emulated::round_to<T>(low) | static_cast<uint32_t>(emulated::round_to<T>(high)) << 16;
}
template <typename T>
float low_of(uint32_t x) {
  return emulated::widen<T>(static_cast<uint16_t>(x));
}
template <typename T>
float high_of(uint32_t x) {
  return emulated::widen<T>(static_cast<uint16_t>(x >> 16));
}

inline float fast_exp2(float x) { return exp2f(x); }
inline float fast_log2(float x) { return log2f(x); }

}  // namespace sra

#undef EMULATOR_SITE

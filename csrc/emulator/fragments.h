// Which element of a matrix a lane's registers hold: mma.sync.m16n8k16 and ldmatrix, as the PTX manual draws them
// (sections "Matrix fragments for mma.m16n8k16" and "ldmatrix"). tests/cuda/test_fragments.py holds them to CuTe's traits.
//
// Registers of 16-bit elements hold two: `half` 0 is the low one. g = lane / 4 is a lane's group, t = lane % 4 its place.
#pragma once

namespace emulator {

struct Place {
  int row, column;
};

// A [16, 16]: register 0..3, half 0..1
constexpr Place a_place(int lane, int reg, int half) {
  return {lane / 4 + 8 * (reg % 2), 2 * (lane % 4) + half + 8 * (reg / 2)};
}

// B [16 (k), 8 (n)]: register 0..1, half 0..1
constexpr Place b_place(int lane, int reg, int half) { return {2 * (lane % 4) + half + 8 * reg, lane / 4}; }

// C and D [16, 8], float32: register 0..3
constexpr Place c_place(int lane, int reg) { return {lane / 4 + 8 * (reg / 2), 2 * (lane % 4) + reg % 2}; }

// ldmatrix.x4: register i of a lane holds two elements of the i-th 8 x 8 matrix, whose row r lane 8 i + r points to
constexpr Place ldmatrix_place(int lane, int half, bool transposed) {
  const int group = lane / 4, at = 2 * (lane % 4) + half;
  return transposed ? Place{at, group} : Place{group, at};
}

}  // namespace emulator

// Copies of rows, any number of tensors of any dtype in one launch.
//
//     pack:    packed[a, t] = full[a, row[t]]
//     unpack:  full[a, row[t]] = packed[a, t]
//
// A tensor is runs of contiguous bytes, one for each kept row t and each place a on its other axes; bytes are copied as
// they are. `row` holds distinct indices, so no two threads write one place. An index outside the tensor packs as zeros
// and unpacks nowhere.
//
// A block owns the runs of one tensor: LANES threads side by side on one run, 16 bytes each where the layout allows it,
// and STEPS runs in flight for each of them.

#include <limits.h>

#include "device.cuh"
#include "host.h"

namespace sra {
namespace {

constexpr int THREADS = 128, STEPS = 4;
constexpr int MOST_COPIES = 16;  // of one launch: their arguments fit the 4 KB that a kernel takes

struct Copy {
  char *full, *packed;
  int64_t full_row, packed_row;
  int64_t full_strides[SRA_MAX_AXES], packed_strides[SRA_MAX_AXES];
  uint32_t sizes[SRA_MAX_AXES];
  uint32_t places;   // product of the sizes
  uint32_t runs;     // places * kept rows
  uint32_t vectors;  // of one run
  uint32_t pieces;   // that a run is cut into, one block each
  int vector;        // bytes
  int lanes;         // threads on one run, a power of two
  int axes;
};

struct Copies {
  Copy copy[MOST_COPIES];
  uint32_t first_block[MOST_COPIES + 1];
  int count;
  const void* row;
  bool wide;  // row holds 64-bit integers
  int64_t size;
};

template <typename Vector, bool UNPACK>
__device__ void copy_runs(const Copy& c, const Copies& all, uint32_t block) {
  const uint32_t group = block / c.pieces, piece = block % c.pieces;
  const uint32_t side_by_side = THREADS / c.lanes;
  const uint32_t column = piece * c.lanes + threadIdx.x % c.lanes;
  if (column >= c.vectors) return;
  Vector value[STEPS];
  Vector* to[STEPS];
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const uint32_t run = (group * STEPS + step) * side_by_side + threadIdx.x / c.lanes;
    to[step] = nullptr;
    if (run >= c.runs) continue;
    const uint32_t t = run / c.places;
    uint32_t place = run % c.places;
    const int64_t r = all.wide ? load_global(static_cast<const long long*>(all.row) + t)
                               : load_global(static_cast<const int*>(all.row) + t);
    const bool inside = 0 <= r && r < all.size;
    char* full = c.full + (inside ? r : 0) * c.full_row;
    char* packed = c.packed + t * c.packed_row;
    for (int axis = c.axes - 1; axis >= 0; axis--) {
      const int64_t at = place % c.sizes[axis];
      place /= c.sizes[axis];
      full += at * c.full_strides[axis];
      packed += at * c.packed_strides[axis];
    }
    const Vector* from = reinterpret_cast<const Vector*>(UNPACK ? packed : full) + column;
    value[step] = inside ? load_global(from) : Vector{};
    if (inside || !UNPACK) to[step] = reinterpret_cast<Vector*>(UNPACK ? full : packed) + column;
  }
#pragma unroll
  for (int step = 0; step < STEPS; step++)
    if (to[step]) store_global(to[step], value[step]);
}

template <bool UNPACK>
__global__ void __launch_bounds__(THREADS) copy_rows(const __grid_constant__ Copies all) {
  int i = 0;
  while (all.first_block[i + 1] <= blockIdx.x) i++;
  const Copy& c = all.copy[i];
  const uint32_t block = blockIdx.x - all.first_block[i];
  switch (c.vector) {
    case 16:
      return copy_runs<uint4, UNPACK>(c, all, block);
    case 8:
      return copy_runs<unsigned long long, UNPACK>(c, all, block);
    case 4:
      return copy_runs<unsigned, UNPACK>(c, all, block);
    case 2:
      return copy_runs<unsigned short, UNPACK>(c, all, block);
    default:
      return copy_runs<unsigned char, UNPACK>(c, all, block);
  }
}

// The widest vector that divides every address of a copy.
int vector_of(const sra_row_copy& x) {
  uint64_t all = 16 | reinterpret_cast<uintptr_t>(x.full) | reinterpret_cast<uintptr_t>(x.packed);
  all |= static_cast<uint64_t>(x.bytes | x.full_row | x.packed_row);
  for (int64_t axis = 0; axis < x.axes; axis++) all |= static_cast<uint64_t>(x.full_strides[axis] | x.packed_strides[axis]);
  return static_cast<int>(all & (~all + 1));
}

int check_copy(const sra_row_copy& x, int64_t rows, int64_t* places) {
  if (int error = check_size("axes", x.axes, 0, SRA_MAX_AXES)) return error;
  if (int error = check_size("bytes", x.bytes, 0, INT64_MAX)) return error;
  *places = x.bytes > 0;
  for (int64_t axis = 0; axis < x.axes; axis++) {
    if (int error = check_size("the size of an axis", x.sizes[axis], 0, UINT32_MAX)) return error;
    *places *= x.sizes[axis];
    if (int error = check_size("the product of rows and axes", *places, 0, INT32_MAX)) return error;
  }
  if (*places == 0 || rows == 0) return SRA_OK;
  if (int error = check_size("the product of rows and axes", rows > INT32_MAX ? rows : rows * *places, 0, INT32_MAX)) return error;
  if (int error = check_given("full", x.full)) return error;
  return check_given("packed", x.packed);
}

template <bool UNPACK>
int copy_all(const sra_rows_args* args, void* stream) {
  if (int error = check_given("args", args)) return error;
  if (int error = check_size("count", args->count, 0, INT64_MAX)) return error;
  if (int error = check_size("rows", args->rows, 0, INT64_MAX)) return error;
  if (int error = check_size("size", args->size, 0, INT64_MAX)) return error;
  if (args->count == 0) return SRA_OK;
  if (int error = check_given("copies", args->copies)) return error;
  int64_t places;
  for (int64_t i = 0; i < args->count; i++)
    if (int error = check_copy(args->copies[i], args->rows, &places)) return error;
  if (args->rows == 0) return SRA_OK;
  if (int error = check_index("row", args->row)) return error;

  for (int64_t next = 0; next < args->count;) {
    Copies all = {};
    all.row = args->row.data;
    all.wide = args->row.bytes == 8;
    all.size = args->size;
    int64_t blocks = 0;
    for (; next < args->count && all.count < MOST_COPIES; next++) {
      const sra_row_copy& x = args->copies[next];
      check_copy(x, args->rows, &places);
      if (places == 0) continue;
      Copy& c = all.copy[all.count];
      c.full = static_cast<char*>(x.full);
      c.packed = static_cast<char*>(x.packed);
      c.full_row = x.full_row;
      c.packed_row = x.packed_row;
      c.axes = static_cast<int>(x.axes);
      for (int axis = 0; axis < c.axes; axis++) {
        c.sizes[axis] = static_cast<uint32_t>(x.sizes[axis]);
        c.full_strides[axis] = x.full_strides[axis];
        c.packed_strides[axis] = x.packed_strides[axis];
      }
      c.places = static_cast<uint32_t>(places);
      c.runs = static_cast<uint32_t>(places * args->rows);
      c.vector = vector_of(x);
      const int64_t vectors = x.bytes / c.vector;
      if (int error = check_size("the vectors of a row", vectors, 1, INT32_MAX)) return error;
      c.vectors = static_cast<uint32_t>(vectors);
      for (c.lanes = 1; c.lanes < THREADS && c.lanes < vectors;) c.lanes *= 2;
      c.pieces = static_cast<uint32_t>(blocks_of(vectors, c.lanes));
      const int64_t more = c.pieces * blocks_of(c.runs, STEPS * THREADS / c.lanes);
      if (all.count && blocks + more > MOST_BLOCKS) break;
      if (int error = check_size("the blocks of a tensor", more, 1, MOST_BLOCKS)) return error;
      all.first_block[all.count++] = static_cast<uint32_t>(blocks);
      blocks += more;
    }
    for (int i = all.count; i <= MOST_COPIES; i++) all.first_block[i] = static_cast<uint32_t>(blocks);
    if (blocks)
      if (int error = launch(copy_rows<UNPACK>, dim3(static_cast<unsigned>(blocks)), THREADS, 0, stream, all)) return error;
  }
  return SRA_OK;
}

}  // namespace
}  // namespace sra

int sra_pack_rows(const sra_rows_args* args, void* stream) { return sra::copy_all<false>(args, stream); }

int sra_unpack_rows(const sra_rows_args* args, void* stream) { return sra::copy_all<true>(args, stream); }

// Column means of the generation-to-reference block of the softmax, and the LSE that they need.
//
//     lse[h, j]  = ln sum_k exp(a <q[h, j], k[h, k]>)                               over an item's keys
//     mass[h, r] = |v[h, r]| / N sum_j exp(a <q[h, j], k[h, r]> - lse[h, j])        over its N queries; |v| if wanted
//     mean[r]    = 1/H sum_h mass[h, r]
//
// A block owns BLOCK_M queries (for the LSE) or reference rows (for the mass) of one head of one item and walks over the
// other side, BLOCK_N rows at a time, the next tiles' copies in flight. The scores of the mass are transposed, so that a
// reference row's sum stays within four lanes. No atomics: the same bits every time.
//
// Dense items lie `item` strides apart; ragged ones begin where the offsets say.

#include <initializer_list>
#include <type_traits>

#include "host.h"
#include "tiles.cuh"

namespace sra {
namespace {

constexpr int WARPS = 4, STRIPS = 2, STAGES = 3;
constexpr int BLOCK_M = WARPS * STRIPS * 16, BLOCK_N = 64, ROWS = BLOCK_N / WARPS;

template <int C>
constexpr int TILE_BYTES = BLOCK_N * C * 2;
constexpr int PIVOT_BYTES = BLOCK_N * 4;
template <int C>
constexpr int SHARED_BYTES = BLOCK_M * C * 2 + STAGES * TILE_BYTES<C> + 2 * PIVOT_BYTES;

struct Rows {
  const uint16_t* x;
  int64_t item, row, head;
  __device__ const uint16_t* at(int64_t i, int64_t r, int64_t h) const { return x + i * item + r * row + h * head; }
};

struct Floats {
  float* x;
  int64_t item, row, head;
  __device__ float* at(int64_t i, int64_t r, int64_t h) const { return x + i * item + r * row + h * head; }
};

struct Mask {
  const unsigned char* x;
  int64_t item, row;
  __device__ bool keeps(int64_t i, int64_t r) const { return load_global(x + i * item + r * row) != 0; }
};

// One item's rows: first .. of the packed ones where `offsets` says so, else `dense` of them in an item of their own.
struct Range {
  int64_t item, first;
  int count;
  __device__ Range(const int* offsets, int item, int64_t dense) : item(item), first(0), count(static_cast<int>(dense)) {
    if (!offsets) return;
    this->item = 0;
    first = load_global(offsets + item);
    count = static_cast<int>(load_global(offsets + item + 1) - first);
  }
};

// Begins to copy the tile of rows start .. of x, of which there are `count`, `step` strides apart.
template <int C>
__device__ __forceinline__ void copy_tile(uint32_t tile, const uint16_t* x, int64_t x_row, int start, int count) {
  const int row = start + warp_id() * ROWS + lane_id() % ROWS;
  if (start < count) copy_rows<C, ROWS>(tile, x, x_row, row < count ? row : -1);
  cp_async_commit();
}

// This block's BLOCK_M rows, start .. of x.
template <int C>
__device__ __forceinline__ void copy_block(uint32_t tile, const uint16_t* x, int64_t x_row, int start, int count) {
  const int row = start + warp_id() * STRIPS * 16 + lane_id();
  copy_rows<C, STRIPS * 16>(tile, x, x_row, row < count ? row : -1);
}

struct LseArguments {
  Rows q, k;
  Mask mask;
  Floats lse;
  const int *cu_seqlens_q, *cu_seqlens_k;
  int64_t queries, keys;
  int query_stride;
  float scale2;
};

template <typename T, int C, bool MASKED>
__global__ void __launch_bounds__(WARPS * 32) attention_lse(const __grid_constant__ LseArguments a) {
  const int head = blockIdx.y, start = blockIdx.x * BLOCK_M;
  const Range queries(a.cu_seqlens_q, blockIdx.z, a.queries), keys(a.cu_seqlens_k, blockIdx.z, a.keys);
  const int count = (queries.count + a.query_stride - 1) / a.query_stride;
  if (start >= count) return;
  const uint16_t* q = a.q.at(queries.item, queries.first, head);
  const uint16_t* k = a.k.at(keys.item, keys.first, head);
  const uint32_t q_tile = shared_memory(), k_tiles = q_tile + BLOCK_M * C * 2;
  copy_block<C>(q_tile, q, a.q.row * a.query_stride, start, count);
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; stage++)
    copy_tile<C>(k_tiles + stage * TILE_BYTES<C>, k, a.k.row, stage * BLOCK_N, keys.count);

  Softmax<STRIPS> softmax;
  int here = 0;  // the stage of this tile
  for (int first = 0; first < keys.count; first += BLOCK_N) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    const int free = here == 0 ? STAGES - 1 : here - 1;  // every warp has left the tile before
    copy_tile<C>(k_tiles + free * TILE_BYTES<C>, k, a.k.row, first + (STAGES - 1) * BLOCK_N, keys.count);
    float s[STRIPS][BLOCK_N / 8][4], alpha[STRIPS][2];
    scores<T, C, STRIPS, BLOCK_N>(s, q_tile, k_tiles + here * TILE_BYTES<C>);
    if (keys.count - first < BLOCK_N) mask_from(s, keys.count - first);
    if (MASKED) {
#pragma unroll
      for (int n = 0; n < BLOCK_N / 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int key = first + n * 8 + lane_id() % 4 * 2 + i;
          if (key < keys.count && !a.mask.keeps(keys.item, key))
#pragma unroll
            for (int strip = 0; strip < STRIPS; strip++) s[strip][n][i] = s[strip][n][i + 2] = -INFINITY;
        }
    }
    softmax.step(s, alpha, a.scale2);
    here = here + 1 == STAGES ? 0 : here + 1;
  }

#pragma unroll
  for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float total = row_sum(softmax.total[strip][i]);
      const int row = start + (warp_id() * STRIPS + strip) * 16 + lane_id() / 4 + i * 8;
      if (row < count && lane_id() % 4 == 0)
        store_global(a.lse.at(queries.item, queries.first + static_cast<int64_t>(row) * a.query_stride, head),
                     natural_lse(softmax.m[strip][i], total, a.scale2));
    }
}

struct MassArguments {
  Rows q, k, value;
  Mask mask;
  Floats lse, mass;
  const int *cu_seqlens_q, *cu_seqlens_ref, *ref_starts;
  int64_t queries, refs;
  int query_stride;
  float scale2;
};

// The Euclidean norm of a row of C channels, by the four lanes that hold it.
template <typename T, int C>
__device__ __forceinline__ float norm(const uint16_t* v, bool live) {
  float sum = 0.0f;
  for (int c = lane_id() % 4 * 8; live && c < C; c += 32) {
    const uint4 x = load_global(reinterpret_cast<const uint4*>(v + c));
    for (const uint32_t pair : {x.x, x.y, x.z, x.w}) {
      sum = fmaf(low_of<T>(pair), low_of<T>(pair), sum);
      sum = fmaf(high_of<T>(pair), high_of<T>(pair), sum);
    }
  }
  return sqrtf(row_sum(sum));
}

template <typename T, int C>
__global__ void __launch_bounds__(WARPS * 32) attention_mass(const __grid_constant__ MassArguments a) {
  const int head = blockIdx.y, start = blockIdx.x * BLOCK_M;
  const Range queries(a.cu_seqlens_q, blockIdx.z, a.queries), refs(a.cu_seqlens_ref, blockIdx.z, a.refs);
  if (start >= refs.count) return;
  const int count = (queries.count + a.query_stride - 1) / a.query_stride;
  const int64_t first_row = a.ref_starts ? load_global(a.ref_starts + blockIdx.z) : 0;
  const uint16_t* k = a.k.at(refs.item, first_row, head);
  const uint16_t* q = a.q.at(queries.item, queries.first, head);
  const int64_t q_row = a.q.row * a.query_stride;
  const uint32_t k_tile = shared_memory(), q_tiles = k_tile + BLOCK_M * C * 2, pivots = q_tiles + STAGES * TILE_BYTES<C>;

  // The base 2 LSE of the queries of the tile at `first`, one query a thread: it travels in a register, one tile ahead,
  // so that no load waits inside the loop. exp2 of anything less infinity is 0: no query there, or one without keys.
  const auto load_pivot = [&](int first) {
    const int query = first + static_cast<int>(threadIdx.x);
    if (threadIdx.x >= BLOCK_N || query >= count) return static_cast<float>(INFINITY);
    const float lse = load_global(a.lse.at(queries.item, queries.first + static_cast<int64_t>(query) * a.query_stride, head));
    return lse == -INFINITY ? static_cast<float>(INFINITY) : lse * LOG2E;
  };
  const auto keep_pivot = [&](int place, float pivot) {
    if (threadIdx.x < BLOCK_N) store_shared(pivots + place * PIVOT_BYTES + threadIdx.x * 4, pivot);
  };

  copy_block<C>(k_tile, k, a.k.row, start, refs.count);
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; stage++)
    copy_tile<C>(q_tiles + stage * TILE_BYTES<C>, q, q_row, stage * BLOCK_N, count);
  keep_pivot(0, load_pivot(0));
  float next_pivot = load_pivot(BLOCK_N);

  float total[STRIPS][2] = {};
  int here = 0;  // the stage of this tile
  for (int first = 0; first < count; first += BLOCK_N) {
    const int place = first / BLOCK_N % 2;
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    const int free = here == 0 ? STAGES - 1 : here - 1;  // every warp has left the tile before
    copy_tile<C>(q_tiles + free * TILE_BYTES<C>, q, q_row, first + (STAGES - 1) * BLOCK_N, count);
    keep_pivot(1 - place, next_pivot);
    next_pivot = load_pivot(first + 2 * BLOCK_N);
    float s[STRIPS][BLOCK_N / 8][4];
    scores<T, C, STRIPS, BLOCK_N>(s, k_tile, q_tiles + here * TILE_BYTES<C>);
#pragma unroll
    for (int n = 0; n < BLOCK_N / 8; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float pivot = load_shared(pivots + place * PIVOT_BYTES + (n * 8 + lane_id() % 4 * 2 + i) * 4);
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
          for (int row = 0; row < 2; row++) total[strip][row] += fast_exp2(fmaf(s[strip][n][2 * row + i], a.scale2, -pivot));
      }
    here = here + 1 == STAGES ? 0 : here + 1;
  }

#pragma unroll
  for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = start + (warp_id() * STRIPS + strip) * 16 + lane_id() / 4 + i * 8;
      const bool live = row < refs.count;
      float mass = row_sum(total[strip][i]) / max(count, 1);
      if (a.value.x) mass *= norm<T, C>(a.value.at(refs.item, first_row + row, head), live);
      if (a.mask.x && live && !a.mask.keeps(refs.item, row)) mass = 0.0f;
      if (live && lane_id() % 4 == 0) store_global(a.mass.at(refs.item, refs.first + row, head), mass);
    }
}

struct MeanArguments {
  Floats mass, mean;
  const int* cu_seqlens_ref;
  int64_t refs;
  int heads;
};

// One reference row a thread, heads in order.
__global__ void __launch_bounds__(WARPS * 32) mean_over_heads(const __grid_constant__ MeanArguments a) {
  const Range refs(a.cu_seqlens_ref, blockIdx.z, a.refs);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS * 32 + threadIdx.x;
  if (row >= refs.count) return;
  float sum = 0.0f;
  for (int head = 0; head < a.heads; head++) sum += load_global(a.mass.at(refs.item, refs.first + row, head));
  store_global(a.mean.at(refs.item, refs.first + row, 0), sum / a.heads);
}

Rows rows_of(const sra_tensor& x) { return {static_cast<const uint16_t*>(x.data), x.item, x.row, x.head}; }
Floats floats_of(const sra_tensor& x) { return {static_cast<float*>(x.data), x.item, x.row, x.head}; }
Mask mask_of(const sra_tensor& x) { return {static_cast<const unsigned char*>(x.data), x.item, x.row}; }

// What both functions ask of their arguments.
template <typename Args>
int check_common(const Args& x) {
  if (int error = check_format(x.dtype, x.channels)) return error;
  if (int error = check_scale(x.scale)) return error;
  if (int error = check_size("heads", x.heads, 1, MOST_ALONG)) return error;
  if (int error = check_size("items", x.items, 0, MOST_ALONG)) return error;
  if (int error = check_size("queries", x.queries, 0, INT32_MAX - BLOCK_N)) return error;
  if (int error = check_size("query_stride", x.query_stride, 1, INT32_MAX)) return error;
  if (x.cu_seqlens_q && x.key_mask.data) return refuse(SRA_UNSUPPORTED, "key_mask must be NULL with offsets, got both");
  return SRA_OK;
}

int check_offsets(const char* name, const int32_t* offsets, bool ragged) {
  if (!ragged && offsets) return refuse(SRA_NULL_POINTER, "%s must come with cu_seqlens_q, got it alone", name);
  return ragged ? check_floats(name, offsets) : SRA_OK;
}

// One dtype and head dim of a kernel: `run` gets their types.
template <typename Run>
int for_format(int32_t dtype, int32_t channels, Run run) {
  const auto for_channels = [&](auto format) {
    return channels == 64 ? run(format, std::integral_constant<int, 64>{}) : run(format, std::integral_constant<int, 128>{});
  };
  return dtype == SRA_FLOAT16 ? for_channels(float16{}) : for_channels(bfloat16{});
}

int grid_of(int64_t rows, int64_t block, int heads, int items, dim3* grid) {
  const int64_t blocks = blocks_of(rows, block);
  *grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(heads), static_cast<unsigned>(items));
  return check_size("the number of blocks", blocks, 0, MOST_BLOCKS);
}

}  // namespace
}  // namespace sra

int sra_attention_lse(const sra_attention_lse_args* args, void* stream) {
  using namespace sra;
  if (int error = check_given("args", args)) return error;
  const sra_attention_lse_args& x = *args;
  const bool ragged = x.cu_seqlens_q;
  if (int error = check_common(x)) return error;
  if (int error = check_size("keys", x.keys, 0, INT32_MAX - STAGES * BLOCK_N)) return error;
  if (int error = check_offsets("cu_seqlens_k", x.cu_seqlens_k, ragged)) return error;
  if (x.items == 0 || x.queries == 0) return SRA_OK;
  if (int error = check_rows("q", x.q, !ragged)) return error;
  if (ragged || x.keys)
    if (int error = check_rows("k", x.k, !ragged)) return error;
  if (int error = check_floats("lse", x.lse.data)) return error;
  const LseArguments a = {rows_of(x.q), rows_of(x.k), mask_of(x.key_mask), floats_of(x.lse), x.cu_seqlens_q, x.cu_seqlens_k,
                          x.queries, x.keys, static_cast<int>(x.query_stride), x.scale * LOG2E};
  dim3 grid;
  if (int error = grid_of(blocks_of(x.queries, x.query_stride), BLOCK_M, x.heads, x.items, &grid)) return error;
  return for_format(x.dtype, x.channels, [&](auto format, auto channels) {
    using T = decltype(format);
    constexpr int C = decltype(channels)::value;
    const auto kernel = x.key_mask.data ? attention_lse<T, C, true> : attention_lse<T, C, false>;
    return launch(kernel, grid, WARPS * 32, SHARED_BYTES<C>, stream, a);
  });
}

int sra_attention_mass(const sra_attention_mass_args* args, void* stream) {
  using namespace sra;
  if (int error = check_given("args", args)) return error;
  const sra_attention_mass_args& x = *args;
  const bool ragged = x.cu_seqlens_q;
  if (int error = check_common(x)) return error;
  if (int error = check_size("refs", x.refs, 0, INT32_MAX - BLOCK_M)) return error;
  if (int error = check_offsets("cu_seqlens_ref", x.cu_seqlens_ref, ragged)) return error;
  if (int error = check_offsets("ref_starts", x.ref_starts, ragged)) return error;
  if (x.items == 0 || x.refs == 0) return SRA_OK;
  if (ragged || x.queries) {
    if (int error = check_rows("q", x.q, !ragged)) return error;
    if (int error = check_floats("lse", x.lse.data)) return error;
  }
  if (int error = check_rows("k", x.k, !ragged)) return error;
  if (x.value.data)
    if (int error = check_rows("value", x.value, !ragged)) return error;
  if (int error = check_floats("mass", x.mass.data)) return error;
  if (x.mean.data)
    if (int error = check_floats("mean", x.mean.data)) return error;
  const MassArguments a = {rows_of(x.q), rows_of(x.k), rows_of(x.value), mask_of(x.key_mask), floats_of(x.lse), floats_of(x.mass),
                           x.cu_seqlens_q, x.cu_seqlens_ref, x.ref_starts, x.queries, x.refs, static_cast<int>(x.query_stride),
                           x.scale * LOG2E};
  dim3 grid;
  if (int error = grid_of(x.refs, BLOCK_M, x.heads, x.items, &grid)) return error;
  const int error = for_format(x.dtype, x.channels, [&](auto format, auto channels) {
    using T = decltype(format);
    constexpr int C = decltype(channels)::value;
    return launch(attention_mass<T, C>, grid, WARPS * 32, SHARED_BYTES<C>, stream, a);
  });
  if (error || !x.mean.data) return error;
  const MeanArguments mean = {floats_of(x.mass), floats_of(x.mean), x.cu_seqlens_ref, x.refs, x.heads};
  if (int refused = grid_of(x.refs, WARPS * 32, 1, x.items, &grid)) return refused;
  return launch(mean_over_heads, grid, WARPS * 32, 0, stream, mean);
}

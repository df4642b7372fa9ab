// Forward of attention over at most two dense segments and the kept rows of a bank, in one online softmax.
//
//     s = <q, k>    m = running max of s    total = sum exp(a s - a m)    acc = sum exp(a s - a m) v
//     out = acc / total    lse = a m + ln total
//
// A block owns BLOCK_M queries of one item and head and walks over the item's keys, BLOCK_N at a time: dense and gathered
// tiles are one loop, and differ only in how a lane finds its row. While a tile is worked on, the copies of the next ones
// are in flight, and the indices of the one after those are on their way to registers: nothing waits for an index.
//
// The backward is Triton's.

#include "host.h"
#include "tiles.cuh"

namespace sra {
namespace {

constexpr int BLOCK_M = 128, BLOCK_N = 64;
constexpr int MOST_SEGMENTS = 3;

// Two strips a warp halve what it reads of k and v from shared memory; with 128 channels their sums would not fit its
// registers. With 64 channels a multiprocessor holds two blocks: 218 registers a thread, 64 KB of 163 or more. With 128 it
// holds one, since 190 registers (196 on sm_90) times 256 threads are more than half of all; two stages are 96 KB, which
// cards with 99 KB have too.
template <int C>
constexpr int STRIPS = C == 64 ? 2 : 1;
template <int C>
constexpr int WARPS = BLOCK_M / 16 / STRIPS<C>;
template <int C>
constexpr int STAGES = C == 64 ? 3 : 2;
template <int C>
constexpr int ROWS = BLOCK_N / WARPS<C>;  // of a tile, that one warp copies

template <int C>
constexpr int TILE_BYTES = BLOCK_N * C * 2;
template <int C>
constexpr int SHARED_BYTES = BLOCK_M * C * 2 + 2 * STAGES<C> * TILE_BYTES<C>;

struct Rows {
  const uint16_t* x;
  int64_t row, head;
};

struct Integers {
  const void* data;
  bool wide;
  __device__ int64_t operator[](int64_t x) const { return element(data, wide, x); }
};

struct Arguments {
  Rows q, k[MOST_SEGMENTS], v[MOST_SEGMENTS];  // two dense segments, then the bank
  uint16_t* out;
  int64_t out_row, out_head;
  float* lse;
  Integers cu_seqlens_q, cu_seqlens_k, ref_indices, ref_offsets;
  int64_t queries;
  int items, query_parts, dense_parts, group;
  bool gather, per_head;
  float scale2;
};

// The queries of a block: rows first .. stop of one item, at most BLOCK_M of them.
struct Queries {
  int item, first, stop;
};

// Block `tile` of the item's ranges; no rows where there is no such block.
__device__ Queries find_queries(const Arguments& a, int tile) {
  for (int part = 0; part < a.query_parts; part++)
    for (int item = 0; item < a.items; item++) {
      const int64_t at = static_cast<int64_t>(part) * (a.items + 1) + item;
      const int first = static_cast<int>(a.cu_seqlens_q[at]), stop = static_cast<int>(a.cu_seqlens_q[at + 1]);
      const int blocks = (stop - first + BLOCK_M - 1) / BLOCK_M;
      if (tile < blocks) return {item, first + tile * BLOCK_M, min(stop, first + (tile + 1) * BLOCK_M)};
      tile -= blocks;
    }
  return {0, 0, 0};
}

// Walks over the tiles of an item's keys, segment after segment, one tile ahead of the copies.
template <int C>
struct Keys {
  const Arguments& a;
  const int item, head;
  int segment = -1, first = 0, count = 0;  // the next tile holds keys first .. of the segment's count
  int64_t start = 0;                       // of the segment, in its rows or in ref_indices
  int row = -1;                            // that this lane names in the next tile

  __device__ __forceinline__ Keys(const Arguments& a, int item, int head) : a(a), item(item), head(head) { advance(); }

  __device__ __forceinline__ void advance() {
    first += BLOCK_N;
    while (first >= count && segment + 1 < MOST_SEGMENTS) open(++segment);
    const int key = first + warp_id() * ROWS<C> + lane_id() % ROWS<C>;
    row = -1;
    if (key < count) row = static_cast<int>(segment == 2 ? a.ref_indices[start + key] : start + key);
  }

  __device__ __forceinline__ void open(int s) {
    first = count = 0;
    if (s < 2 ? s >= a.dense_parts : !a.gather) return;
    const int64_t at = static_cast<int64_t>(s < 2 ? s : a.per_head ? head : 0) * (a.items + 1) + item;
    const Integers& offsets = s < 2 ? a.cu_seqlens_k : a.ref_offsets;
    start = offsets[at];
    count = static_cast<int>(offsets[at + 1] - start);
  }

  // Begins to copy the next tile and returns how many live keys it holds, 0 after the last.
  __device__ __forceinline__ int copy(uint32_t k_tile, uint32_t v_tile) {
    const int live = count - first;
    if (live > 0) {
      const Rows &k = a.k[segment], &v = a.v[segment];
      copy_rows<C, ROWS<C>>(k_tile, k.x + head * k.head, k.row, row);
      copy_rows<C, ROWS<C>>(v_tile, v.x + head * v.head, v.row, row);
      advance();
    }
    cp_async_commit();
    return live;
  }
};

// One tile of keys and values joins acc and the softmax.
template <typename T, int C>
__device__ __forceinline__ void attend_tile(float (&acc)[STRIPS<C>][C / 8][4], Softmax<STRIPS<C>>& softmax, uint32_t q_tile, uint32_t k_tile,
                                            uint32_t v_tile, int live, float scale2) {
  float s[STRIPS<C>][BLOCK_N / 8][4], alpha[STRIPS<C>][2];
  scores<T, C, STRIPS<C>, BLOCK_N>(s, q_tile, k_tile);
  if (live < BLOCK_N) mask_from(s, live);
  softmax.step(s, alpha, scale2);
#pragma unroll
  for (int strip = 0; strip < STRIPS<C>; strip++)
#pragma unroll
    for (int n = 0; n < C / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) acc[strip][n][i] *= alpha[strip][i / 2];
#pragma unroll
  for (int key = 0; key < BLOCK_N / 16; key++) {  // 16 keys at a time
    uint32_t p[STRIPS<C>][4];
#pragma unroll
    for (int strip = 0; strip < STRIPS<C>; strip++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float(&weights)[4] = s[strip][2 * key + i / 2];
        p[strip][i] = pack<T>(weights[i % 2 * 2], weights[i % 2 * 2 + 1]);
      }
#pragma unroll
    for (int n = 0; n < C / 16; n++) {
      uint32_t v[4];
      ldmatrix_x4_trans(v, v_tile + matrices_at<C>(key * 16, n * 2));
#pragma unroll
      for (int strip = 0; strip < STRIPS<C>; strip++) {
        mma_m16n8k16<T>(acc[strip][2 * n], p[strip], v[0], v[1]);
        mma_m16n8k16<T>(acc[strip][2 * n + 1], p[strip], v[2], v[3]);
      }
    }
  }
}

template <typename T, int C>
__global__ void __launch_bounds__(WARPS<C> * 32) gather_attention(const __grid_constant__ Arguments a) {
  const Queries queries = find_queries(a, blockIdx.x);
  if (queries.first >= queries.stop) return;
  const int head = blockIdx.y;
  const uint32_t q_tile = shared_memory(), k_tiles = q_tile + BLOCK_M * C * 2, v_tiles = k_tiles + STAGES<C> * TILE_BYTES<C>;

  const int query = queries.first + warp_id() * STRIPS<C> * 16 + lane_id();
  copy_rows<C, STRIPS<C> * 16>(q_tile, a.q.x + head * a.q.head, a.q.row, query < queries.stop ? query : -1);
  Keys<C> keys(a, queries.item, head / a.group);
  int live[STAGES<C>];  // keys in this tile and the ones in flight
#pragma unroll
  for (int stage = 0; stage < STAGES<C> - 1; stage++)
    live[stage] = keys.copy(k_tiles + stage * TILE_BYTES<C>, v_tiles + stage * TILE_BYTES<C>);

  float acc[STRIPS<C>][C / 8][4] = {};
  Softmax<STRIPS<C>> softmax;
  int here = 0;  // the stage of this tile
  while (live[0] > 0) {
    cp_async_wait<STAGES<C> - 2>();
    __syncthreads();
    const int free = here == 0 ? STAGES<C> - 1 : here - 1;  // every warp has left the tile before
    live[STAGES<C> - 1] = keys.copy(k_tiles + free * TILE_BYTES<C>, v_tiles + free * TILE_BYTES<C>);
    attend_tile<T, C>(acc, softmax, q_tile, k_tiles + here * TILE_BYTES<C>, v_tiles + here * TILE_BYTES<C>, live[0],
                      a.scale2);
#pragma unroll
    for (int stage = 0; stage < STAGES<C> - 1; stage++) live[stage] = live[stage + 1];
    here = here + 1 == STAGES<C> ? 0 : here + 1;
  }

#pragma unroll
  for (int strip = 0; strip < STRIPS<C>; strip++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float total = row_sum(softmax.total[strip][i]);
      const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
      const int64_t row = queries.first + (warp_id() * STRIPS<C> + strip) * 16 + lane_id() / 4 + i * 8;
      if (row >= queries.stop) continue;
      uint16_t* out = a.out + row * a.out_row + head * a.out_head + lane_id() % 4 * 2;
#pragma unroll
      for (int n = 0; n < C / 8; n++)
        store_global(reinterpret_cast<uint32_t*>(out + n * 8),
                     pack<T>(acc[strip][n][2 * i] * inverse, acc[strip][n][2 * i + 1] * inverse));
      if (a.lse && lane_id() % 4 == 0)
        store_global(a.lse + head * a.queries + row, natural_lse(softmax.m[strip][i], total, a.scale2));
    }
}

int check(const sra_gather_attention_args& x) {
  if (int error = check_format(x.dtype, x.channels)) return error;
  if (int error = check_scale(x.scale)) return error;
  if (int error = check_size("heads", x.heads, 1, MOST_ALONG)) return error;
  if (int error = check_size("key_heads", x.key_heads, 1, x.heads)) return error;
  if (x.heads % x.key_heads)
    return refuse(SRA_BAD_SIZE, "heads must be a multiple of key_heads, got %d and %d", x.heads, x.key_heads);
  if (int error = check_size("items", x.items, 1, INT32_MAX / 4)) return error;
  if (int error = check_size("query_parts", x.query_parts, 1, 2)) return error;
  if (int error = check_size("dense_parts", x.dense_parts, 0, 2)) return error;
  if (x.selections != 0 && x.selections != 1 && x.selections != x.key_heads)
    return refuse(SRA_BAD_SIZE, "selections must be 0, 1 or key_heads (%d), got %d", x.key_heads, x.selections);
  if (x.dense_parts + x.selections == 0)
    return refuse(SRA_BAD_SIZE, "there must be keys: dense_parts or selections, got 0 of both");
  if (int error = check_size("queries", x.queries, 0, INT32_MAX - BLOCK_M)) return error;
  if (x.queries == 0) return SRA_OK;
  if (int error = check_rows("q", x.q, false)) return error;
  if (int error = check_rows("out", x.out, false)) return error;
  if (x.lse)
    if (int error = check_floats("lse", x.lse)) return error;
  if (int error = check_index("cu_seqlens_q", x.cu_seqlens_q)) return error;
  const sra_tensor* of[MOST_SEGMENTS][2] = {{&x.k, &x.v}, {&x.k2, &x.v2}, {&x.k_ref, &x.v_ref}};
  const char* names[MOST_SEGMENTS][2] = {{"k", "v"}, {"k2", "v2"}, {"k_ref", "v_ref"}};
  for (int s = 0; s < MOST_SEGMENTS; s++)
    for (int i = 0; i < 2 && (s < 2 ? s < x.dense_parts : x.selections > 0); i++) {
      // a tensor without rows has no memory
      sra_tensor given = *of[s][i];
      if (!given.data) given.data = x.q.data;
      if (int error = check_rows(names[s][i], given, false)) return error;
    }
  if (x.dense_parts)
    if (int error = check_index("cu_seqlens_k", x.cu_seqlens_k)) return error;
  if (x.selections) {
    if (int error = check_index("ref_offsets", x.ref_offsets)) return error;
    sra_index given = x.ref_indices;
    if (!given.data) given.data = x.ref_offsets.data, given.bytes = x.ref_offsets.bytes;
    if (int error = check_index("ref_indices", given)) return error;
  }
  return SRA_OK;
}

Rows rows_of(const sra_tensor& x) { return {static_cast<const uint16_t*>(x.data), x.row, x.head}; }

Integers integers_of(const sra_index& x) { return {x.data, x.bytes == 8}; }

}  // namespace
}  // namespace sra

int sra_gather_attention(const sra_gather_attention_args* args, void* stream) {
  using namespace sra;
  if (int error = check_given("args", args)) return error;
  const sra_gather_attention_args& x = *args;
  if (int error = check(x)) return error;
  if (x.queries == 0) return SRA_OK;
  Arguments a = {};
  a.q = rows_of(x.q);
  const sra_tensor *k[] = {&x.k, &x.k2, &x.k_ref}, *v[] = {&x.v, &x.v2, &x.v_ref};
  for (int s = 0; s < MOST_SEGMENTS; s++) a.k[s] = rows_of(*k[s]), a.v[s] = rows_of(*v[s]);
  a.out = static_cast<uint16_t*>(x.out.data);
  a.out_row = x.out.row;
  a.out_head = x.out.head;
  a.lse = x.lse;
  a.cu_seqlens_q = integers_of(x.cu_seqlens_q);
  a.cu_seqlens_k = integers_of(x.cu_seqlens_k);
  a.ref_indices = integers_of(x.ref_indices);
  a.ref_offsets = integers_of(x.ref_offsets);
  a.queries = x.queries;
  a.items = x.items;
  a.query_parts = x.query_parts;
  a.dense_parts = x.dense_parts;
  a.group = x.heads / x.key_heads;
  a.gather = x.selections > 0;
  a.per_head = x.selections > 1;
  a.scale2 = x.scale * LOG2E;
  // known without reading the offsets: every range may end in a block of its own; the few left over return
  const int64_t blocks = blocks_of(x.queries, BLOCK_M) + static_cast<int64_t>(x.query_parts) * x.items;
  if (int error = check_size("the number of blocks", blocks, 1, MOST_BLOCKS)) return error;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(x.heads));
  const auto run = [&](auto kernel, int warps, int shared_bytes) { return launch(kernel, grid, warps * 32, shared_bytes, stream, a); };
  const auto run_format = [&](auto format) {
    using T = decltype(format);
    return x.channels == 64 ? run(gather_attention<T, 64>, WARPS<64>, SHARED_BYTES<64>)
                            : run(gather_attention<T, 128>, WARPS<128>, SHARED_BYTES<128>);
  };
  return x.dtype == SRA_FLOAT16 ? run_format(float16{}) : run_format(bfloat16{});
}

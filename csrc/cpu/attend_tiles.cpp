// The entry points: arguments are checked, tiles are cut into blocks of queries, threads take blocks.
//
// Rows of a bank lie as far apart as all heads are wide, a multiple of the pages and of the ways of a cache: read in any
// order they push one another out. So each head's rows that some tile reads are laid side by side once, in float32, for
// all tiles of that head. Rows of float32 that lie side by side already are read where they are.
#include "sra_cpu.h"

#include <math.h>
#include <omp.h>
#include <stdarg.h>
#include <stdio.h>

#include "attend.h"

namespace sra_cpu {
namespace {

thread_local char last_error[256];

int refuse(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));

int refuse(int code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return code;
}

using Arguments = sra_cpu_attend_tiles_args;

struct Target {
  const char* name;
  void (*attend)(const Block&, float*);
  void (*exp2)(const float*, float*, int64_t);
};

const Target targets[] = {
    {"baseline", attend_baseline, exp2_baseline},
#if defined(__x86_64__)
    {"avx2", attend_avx2, exp2_avx2},
    {"avx512", attend_avx512, exp2_avx512},
#endif
};

int best_target() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 ? avx512 ? SRA_AVX512 : SRA_AVX2 : SRA_BASELINE;
#else
  return SRA_BASELINE;
#endif
}

const Target& target_of(int asked) {
  const int best = best_target();
  return targets[asked < best ? asked : best];
}

int64_t number(const sra_index& index, int64_t at) {
  return index.bytes == 4 ? static_cast<const int32_t*>(index.data)[at] : static_cast<const int64_t*>(index.data)[at];
}

bool half(const Arguments& a) { return a.dtype == SRA_BFLOAT16; }
int64_t size_of(const Arguments& a) { return half(a) ? 2 : 4; }
int64_t group_of(const Arguments& a) { return a.heads / a.key_heads; }
const char* element(const Arguments& a, const sra_tensor& x, int64_t row, int64_t head) {
  return static_cast<const char*>(x.data) + (row * x.row + head * x.head) * size_of(a);
}

// Queries of one tile and one key/value head that a thread takes at once: `count` from `first` on, heads innermost.
struct Piece {
  int64_t tile;
  int64_t item;
  int64_t first;
  int64_t count;
};

// The pieces of all tiles, as even as they can be; written to `to` where it is given.
int64_t pieces_of(const Arguments& a, Piece* to) {
  int64_t count = 0, range = 0;
  for (int64_t tile = 0; tile < a.tiles; tile++) {
    const int64_t start = number(a.cu_tiles, tile), rows = number(a.cu_tiles, tile + 1) - start;
    if (!rows) continue;
    // items follow one another, part after part; between two parts lies an edge twice, and no row
    while (number(a.cu_seqlens_q, range + 1) <= start) range++;
    const int64_t lanes = rows * group_of(a), parts = (lanes + LANES - 1) / LANES;
    for (int64_t part = 0; part < parts; part++, count++) {
      const int64_t first = lanes * part / parts;
      if (to) to[count] = {tile, range % (a.items + 1), first, lanes * (part + 1) / parts - first};
    }
  }
  return count;
}

// One head's rows of a tensor: where they lie, or where they are laid.
struct Laid {
  bool copied;
  int64_t rows;
  float* place;

  const float* data(const Arguments& a, const sra_tensor& x, int64_t head) const {
    return copied ? place : reinterpret_cast<const float*>(element(a, x, 0, head));
  }
  int64_t stride(const Arguments& a, const sra_tensor& x) const { return copied ? a.channels : x.row; }

  void lay(const Arguments& a, const sra_tensor& x, int64_t head, int64_t row) const {
    const char* from = element(a, x, row, head);
    float* to = place + row * a.channels;
    if (!half(a)) {
      memcpy(to, from, sizeof(float) * a.channels);
      return;
    }
    for (int64_t c = 0; c < a.channels; c++) to[c] = widened(reinterpret_cast<const Half*>(from)[c]);
  }
};

// What a call works in, one after another in one piece of memory.
struct Room {
  float* threads;
  Laid k2, v2, k_ref, v_ref;
  Piece* pieces;
  unsigned char* read;  // of each row of the bank: whether a tile keeps it
  int64_t bytes;

  Room(const Arguments& a, void* memory) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory), first = aligned(start);
    uintptr_t at = first;
    threads = reinterpret_cast<float*>(at);
    at += sizeof(float) * a.threads * room_of(a.channels);
    k2 = laid(a, a.k2, a.means, at);
    v2 = laid(a, a.v2, a.means, at);
    k_ref = laid(a, a.k_ref, a.selections ? a.bank : 0, at);
    v_ref = laid(a, a.v_ref, a.selections ? a.bank : 0, at);
    pieces = reinterpret_cast<Piece*>(at);
    at = aligned(at + sizeof(Piece) * pieces_of(a, nullptr));
    read = reinterpret_cast<unsigned char*>(at);
    bytes = static_cast<int64_t>(at + a.bank - first) + ALIGNMENT;
  }

  static uintptr_t aligned(uintptr_t at) { return (at + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

  static Laid laid(const Arguments& a, const sra_tensor& x, int64_t rows, uintptr_t& at) {
    const bool apart = x.data && (half(a) || x.row != a.channels);
    const Laid here = {apart, x.data ? rows : 0, reinterpret_cast<float*>(at)};
    if (apart) at = aligned(at + sizeof(float) * rows * a.channels);
    return here;
  }
};

void mark(const Arguments& a, int64_t head, unsigned char* read) {
  memset(read, 0, a.bank);
  const int64_t row = a.selections > 1 ? head * (a.tiles + 1) : 0, stop = number(a.ref_offsets, row + a.tiles);
  for (int64_t i = number(a.ref_offsets, row); i < stop; i++) read[number(a.ref_indices, i)] = 1;
}

void attend_piece(const Arguments& a, const Room& room, const Target& target, int64_t head, const Piece& piece,
                  float* scratch) {
  Block block;
  block.queries = static_cast<int>(piece.count);
  block.channels = a.channels;
  block.half = half(a);
  block.carry = a.carry;
  block.scale = a.scale;
  const int64_t start = number(a.cu_tiles, piece.tile), group = group_of(a);
  for (int64_t i = 0; i < piece.count; i++) {
    const int64_t row = start + (piece.first + i) / group, of = head * group + (piece.first + i) % group;
    block.q[i] = element(a, a.q, row, of);
    block.out[i] = const_cast<char*>(element(a, a.out, row, of));
    block.lse[i] = a.lse + of * a.queries + row;
  }
  block.segments = 0;
  if (a.k2.data) {
    const int64_t first = number(a.cu_means, piece.item), count = number(a.cu_means, piece.item + 1) - first;
    const int64_t k_row = room.k2.stride(a, a.k2), v_row = room.v2.stride(a, a.v2);
    block.segment[block.segments++] = {room.k2.data(a, a.k2, head) + first * k_row,
                                       room.v2.data(a, a.v2, head) + first * v_row,
                                       k_row, v_row, nullptr, 0, count,
                                       a.bias ? a.bias + piece.tile * a.bias_row : nullptr};
  }
  if (a.selections) {
    const int64_t at = (a.selections > 1 ? head * (a.tiles + 1) : 0) + piece.tile;
    const int64_t first = number(a.ref_offsets, at), count = number(a.ref_offsets, at + 1) - first;
    block.segment[block.segments++] = {room.k_ref.data(a, a.k_ref, head), room.v_ref.data(a, a.v_ref, head),
                                       room.k_ref.stride(a, a.k_ref), room.v_ref.stride(a, a.v_ref),
                                       static_cast<const char*>(a.ref_indices.data) + first * a.ref_indices.bytes,
                                       a.ref_indices.bytes, count, nullptr};
  }
  target.attend(block, scratch);
}

void attend_tiles(const Arguments& a, const Room& room) {
  const Target& target = target_of(a.target);
  const int64_t pieces = pieces_of(a, room.pieces);
  const bool marks = room.k_ref.copied || room.v_ref.copied;
#pragma omp parallel num_threads(a.threads)
  {
    float* const scratch = room.threads + omp_get_thread_num() * room_of(a.channels);
    for (int64_t head = 0; head < a.key_heads; head++) {  // the loops over rows and pieces end with a barrier
      if (marks && (head == 0 || a.selections > 1)) {
#pragma omp single
        mark(a, head, room.read);
      }
#pragma omp for schedule(static) nowait
      for (int64_t row = 0; row < a.means; row++) {
        if (room.k2.copied) room.k2.lay(a, a.k2, head, row);
        if (room.v2.copied) room.v2.lay(a, a.v2, head, row);
      }
#pragma omp for schedule(static)
      for (int64_t row = 0; row < room.k_ref.rows; row++) {
        if (room.k_ref.copied && room.read[row]) room.k_ref.lay(a, a.k_ref, head, row);
        if (room.v_ref.copied && room.read[row]) room.v_ref.lay(a, a.v_ref, head, row);
      }
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < pieces; i++) attend_piece(a, room, target, head, room.pieces[i], scratch);
    }
  }
}

int check(const Arguments& a) {
  if (a.dtype != SRA_FLOAT32 && a.dtype != SRA_BFLOAT16)
    return refuse(SRA_UNSUPPORTED, "dtype must be SRA_FLOAT32 (2) or SRA_BFLOAT16 (1), got %d", a.dtype);
  if (a.channels < MULTIPLE || a.channels % MULTIPLE)
    return refuse(SRA_UNSUPPORTED, "channels must be a multiple of %d, got %d", MULTIPLE, a.channels);
  if (a.key_heads < 1 || a.heads < 1 || a.heads % a.key_heads)
    return refuse(SRA_BAD_SIZE, "key_heads must divide heads, got %d and %d", a.key_heads, a.heads);
  if (a.threads < 1) return refuse(SRA_BAD_SIZE, "threads must be at least 1, got %d", a.threads);
  if (a.selections != 0 && a.selections != 1 && a.selections != a.key_heads)
    return refuse(SRA_BAD_SIZE, "selections must be 0, 1 or key_heads, got %d", a.selections);
  if (!(a.scale > 0 && a.scale < INFINITY))
    return refuse(SRA_UNSUPPORTED, "scale must be positive and finite, got %g", static_cast<double>(a.scale));
  const bool bank = !a.selections || (a.k_ref.data && a.v_ref.data && a.ref_indices.data && a.ref_offsets.data);
  const bool means = !a.k2.data || (a.v2.data && a.cu_means.data);
  if (!a.q.data || !a.out.data || !a.lse || !a.cu_tiles.data || !a.cu_seqlens_q.data || !bank || !means)
    return refuse(SRA_NULL_POINTER, "q, out, lse, cu_tiles, cu_seqlens_q and what comes with keys must be given, got NULL");
  return SRA_OK;
}

}  // namespace
}  // namespace sra_cpu

int64_t sra_cpu_attend_tiles_room(const sra_cpu_attend_tiles_args* args) {
  if (int error = sra_cpu::check(*args)) return error;
  return sra_cpu::Room(*args, nullptr).bytes;
}

int sra_cpu_attend_tiles(const sra_cpu_attend_tiles_args* args, void* memory, int64_t bytes) {
  if (int error = sra_cpu::check(*args)) return error;
  const sra_cpu::Room room(*args, memory);
  if (!memory || bytes < room.bytes)
    return sra_cpu::refuse(SRA_BAD_SIZE, "room must have %lld bytes, got %lld", static_cast<long long>(room.bytes),
                           static_cast<long long>(memory ? bytes : 0));
  sra_cpu::attend_tiles(*args, room);
  return SRA_OK;
}

int sra_cpu_exp2(int target, const float* x, float* y, int64_t count) {
  sra_cpu::target_of(target).exp2(x, y, count);
  return SRA_OK;
}

int sra_cpu_target(void) { return sra_cpu::best_target(); }

int sra_cpu_version(void) { return SRA_CPU_VERSION; }

const char* sra_cpu_last_error(void) { return sra_cpu::last_error; }

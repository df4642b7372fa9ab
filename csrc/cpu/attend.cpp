// Attention of a block of queries to its keys, in one online softmax. A query is a lane of a vector.
//
//     s_jn = log2(e) (a <q_n, k_j> + b_j)      m_n = max_j s_jn      p_jn = 2^(s_jn - m_n)      l_n = sum_j p_jn
//     out_n = sum_j p_jn v_j / l_n             lse_n = ln(2) m_n + ln(l_n)
//
// Queries lie transposed, (C, lanes), so that a key's channel is one number for all lanes: a product with it is a fused
// multiply-add that reads the number where it lies. So keys are gathered by being named, and no tile copies them.
// The result and the LSE of other keys, out' and lse', are where the softmax begins: m = log2(e) lse' and l = 1; out'
// joins the sum at the end, with the weight 2^(log2(e) lse' - m) that is left of that 1.
//
// Registers: a product loop holds AT_ONCE keys x VECTORS of queries, or CHANNELS x VECTORS of the result, in
// accumulators: 16 of 32 (AVX-512, NEON), 12 of 16 (AVX2), 8 of 16 (else). That hides the latency of an addition, and
// two vectors of queries share each number that is read.
#include "attend.h"

#include <math.h>

namespace sra_cpu {
namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16, VECTORS = 2, AT_ONCE = 8;
#elif defined(__AVX2__)
constexpr int WIDTH = 8, VECTORS = 2, AT_ONCE = 6;
#elif defined(__aarch64__)
constexpr int WIDTH = 4, VECTORS = 4, AT_ONCE = 4;
#else
constexpr int WIDTH = 4, VECTORS = 2, AT_ONCE = 4;
#endif
static_assert(AT_ONCE <= SPARE && LANES % (WIDTH * VECTORS) == 0, "lanes and keys must have room");

typedef float Floats __attribute__((vector_size(4 * WIDTH), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH), may_alias));

constexpr float LOG2E = 1.44269504088896340736f, LN2 = 0.69314718055994530942f;
constexpr float NO_KEY = -INFINITY;
constexpr int LINE = ALIGNMENT / 4;  // floats of a cache line

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE inline __attribute__((always_inline))

INLINE Floats all(float x) { return x - Floats{}; }
INLINE Floats& at(float* x, int64_t vector) { return reinterpret_cast<Floats*>(x)[vector]; }
INLINE const Floats& at(const float* x, int64_t vector) { return reinterpret_cast<const Floats*>(x)[vector]; }
INLINE Floats larger(Floats x, Floats y) { return x > y ? x : y; }

// 2^x for x <= 0 by x = n + f, |f| <= 1/2: to two units of the last place; 0 below 2^-126 and for -inf.
INLINE Floats exp2_of(Floats x) {
  const Floats least = all(-126.0f), magic = all(12582912.0f);  // 1.5 2^23: a sum with it has no fraction
  const auto gone = x < least;
  const Floats held = gone ? least : x;
  const Floats shifted = held + magic;
  const Floats f = held - (shifted - magic);
  Floats p = all(1.53458121587e-4f);  // the minimax polynomial of degree 6: off by 2e-9
  p = p * f + all(1.33999312095e-3f);
  p = p * f + all(9.61848895652e-3f);
  p = p * f + all(5.550328777e-2f);
  p = p * f + all(2.40226468906e-1f);
  p = p * f + all(6.93147205737e-1f);
  p = p * f + all(1.0f);
  const Ints bits = reinterpret_cast<const Ints&>(p) + (reinterpret_cast<const Ints&>(shifted) << 23);
  return gone ? Floats{} : reinterpret_cast<const Floats&>(bits);
}

// s (AT_ONCE, V) = k (AT_ONCE, C) q (C, V vectors). Meanwhile the rows `next` are fetched; it may be nullptr.
template <int V>
INLINE void scores(const float* const* k, const float* const* next, const float* q, int64_t channels, float* s) {
  Floats sum[AT_ONCE][V] = {};
  const float* row[AT_ONCE];
  UNROLL for (int j = 0; j < AT_ONCE; j++) row[j] = k[j];
  for (int64_t first = 0; first < channels; first += MULTIPLE) {
    if (next && first % LINE == 0)
      UNROLL for (int j = 0; j < AT_ONCE; j++) __builtin_prefetch(next[j] + first);
    for (int64_t c = first; c < first + MULTIPLE; c++) {
      Floats of_q[V];
      UNROLL for (int v = 0; v < V; v++) of_q[v] = at(q, c * V + v);
      UNROLL for (int j = 0; j < AT_ONCE; j++)
        UNROLL for (int v = 0; v < V; v++) sum[j][v] += row[j][c] * of_q[v];
    }
  }
  UNROLL for (int j = 0; j < AT_ONCE; j++)
    UNROLL for (int v = 0; v < V; v++) at(s, j * V + v) = sum[j][v];
}

// o (CHANNELS, V) = decay o + p^T (CHANNELS, count) v: the channels from `first` on.
template <int CHANNELS, int V>
INLINE void weighted(const float* const* rows, int64_t first, int count, const float* p, const Floats* decay, float* o) {
  Floats sum[CHANNELS][V];
  UNROLL for (int c = 0; c < CHANNELS; c++)
    UNROLL for (int v = 0; v < V; v++) sum[c][v] = at(o, c * V + v) * decay[v];
  for (int j = 0; j < count; j++) {
    const float* row = rows[j] + first;
    Floats of_p[V];
    UNROLL for (int v = 0; v < V; v++) of_p[v] = at(p, j * V + v);
    UNROLL for (int c = 0; c < CHANNELS; c++)
      UNROLL for (int v = 0; v < V; v++) sum[c][v] += row[c] * of_p[v];
  }
  UNROLL for (int c = 0; c < CHANNELS; c++)
    UNROLL for (int v = 0; v < V; v++) at(o, c * V + v) = sum[c][v];
}

// Keys that are taken together: rows of k and v; `k` goes on for AT_ONCE more, and so does `v`.
struct Keys {
  int count;
  const float* bias;
  const float* k[KEYS + SPARE];
  const float* v[KEYS + SPARE];
};

// The softmax of V vectors of queries.
struct State {
  const float* q;  // (C, V), scaled
  float* o;        // (C, V)
  float* m;        // (V)
  float* l;        // (V)
};

// The keys join the state; s (KEYS + SPARE, V) is room.
template <int V>
INLINE void join(const Keys& keys, bool fetch, int64_t channels, float* s, const State& state) {
  for (int j = 0; j < keys.count; j += AT_ONCE)
    scores<V>(keys.k + j, fetch ? keys.v + j : nullptr, state.q, channels, s + j * V * WIDTH);
  Floats top[V], decay[V], sum[V];
  UNROLL for (int v = 0; v < V; v++) top[v] = at(state.m, v);
  for (int j = 0; j < keys.count; j++) {
    if (keys.bias)
      UNROLL for (int v = 0; v < V; v++) at(s, j * V + v) += all(LOG2E * keys.bias[j]);
    UNROLL for (int v = 0; v < V; v++) top[v] = larger(top[v], at(s, j * V + v));
  }
  UNROLL for (int v = 0; v < V; v++) {
    const Floats before = at(state.m, v);
    at(state.m, v) = top[v];
    top[v] = top[v] == all(NO_KEY) ? Floats{} : top[v];  // a pivot that can be subtracted
    decay[v] = exp2_of(before - top[v]);
    sum[v] = at(state.l, v) * decay[v];
  }
  for (int j = 0; j < keys.count; j++)
    UNROLL for (int v = 0; v < V; v++) sum[v] += at(s, j * V + v) = exp2_of(at(s, j * V + v) - top[v]);
  UNROLL for (int v = 0; v < V; v++) at(state.l, v) = sum[v];
  constexpr int CHANNELS = V == 1 ? 2 * MULTIPLE : MULTIPLE;
  int64_t c = 0;
  for (; c + CHANNELS <= channels; c += CHANNELS)
    weighted<CHANNELS, V>(keys.v, c, keys.count, s, decay, state.o + c * V * WIDTH);
  for (; c < channels; c += MULTIPLE)
    weighted<MULTIPLE, V>(keys.v, c, keys.count, s, decay, state.o + c * V * WIDTH);
}

template <int V>
INLINE void join_by(int vectors, const Keys& keys, bool fetch, int64_t channels, float* s, const State& state) {
  if (vectors == V) return join<V>(keys, fetch, channels, s, state);
  if constexpr (V > 1) join_by<V - 1>(vectors, keys, fetch, channels, s, state);
}

INLINE int64_t row_of(const Segment& segment, int64_t j) {
  if (!segment.rows) return j;
  return segment.row_bytes == 4 ? static_cast<const int32_t*>(segment.rows)[j]
                                : static_cast<const int64_t*>(segment.rows)[j];
}

INLINE void find(const Segment& segment, int64_t first, Keys& keys) {
  const int64_t left = segment.count - first;
  keys.count = static_cast<int>(left < KEYS ? left : KEYS);
  keys.bias = segment.bias ? segment.bias + first : nullptr;
  for (int j = 0; j < keys.count; j++) {
    const int64_t row = row_of(segment, first + j);
    keys.k[j] = segment.k + row * segment.k_row;
    keys.v[j] = segment.v + row * segment.v_row;
  }
  for (int j = keys.count; j < keys.count + AT_ONCE; j++) {  // scores that nobody looks at
    keys.k[j] = keys.k[keys.count - 1];
    keys.v[j] = keys.v[keys.count - 1];
  }
}

INLINE void narrow(float x, float& to) { to = x; }

INLINE void narrow(float x, Half& to) {  // to the nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  to.bits = x != x ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Queries `lane` .. of the block, and what they begin with; lanes beyond the last query compute what is thrown away.
template <typename T>
INLINE void begin(const Block& block, int lane, int lanes, float* q, const State& state) {
  const float scale = LOG2E * block.scale;
  memset(state.o, 0, sizeof(float) * block.channels * lanes);
  for (int i = 0; i < lanes; i++) {
    const bool live = lane + i < block.queries;
    const float lse = live && block.carry ? *block.lse[lane + i] : NO_KEY;
    state.m[i] = LOG2E * lse;
    state.l[i] = lse == NO_KEY ? 0.0f : 1.0f;
    const T* x = live ? static_cast<const T*>(block.q[lane + i]) : nullptr;
    for (int64_t c = 0; c < block.channels; c++) q[c * lanes + i] = live ? scale * widened(x[c]) : 0.0f;
  }
}

template <typename T>
INLINE void end(const Block& block, int lane, int lanes, const State& state) {
  for (int i = 0; i < lanes && lane + i < block.queries; i++) {
    const float l = state.l[i];
    const float share = l == 0 ? 0.0f : 1.0f / l;
    const float others = block.carry && l != 0 ? share * exp2f(LOG2E * *block.lse[lane + i] - state.m[i]) : 0.0f;
    T* out = static_cast<T*>(block.out[lane + i]);
    for (int64_t c = 0; c < block.channels; c++) {
      const float mine = share * state.o[c * lanes + i];
      narrow(block.carry ? mine + others * widened(out[c]) : mine, out[c]);
    }
    *block.lse[lane + i] = l == 0 ? NO_KEY : LN2 * state.m[i] + logf(l);
  }
}

template <typename T>
void attend(const Block& block, float* room) {
  float* const s = room + 2 * block.channels * LANES;
  struct Panel {
    int vectors;
    State state;
  } panels[LANES / WIDTH];
  int count = 0;
  for (int lane = 0; lane < block.queries; count++) {
    const int left = (block.queries - lane + WIDTH - 1) / WIDTH, vectors = left < VECTORS ? left : VECTORS;
    float* const q = room + 2 * block.channels * lane;
    float* const o = q + block.channels * vectors * WIDTH;
    float* const m = s + (KEYS + SPARE) * LANES + 2 * lane;
    panels[count] = {vectors, {q, o, m, m + vectors * WIDTH}};
    begin<T>(block, lane, vectors * WIDTH, q, panels[count].state);
    lane += vectors * WIDTH;
  }
  Keys keys;
  for (int n = 0; n < block.segments; n++)
    for (int64_t first = 0; first < block.segment[n].count; first += KEYS) {
      find(block.segment[n], first, keys);
      for (int p = 0; p < count; p++)
        join_by<VECTORS>(panels[p].vectors, keys, p == 0, block.channels, s, panels[p].state);
    }
  for (int p = 0, lane = 0; p < count; p++) {
    end<T>(block, lane, panels[p].vectors * WIDTH, panels[p].state);
    lane += panels[p].vectors * WIDTH;
  }
}

}  // namespace

#define JOINED(name, target) name##_##target
#define NAMED(name, target) JOINED(name, target)

void NAMED(attend, SRA_TARGET)(const Block& block, float* room) {
  block.half ? attend<Half>(block, room) : attend<float>(block, room);
}

void NAMED(exp2, SRA_TARGET)(const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count / WIDTH; i++) at(y, i) = exp2_of(at(x, i));
}

}  // namespace sra_cpu

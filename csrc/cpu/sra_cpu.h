/* The C interface of libsra_cpu.so: attention of query tiles on a CPU. The letters are those of ../include/sra.h.

   A function returns 0, or a negative SRA_ code; `sra_cpu_last_error` says in words what must hold and what was got.
   Offsets and indices are believed. Results are the same bits every time, however many threads there are. */
#ifndef SRA_CPU_H
#define SRA_CPU_H

#include "../include/sra.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Changes whenever a struct or a function does. */
#define SRA_CPU_VERSION 1

enum { SRA_FLOAT32 = 2 };

/* What the kernels were compiled for; a processor runs its own target and those before it. */
enum { SRA_BASELINE = 0, SRA_AVX2 = 1, SRA_AVX512 = 2 };

/* One softmax of each query over the biased keys of its item, the rows of the bank that its tile keeps, and, with
   `carry`, other keys whose result is in `out` and `lse` already.

   With g = h / (H / G), t the tile of query j and i its item, over the rows k2[n] of item i and k_ref[r] kept by t:
     lse[h, j] = ln(e^lse'[h, j] + sum_n exp(scale <q[j, h], k2[n, g]> + bias[t, n - first of i]) + sum_r exp(scale <q[j, h], k_ref[r, g]>))
   and out[j, h] is the mean of out'[j, h], v2[n, g] and v_ref[r, g] under these weights. No key gives 0 and -inf. */
typedef struct sra_cpu_attend_tiles_args {
  int32_t dtype;          /* SRA_FLOAT32 or SRA_BFLOAT16, of every tensor; sums are float32 */
  int32_t channels;       /* C, a multiple of 8 */
  int32_t heads;          /* H */
  int32_t key_heads;      /* G, divides H */
  int32_t items;          /* B */
  int32_t query_parts;    /* rows of cu_seqlens_q, 1 or 2 */
  int32_t selections;     /* rows of ref_offsets: 0 (no bank), 1, or G */
  int32_t carry;          /* not 0: out and lse hold a result that is joined */
  int32_t threads;        /* at least 1 */
  int32_t target;         /* the most that may be used; SRA_AVX512 for the best that this processor has */
  int64_t tiles;
  int64_t queries;        /* T */
  int64_t bank;           /* rows of k_ref */
  int64_t means;          /* rows of k2 */
  float scale;            /* positive and finite */
  sra_tensor q;           /* (T, H, C); item strides are not read */
  sra_tensor k2, v2;      /* (means, G, C); data may be NULL: no biased keys */
  sra_tensor k_ref, v_ref;/* (bank, G, C); data may be NULL where selections is 0 */
  sra_tensor out;         /* (T, H, C), written */
  float *lse;             /* (H, T) contiguous, written */
  const float *bias;      /* (tiles, any width), a row `bias_row` after the other; NULL: 0 */
  int64_t bias_row;
  sra_index cu_tiles;     /* (tiles + 1,): tile t is rows cu_tiles[t] to cu_tiles[t + 1] of q */
  sra_index cu_seqlens_q; /* (query_parts, B + 1) */
  sra_index cu_means;     /* (B + 1,): item i's rows of k2; not read without k2 */
  sra_index ref_indices;
  sra_index ref_offsets;  /* (selections, tiles + 1) into ref_indices */
} sra_cpu_attend_tiles_args;

/* Works in `room`, of at least the bytes that sra_cpu_attend_tiles_room says for these arguments. */
SRA_API int sra_cpu_attend_tiles(const sra_cpu_attend_tiles_args *args, void *room, int64_t bytes);
SRA_API int64_t sra_cpu_attend_tiles_room(const sra_cpu_attend_tiles_args *args);

/* y = 2^x for x <= 0, as the kernels of a target compute it. */
SRA_API int sra_cpu_exp2(int target, const float *x, float *y, int64_t count);

/* The best target that this build and this processor have in common. */
SRA_API int sra_cpu_target(void);

SRA_API int sra_cpu_version(void);

/* What the last refused call of this thread was refused for. */
SRA_API const char *sra_cpu_last_error(void);

#ifdef __cplusplus
}
#endif

#endif

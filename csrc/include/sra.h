/* The C interface of libsra_kernels.so: attention kernels for NVIDIA cards of compute capability 8.0 and later.

   Letters: B items of a batch, T packed query rows, H query heads, G key/value heads (H is a multiple of G), C channels,
   M dense key rows, R rows of the reference bank, S rows of a token axis. Row b of a ragged batch's offsets is where item b
   begins; there is one offset more than items.

   Every function launches on the current device, in `stream` (a cudaStream_t; NULL is the default stream), and returns at
   once. It returns 0, or a negative SRA_ code if an argument was refused (then nothing was launched), or a positive
   cudaError_t. `sra_last_error` says in words what must hold and what was got.

   All pointers are device pointers, but those to the argument structs and to `copies`. Nothing that lies on the device is
   read on the host: a wrong offset or index there reads foreign memory. Strides and offsets are 64 bit, in elements where
   nothing else is said; a tensor has fewer than 2^31 rows. Results are the same bits every time: no atomics, sums in a
   fixed order. */
#ifndef SRA_H
#define SRA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define SRA_API __declspec(dllexport)
#else
#define SRA_API __attribute__((visibility("default")))
#endif

/* Changes whenever a struct or a function does. */
#define SRA_VERSION 1

enum { SRA_FLOAT16 = 0, SRA_BFLOAT16 = 1 };

enum {
  SRA_OK = 0,
  SRA_NULL_POINTER = -1, /* a pointer that must be given is NULL */
  SRA_BAD_SIZE = -2,     /* a size is negative, zero where it must not be, or beyond what a launch can do */
  SRA_BAD_STRIDE = -3,   /* a row's stride is not a multiple of 16 bytes */
  SRA_MISALIGNED = -4,   /* a pointer is not a multiple of 16 bytes */
  SRA_UNSUPPORTED = -5   /* a dtype, head dim, scale or option that no kernel has */
};

/* (item, row, head, channel): the channels are contiguous, the others have strides. data may be NULL where stated. */
typedef struct sra_tensor {
  void *data;
  int64_t item;
  int64_t row;
  int64_t head;
} sra_tensor;

/* Integers of 4 or 8 bytes, contiguous. */
typedef struct sra_index {
  const void *data;
  int64_t bytes;
} sra_index;

/* One softmax over an item's dense keys and its kept rows of the bank; `gather_attention`.

   With g = h / (H / G):  lse[h, j] = ln sum_k exp(scale <q[j, h], k[k, g]>),
                          out[j, h] = sum_k exp(scale <q[j, h], k[k, g]> - lse[h, j]) v[k, g].
   A query without keys gets 0 and -inf. Tensors are packed: their item strides are not read. */
typedef struct sra_gather_attention_args {
  int32_t dtype;               /* SRA_FLOAT16 or SRA_BFLOAT16, of every tensor */
  int32_t channels;            /* C: 64 or 128 */
  int32_t heads;               /* H, at most 65535 */
  int32_t key_heads;           /* G, divides H */
  int32_t items;               /* B */
  int32_t query_parts;         /* rows of cu_seqlens_q: 1, or 2 where an item's queries lie in two ranges */
  int32_t dense_parts;         /* rows of cu_seqlens_k: 0 (no dense keys), 1 or 2 */
  int32_t selections;          /* rows of ref_offsets: 0 (no bank), 1, or G for one selection per key/value head */
  int64_t queries;             /* T */
  float scale;                 /* positive and finite */
  sra_tensor q;                /* (T, H, C) */
  sra_tensor k, v;             /* (M, G, C): what row 0 of cu_seqlens_k counts in */
  sra_tensor k2, v2;           /* what row 1 counts in; the same as k and v where two ranges lie in one tensor */
  sra_tensor k_ref, v_ref;     /* (R, G, C) */
  sra_tensor out;              /* (T, H, C), written */
  float *lse;                  /* (H, T) contiguous, written; may be NULL */
  sra_index cu_seqlens_q;      /* (query_parts, B + 1) */
  sra_index cu_seqlens_k;      /* (dense_parts, B + 1) */
  sra_index ref_indices;       /* rows of the bank, one selection after another */
  sra_index ref_offsets;       /* (selections, B + 1) into ref_indices */
} sra_gather_attention_args;

SRA_API int sra_gather_attention(const sra_gather_attention_args *args, void *stream);

/* lse[h, j] = ln sum_k exp(scale <q[j, h], k[k, h]>) over an item's keys, of every query_stride-th query; the places of
   the others are left alone. Dense batches lie `item` strides apart and have NULL offsets; ragged ones begin where the
   offsets say and their item strides are not read. */
typedef struct sra_attention_lse_args {
  int32_t dtype;
  int32_t channels;            /* C: 64 or 128 */
  int32_t heads;               /* H, at most 65535, of q and of k */
  int32_t items;               /* B, at most 65535 */
  int64_t queries;             /* of each item; ragged: of the longest, or more */
  int64_t keys;                /* of each item; ragged: not read */
  int64_t query_stride;        /* at least 1 */
  float scale;                 /* positive and finite */
  sra_tensor q;                /* (B, queries, H, C), or (T, H, C) */
  sra_tensor k;                /* (B, keys, H, C), or (M, H, C) */
  sra_tensor key_mask;         /* uint8 (B, keys), nonzero: the key is attended to; data may be NULL. Not with ragged */
  sra_tensor lse;              /* float32 (B, queries, H), or (T, H), any strides, written */
  const int32_t *cu_seqlens_q; /* (B + 1,), or NULL: dense */
  const int32_t *cu_seqlens_k; /* (B + 1,), together with cu_seqlens_q */
} sra_attention_lse_args;

SRA_API int sra_attention_lse(const sra_attention_lse_args *args, void *stream);

/* Column means of the softmax: mass[h, r] = |v[r, h]| / N sum_j exp(scale <q[j, h], k[r, h]> - lse[h, j]), over every
   query_stride-th query (N of them), without the factor |v| where value.data is NULL. An item without queries, and a
   masked key, get 0. */
typedef struct sra_attention_mass_args {
  int32_t dtype;
  int32_t channels;              /* C: 64 or 128 */
  int32_t heads;                 /* H, at most 65535, of q, k and value */
  int32_t items;                 /* B, at most 65535 */
  int64_t queries;               /* of each item; ragged: not read */
  int64_t refs;                  /* of each item; ragged: of the longest, or more */
  int64_t query_stride;          /* at least 1 */
  float scale;                   /* positive and finite */
  sra_tensor q;                  /* (B, queries, H, C), or (T, H, C) */
  sra_tensor k;                  /* (B, refs, H, C) from the first reference row on, or (M, H, C) all rows */
  sra_tensor value;              /* as k; data may be NULL */
  sra_tensor key_mask;           /* uint8 (B, refs); data may be NULL. Not with ragged */
  sra_tensor lse;                /* float32 (B, queries, H), or (T, H), any strides; -inf: a query without keys */
  sra_tensor mass;               /* float32 (B, refs, H), or (refs of all items, H), any strides, written */
  sra_tensor mean;               /* float32, the mean of mass over the heads, written; data may be NULL */
  const int32_t *cu_seqlens_q;   /* (B + 1,), or NULL: dense */
  const int32_t *cu_seqlens_ref; /* (B + 1,): where an item's rows of mass begin; together with cu_seqlens_q */
  const int32_t *ref_starts;     /* (B,): the row of k at which an item's references begin; together with cu_seqlens_q */
} sra_attention_mass_args;

SRA_API int sra_attention_mass(const sra_attention_mass_args *args, void *stream);

/* The axes of a tensor beside its token axis and the contiguous run of bytes at its end. */
#define SRA_MAX_AXES 4

/* One tensor: full (axes.., S, bytes) and packed (axes.., rows, bytes), of any dtype: all strides are in bytes. */
typedef struct sra_row_copy {
  void *full;
  void *packed;
  int64_t bytes;        /* of the contiguous run that one (axes.., row) owns */
  int64_t full_row;     /* stride of the token axis */
  int64_t packed_row;
  int64_t axes;         /* 0 to SRA_MAX_AXES */
  int64_t sizes[SRA_MAX_AXES];
  int64_t full_strides[SRA_MAX_AXES];
  int64_t packed_strides[SRA_MAX_AXES];
} sra_row_copy;

/* pack: packed[.., t] = full[.., row[t]].   unpack: full[.., row[t]] = packed[.., t]; other rows are left alone.
   The rows are distinct. A row outside [0, size) packs as zeros and unpacks nowhere. */
typedef struct sra_rows_args {
  const sra_row_copy *copies; /* on the host; any number of tensors share launches */
  int64_t count;
  sra_index row;              /* (rows,) */
  int64_t rows;               /* kept rows */
  int64_t size;               /* S, the same for all tensors */
} sra_rows_args;

SRA_API int sra_pack_rows(const sra_rows_args *args, void *stream);
SRA_API int sra_unpack_rows(const sra_rows_args *args, void *stream);

/* SRA_VERSION of the library that was loaded. */
SRA_API int sra_version(void);

/* What a code means, in a few words; never NULL. */
SRA_API const char *sra_error_string(int code);

/* What the last refused call of this thread was refused for: what must hold, then what was got. Empty if none was. */
SRA_API const char *sra_last_error(void);

#ifdef __cplusplus
}
#endif

#endif

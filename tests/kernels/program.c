/* The interface from C, without Python: every refusal, and what a machine without a driver answers. */
#include <sra.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(what)                                             \
  do {                                                          \
    if (!(what)) {                                              \
      printf("line %d: %s\n", __LINE__, #what);                 \
      printf("last error: \"%s\"\n", sra_last_error());         \
      exit(1);                                                  \
    }                                                           \
  } while (0)

#define REFUSED(call, code, words)                              \
  do {                                                          \
    const int got = (call);                                     \
    if (got != (code) || !strstr(sra_last_error(), words)) {    \
      printf("line %d: %s\n", __LINE__, #call);                 \
      printf("got %d \"%s\"\n", got, sra_last_error());         \
      exit(1);                                                  \
    }                                                           \
  } while (0)

/* Never read: nothing is launched before every argument was looked at. */
static _Alignas(16) char memory[64];

static sra_gather_attention_args attention(void) {
  sra_gather_attention_args a = {0};
  const sra_tensor rows = {memory, 0, 128, 64};
  const sra_index offsets = {memory, 4};
  a.dtype = SRA_BFLOAT16;
  a.channels = 64;
  a.heads = 2;
  a.key_heads = 2;
  a.items = 1;
  a.query_parts = a.dense_parts = a.selections = 1;
  a.queries = 3;
  a.scale = 0.125f;
  a.q = a.k = a.v = a.k_ref = a.v_ref = a.out = rows;
  a.cu_seqlens_q = a.cu_seqlens_k = a.ref_indices = a.ref_offsets = offsets;
  return a;
}

static void attention_refuses(void) {
  sra_gather_attention_args a;
  REFUSED(sra_gather_attention(NULL, NULL), SRA_NULL_POINTER, "must be given, got NULL");
#define WITH(change, code, words) (a = attention(), change, (void)0); REFUSED(sra_gather_attention(&a, NULL), code, words)
  WITH(a.q.data = NULL, SRA_NULL_POINTER, "q must be given, got NULL");
  WITH(a.out.data = NULL, SRA_NULL_POINTER, "out must be given, got NULL");
  WITH(a.ref_offsets.data = NULL, SRA_NULL_POINTER, "ref_offsets must be given, got NULL");
  WITH(a.k.data = memory + 2, SRA_MISALIGNED, "k must lie at a multiple of 16 bytes");
  WITH(a.v.row = 100, SRA_BAD_STRIDE, "strides of v must be multiples of 8 elements");
  WITH(a.out.head = 3, SRA_BAD_STRIDE, "strides of out must be multiples of 8 elements");
  WITH(a.heads = 0, SRA_BAD_SIZE, "heads must lie between");
  WITH(a.heads = 65536, SRA_BAD_SIZE, "heads must lie between");
  WITH(a.key_heads = 3, SRA_BAD_SIZE, "key_heads");
  WITH(a.items = -1, SRA_BAD_SIZE, "items must lie between");
  WITH(a.queries = -1, SRA_BAD_SIZE, "queries must lie between");
  WITH(a.query_parts = 3, SRA_BAD_SIZE, "query_parts");
  WITH(a.selections = 5, SRA_BAD_SIZE, "selections");
  WITH(a.cu_seqlens_q.bytes = 2, SRA_UNSUPPORTED, "cu_seqlens_q must hold integers of 4 or 8 bytes");
  WITH(a.dtype = 7, SRA_UNSUPPORTED, "dtype must be SRA_FLOAT16 (0) or SRA_BFLOAT16 (1), got 7");
  WITH(a.channels = 96, SRA_UNSUPPORTED, "channels must be 64 or 128, got 96");
  WITH(a.scale = 0, SRA_UNSUPPORTED, "scale must be positive and finite");
#undef WITH
}

static void mass_refuses(void) {
  sra_attention_lse_args fine = {0}, a;
  const sra_tensor rows = {memory, 1024, 128, 64}, floats = {memory, 8, 1, 4};
  fine.channels = 64;
  fine.heads = fine.items = 1;
  fine.queries = fine.keys = 3;
  fine.query_stride = 1;
  fine.scale = 1;
  fine.q = fine.k = rows;
  fine.lse = floats;
  REFUSED(sra_attention_lse(NULL, NULL), SRA_NULL_POINTER, "must be given, got NULL");
#define WITH(change, code, words) (a = fine, change, (void)0); REFUSED(sra_attention_lse(&a, NULL), code, words)
  WITH(a.lse.data = NULL, SRA_NULL_POINTER, "lse must be given, got NULL");
  WITH(a.k.data = memory + 8, SRA_MISALIGNED, "k must lie at a multiple of 16 bytes");
  WITH(a.q.item = 7, SRA_BAD_STRIDE, "strides of q must be multiples of 8 elements");
  WITH(a.query_stride = 0, SRA_BAD_SIZE, "query_stride must lie between");
  WITH(a.items = 65536, SRA_BAD_SIZE, "items must lie between");
  WITH(a.channels = 32, SRA_UNSUPPORTED, "channels must be 64 or 128, got 32");
#undef WITH
  sra_attention_mass_args mass = {0};
  REFUSED(sra_attention_mass(NULL, NULL), SRA_NULL_POINTER, "must be given, got NULL");
  mass.channels = 64;
  mass.heads = mass.items = 1;
  mass.queries = mass.refs = 3;
  mass.query_stride = 1;
  mass.scale = -1;
  mass.q = mass.k = rows;
  mass.lse = mass.mass = floats;
  REFUSED(sra_attention_mass(&mass, NULL), SRA_UNSUPPORTED, "scale must be positive and finite, got -1");
  mass.scale = 1;
  mass.mass.data = NULL;
  REFUSED(sra_attention_mass(&mass, NULL), SRA_NULL_POINTER, "mass must be given, got NULL");
}

static sra_row_copy copy(void) {
  const sra_row_copy one = {memory, memory + 32, 4, 4, 4, 0, {0}, {0}, {0}};
  return one;
}

static void rows_refuse(void) {
  sra_row_copy one = copy();
  sra_rows_args a = {&one, 1, {memory, 8}, 2, 4};
  REFUSED(sra_pack_rows(NULL, NULL), SRA_NULL_POINTER, "must be given, got NULL");
  a.copies = NULL;
  REFUSED(sra_pack_rows(&a, NULL), SRA_NULL_POINTER, "copies must be given, got NULL");
  a.copies = &one;
  a.rows = -1;
  REFUSED(sra_unpack_rows(&a, NULL), SRA_BAD_SIZE, "rows must lie between");
  a.rows = 2;
  one.axes = SRA_MAX_AXES + 1;
  REFUSED(sra_pack_rows(&a, NULL), SRA_BAD_SIZE, "axes");
  one = copy();
  one.full = NULL;
  REFUSED(sra_pack_rows(&a, NULL), SRA_NULL_POINTER, "full");
  one = copy();
  a.row.data = NULL;
  REFUSED(sra_pack_rows(&a, NULL), SRA_NULL_POINTER, "row must be given, got NULL");
  a.row.data = memory;
  a.count = 0;
  CHECK(sra_pack_rows(&a, NULL) == SRA_OK); /* nothing to do */
}

/* What is well formed is launched, and CUDA's own error comes back: positive, with words, and the process lives on. */
static void without_a_driver(void) {
  sra_gather_attention_args a = attention();
  sra_row_copy one = copy();
  const sra_rows_args rows = {&one, 1, {memory, 8}, 2, 4};
  for (int turn = 0; turn < 2; turn++) {
    const int code = sra_gather_attention(&a, NULL);
    CHECK(code > 0);
    CHECK(strlen(sra_error_string(code)) > 0);
    CHECK(!strcmp(sra_last_error(), sra_error_string(code)));
    CHECK(sra_pack_rows(&rows, NULL) == code);
  }
  printf("without a driver: %s\n", sra_error_string(sra_gather_attention(&a, NULL)));
}

int main(int count, char **arguments) {
  CHECK(sra_version() == SRA_VERSION);
  CHECK(!strcmp(sra_last_error(), ""));
  for (int code = -6; code < 3; code++) CHECK(strlen(sra_error_string(code)) > 0);
  CHECK(strcmp(sra_error_string(SRA_BAD_SIZE), sra_error_string(SRA_BAD_STRIDE)));
  attention_refuses();
  mass_refuses();
  rows_refuse();
  if (count > 1 && !strcmp(arguments[1], "without-driver")) without_a_driver();
  printf("every refusal as expected\n");
  return 0;
}

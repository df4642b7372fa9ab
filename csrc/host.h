// Argument checks and launches, shared by the entry points: an argument is refused before anything is launched.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "include/sra.h"

namespace sra {

// Remembers a sentence ("x must hold, got y") for sra_last_error, and returns `code`.
int refuse(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Launches, or returns the error of CUDA as the functions of sra.h do.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, void* stream, const Arguments&... arguments) {
  constexpr int without_opting_in = 48 << 10;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > without_opting_in)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  if (error == cudaSuccess) return SRA_OK;
  cudaGetLastError();  // not sticky: the next call of somebody else must not find it
  return refuse(error, "%s", cudaGetErrorString(error));
}

constexpr int64_t MOST_BLOCKS = 0x7FFFFFFF;  // along a grid's first axis
constexpr int64_t MOST_ALONG = 65535;        // along its second and third

inline int64_t blocks_of(int64_t rows, int64_t block) { return (rows + block - 1) / block; }

inline int check_size(const char* name, int64_t size, int64_t least, int64_t most) {
  if (least <= size && size <= most) return SRA_OK;
  return refuse(SRA_BAD_SIZE, "%s must lie between %lld and %lld, got %lld", name, static_cast<long long>(least),
                static_cast<long long>(most), static_cast<long long>(size));
}

inline int check_given(const char* name, const void* data) {
  return data ? SRA_OK : refuse(SRA_NULL_POINTER, "%s must be given, got NULL", name);
}

inline int check_index(const char* name, const sra_index& x) {
  if (int error = check_given(name, x.data)) return error;
  if (x.bytes != 4 && x.bytes != 8)
    return refuse(SRA_UNSUPPORTED, "%s must hold integers of 4 or 8 bytes, got %lld", name, static_cast<long long>(x.bytes));
  if (reinterpret_cast<uintptr_t>(x.data) % x.bytes)
    return refuse(SRA_MISALIGNED, "%s must lie at a multiple of its integers' %lld bytes", name, static_cast<long long>(x.bytes));
  return SRA_OK;
}

// A tensor of 16-bit elements whose rows are read and written 16 bytes at a time. Strides of 0 are fine.
inline int check_rows(const char* name, const sra_tensor& x, bool has_items) {
  constexpr int64_t vector = 8;
  if (int error = check_given(name, x.data)) return error;
  if (reinterpret_cast<uintptr_t>(x.data) % 16)
    return refuse(SRA_MISALIGNED, "%s must lie at a multiple of 16 bytes, got %p", name, x.data);
  if (x.row % vector || x.head % vector || (has_items && x.item % vector))
    return refuse(SRA_BAD_STRIDE, "strides of %s must be multiples of 8 elements, got item %lld, row %lld, head %lld", name,
                  static_cast<long long>(has_items ? x.item : 0), static_cast<long long>(x.row),
                  static_cast<long long>(x.head));
  return SRA_OK;
}

// A tensor of float32 or int32, read and written one element at a time.
inline int check_floats(const char* name, const void* data) {
  if (int error = check_given(name, data)) return error;
  if (reinterpret_cast<uintptr_t>(data) % 4) return refuse(SRA_MISALIGNED, "%s must lie at a multiple of 4 bytes, got %p", name, data);
  return SRA_OK;
}

inline int check_format(int32_t dtype, int32_t channels) {
  if (dtype != SRA_FLOAT16 && dtype != SRA_BFLOAT16)
    return refuse(SRA_UNSUPPORTED, "dtype must be SRA_FLOAT16 (0) or SRA_BFLOAT16 (1), got %d", dtype);
  if (channels != 64 && channels != 128) return refuse(SRA_UNSUPPORTED, "channels must be 64 or 128, got %d", channels);
  return SRA_OK;
}

inline int check_scale(float scale) {
  if (scale > 0 && scale < INFINITY) return SRA_OK;
  return refuse(SRA_UNSUPPORTED, "scale must be positive and finite, got %g", static_cast<double>(scale));
}

}  // namespace sra

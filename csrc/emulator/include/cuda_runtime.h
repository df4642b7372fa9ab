// What a kernel and its launcher need of CUDA's header of this name, on a CPU. First in the include path, it takes the
// place of the real one; ../README.md says what is modelled.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

typedef struct CUstream_st* cudaStream_t;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

namespace emulator {

// Runs `thread(arguments)` as every thread of the grid.
using Body = void (*)(const void* arguments);
cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, Body thread, const void* arguments);
cudaError_t allow_shared(const void* kernel, int bytes);
void block_barrier(const char* file, int line);
void warp_barrier(const char* file, int line);

}  // namespace emulator

// Set by the scheduler whenever it resumes a thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::block_barrier(file, line);
}

inline void __syncwarp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::warp_barrier(file, line);
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  return emulator::allow_shared(reinterpret_cast<const void*>(kernel), value);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const auto thread = [&] { kernel(arguments...); };
  const auto run = [](const void* closure) { (*static_cast<decltype(&thread)>(closure))(); };
  return emulator::launch(reinterpret_cast<const void*>(kernel), *config, run, &thread);
}

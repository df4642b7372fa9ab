// The machine under the emulated device functions (device.h): fibers, warps, shared memory with a memory of who touched
// it, global memory that must be announced. README.md says what it models and how to use it.
#pragma once

#include <stdint.h>

#include "cuda_runtime.h"

namespace emulator {

// Where in the kernel's source something was called.
struct Site {
  const char* file;
  int line;
};

constexpr int WARP = 32;
constexpr uint32_t SHARED_LIMIT = 232448;  // sm_90; the most that a block may have

// What a lane brings to a warp collective and takes from it, by value.
struct Lane {
  uint32_t in[8];
  uint32_t out[4];
};

// Stops the launch: the message gets the block, thread and place.
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Meets the other lanes of the warp; the last to come computes for all. `name` and `site` must be the same in every lane.
using Compute = void (*)(Lane (&lanes)[WARP], Site site);
Lane& collective(const char* name, Site site, Compute compute);
Lane& my_lane();

// cp.async of 16 bytes, zeros where not `live`; commit; wait until at most `groups` groups are in flight.
void copy_async(uint32_t to, const void* from, bool live, Site site);
void copy_commit();
void copy_wait(int groups, Site site);

// Shared memory, at a byte offset from its start. `thread` is who reads: in a collective not always the caller.
int this_thread();
const unsigned char* read_shared(uint32_t at, int bytes, int thread, Site site);
void write_shared(uint32_t at, const void* from, int bytes, Site site);

// Global memory: aligned, announced, and not written by two threads of one launch.
void read_global(const void* from, int bytes, Site site);
void write_global(void* to, int bytes, Site site);

// Events of the last launch, by name.
void count(const char* name, int64_t by = 1);

}  // namespace emulator

extern "C" {

// How the next launches run. `seed` draws the order of blocks, warps and lanes. `copies`: when an asynchronous copy lands,
// 0 at once, 1 at the wait that retires it, 2 one or the other at random.
void emulator_schedule(uint64_t seed, int copies);

// Announces memory that kernels may touch; with none announced global accesses are not checked.
void emulator_memory(const void* start, int64_t bytes, int writable);
void emulator_forget_memory();

// The diagnosis of the last launch that failed, "" if none did since emulator_schedule.
const char* emulator_report();

// How often something happened in the last launch: "mma", "ldmatrix", "cp.async", "barrier", "bank conflict", "shared bytes", ...
int64_t emulator_count(const char* name);
}

// The emulated machine: one thread block at a time, every CUDA thread a fiber. See README.md.

#include "emulator.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t STACK = 128 << 10;
constexpr uint32_t OPT_IN = 48 << 10;  // more shared memory than this needs cudaFuncSetAttribute
constexpr int NOBODY = -1, SEVERAL = -2;

// ---------------------------------------------------------------------------------------------- fibers

#if defined(__x86_64__)
using Context = void*;
extern "C" void emulator_switch(Context* from, Context to);
__asm__(
    ".text\n.globl emulator_switch\n.hidden emulator_switch\nemulator_switch:\n"
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n  mov %rsi, %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n  ret\n");
void jump(Context& from, Context& to) { emulator_switch(&from, to); }
void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + STACK) & ~uintptr_t(15)) - 2;
  *top = reinterpret_cast<void*>(entry);
  context = top - 6;
}
#else
using Context = ucontext_t;
void jump(Context& from, Context& to) { swapcontext(&from, &to); }
void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

// ---------------------------------------------------------------------------------------------- the machine

struct Copy {
  uint32_t to;
  const void* from;  // null: zeros
  bool landed;
  Site site;
};

enum class At { READY, COLLECTIVE, BARRIER, RETURNED };

struct Thread {
  Context context;
  uint3 index;
  At at;
  Site site;  // where it waits
  std::vector<Copy> open;                 // issued, not yet committed
  std::deque<std::vector<Copy>> groups;   // committed, not yet waited for
};

struct Warp {
  Lane lanes[WARP];
  int arrived;       // lanes that wait at a collective
  int first;         // the first of them,
  const char* name;  // and where
  Site site;
  int ready;
  uint32_t epoch;  // __syncwarp passed
};

// Who last wrote and read four bytes of shared memory, and when: barriers passed by the block and by the warp.
struct Word {
  int writer = NOBODY, reader = NOBODY, reader_warp = NOBODY, copier = NOBODY;
  uint32_t written = 0, written_warp = 0, read = 0, read_warp = 0;
  Site site = {"", 0};  // of the last write
};

struct Region {
  uintptr_t start, stop;
  bool writable;
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> stacks;
  size_t stacks_for = 0;
  alignas(1024) unsigned char shared[SHARED_LIMIT];
  std::vector<Word> words;
  uint32_t shared_bytes = 0;
  uint32_t epoch = 0;
  int live = 0, at_barrier = 0;
  Site barrier = {"", 0};
  int current = 0;
  Body body = nullptr;
  const void* arguments = nullptr;
  Context scheduler;
  std::mt19937_64 random{1};
  uint64_t seed = 1;
  int copies = 2;
  bool failed = false;
  std::string report;
  cudaError_t error = cudaSuccess;
  std::vector<Region> memory;
  std::unordered_map<uintptr_t, std::unique_ptr<int64_t[]>> owners;  // by page of 4096 bytes: who wrote each byte
  std::vector<std::pair<const char*, int64_t>> counts;
  std::map<const void*, int> allowed;
};

Machine machine;

Thread& me() { return machine.threads[machine.current]; }
int64_t me_in_grid() {
  const uint3& b = blockIdx;
  const int64_t block = (static_cast<int64_t>(b.z) * gridDim.y + b.y) * gridDim.x + b.x;
  return block * static_cast<int64_t>(machine.threads.size()) + machine.current;
}
uint64_t draw(uint64_t below) { return machine.random() % below; }
std::string where(Site site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

cudaError_t refuse(const std::string& why) {
  machine.report = why;
  return machine.error = cudaErrorInvalidConfiguration;
}

void leave() { jump(me().context, machine.scheduler); }

void wait(At at, Site site) {
  Thread& thread = me();
  thread.at = at;
  thread.site = site;
  machine.warps[machine.current / WARP].ready--;
  leave();
}

void release(int thread) {
  machine.threads[thread].at = At::READY;
  machine.warps[thread / WARP].ready++;
}

void release_barrier() {
  machine.at_barrier = 0;
  machine.epoch++;
  count("barrier");
  for (size_t t = 0; t < machine.threads.size(); t++)
    if (machine.threads[t].at == At::BARRIER) release(static_cast<int>(t));
}

void run_thread() {
  machine.body(machine.arguments);
  me().at = At::RETURNED;
  machine.warps[machine.current / WARP].ready--;
  machine.live--;
  if (machine.live > 0 && machine.at_barrier == machine.live) release_barrier();
  leave();
  abort();  // a thread that returned is never resumed
}

// ---------------------------------------------------------------------------------------------- shared memory

bool ordered(int then, uint32_t epoch, uint32_t warp_epoch, int now) {
  const bool same_warp = then >= 0 && then / WARP == now / WARP;
  return then == now || epoch < machine.epoch || (same_warp && warp_epoch < machine.warps[now / WARP].epoch);
}

void check_shared(uint32_t at, int bytes, Site site) {
  if (at % bytes)
    fail(site, "misaligned shared memory access: byte %u must be a multiple of %d", at, bytes);
  if (at + bytes > machine.shared_bytes)
    fail(site, "shared memory access out of bounds: bytes %u to %u of %u", at, at + bytes, machine.shared_bytes);
}

void check_write(uint32_t at, int bytes, Site site) {
  const int now = machine.current;
  check_shared(at, bytes, site);
  for (uint32_t w = at / 4; w < (at + bytes) / 4; w++) {
    const Word& word = machine.words[w];
    if (word.copier != NOBODY)
      fail(site, "shared memory at byte %u is written while an asynchronous copy of thread %d into it (%s) is in flight",
           at, word.copier, where(word.site).c_str());
    const bool mine = word.reader == now;
    const bool my_warps = word.reader_warp == now / WARP && word.read_warp < machine.warps[now / WARP].epoch;
    if (word.reader != NOBODY && word.read == machine.epoch && !mine && !my_warps)
      fail(site, "race: shared memory at byte %u is written, and thread %d read it, with no barrier between", at,
           word.reader == SEVERAL ? word.reader_warp * WARP : word.reader);
    if (word.writer != NOBODY && !ordered(word.writer, word.written, word.written_warp, now))
      fail(site, "race: shared memory at byte %u is written, and thread %d wrote it (%s), with no barrier between", at,
           word.writer, where(word.site).c_str());
  }
}

void note_write(uint32_t at, int bytes, Site site) {
  const int now = machine.current;
  for (uint32_t w = at / 4; w < (at + bytes) / 4; w++) {
    Word& word = machine.words[w];
    word.copier = word.reader = NOBODY;
    word.writer = now;
    word.written = machine.epoch;
    word.written_warp = machine.warps[now / WARP].epoch;
    word.site = site;
  }
}

void land(const Copy& copy) {
  if (copy.from)
    memcpy(machine.shared + copy.to, copy.from, 16);
  else
    memset(machine.shared + copy.to, 0, 16);
}

// ---------------------------------------------------------------------------------------------- scheduling

// Nobody can go on. Threads at a barrier wait for no one who returned, so some warp waits for its own lanes.
std::string describe_stuck() {
  size_t w = 0;
  while (!machine.warps[w].arrived) w++;
  const Warp& warp = machine.warps[w];
  unsigned lanes = 0;
  std::string others;
  for (int lane = 0; lane < WARP; lane++) {
    const Thread& thread = machine.threads[w * WARP + lane];
    if (thread.at == At::COLLECTIVE)
      lanes |= 1u << lane;
    else
      others = thread.at == At::RETURNED ? "returned" : "wait at __syncthreads (" + where(thread.site) + ")";
  }
  char mask[16];
  snprintf(mask, sizeof mask, "0x%08x", lanes);
  return std::string("deadlock in a divergent warp collective: ") + warp.name + " (" + where(warp.site) +
         ") is waited for by lanes " + mask + " of warp " + std::to_string(w) + ", others " + others;
}

void run_block() {
  const int count = static_cast<int>(machine.threads.size());
  machine.epoch = 0;
  machine.at_barrier = 0;
  machine.live = count;
  memset(machine.shared, 0xFF, machine.shared_bytes);  // NaN in every format: what nobody wrote is poison
  std::fill(machine.words.begin(), machine.words.end(), Word());
  for (Warp& warp : machine.warps) warp.arrived = 0, warp.epoch = 0, warp.ready = WARP;
  for (int t = 0; t < count; t++) {
    Thread& thread = machine.threads[t];
    const unsigned u = static_cast<unsigned>(t);
    thread.index = {u % blockDim.x, u / blockDim.x % blockDim.y, u / (blockDim.x * blockDim.y)};
    thread.at = At::READY;
    thread.open.clear();
    thread.groups.clear();
    prepare(thread.context, machine.stacks.get() + STACK * t, run_thread);
  }
  const uint64_t patience = draw(2) ? 1 : 64;  // passes over a warp before another's turn may come: skewed or mixed
  std::vector<int> runnable;
  while (machine.live > 0) {
    runnable.clear();
    for (size_t w = 0; w < machine.warps.size(); w++)
      if (machine.warps[w].ready) runnable.push_back(static_cast<int>(w));
    if (runnable.empty()) {
      machine.failed = true;
      machine.report = describe_stuck();
      return;
    }
    const int w = runnable[draw(runnable.size())];
    for (uint64_t pass = 0; pass < patience && machine.warps[w].ready; pass++) {
      const int start = static_cast<int>(draw(WARP));
      for (int i = 0; i < WARP; i++) {
        const int t = w * WARP + (start + i) % WARP;
        if (machine.threads[t].at != At::READY) continue;
        machine.current = t;
        threadIdx = machine.threads[t].index;
        jump(machine.scheduler, machine.threads[t].context);
        if (machine.failed) return;
      }
    }
  }
}

}  // namespace

// ------------------------------------------------------------------------------------------------ what kernels call

void fail(Site site, const char* format, ...) {
  char text[512];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  const uint3& b = blockIdx;
  char place[128];
  snprintf(place, sizeof place, " [block (%u, %u, %u), thread %d, ", b.x, b.y, b.z, machine.current);
  machine.report = text + std::string(place) + where(site) + "]";
  machine.failed = true;
  leave();
  abort();  // the scheduler never resumes a launch that failed
}

int this_thread() { return machine.current; }
Lane& my_lane() { return machine.warps[machine.current / WARP].lanes[machine.current % WARP]; }

void count(const char* name, int64_t by) {
  for (auto& [known, total] : machine.counts)
    if (known == name || !strcmp(known, name)) {
      total += by;
      return;
    }
  machine.counts.emplace_back(name, by);
}

Lane& collective(const char* name, Site site, Compute compute) {
  const int warp = machine.current / WARP;
  Warp& w = machine.warps[warp];
  if (w.arrived == 0) {
    w.first = machine.current % WARP;
    w.name = name;
    w.site = site;
  } else if (w.site.line != site.line || (w.name != name && strcmp(w.name, name))) {
    fail(site, "divergent warp collective: this lane is at %s, lane %d of its warp at %s (%s)", name, w.first, w.name,
         where(w.site).c_str());
  }
  if (++w.arrived < WARP) {
    wait(At::COLLECTIVE, site);
    return my_lane();
  }
  compute(w.lanes, site);
  w.arrived = 0;
  for (int t = warp * WARP; t < (warp + 1) * WARP; t++)
    if (t != machine.current) release(t);
  return my_lane();
}

void warp_barrier(const char* file, int line) {
  collective("__syncwarp", {file, line}, [](Lane(&)[WARP], Site) { machine.warps[machine.current / WARP].epoch++; });
}

void block_barrier(const char* file, int line) {
  const Site site = {file, line};
  if (machine.at_barrier && (machine.barrier.line != line || strcmp(machine.barrier.file, file)))
    fail(site, "divergent barrier: this thread is at another __syncthreads than those that wait at %s",
         where(machine.barrier).c_str());
  machine.barrier = site;
  if (++machine.at_barrier < machine.live) {
    wait(At::BARRIER, site);
    return;
  }
  release_barrier();
}

void copy_async(uint32_t to, const void* from, bool live, Site site) {
  if (reinterpret_cast<uintptr_t>(from) % 16)
    fail(site, "misaligned asynchronous copy: the global address must be a multiple of 16, got one of %d",
         static_cast<int>(reinterpret_cast<uintptr_t>(from) % 16));
  if (live) read_global(from, 16, site);
  check_write(to, 16, site);
  for (uint32_t w = to / 4; w < to / 4 + 4; w++) {
    machine.words[w].copier = machine.current;
    machine.words[w].site = site;
  }
  Copy copy = {to, live ? from : nullptr, machine.copies == 0 || (machine.copies == 2 && draw(2)), site};
  if (copy.landed)
    land(copy);
  else
    memset(machine.shared + to, 0xFF, 16);
  me().open.push_back(copy);
  count("cp.async");
}

void copy_commit() {
  me().groups.push_back(std::move(me().open));
  me().open.clear();
}

void copy_wait(int groups, Site) {
  Thread& thread = me();
  while (static_cast<int>(thread.groups.size()) > groups) {
    for (const Copy& copy : thread.groups.front()) {
      if (!copy.landed) land(copy);
      note_write(copy.to, 16, copy.site);
    }
    thread.groups.pop_front();
  }
}

const unsigned char* read_shared(uint32_t at, int bytes, int thread, Site site) {
  check_shared(at, bytes, site);
  for (uint32_t w = at / 4; w < (at + bytes) / 4; w++) {
    Word& word = machine.words[w];
    if (word.copier != NOBODY)
      fail(site, "thread %d reads shared memory at byte %u while an asynchronous copy of thread %d into it (%s) is in flight",
           thread, at, word.copier, where(word.site).c_str());
    if (word.writer == NOBODY)
      fail(site, "thread %d reads shared memory at byte %u that nobody wrote", thread, at);
    if (!ordered(word.writer, word.written, word.written_warp, thread))
      fail(site, "race: thread %d reads shared memory at byte %u, and thread %d wrote it (%s), with no barrier between",
           thread, at, word.writer, where(word.site).c_str());
    const uint32_t warp_epoch = machine.warps[thread / WARP].epoch;
    const bool first = word.reader == NOBODY || word.read < machine.epoch;
    word.reader_warp = first || word.reader_warp == thread / WARP ? thread / WARP : SEVERAL;
    word.reader = first || word.reader == thread ? thread : SEVERAL;
    word.read = machine.epoch;
    word.read_warp = warp_epoch;
  }
  return machine.shared + at;
}

void write_shared(uint32_t at, const void* from, int bytes, Site site) {
  check_write(at, bytes, site);
  note_write(at, bytes, site);
  memcpy(machine.shared + at, from, bytes);
}

namespace {

const Region* region_of(uintptr_t start, int bytes) {
  for (const Region& region : machine.memory)
    if (region.start <= start && start + bytes <= region.stop) return &region;
  return nullptr;
}

void check_global(uintptr_t start, int bytes, bool write, Site site) {
  if (start % bytes)
    fail(site, "misaligned global memory access: the address must be a multiple of %d, got one of %d", bytes,
         static_cast<int>(start % bytes));
  if (machine.memory.empty()) return;
  const Region* region = region_of(start, bytes);
  if (!region) fail(site, "global memory access out of bounds: %d bytes at %p were not announced", bytes, (void*)start);
  if (write && !region->writable) fail(site, "%d bytes at %p are written, announced to be read only", bytes, (void*)start);
}

}  // namespace

void read_global(const void* from, int bytes, Site site) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(from);
  check_global(start, bytes, false, site);
  count("global bytes read", bytes);
  const auto page = machine.owners.find(start / 4096);
  if (page == machine.owners.end()) return;
  const int64_t owner = page->second[start % 4096];
  if (owner != NOBODY && owner != me_in_grid())
    fail(site, "race: global memory at %p is read, and another thread wrote it in this launch", from);
}

void write_global(void* to, int bytes, Site site) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(to);
  check_global(start, bytes, true, site);
  count("global bytes written", bytes);
  for (uintptr_t byte = start; byte < start + bytes; byte++) {
    std::unique_ptr<int64_t[]>& page = machine.owners[byte / 4096];
    if (!page) {
      page.reset(new int64_t[4096]);
      std::fill(page.get(), page.get() + 4096, NOBODY);
    }
    int64_t& owner = page[byte % 4096];
    if (owner != NOBODY && owner != me_in_grid())
      fail(site, "race: global memory at %p is written, and another thread wrote it in this launch", to);
    owner = me_in_grid();
  }
}

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<uint32_t>(bytes) > SHARED_LIMIT) return machine.error = cudaErrorInvalidValue;
  machine.allowed[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, Body body, const void* arguments) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const int64_t threads = static_cast<int64_t>(block.x) * block.y * block.z;
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  if (threads < 1 || threads > 1024 || threads % WARP)
    return refuse("a block must have 32 to 1024 threads in whole warps, got " + std::to_string(threads));
  if (blocks < 1 || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535)
    return refuse("a grid must have 1 to 2^31 - 1, 65535 and 65535 blocks along its axes");
  const auto allowed = machine.allowed.find(kernel);
  const uint32_t most = std::max(OPT_IN, allowed == machine.allowed.end() ? 0u : static_cast<uint32_t>(allowed->second));
  if (config.dynamicSmemBytes > most)
    return refuse("shared memory must be at most the " + std::to_string(most) + " bytes that the kernel was allowed, got " +
                  std::to_string(config.dynamicSmemBytes));
  machine.random.seed(machine.seed);
  gridDim = grid;
  blockDim = block;
  machine.body = body;
  machine.arguments = arguments;
  machine.shared_bytes = static_cast<uint32_t>(config.dynamicSmemBytes);
  machine.words.resize((machine.shared_bytes + 3) / 4);
  machine.threads.resize(threads);
  machine.warps.resize(threads / WARP);
  machine.owners.clear();
  machine.counts.clear();
  count("shared bytes", machine.shared_bytes);
  if (machine.stacks_for < static_cast<size_t>(threads)) {
    machine.stacks.reset(new char[STACK * threads]);
    machine.stacks_for = threads;
  }
  std::vector<int64_t> order(blocks);
  for (int64_t b = 0; b < blocks; b++) order[b] = b;
  std::shuffle(order.begin(), order.end(), machine.random);
  machine.failed = false;
  for (int64_t b : order) {
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block();
    if (machine.failed) return machine.error = cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace emulator

// -------------------------------------------------------------------------------------------------- what hosts call

using emulator::machine;

cudaError_t cudaGetLastError() {
  const cudaError_t error = machine.error;
  machine.error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  return machine.report.empty() ? "invalid argument" : machine.report.c_str();
}

extern "C" {

void emulator_schedule(uint64_t seed, int copies) {
  machine.seed = seed;
  machine.copies = copies;
  machine.report.clear();
}

void emulator_memory(const void* start, int64_t bytes, int writable) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(start);
  machine.memory.push_back({at, at + static_cast<uintptr_t>(bytes), writable != 0});
}

void emulator_forget_memory() { machine.memory.clear(); }

const char* emulator_report() { return machine.report.c_str(); }

int64_t emulator_count(const char* name) {
  for (const auto& [known, total] : machine.counts)
    if (!strcmp(known, name)) return total;
  return 0;
}
}

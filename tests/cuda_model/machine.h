// The machine of the CUDA model (cuda_runtime.h): its state, the scheduler, and the barriers and exchanges of threads.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__USE_FORTIFY_LEVEL) && __USE_FORTIFY_LEVEL > 0
#error "compile with -U_FORTIFY_SOURCE: its longjmp refuses to go to another stack"
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockDim;

namespace kdk::model {

// ---- devices

struct Device {
  int major = 9, minor = 0, multiprocessors = 132, l2_bytes = 50 << 20;
  int shared_memory_per_block = 227 << 10, shared_memory_per_multiprocessor = 228 << 10;
  int max_cluster = 16;  // the largest cluster that fits the device
  int ptx_version = 0;   // the architecture that the kernels were compiled for; 0: this device's
};

// The attributes that cudaFuncSetAttribute set for a kernel on a device.
struct KernelAttributes {
  int dynamic_shared = 48 << 10;
  bool non_portable_cluster = false;
};

struct Launch {
  dim3 grid, block;
  int cluster;
  size_t shared;
};

// ---- threads, warps, blocks

// A place in the source at which a thread waits. In a watched build `calls` is a hash of the calls that led there.
struct Place {
  const char* file;
  int line;
  uint64_t calls = 0;
  Place(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : file(file), line(line) {}
  bool same_line(const Place& other) const { return line == other.line && strcmp(file, other.file) == 0; }
  std::string text() const {
    const char* slash = strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

enum class Wait { nothing, block_barrier, cluster_barrier, warp_exchange, bulk_barrier, the_end };
constexpr const char* kWaits[] = {"runnable", "at the block barrier", "at the cluster barrier",
                                  "in a warp exchange", "at a bulk barrier", "have ended"};

struct Block;

// Times are numbers of events: of barriers, of fences, of starts of clusters.
using Time = uint32_t;

struct Fiber {
  jmp_buf context;
  char* stack = nullptr;
  bool entered = false;  // its stack holds a loop that runs one thread after the other
  Block* block = nullptr;
  int thread = 0, priority = 0;  // priority 0 is the highest
  uint32_t number = 0;           // in the launch; 0 is no thread
  Time fence = 0;                // of the last bulk_fence
  Time fence_before = 0;         // of the last bulk_fence before the block's last barrier, if `fence` is after it
  dim3 index;
  Wait wait = Wait::nothing;
  Place place;
  // Where each function that runs was called, if the build is watched. It is no vector, whose functions are calls too.
  uintptr_t calls[64];
  int depth = 0;
};

enum class Exchange { sync, indexed, up, down, butterfly, vote };

struct Lane {
  Exchange exchange;
  uint32_t mask;
  int source;
  uint64_t value, result;
};

struct Warp {
  uint32_t present = 0, ended = 0, waiting = 0;
  Time synchronised = 0;  // the last __syncwarp
  Lane lanes[32];
};

struct BulkBarrier {
  uint32_t phase = 0;
  const Fiber* initialised_by = nullptr;
  bool published = false;               // a fence made its initialisation visible to bulk copies
  bool expecting = false;               // the one arrival of this phase has come
  int64_t to_issue = 0, to_arrive = 0;  // bytes
  std::vector<Fiber*> waiting;
};

struct Block {
  int number = 0, rank = 0;  // in the grid, in the cluster
  dim3 index;
  char* shared = nullptr;
  Fiber* first = nullptr;  // the first of the block's fibers
  int at_barrier = 0, ended = 0;
  Place barrier;
  Time synchronised = 0;  // the last block barrier
  int votes = 0, vote_result = 0;  // of __syncthreads_count
  std::vector<Warp> warps;
  std::deque<BulkBarrier> bulk_barriers;
};

// A copy under way: from global memory; or, if `from` is null, of a value that another block's thread stores.
struct BulkCopy {
  Block* block;
  char* to;
  const char* from;
  uint32_t bytes;
  BulkBarrier* barrier;
  char value[16];
};

// The set of runnable priorities: one bit a priority in `words`, and one bit in `summary` for each word that is not 0.
struct Runnable {
  std::vector<uint64_t> words, summary;

  void reset(int count) {
    words.assign(count / 64 + 1, 0);
    summary.assign(count / 4096 + 1, 0);
  }
  bool has(int i) const { return words[i / 64] >> (i % 64) & 1; }
  void add(int i) {
    words[i / 64] |= 1ull << (i % 64);
    summary[i / 4096] |= 1ull << (i / 64 % 64);
  }
  void remove(int i) {
    if (!(words[i / 64] &= ~(1ull << (i % 64)))) summary[i / 4096] &= ~(1ull << (i / 64 % 64));
  }
  int first() const {
    for (size_t s = 0; s < summary.size(); ++s) {
      if (!summary[s]) continue;
      size_t word = s * 64 + __builtin_ctzll(summary[s]);
      return (int)(word * 64 + __builtin_ctzll(words[word]));
    }
    return -1;
  }
};

struct Machine {
  // The host.
  std::mutex launching;
  std::deque<Device> devices = {Device()};
  int current_device = 0;
  std::map<std::pair<int, const void*>, KernelAttributes> kernels;
  std::map<std::string, int> failing;  // call -> error
  int last_error = 0;
  std::vector<Launch> launches;

  // The launch.
  uint64_t random = 0;              // the state of the generator
  uint32_t redraw = 0, arrive = 0;  // probabilities times 2^32: a wake-up redraws a priority, a switch ends a bulk copy
  int cluster = 1, threads = 0;     // blocks of a cluster, threads of a cluster
  size_t shared_bytes = 0;
  void (*kernel)(void*) = nullptr;
  void* arguments = nullptr;
  jmp_buf host;
  std::string error;

  // The running cluster.
  std::vector<Fiber> fibers;  // never moves: it has room for the largest cluster
  std::vector<Fiber*> order;  // by priority
  Runnable runnable;
  Fiber* current = nullptr;
  std::vector<Block> blocks;
  std::vector<BulkCopy> copies;
  int ended = 0, at_barrier = 0;
  Place barrier;
  Time now = 0, launched = 0, started = 0, synchronised = 0;  // launch, start and last barrier of the cluster
  std::vector<char> shared;  // shared memory of all its blocks
  uint64_t switches = 0;
};
inline Machine machine;

inline uint64_t scrambled(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}
inline uint64_t random_bits() { return scrambled(machine.random += 0x9e3779b97f4a7c15ull); }
inline int random_below(int n) { return (int)((random_bits() >> 32) * (uint64_t)n >> 32); }
inline bool chance(uint32_t probability) { return probability && (uint32_t)random_bits() <= probability; }

// Ends the launch. The fibers stop without unwinding their stacks.
[[noreturn]] inline void fail(const std::string& what) {
  if (!machine.current) throw std::runtime_error("CUDA model: " + what);
  machine.error = "block " + std::to_string(machine.current->block->number) + ", thread " +
                  std::to_string(machine.current->thread) + " " + what;
  _longjmp(machine.host, 1);
}

// ---- scheduling

inline void end_copy();     // memory.h
inline void run_threads();  // grid.h

// A text: for each block and each place, the number of threads that wait there.
inline std::string standstill() {
  std::map<std::pair<int, std::string>, int> counts;
  for (Fiber* fiber : machine.order) {
    const std::string place = fiber->wait == Wait::the_end ? "" : " (" + fiber->place.text() + ")";
    ++counts[{fiber->block->number, kWaits[(int)fiber->wait] + place}];
  }
  std::string text = "waits for ever (deadlock)";
  for (auto& [key, count] : counts)
    text += "; of block " + std::to_string(key.first) + ", " + std::to_string(count) + " threads " + key.second;
  return text.substr(0, 1500);
}

inline Fiber* choose() {
  if (!machine.copies.empty() && chance(machine.arrive)) end_copy();
  int first;
  while ((first = machine.runnable.first()) < 0) {
    if (machine.copies.empty()) fail(standstill());
    end_copy();
  }
  return machine.order[first];
}

// Resumes a fiber, or starts it. The caller has saved its own context.
[[noreturn]] inline void enter(Fiber* fiber) {
  machine.current = fiber;
  if (fiber->entered) _longjmp(fiber->context, 1);
  fiber->depth = 0;
  constexpr size_t guard = 4 << 10, usable = 32 << 10;  // an overflow of the stack ends the process
  if (!fiber->stack) {
    void* memory = mmap(nullptr, guard + usable, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect((char*)memory + guard, usable, PROT_READ | PROT_WRITE))
      fail("has no stack: the system gave no memory");
    fiber->stack = (char*)memory + guard;
  }
  // If all stacks ended at the same offset in a page, they would share a few lines of the cache.
  const size_t colour = fiber->thread % 8 * 512;
  static ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber->stack;
  start.uc_stack.ss_size = usable - colour;
  start.uc_link = nullptr;
  makecontext(&start, run_threads, 0);
  fiber->entered = true;
  setcontext(&start);
  abort();  // setcontext does not return
}

// Runs the runnable thread of the highest priority, which may be this thread. Returns when this thread runs again.
inline __attribute__((noinline)) void reschedule() {
  Fiber* self = machine.current;
  Fiber* next = choose();
  if (next == self) return;
  ++machine.switches;
  const int depth = self->depth;
  if (_setjmp(self->context) == 0) enter(next);
  self->depth = depth;  // enter() did not return
}

inline void sleep(Wait wait, Place place) {
  Fiber* self = machine.current;
  self->wait = wait;
  self->place = place;
  machine.runnable.remove(self->priority);
  reschedule();
}

inline void set_priority(Fiber* fiber, int priority) {
  fiber->priority = priority;
  machine.order[priority] = fiber;
  if (fiber->wait == Wait::nothing)
    machine.runnable.add(priority);
  else
    machine.runnable.remove(priority);
}

inline void wake(Fiber* fiber) {
  fiber->wait = Wait::nothing;
  machine.runnable.add(fiber->priority);
  if (chance(machine.redraw)) {
    Fiber* other = machine.order[random_below(machine.threads)];
    int priority = fiber->priority;
    set_priority(fiber, other->priority);
    set_priority(other, priority);
  }
}

// ---- barriers and exchanges

inline int block_threads() { return blockDim.x * blockDim.y * blockDim.z; }

inline void require_all_there(int ended, const std::string& what) {
  if (ended) fail("waits at the " + what + ", which " + std::to_string(ended) + " threads that ended never reach");
}

inline void wake_block(Block& block, Wait wait) {
  for (int i = 0; i < block_threads(); ++i)
    if (block.first[i].wait == wait) wake(block.first + i);
}

// The barriers are .aligned instructions: all lanes of a warp execute the same one. No kernel has its warps or blocks
// wait at several, so the first thread at a barrier decides where all threads wait.
inline void require_one_place(const char* barrier, bool is_first, Place here, Place& all) {
  const Fiber& self = *machine.current;
  for (int i = 0; i < self.depth && i < (int)std::size(self.calls); ++i)
    here.calls = scrambled(here.calls ^ self.calls[i]);
  if (is_first) all = here;
  auto at = [&] { return "waits at the " + std::string(barrier) + " of " + here.text(); };
  if (!here.same_line(all)) fail(at() + ", others at that of " + all.text());
  if (here.calls != all.calls) fail(at() + ", to which other calls led others");
}

// Returns the number of the block's threads whose predicate is not 0.
inline int block_barrier(int predicate, Place place) {
  Block& block = *machine.current->block;
  require_all_there(block.ended, "block barrier");
  require_one_place("block barrier", block.at_barrier == 0, place, block.barrier);
  block.votes += predicate != 0;
  if (++block.at_barrier < block_threads()) {
    sleep(Wait::block_barrier, place);
  } else {
    block.vote_result = block.votes;
    block.at_barrier = block.votes = 0;
    block.synchronised = ++machine.now;
    wake_block(block, Wait::block_barrier);
    reschedule();
  }
  return block.vote_result;
}

inline void cluster_barrier(Place place) {
  require_all_there(machine.ended, "cluster barrier");
  require_one_place("cluster barrier", machine.at_barrier == 0, place, machine.barrier);
  if (++machine.at_barrier < machine.threads) return sleep(Wait::cluster_barrier, place);
  machine.at_barrier = 0;
  machine.synchronised = ++machine.now;
  for (Block& block : machine.blocks) wake_block(block, Wait::cluster_barrier);
  reschedule();
}

inline std::string hex(uint64_t x) {
  char text[24];
  snprintf(text, sizeof text, "0x%llx", (unsigned long long)x);
  return text;
}

inline bool all_wait(const Warp& warp, uint32_t mask) {
  if ((warp.waiting & mask) != mask) return false;
  for (int i = 0; i < 32; ++i)
    if ((mask >> i & 1) && warp.lanes[i].mask != mask) return false;
  return true;
}

// Gives each lane of the mask the value of its source lane. In a vote, every lane gets one bit for each value that is
// not 0.
inline void exchange_values(Warp& warp, uint32_t mask, Exchange what, Place place) {
  uint64_t ballot = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) ballot |= (uint64_t)(warp.lanes[i].value != 0) << i;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    Lane& lane = warp.lanes[i];
    if (lane.exchange != what)
      fail("is in a warp exchange at " + place.text() + ", another lane in one of another kind");
    if (!(mask >> lane.source & 1))
      fail("completes a shuffle at " + place.text() + " in which lane " + std::to_string(i) + " reads lane " +
           std::to_string(lane.source) + ", which is not in the mask " + hex(mask));
    lane.result = what == Exchange::vote ? ballot : warp.lanes[lane.source].value;
  }
}

inline uint64_t exchange(Exchange what, uint32_t mask, uint64_t value, int source, Place place) {
  Fiber* self = machine.current;
  Warp& warp = self->block->warps[self->thread / 32];
  const int me = self->thread % 32;
  if (!(mask >> me & 1)) fail("is not in the mask " + hex(mask) + " of its warp exchange at " + place.text());
  if (uint32_t absent = mask & ~(warp.present & ~warp.ended))
    fail("is in a warp exchange at " + place.text() + " with lanes " + hex(absent) + ", which are not there any more");
  warp.lanes[me] = {what, mask, source, value, 0};
  warp.waiting |= 1u << me;
  if (!all_wait(warp, mask)) {
    sleep(Wait::warp_exchange, place);
  } else {
    exchange_values(warp, mask, what, place);
    warp.waiting &= ~mask;
    if (what == Exchange::sync) warp.synchronised = ++machine.now;
    for (int i = 0; i < 32; ++i)
      if ((mask >> i & 1) && i != me) wake(self - me + i);
    reschedule();
  }
  return warp.lanes[me].result;
}

}  // namespace kdk::model

// The functions of the watch (watch.h), and those that the compiler calls before each read and each write.
#define KDK_WATCHED
#include <memory>
#include <unordered_map>

#include "cuda_runtime.h"

namespace kdk::model {

// ---- touches and their order

struct Touch {
  uint32_t number = 0;  // of the thread, in the launch
  Time time = 0;

  int block() const { return (int)((number - 1) / 1024); }
  int thread() const { return (int)((number - 1) % 1024); }
  bool in_warp_of(const Touch& other) const { return (number - 1) / 32 == (other.number - 1) / 32; }
  std::string text() const {
    return "thread " + std::to_string(thread()) + " of block " + std::to_string(block());
  }
};

static Touch touch_of(const Fiber& fiber) { return {fiber.number, machine.now}; }

// Whether barriers within a block order the touch before all that the thread does from now on.
static bool ordered_in_block(const Touch& before, const Fiber& self) {
  if (before.number == self.number) return true;
  if (before.block() != self.block->number) return false;
  if (before.time < self.block->synchronised) return true;
  return before.thread() / 32 == self.thread / 32 && before.time < self.block->warps[self.thread / 32].synchronised;
}

// The same with barriers of the cluster, which order shared memory alone.
static bool ordered(const Touch& before, const Fiber& self) {
  return before.time < machine.synchronised || ordered_in_block(before, self);
}

// Whether the toucher of a byte of shared memory has called bulk_fence since, and a barrier orders that call before all
// that the thread does from now on.
static bool fenced(const Touch& touch, const Fiber& self) {
  const int rank = touch.block() - machine.blocks[0].number;
  const Fiber& toucher = machine.blocks[rank].first[touch.thread()];
  const bool counts = &toucher == &self || toucher.fence < last_barrier(*self.block);
  return (counts ? toucher.fence : toucher.fence_before) > touch.time;
}

// ---- shared memory

enum class Access { read, write, add };  // add: atomic

// The last write of a byte, and reads since: the last, the last of another lane of that read's warp, the last of
// another warp.
struct SharedByte {
  Touch write, read, of_lane, of_warp;
  bool added = false;  // the write was an add

  void add_read(const Touch& touch) {
    if (read.number == touch.number) {
      read = touch;
      return;
    }
    if (read.in_warp_of(touch)) {
      of_lane = read;
    } else {
      of_lane = of_warp.in_warp_of(touch) && of_warp.number != touch.number ? of_warp : Touch();
      of_warp = read;
    }
    read = touch;
  }
};

static const char* shared_begin;
static size_t shared_end, stride;  // from shared_begin
static std::vector<SharedByte> shared_bytes;

void watch_cluster(const char* shared, size_t stride_of_block) {
  shared_begin = shared;
  stride = stride_of_block;
  shared_end = shared ? machine.cluster * stride : 0;
  // Touches of other clusters are older than the start of this one.
  if (shared && shared_bytes.size() < machine.cluster * machine.shared_bytes)
    shared_bytes.resize(machine.cluster * machine.shared_bytes);
}

static std::string place_in_shared(size_t rank, size_t at) {
  return "byte " + std::to_string(at) + " of the shared memory of block " +
         std::to_string(machine.blocks[rank].number);
}

[[noreturn]] static void fail_unordered(const char* does, const std::string& what, const Touch& before, bool written) {
  fail(does + what + ", which " + before.text() + (written ? " wrote" : " read") + ", and no barrier stands between");
}

static void require_order(const SharedByte& byte, Access access, const Fiber& self, const char* does, size_t rank,
                          size_t at) {
  if (!ordered(byte.write, self) && !(access == Access::add && byte.added))
    fail_unordered(does, place_in_shared(rank, at), byte.write, true);
  if (access == Access::read) return;
  for (const Touch& read : {byte.read, byte.of_lane, byte.of_warp})
    if (!ordered(read, self)) fail_unordered(does, place_in_shared(rank, at), read, false);
}

static void touch_shared(size_t offset, size_t bytes, Access access) {
  const size_t rank = offset / stride, first = offset % stride;
  if (!machine.current || first + bytes > machine.shared_bytes) return;  // around a block's memory: see check_canaries
  const Fiber& self = *machine.current;
  const Touch touch = touch_of(self);
  SharedByte* const memory = &shared_bytes[rank * machine.shared_bytes];
  for (size_t at = first; at < first + bytes; ++at) {
    SharedByte& byte = memory[at];
    require_order(byte, access, self, access == Access::read ? "reads " : "writes ", rank, at);
    if (access == Access::read)
      byte.add_read(touch);
    else
      byte = {touch, {}, {}, {}, access == Access::add};
  }
}

// ---- global memory

// The last write of a byte, and the cluster that read it.
struct GlobalByte {
  Touch write;
  int cluster = 0;  // kSeveral: more than one
  Time read = 0;
};
constexpr int kSeveral = -1;

constexpr uintptr_t kPage = 4096;
static std::unordered_map<uintptr_t, std::unique_ptr<GlobalByte[]>> pages;

static void forget_pages() {
  static Time launch = 0;
  if (launch != machine.launched && pages.size() > 512) pages.clear();
  launch = machine.launched;
}

static GlobalByte& global_byte(uintptr_t address) {
  static uintptr_t recent_number = 0;
  static GlobalByte* recent = nullptr;
  if (!recent || recent_number != address / kPage) {
    forget_pages();
    auto& page = pages[recent_number = address / kPage];
    if (!page) page.reset(new GlobalByte[kPage]);
    recent = page.get();
  }
  return recent[address % kPage];
}

static int cluster_of(const Fiber& self) { return self.block->number / machine.cluster; }

static void require_own_cluster(const GlobalByte& byte, bool write, const Fiber& self, uintptr_t address) {
  const bool written = byte.write.time >= machine.launched, read = byte.read >= machine.launched;
  if (written && byte.write.block() / machine.cluster != cluster_of(self))
    fail((write ? "writes byte " : "reads byte ") + hex(address) + " of global memory, which " + byte.write.text() +
         " wrote, in another cluster of this launch");
  if (write && read && byte.cluster != cluster_of(self))
    fail("writes byte " + hex(address) + " of global memory, which another cluster of this launch read");
}

// Returns whether the thread sees what is in the byte.
static bool read_global(uintptr_t address, const Fiber& self) {
  GlobalByte& byte = global_byte(address);
  require_own_cluster(byte, false, self, address);
  const bool first = byte.read < machine.launched;
  byte.cluster = first || byte.cluster == cluster_of(self) ? cluster_of(self) : kSeveral;
  byte.read = machine.now;
  return byte.write.time < machine.launched || ordered_in_block(byte.write, self);
}

void watch_load(const void* from, void* value, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i)
    if (!read_global((uintptr_t)from + i, *machine.current)) ((char*)value)[i] = (char)0xff;
}

void watch_store(const void* to, size_t bytes) {
  const Fiber& self = *machine.current;
  for (uintptr_t address = (uintptr_t)to; address < (uintptr_t)to + bytes; ++address) {
    GlobalByte& byte = global_byte(address);
    require_own_cluster(byte, true, self, address);
    if (byte.write.time >= machine.launched && !ordered_in_block(byte.write, self))
      fail_unordered("writes byte ", hex(address) + " of global memory", byte.write, true);
    byte.write = touch_of(self);
  }
}

// ---- bulk copies

void watch_copy(const void* to, const void* from, size_t bytes) {
  const Fiber& self = *machine.current;
  const size_t rank = self.block->rank, first = (const char*)to - self.block->shared;
  for (size_t at = first; at < first + bytes; ++at) {
    SharedByte& byte = shared_bytes[rank * machine.shared_bytes + at];
    require_order(byte, Access::write, self, "copies to ", rank, at);
    for (const Touch& touch : {byte.write, byte.read, byte.of_lane, byte.of_warp})
      if (touch.time >= machine.started && !fenced(touch, self))
        fail("copies to " + place_in_shared(rank, at) + ", which " + touch.text() +
             " touched, without a bulk_fence and a barrier since");
    byte = SharedByte();
    if (!read_global((uintptr_t)from + at - first, self))
      fail("copies from byte " + hex((uintptr_t)from + at - first) + " of global memory, which another thread wrote");
  }
}

void watch_store_to_block(const void* to, size_t bytes) {
  const size_t offset = (const char*)to - shared_begin, rank = offset / stride, first = offset % stride;
  for (size_t at = first; at < first + bytes; ++at) shared_bytes[rank * machine.shared_bytes + at] = SharedByte();
}

}  // namespace kdk::model

// ---- the functions that the compiler calls

using kdk::model::Access;

static void touch(const volatile void* address, size_t bytes, Access access) {
  const size_t offset = (uintptr_t)address - (uintptr_t)kdk::model::shared_begin;
  if (offset < kdk::model::shared_end) kdk::model::touch_shared(offset, bytes, access);
}

extern "C" {
#define KDK_TOUCH(bytes)                                                                      \
  void __tsan_read##bytes(void* address) { touch(address, bytes, Access::read); }             \
  void __tsan_write##bytes(void* address) { touch(address, bytes, Access::write); }           \
  void __tsan_unaligned_read##bytes(void* address) { touch(address, bytes, Access::read); }   \
  void __tsan_unaligned_write##bytes(void* address) { touch(address, bytes, Access::write); }
KDK_TOUCH(1) KDK_TOUCH(2) KDK_TOUCH(4) KDK_TOUCH(8) KDK_TOUCH(16)
#undef KDK_TOUCH
void __tsan_read_range(void* address, size_t bytes) { touch(address, bytes, Access::read); }
void __tsan_write_range(void* address, size_t bytes) { touch(address, bytes, Access::write); }
int __tsan_atomic32_fetch_add(volatile int* address, int x, int) {
  touch(address, sizeof(int), Access::add);
  return __atomic_fetch_add(address, x, __ATOMIC_RELAXED);
}
char __tsan_atomic8_load(const volatile char* address, int) { return *address; }  // of the host
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void* call) {
  kdk::model::Fiber* self = kdk::model::machine.current;
  if (!self) return;
  if ((size_t)self->depth < std::size(self->calls)) self->calls[self->depth] = (uintptr_t)call;
  ++self->depth;
}
void __tsan_func_exit() {
  if (kdk::model::Fiber* self = kdk::model::machine.current) --self->depth;
}
void __tsan_init() {}
}

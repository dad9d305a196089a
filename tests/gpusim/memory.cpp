// Memory: bounds, alignment, traffic and races of global memory; shared memory; copies under way.
#include <algorithm>
#include <cstdlib>

#include "control.h"
#include "runtime.h"

namespace gpusim {
namespace {

// ------------------------------------------------------------------------------------------------------ global memory

/// Who touched a byte last: block + 1, the number of barriers since its start, warp; 0 for nobody.
struct Touch {
  uint32_t block;
  uint16_t epoch;
  uint16_t warp;

  bool races_with(const Touch& me) const {
    return block && (block != me.block || (epoch == me.epoch && warp != me.warp));
  }
};
constexpr uint32_t SEVERAL_BLOCKS = ~0u;
constexpr uint16_t SEVERAL_WARPS = 0xffff;

struct Buffer {
  std::string name;
  uintptr_t begin;
  size_t rows, row_bytes, stride;  // in bytes
  std::vector<Touch> readers, writers;
  Traffic traffic;

  size_t extent() const { return rows ? (rows - 1) * stride + row_bytes : 0; }
  /// Which of the rows' bytes lies there: rows may be far apart.
  size_t byte(size_t offset) const { return rows == 1 ? offset : offset / stride * row_bytes + offset % stride; }

  /// Whether all of [address, address + bytes) lies in one row.
  bool holds(uintptr_t address, size_t bytes) const {
    if (address < begin || address + bytes > begin + extent()) return false;
    const size_t offset = address - begin;
    return rows == 1 || offset % stride + bytes <= row_bytes;
  }
};

std::vector<Buffer> buffers;

Buffer* find_buffer(uintptr_t address, size_t bytes) {
  static size_t last;  // most accesses are to the same buffer as the one before
  if (last < buffers.size() && buffers[last].holds(address, bytes)) return &buffers[last];
  for (last = 0; last < buffers.size(); last++)
    if (buffers[last].holds(address, bytes)) return &buffers[last];
  return nullptr;
}

std::string nearest_buffer(uintptr_t address) {
  const Buffer* nearest = nullptr;
  size_t least = SIZE_MAX;
  for (const Buffer& buffer : buffers) {
    const uintptr_t end = buffer.begin + buffer.extent();
    const size_t distance = address < buffer.begin ? buffer.begin - address : address >= end ? address - end : 0;
    if (distance < least) {
      least = distance;
      nearest = &buffer;
    }
  }
  const auto offset = static_cast<long long>(address) - static_cast<long long>(nearest->begin);
  return "byte " + std::to_string(offset) + " of " + nearest->name + ", which has " + std::to_string(nearest->rows) +
         " rows of " + std::to_string(nearest->row_bytes) + " bytes, " + std::to_string(nearest->stride) + " apart";
}

[[noreturn]] void fail_race(const Buffer& buffer, size_t offset, Access access, const Touch& other) {
  const bool same = other.block == block_number() + 1;
  fail("race: thread %d of block %u %s byte %zu of %s, which %s has touched %s", self->number, block_number(),
       access == READ ? "reads" : "writes", offset, buffer.name.c_str(), same ? "another warp" : "another block",
       same ? "since the last barrier" : "in this launch");
}

void note_touch(Buffer& buffer, size_t offset, size_t bytes, Access access) {
  const Touch me = {block_number() + 1, uint16_t(barrier_epoch()), uint16_t(self->warp)};
  const size_t first = buffer.byte(offset);
  for (size_t i = offset; i < offset + bytes; i++) {
    Touch &reader = buffer.readers[first + i - offset], &writer = buffer.writers[first + i - offset];
    if (writer.races_with(me)) fail_race(buffer, i, access, writer);
    if (access == READ) {
      if (reader.block && reader.block != me.block) {
        reader.block = SEVERAL_BLOCKS;
      } else {
        const bool several = reader.block && reader.epoch == me.epoch && reader.warp != me.warp;
        reader = me;
        if (several) reader.warp = SEVERAL_WARPS;
      }
    } else {
      if (reader.races_with(me)) fail_race(buffer, i, access, reader);
      writer = me;
    }
  }
  (access == READ ? buffer.traffic.bytes_read : buffer.traffic.bytes_written) += bytes;
}

uint64_t touched(const std::vector<Touch>& touches) {
  return std::count_if(touches.begin(), touches.end(), [](const Touch& touch) { return touch.block != 0; });
}

// ------------------------------------------------------------------------------------------------------ shared memory

constexpr size_t STATIC_LIMIT = 48 << 10, DYNAMIC_ALIGNMENT = 128;
constexpr unsigned char POISON = 0xff, GUARD_VALUE = 0xa5;
constexpr size_t GUARD = 128;  // bytes before and after an array, whose change gives writes beyond it away

struct SharedArray {
  const void* site;
  std::string name;
  size_t bytes, guard;
  unsigned char* memory;  // with its guards

  SharedArray(const void* site, const std::string& name, size_t bytes)
      : site(site), name(name), bytes(bytes), guard(under_asan() ? 0 : GUARD) {
    memory = static_cast<unsigned char*>(new_memory(bytes + 2 * guard, DYNAMIC_ALIGNMENT));
    memset(memory, GUARD_VALUE, bytes + 2 * guard);
    memset(data(), POISON, bytes);
  }
  unsigned char* data() const { return memory + guard; }
  bool intact() const {
    const auto whole = [](const unsigned char* p, size_t n) {
      return std::all_of(p, p + n, [](unsigned char byte) { return byte == GUARD_VALUE; });
    };
    return whole(memory, guard) && whole(data() + bytes, guard);
  }
};

std::vector<SharedArray> shared_arrays;  // of the block; the first is the dynamic one
uint64_t shared_limit;                   // of static and dynamic bytes together

const SharedArray* find_shared(uintptr_t address, size_t bytes) {
  for (const SharedArray& array : shared_arrays) {
    const auto begin = reinterpret_cast<uintptr_t>(array.data());
    if (address >= begin - array.guard && address < begin + array.bytes + array.guard) {
      if (address < begin || address + bytes > begin + array.bytes)
        fail("thread %d touches bytes %lld to %lld of shared memory %s, which has %zu", self->number,
             static_cast<long long>(address) - static_cast<long long>(begin),
             static_cast<long long>(address + bytes - 1) - static_cast<long long>(begin), array.name.c_str(),
             array.bytes);
      return &array;
    }
  }
  return nullptr;
}

}  // namespace

void touch(Access access, const void* pointer, size_t bytes, size_t alignment) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address % alignment)
    fail("thread %d %s %zu bytes at an address that is %zu beyond a multiple of %zu", self->number,
         access == READ ? "reads" : "writes", bytes, address % alignment, alignment);
  if (find_shared(address, bytes) || buffers.empty()) return;
  Buffer* buffer = find_buffer(address, bytes);
  if (!buffer)
    fail("out of bounds: thread %d of block %u %s %zu bytes from byte %s", self->number, block_number(),
         access == READ ? "reads" : "writes", bytes, nearest_buffer(address).c_str() + strlen("byte "));
  note_touch(*buffer, address - buffer->begin, bytes, access);
}

void begin_memory() {
  for (Buffer& buffer : buffers) {
    buffer.readers.assign(buffer.rows * buffer.row_bytes, Touch{});
    buffer.writers.assign(buffer.rows * buffer.row_bytes, Touch{});
    buffer.traffic = {buffer.name};
  }
}

void end_memory() {
  if (!settings.recording) return;
  for (Buffer& buffer : buffers) {
    buffer.traffic.unique_read = touched(buffer.readers);
    buffer.traffic.unique_written = touched(buffer.writers);
    record.traffic.push_back(buffer.traffic);
  }
}

void begin_shared(size_t dynamic_bytes, uint64_t limit) {
  shared_limit = limit;
  shared_arrays.emplace_back(nullptr, "DYN_SMEM", dynamic_bytes);
}

std::string end_shared() {
  std::string damage;
  for (const SharedArray& array : shared_arrays) {
    if (!array.intact()) damage = "writes beyond the bounds of shared memory " + array.name;
    delete_memory(array.memory, array.bytes + 2 * array.guard);
  }
  shared_arrays.clear();
  return damage;
}

void* dynamic_shared() { return shared_arrays.front().data(); }

void* static_shared(const void* site, const char* name, size_t bytes, size_t alignment) {
  const Unwatched unwatched;
  for (const SharedArray& array : shared_arrays)
    if (array.site == site) return array.data();
  if (alignment > DYNAMIC_ALIGNMENT) fail("shared memory %s asks for an alignment of %zu", name, alignment);
  shared_arrays.emplace_back(site, name, bytes);
  uint64_t total = 0;
  for (const SharedArray& array : shared_arrays)
    if (array.site) total += array.bytes;
  record.static_shared = std::max(record.static_shared, total);
  if (total > STATIC_LIMIT || total + record.dynamic_shared > shared_limit)
    fail("%llu bytes of static and %llu of dynamic shared memory: more than %llu", (unsigned long long)total,
         (unsigned long long)record.dynamic_shared, (unsigned long long)shared_limit);
  return shared_arrays.back().data();
}

// ------------------------------------------------------------------------------------------------------------ cp.async

void begin_copy(void* to, const void* from) {
  const Unwatched unwatched;
  BlockThread& thread = current();
  thread.copies.push_back({to, from, thread.groups});
  record.copies++;
}

void commit_copies() { current().groups++; }

bool finish_copy(int pending, Copy* copy) {
  BlockThread& thread = current();
  if (thread.finished_copies == thread.copies.size()) return false;
  const Copy& next = thread.copies[thread.finished_copies];
  if (next.group >= thread.groups - pending) return false;
  *copy = next;
  thread.finished_copies++;
  return true;
}

void end_copies() {
  const BlockThread& thread = current();
  if (const size_t left = thread.copies.size() - thread.finished_copies)
    fail("thread %d exits with %zu cp.async under way", thread.thread.number, left);
}

}  // namespace gpusim

// ------------------------------------------------------------------------------------------- what the host may ask for

using namespace gpusim;

void gpusim_seed(uint64_t seed) { settings.seed = seed; }

void gpusim_register(const char* name, uint64_t address, uint64_t rows, uint64_t row_bytes, uint64_t stride) {
  for (const Buffer& buffer : buffers)
    if (buffer.begin == address && buffer.rows == rows && buffer.row_bytes == row_bytes && buffer.stride == stride)
      return;
  if (rows && row_bytes) buffers.push_back({name, uintptr_t(address), rows, row_bytes, stride, {}, {}, {}});
}
void gpusim_forget() { buffers.clear(); }

void gpusim_record(int recording) {
  settings.recording = recording;
  records.clear();
}
uint64_t gpusim_launches() { return records.size(); }
uint64_t gpusim_buffers(uint64_t launch) { return records[launch].traffic.size(); }

const char* gpusim_kernel(uint64_t launch) { return records[launch].kernel.c_str(); }
void gpusim_counts(uint64_t launch, uint64_t counts[14]) {
  const Record& r = records[launch];
  const uint64_t all[] = {r.grid.x,
                          r.grid.y,
                          r.grid.z,
                          r.block.x,
                          r.block.y,
                          r.block.z,
                          r.dynamic_shared,
                          r.static_shared,
                          r.mma,
                          r.shuffles,
                          r.barriers,
                          r.ldmatrix,
                          r.ldmatrix_conflicts,
                          r.copies};
  std::copy(std::begin(all), std::end(all), counts);
}

const char* gpusim_buffer(uint64_t launch, uint64_t buffer) { return records[launch].traffic[buffer].buffer.c_str(); }
void gpusim_traffic(uint64_t launch, uint64_t buffer, uint64_t counts[4]) {
  const Traffic& t = records[launch].traffic[buffer];
  const uint64_t all[] = {t.bytes_read, t.bytes_written, t.unique_read, t.unique_written};
  std::copy(std::begin(all), std::end(all), counts);
}

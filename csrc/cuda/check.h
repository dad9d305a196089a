// What a launcher refuses before it launches anything, in words.
#pragma once
#include <cstdint>
#include <string>

#include "llmbuilder/cuda.h"

namespace llmbuilder::gpu {

/// Collects the first thing that is wrong with a launcher's arguments.
class Check {
 public:
  explicit Check(const char* launcher) : launcher_(launcher) {}
  const Status& status() const { return status_; }

  Check& that(bool right, const std::string& otherwise) {
    if (status_ && !right) {
      status_.kind = Status::REFUSED;
      status_.message = std::string(launcher_) + ": " + otherwise;
    }
    return *this;
  }

  Check& matrix(const char* name, const ConstMatrix& m, int64_t rows, int64_t columns) {
    that(m.rows == rows && m.columns == columns,
         std::string(name) + " is " + shape(m.rows, m.columns) + ", expected " + shape(rows, columns));
    that(rows >= 0 && columns >= 0, std::string(name) + " has a negative size, " + shape(rows, columns));
    that(m.stride >= columns || rows <= 1, std::string(name) + ": rows of " + std::to_string(columns) +
                                               " columns that are " + std::to_string(m.stride) + " apart overlap");
    return pointer(name, m.data, rows > 0 && columns > 0);
  }

  Check& count(const char* name, int64_t number) {
    return that(number >= 0, std::string(name) + " is " + std::to_string(number) + ", below 0");
  }

  Check& pointer(const char* name, const void* data, bool needed) {
    return that(data || !needed, std::string(name) + " is null");
  }

  Check& workspace(const void* memory, bool needed) {
    return pointer("the workspace", memory, needed)
        .that(reinterpret_cast<uintptr_t>(memory) % 16 == 0, "the workspace must be at a multiple of 16 bytes");
  }

  /// A mask counts rows in 32 bits.
  Check& mask(const DeviceMask& mask, int64_t rows) {
    that(mask.threshold < 65536, "the mask's threshold is " + std::to_string(mask.threshold) + ", must be below 65536");
    if (mask.threshold == 0) return *this;
    that(rows <= int64_t(1) << 32, "a mask has at most 2^32 rows, got " + std::to_string(rows));
    return pointer("the mask's seed", mask.seed, true);
  }

  /// Blocks in the grid's x, which are counted in 31 bits.
  Check& blocks(int64_t count) {
    return that(count <= 0x7fffffff, "too large for one launch, " + std::to_string(count) + " blocks");
  }

 private:
  static std::string shape(int64_t rows, int64_t columns) {
    return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
  }

  const char* launcher_;
  Status status_;
};

}  // namespace llmbuilder::gpu

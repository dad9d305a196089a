// Scratch memory that outlives a call: fresh pages cost more than the work done on them.
#pragma once
#include <cstdint>

namespace llmbuilder {

/// `bytes` of uninitialised memory, aligned to 64, taken from a pool and given back to it. Any thread may ask at any
/// time; the pool keeps at most KEPT_BYTES.
class Workspace {
 public:
  static constexpr int64_t KEPT_BYTES = int64_t(64) << 20;

  explicit Workspace(int64_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const;

 private:
  void* block_;
  int64_t bytes_;
};

}  // namespace llmbuilder

#include "workspace.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace llmbuilder {
namespace {

struct Block {
  void* memory;
  int64_t bytes;
};

struct Pool {
  std::mutex lock;
  std::vector<Block> blocks;
  int64_t bytes = 0;
};

// never destroyed: a thread may still compute while the process exits
Pool& pool() {
  static Pool& only = *new Pool;
  return only;
}

}  // namespace

Workspace::Workspace(int64_t bytes) : block_(nullptr), bytes_((std::max<int64_t>(bytes, 1) + 4095) / 4096 * 4096) {
  {
    Pool& p = pool();
    std::lock_guard<std::mutex> hold(p.lock);
    // the smallest block that is large enough
    auto best = p.blocks.end();
    for (auto b = p.blocks.begin(); b != p.blocks.end(); ++b)
      if (b->bytes >= bytes_ && (best == p.blocks.end() || b->bytes < best->bytes)) best = b;
    if (best != p.blocks.end()) {
      block_ = best->memory;
      bytes_ = best->bytes;
      p.bytes -= best->bytes;
      p.blocks.erase(best);
      return;
    }
  }
  block_ = std::aligned_alloc(64, static_cast<size_t>(bytes_));
  if (!block_) throw std::bad_alloc();
}

Workspace::~Workspace() {
  Pool& p = pool();
  std::lock_guard<std::mutex> hold(p.lock);
  // make room by freeing the oldest, which the present shapes use least
  while (!p.blocks.empty() && p.bytes + bytes_ > KEPT_BYTES) {
    std::free(p.blocks.front().memory);
    p.bytes -= p.blocks.front().bytes;
    p.blocks.erase(p.blocks.begin());
  }
  if (bytes_ > KEPT_BYTES) {
    std::free(block_);
  } else {
    p.blocks.push_back({block_, bytes_});
    p.bytes += bytes_;
  }
}

void* Workspace::data() const { return block_; }

}  // namespace llmbuilder

// The mask of philox.h on a GPU. A call of draw() costs some 54 instructions and decides eight columns of a row, so a
// kernel gives each thread eight columns at a time: a layout that owns fewer pays for slices that nobody uses.
#pragma once
#include "cuda/device.h"
#include "llmbuilder/cuda.h"
#include "llmbuilder/philox.h"

namespace llmbuilder::gpu {

/// What a Philox call says of columns 8 * call ... 8 * call + 7: eight slices of sixteen bits, and what they must
/// reach.
struct Keep {
  uint32_t words[4];
  uint32_t threshold;

  /// Whether column 8 * call + i stays.
  DEVICE bool operator()(int i) const { return (words[i / 2] >> (16 * (i % 2)) & 0xffffu) >= threshold; }

  /// Ones over the sixteen bits of each column of the i-th pair that stays, zeros over the other: for packed elements.
  DEVICE uint32_t pair(int i) const {
    return ((*this)(2 * i) ? 0xffffu : 0u) | ((*this)(2 * i + 1) ? 0xffff0000u : 0u);
  }
};

/// The mask of one launch, its seed read from memory. Without dropout (threshold 0) there is no seed to read.
struct Mask {
  uint32_t key_low, key_high, stream, threshold;

  DEVICE explicit Mask(const DeviceMask& mask)
      : key_low(0), key_high(0), stream(mask.stream), threshold(mask.threshold) {
    if (threshold == 0) return;
    const uint64_t seed = load(mask.seed);
    key_low = uint32_t(seed);
    key_high = uint32_t(seed >> 32);
  }

  /// Columns 8 * call ... 8 * call + 7 of a row.
  DEVICE Keep draw(uint32_t row, uint32_t call) const {
    uint32_t c0 = call, c1 = row, c2 = stream, c3 = 0, k0 = key_low, k1 = key_high;
#pragma unroll
    for (int round = 0; round < PHILOX_ROUNDS; round++, k0 += PHILOX_WEYL_0, k1 += PHILOX_WEYL_1) {
      const uint64_t p0 = uint64_t(PHILOX_MULTIPLIER_0) * c0, p1 = uint64_t(PHILOX_MULTIPLIER_1) * c2;
      c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
      c1 = uint32_t(p1);
      c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
      c3 = uint32_t(p0);
    }
    return {{c0, c1, c2, c3}, threshold};
  }
};

/// The factor of what stays, computed on the host and rounded once.
inline float mask_scale(const DeviceMask& mask) { return float(65536.0 / (65536.0 - mask.threshold)); }

}  // namespace llmbuilder::gpu

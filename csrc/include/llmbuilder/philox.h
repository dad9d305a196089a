// The dropout mask, defined once for every backend. It never changes: a run must repeat on another machine and release.
//
//   words = Philox4x32-7(counter = (column / 8, row, stream, 0), key = (seed low, seed high))
//   slice = the (column % 8)-th sixteen bits of words, the low half of word 0 first
//   keep  = slice >= threshold
//
// column counts in the last dimension and row over all leading ones, 32 bits each, so that no call straddles rows.
// Philox4x32 with seven rounds is Crush-resistant: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy
// as 1, 2, 3" (SC '11).
#pragma once
#include <cstdint>

namespace llmbuilder {

constexpr int PHILOX_ROUNDS = 7;
constexpr uint32_t PHILOX_MULTIPLIER_0 = 0xD2511F53u, PHILOX_MULTIPLIER_1 = 0xCD9E8D57u;
constexpr uint32_t PHILOX_WEYL_0 = 0x9E3779B9u, PHILOX_WEYL_1 = 0xBB67AE85u;

/// Which mask: `stream` is one of 2^32 independent masks of a seed, `threshold` in [0, 65536) is p in 1/65536, and 0
/// keeps everything.
struct MaskKey {
  uint64_t seed;
  uint32_t stream;
  uint32_t threshold;
};

/// words[n][4] = Philox4x32-7(counters[n][4], key): the generator alone, for its published test vectors.
using Philox = void(const uint32_t* counters, uint32_t* words, int64_t n, uint64_t key);

}  // namespace llmbuilder

// Operations of a warp: lanes wait for each other, and the last to arrive carries the operation out for all.
#include <cmath>

#include "runtime.h"

namespace gpusim {

std::vector<Warp> warps;

void reset_warps(int threads) {
  warps.assign((threads + LANES - 1) / LANES, Warp{});
  for (size_t i = 0; i < warps.size(); i++) warps[i].first = int(i) * LANES;
}

int lanes_waiting() {
  int lanes = 0;
  for (const Warp& warp : warps) lanes += __builtin_popcount(warp.arrived);
  return lanes;
}

namespace {

const char* name(Operation operation) {
  constexpr const char* names[] = {"__syncwarp", "shuffle",  "mma bf16",      "mma f16",
                                   "mma tf32",   "ldmatrix", "ldmatrix.trans"};
  return names[operation];
}

template <class F>
void each_lane(const Warp& warp, F f) {
  for (int lane = 0; lane < LANES; lane++)
    if (warp.mask >> lane & 1) f(lane);
}

void shuffle_lanes(Warp& warp) {
  record.shuffles++;
  const auto operand = [&](int lane) { return static_cast<ShuffleOperand*>(warp.operands[lane]); };
  each_lane(warp, [&](int lane) {
    const int source = operand(lane)->source;
    if (!(warp.mask >> source & 1))
      fail("thread %d shuffles from lane %d, which is not in the mask %08x", warp.first + lane, source, warp.mask);
    operand(lane)->result = operand(source)->value;
  });
}

float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
float bfloat(uint32_t word, int half) { return float_of(half ? word & 0xffff0000u : word << 16); }
float half_of(uint32_t word, int half) { return device::half_to_float(uint16_t(half ? word >> 16 : word)); }

float tf32(uint32_t word) {
  const float value = float_of(word);
  if ((word & 0x1fffu) && !std::isnan(value)) fail("mma: %g is no tf32; round_to_tf32 makes one", double(value));
  return value;
}

/// The operands of m16n8k16 or m16n8k8 as matrices.
struct Matrices {
  float a[16][16], b[16][8], d[16][8];
};

template <class F>
void each_accumulator(Warp& warp, Matrices& m, F f) {
  for (int lane = 0; lane < LANES; lane++) {
    float* d = static_cast<MmaOperand*>(warp.operands[lane])->d;
    for (int i = 0; i < 4; i++) f(d[i], m.d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]);
  }
}

template <class Element>
void gather16(const Warp& warp, Matrices& m, Element element) {
  for (int lane = 0; lane < LANES; lane++) {
    const auto* operand = static_cast<MmaOperand*>(warp.operands[lane]);
    const int g = lane / 4, t = 2 * (lane % 4);
    for (int half = 0; half < 2; half++) {
      for (int i = 0; i < 4; i++) m.a[g + 8 * (i % 2)][t + half + 8 * (i / 2)] = element(operand->a[i], half);
      for (int i = 0; i < 2; i++) m.b[t + half + 8 * i][g] = element(operand->b[i], half);
    }
  }
}

void gather_tf32(const Warp& warp, Matrices& m) {
  for (int lane = 0; lane < LANES; lane++) {
    const auto* operand = static_cast<MmaOperand*>(warp.operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) m.a[g + 8 * (i % 2)][t + 4 * (i / 2)] = tf32(operand->a[i]);
    for (int i = 0; i < 2; i++) m.b[t + 4 * i][g] = tf32(operand->b[i]);
  }
}

void multiply(Warp& warp) {
  record.mma++;
  Matrices m;
  if (warp.operation == MMA_TF32) gather_tf32(warp, m);
  if (warp.operation == MMA_BF16) gather16(warp, m, bfloat);
  if (warp.operation == MMA_F16) gather16(warp, m, half_of);
  each_accumulator(warp, m, [](float& d, float& element) { element = d; });
  const int depth = warp.operation == MMA_TF32 ? 8 : 16;
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < depth; k++)
      for (int column = 0; column < 8; column++) m.d[row][column] += m.a[row][k] * m.b[k][column];
  each_accumulator(warp, m, [](float& d, float& element) { d = element; });
}

/// Cycles beyond one for eight rows of 16 bytes from 32 banks of 4.
int conflicts(const LdmatrixOperand* const* rows) {
  int most = 0, count[8] = {};
  for (int i = 0; i < 8; i++) {
    bool repeated = false;  // the same row once more costs nothing
    for (int j = 0; j < i; j++) repeated |= rows[j]->address == rows[i]->address;
    if (repeated) continue;
    const int banks = rows[i]->address / 16 % 8;
    if (++count[banks] > most) most = count[banks];
  }
  return most - 1;
}

void load_matrices(Warp& warp) {
  const auto operands = reinterpret_cast<LdmatrixOperand* const*>(warp.operands);
  for (int matrix = 0; matrix < 4; matrix++) {
    LdmatrixOperand* const* rows = operands + 8 * matrix;
    record.ldmatrix++;
    record.ldmatrix_conflicts += conflicts(rows);
    const auto element = [&](int row, int column) {
      return rows[row]->row[column / 2] >> (16 * (column % 2)) & 0xffffu;
    };
    for (int lane = 0; lane < LANES; lane++) {
      const int i = lane / 4, j = 2 * (lane % 4);
      operands[lane]->words[matrix] = warp.operation == LDMATRIX ? element(i, j) | element(i, j + 1) << 16
                                                                 : element(j, i) | element(j + 1, i) << 16;
    }
  }
}

void carry_out(Warp& warp) {
  switch (warp.operation) {
    case SYNCWARP:
      return;
    case SHUFFLE:
      return shuffle_lanes(warp);
    case MMA_BF16:
    case MMA_F16:
    case MMA_TF32:
      return multiply(warp);
    case LDMATRIX:
    case LDMATRIX_TRANS:
      return load_matrices(warp);
  }
}

}  // namespace

void collective(Operation operation, uint32_t mask, void* operand) {
  const Thread& thread = *self;
  Warp& warp = warps[thread.warp];
  if (operation == SYNCWARP) release(&warp.key);
  if (!(mask >> thread.lane & 1))
    fail("thread %d calls %s with mask %08x, which excludes it", thread.number, name(operation), mask);
  if (!warp.arrived) {
    warp.operation = operation;
    warp.mask = mask;
  } else if (warp.operation != operation || warp.mask != mask) {
    fail("warp %d diverged: thread %d is at %s with mask %08x, others at %s with mask %08x", thread.warp, thread.number,
         name(operation), mask, name(warp.operation), warp.mask);
  }
  warp.arrived |= 1u << thread.lane;
  warp.operands[thread.lane] = operand;
  if (warp.arrived == warp.mask) {
    carry_out(warp);
    warp.arrived = 0;
    each_lane(warp, [&](int lane) {
      if (lane != thread.lane) wake(warp.first + lane);
    });
  } else {
    wait_for_wake();
  }
  if (operation == SYNCWARP) acquire(&warp.key);
}

}  // namespace gpusim

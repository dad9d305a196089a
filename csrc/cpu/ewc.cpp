#include "isa.h"
#include "vec.h"
#include "workspace.h"

namespace llmbuilder::LLMBUILDER_ISA {
namespace {

constexpr i64 CHUNK = 1 << 14;  // elements that a thread takes at once, and the extent of one partial value

/// Cuts many tensors into chunks that never straddle two, numbered through.
class Chunks {
 public:
  struct Chunk {
    i64 tensor, begin, n;
  };

  Chunks(i64 count, const i64* sizes) : count_(count), sizes_(sizes), memory_((count + 1) * sizeof(i64)) {
    auto* first = (i64*)memory_.data();
    first[0] = 0;
    for (i64 i = 0; i < count; i++) first[i + 1] = first[i] + parts_of(sizes[i], CHUNK);
  }
  i64 count() const { return first()[count_]; }
  Chunk at(i64 index) const {
    i64 low = 0, high = count_;  // the last tensor that starts at or before the chunk
    while (high - low > 1) {
      const i64 middle = (low + high) / 2;
      (first()[middle] <= index ? low : high) = middle;
    }
    const i64 begin = (index - first()[low]) * CHUNK;
    return {low, begin, least(CHUNK, sizes_[low] - begin)};
  }

 private:
  const i64* first() const { return (const i64*)memory_.data(); }
  i64 count_;
  const i64* sizes_;
  Workspace memory_;
};

// Everything is computed in double: memory is the limit, and each result is then rounded just once.

template <class T>
inline Doubles load_doubles(const T* p) {
  return to_doubles(load(p));
}
template <class T>
inline void store_doubles(T* p, D low, D high) {
  store(p, to_floats({low, high}));
}

/// LANES elements: adds the gradient to g, and F (theta - anchor)^2 to sums. F = 1 unless WEIGHTED.
template <bool WEIGHTED, class T>
inline void penalty_step(const T* p, const T* q, const T* f, T* g, double strength, Doubles& sums) {
  const Doubles theta = load_doubles(p), anchor = load_doubles(q), grad = load_doubles(g);
  const D low = theta.low - anchor.low, high = theta.high - anchor.high;
  D weighted_low = low, weighted_high = high;
  if (WEIGHTED) {
    const Doubles weight = load_doubles(f);
    weighted_low *= weight.low;
    weighted_high *= weight.high;
  }
  sums.low += weighted_low * low;
  sums.high += weighted_high * high;
  store_doubles(g, grad.low + strength * weighted_low, grad.high + strength * weighted_high);
}

template <bool WEIGHTED, class T>
double penalty(const T* p, const T* q, const T* f, T* g, i64 n, double strength) {
  Doubles sums[2] = {};
  i64 e = 0;
  for (; e + 2 * LANES <= n; e += 2 * LANES) {
    penalty_step<WEIGHTED>(p + e, q + e, WEIGHTED ? f + e : f, g + e, strength, sums[0]);
    penalty_step<WEIGHTED>(p + e + LANES, q + e + LANES, f + e + LANES, g + e + LANES, strength, sums[1]);
  }
  for (; e < n; e += LANES) {  // the tail, by way of padded copies
    const i64 size = least<i64>(LANES, n - e) * sizeof(T);
    T part[4][LANES] = {};
    memcpy(part[0], p + e, size);
    memcpy(part[1], q + e, size);
    if (WEIGHTED) memcpy(part[2], f + e, size);
    memcpy(part[3], g + e, size);
    penalty_step<WEIGHTED>(part[0], part[1], part[2], part[3], strength, sums[0]);
    memcpy(g + e, part[3], size);
  }
  const D sum = (sums[0].low + sums[0].high) + (sums[1].low + sums[1].high);
  double total = 0;
  for (int i = 0; i < LANES / 2; i++) total += sum[i];
  return total;
}

template <class T>
inline void accumulate_step(T* f, const T* g, double weight) {
  const Doubles fisher = load_doubles(f), grad = load_doubles(g);
  store_doubles(f, fisher.low + weight * grad.low * grad.low, fisher.high + weight * grad.high * grad.high);
}

template <class T>
void accumulate(T* f, const T* g, i64 n, double weight) {
  i64 e = 0;
  for (; e + LANES <= n; e += LANES) accumulate_step(f + e, g + e, weight);
  if (e < n) {
    const i64 size = (n - e) * sizeof(T);
    T part[2][LANES] = {};
    memcpy(part[0], f + e, size);
    memcpy(part[1], g + e, size);
    accumulate_step(part[0], part[1], weight);
    memcpy(f + e, part[0], size);
  }
}

}  // namespace

double ewc_penalty(DType dtype, int64_t count, const void* const* params, const void* const* anchors,
                   const void* const* fishers, void* const* grads, const int64_t* sizes, double strength, int threads) {
  const Chunks chunks(count, sizes);
  const i64 n = chunks.count();
  const Workspace memory(n * sizeof(double));
  const auto value = (double*)memory.data();
  dispatch(dtype, [&](auto* type) {
    using T = decltype(type);
#pragma omp parallel for schedule(static) num_threads(team(n* CHUNK, threads))
    for (i64 i = 0; i < n; i++) {
      const auto [tensor, begin, size] = chunks.at(i);
      const T p = (T)params[tensor] + begin, q = (T)anchors[tensor] + begin, g = (T)grads[tensor] + begin;
      value[i] = fishers ? penalty<true>(p, q, (T)fishers[tensor] + begin, g, size, strength)
                         : penalty<false>(p, q, (T) nullptr, g, size, strength);
    }
  });
  double total = 0;
  for (i64 i = 0; i < n; i++) total += value[i];
  return 0.5 * strength * total;
}

void ewc_accumulate(DType dtype, int64_t count, void* const* fishers, const void* const* grads, const int64_t* sizes,
                    double weight, int threads) {
  const Chunks chunks(count, sizes);
  const i64 n = chunks.count();
  dispatch(dtype, [&](auto* type) {
    using T = decltype(type);
#pragma omp parallel for schedule(static) num_threads(team(n* CHUNK, threads))
    for (i64 i = 0; i < n; i++) {
      const auto [tensor, begin, size] = chunks.at(i);
      accumulate((T)fishers[tensor] + begin, (T)grads[tensor] + begin, size, weight);
    }
  });
}

}  // namespace llmbuilder::LLMBUILDER_ISA

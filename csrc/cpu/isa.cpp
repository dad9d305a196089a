#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace llmbuilder {

// defined by table.cpp, once for each set that CMake found the compiler able to build and wrote into isas.inc
#define ISA(name)               \
  namespace name {              \
  extern const Kernels kernels; \
  }
#include "isas.inc"
#undef ISA

namespace {

// __builtin_cpu_supports also asks the operating system whether it saves the wide registers
namespace fits {
bool plain() { return true; }
#if defined(__x86_64__)
bool avx2() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
}
bool avx512() {
  return avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool avx512_bf16() { return avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
}  // namespace fits

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*fits)();
};
#define ISA(name) {#name, &name::kernels, fits::name},
constexpr Isa ISAS[] = {
#include "isas.inc"
};  // best first
#undef ISA

const Isa& find(const std::string& name, const std::string& asked_by) {
  std::string known;
  for (const Isa& isa : ISAS) {
    if (!isa.fits()) continue;
    if (name == isa.name) return isa;
    known += (known.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument(asked_by + " asks for the instruction set '" + name +
                              "', which this build or this processor does not have; it has: " + known);
}

const Isa& first_choice() {
  if (const char* name = std::getenv("LLMBUILDER_ISA"); name && *name) return find(name, "LLMBUILDER_ISA");
  for (const Isa& isa : ISAS)
    if (isa.fits()) return isa;
  throw std::invalid_argument("this build has no kernels");  // never: plain always fits
}

std::atomic<const Isa*> chosen{nullptr};

const Isa& current() {
  const Isa* isa = chosen.load(std::memory_order_relaxed);
  if (!isa) chosen.store(isa = &first_choice(), std::memory_order_relaxed);
  return *isa;
}

}  // namespace

const Kernels& kernels() { return *current().kernels; }

const char* isa() { return current().name; }

const char* available_isa(int index) {
  for (const Isa& isa : ISAS)
    if (isa.fits() && index-- == 0) return isa.name;
  return nullptr;
}

void set_isa(const char* name) { chosen.store(&find(name, "set_isa"), std::memory_order_relaxed); }

}  // namespace llmbuilder

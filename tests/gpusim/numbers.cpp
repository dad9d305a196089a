// Conversions to and from 16-bit floats as the hardware rounds: to nearest, ties to even; NaN becomes one certain NaN.
#include <algorithm>
#include <cmath>

#include "gpusim.h"

namespace gpusim::device {
namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

}  // namespace

uint16_t float_to_bfloat(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint32_t bits = bits_of(value);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

uint16_t float_to_half(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint16_t sign = uint16_t(bits_of(value) >> 16 & 0x8000u);
  const float size = std::fabs(value);
  if (size == 0) return sign;                   // frexp gives it the exponent of a half
  if (size >= 65520.0f) return sign | 0x7c00u;  // beyond half way from the largest to the next
  int exponent;
  std::frexp(size, &exponent);                    // size < 2^exponent
  const int unit = std::max(exponent - 11, -24);  // the last place is worth 2^unit
  const auto places = uint32_t(std::nearbyint(std::ldexp(size, -unit)));
  // 11 bits of which the first is implied; a carry goes into the exponent, as it should
  return sign | uint16_t(unit == -24 ? places : (uint32_t(unit + 24) << 10) + places);
}

float half_to_float(uint16_t bits) {
  // shifted into place the exponent is too small by 127 - 15, also for subnormal numbers
  const uint32_t shifted = uint32_t(bits & 0x7fffu) << 13;
  float size;
  memcpy(&size, &shifted, 4);
  size *= 0x1p112f;
  if ((bits & 0x7c00u) == 0x7c00u) size = bits & 0x3ffu ? NAN : INFINITY;
  return bits & 0x8000u ? -size : size;
}

}  // namespace gpusim::device

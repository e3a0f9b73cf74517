// What travels through a chain: values, or where the source is wanted keys of value and source; see
// cpu/morphology_body.inc, whose results these give. An erosion's items are negated on their way,
// so that every window takes a maximum; in memory between two launches they are not.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "math/morphology.h"

namespace dpfast::cuda {

template <class To, class From>
__device__ inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_of: as many bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class Element>
struct Values {
  using Item = Element;
  using Value = Element;
  static constexpr bool kHasIndex = false;
  static constexpr int kSegment = 16;  // outputs that a thread makes of one stretch of a line

  __device__ static Item best(Item a, Item b) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(Item) == 4) {
      float c;
      asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
      return c;
    }
#endif
    return a >= b || a != a ? a : b;
  }
  __device__ static Item negate(Item a) { return -a; }
  __device__ static Item outside() { return -INFINITY; }
  __device__ static Item constant(double value) { return static_cast<Item>(value); }
  __device__ static Item from(Value x, std::int32_t) { return x; }
  __device__ static Value value(Item a) { return a; }
  __device__ static std::int32_t number(Item) { return -1; }
  __device__ static Item raise(Item a, double height) { return a + static_cast<Item>(height); }
};

// The value's sortable bits above, the complement of its element's number (math/source_index.h)
// below; one signed comparison. The lowest of all is nothing, number -1 (below: 0) the border's
// constant.
struct SingleKeys {
  using Item = std::int64_t;
  using Value = float;
  static constexpr bool kHasIndex = true;
  static constexpr int kSegment = 16;
  static constexpr std::int64_t kNothing = INT64_MIN;
  static constexpr std::int32_t kNaN = 0x7fffffff;
  // -Inf without a source, to which a window that holds nothing comes.
  static constexpr std::int64_t kLowest = static_cast<std::int64_t>(0x807fffff00000000);

  __device__ static Item best(Item a, Item b) { return a > b ? a : b; }
  __device__ static Item negate(Item a) {
    const Item some = best(a, kLowest);
    const Item flipped = some ^ static_cast<std::int64_t>(0xffffffff00000000);
    // NaN has become the lowest, and goes back to the top.
    return flipped < kLowest ? join(kNaN, static_cast<std::int32_t>(some)) : flipped;
  }
  __device__ static Item outside() { return kNothing; }
  __device__ static Item constant(double value) { return pack(static_cast<float>(value), 0); }
  __device__ static Item from(float x, std::int32_t number) { return pack(x, ~number); }
  __device__ static float value(Item a) {
    const Item some = best(a, kLowest);
    return bits_of<float>(math::sortable(static_cast<std::int32_t>(some >> 32)));
  }
  __device__ static std::int32_t number(Item a) { return ~static_cast<std::int32_t>(a); }
  __device__ static Item raise(Item a, double height) {
    if (a < kLowest) return a;
    return pack(value(a) + static_cast<float>(height), static_cast<std::int32_t>(a));
  }

 private:
  __device__ static Item join(std::int32_t high, std::int32_t low) {
    return static_cast<std::int64_t>(
        (static_cast<std::uint64_t>(static_cast<std::uint32_t>(high)) << 32) |
        static_cast<std::uint32_t>(low));
  }
  __device__ static Item pack(float x, std::int32_t low) {
    const std::int32_t bits = bits_of<std::int32_t>(x + 0.0f);  // one zero
    return join(x == x ? math::sortable(bits) : kNaN, low);
  }
};

// The same for doubles, whose keys fill no machine word.
struct alignas(16) DoubleKey {
  std::int64_t value, low;  // low: minus the number, INT64_MIN for none
};

struct DoubleKeys {
  using Item = DoubleKey;
  using Value = double;
  static constexpr bool kHasIndex = true;
  static constexpr int kSegment = 8;
  static constexpr std::int64_t kNaN = INT64_MAX;
  static constexpr std::int64_t kLowest = static_cast<std::int64_t>(0x800fffffffffffff);

  __device__ static Item best(Item a, Item b) {
    return b.value > a.value || (b.value == a.value && b.low > a.low) ? b : a;
  }
  __device__ static Item negate(Item a) {
    const Item some = best(a, {kLowest, INT64_MIN});
    return {some.value == kNaN ? kNaN : ~some.value, some.low};
  }
  __device__ static Item outside() { return {INT64_MIN, INT64_MIN}; }
  __device__ static Item constant(double value) { return {key(value), INT64_MIN}; }
  __device__ static Item from(double x, std::int32_t number) {
    return {key(x), -static_cast<std::int64_t>(number)};
  }
  __device__ static double value(Item a) {
    return bits_of<double>(math::sortable(best(a, {kLowest, INT64_MIN}).value));
  }
  __device__ static std::int32_t number(Item a) {
    return a.low == INT64_MIN ? -1 : static_cast<std::int32_t>(-a.low);
  }
  __device__ static Item raise(Item a, double height) {
    return a.value < kLowest ? a : Item{key(value(a) + height), a.low};
  }

 private:
  __device__ static std::int64_t key(double x) {
    return x == x ? math::sortable(bits_of<std::int64_t>(x + 0.0)) : kNaN;
  }
};

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class T>
struct Narrow {
  __device__ static T from(T x) { return x; }
};
template <>
struct Narrow<__nv_bfloat16> {
  __device__ static __nv_bfloat16 from(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct Narrow<__half> {
  __device__ static __half from(float x) { return __float2half_rn(x); }
};

}  // namespace dpfast::cuda

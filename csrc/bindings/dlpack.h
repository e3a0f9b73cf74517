// The part of DLPack's C exchange interface (version 1.3) that describes a tensor without owning
// it: what a Python attribute costs tens of nanoseconds for, it gives all at once.
#pragma once

#include <cstdint>

namespace dpfast::bindings::dlpack {

constexpr std::uint32_t kMajorVersion = 1;
constexpr const char* kCapsuleName = "dlpack_exchange_api";

enum DeviceType : std::int32_t { kCPU = 1, kCUDA = 2 };
enum TypeCode : std::uint8_t { kFloat = 2, kBFloat = 4 };

struct Device {
  std::int32_t type;
  std::int32_t index;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t num_dims;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements, null for contiguous
  std::uint64_t byte_offset;
};

struct ExchangeApi {
  std::uint32_t major_version;
  std::uint32_t minor_version;
  ExchangeApi* previous;
  void* unused[3];
  int (*describe)(void* py_object, Tensor* out);  // 0, or -1 with a Python exception set
  void* current_stream;
};

}  // namespace dpfast::bindings::dlpack

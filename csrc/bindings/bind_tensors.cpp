#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings/dlpack.h"
#include "bindings/module.h"
#include "bindings/tensor_table.h"
#include "math/noise.h"

namespace dpfast::bindings {
namespace {

namespace py = pybind11;

// (grad, out, row_stride, numel, dtype, summed)
using TensorTuple = std::tuple<std::uint64_t, std::uint64_t, std::int64_t, std::int64_t, int, bool>;

TensorTable table_of_tuples(const std::vector<TensorTuple>& tuples, std::int64_t num_rows) {
  TensorTable table;
  table.num_rows = num_rows;
  for (const auto& [grad, out, row_stride, numel, dtype, summed] : tuples) {
    if (numel < 0 || numel > math::kMaxNoiseElements) {
      throw std::invalid_argument("clip_and_noise: a tensor may have at most 2^36 columns");
    }
    if (dtype < 0 || dtype > 3) throw std::invalid_argument("clip_and_noise: unknown dtype");
    table.tensors.push_back({reinterpret_cast<const void*>(static_cast<std::uintptr_t>(grad)),
                             reinterpret_cast<void*>(static_cast<std::uintptr_t>(out)), row_stride,
                             numel, static_cast<DType>(dtype), 0, summed});
  }
  return table;
}

bool is_contiguous(const dlpack::Tensor& tensor) {
  if (tensor.strides == nullptr) return true;
  std::int64_t reach = 1;
  for (int d = tensor.num_dims - 1; d >= 0; --d) {
    if (tensor.shape[d] == 0) return true;
    if (tensor.shape[d] != 1 && tensor.strides[d] != reach) return false;
    reach *= tensor.shape[d];
  }
  return true;
}

std::optional<DType> dtype_of(const dlpack::DataType& type) {
  if (type.lanes != 1) return std::nullopt;
  if (type.code == dlpack::kBFloat && type.bits == 16) return DType::kBFloat16;
  if (type.code != dlpack::kFloat) return std::nullopt;
  if (type.bits == 64) return DType::kFloat64;
  if (type.bits == 32) return DType::kFloat32;
  if (type.bits == 16) return DType::kFloat16;
  return std::nullopt;
}

// Describes tensors that the kernels can take as they are, and says no to all others: these go
// another, slower way, on which errors are told and copies made.
class PlainReader {
 public:
  PlainReader(const py::capsule& api, const py::tuple& types)
      : api_(static_cast<const dlpack::ExchangeApi*>(api.get_pointer())), types_(types) {}

  std::optional<TensorTable> read(const py::list& grads, const py::list& outs) const {
    if (api_->major_version != dlpack::kMajorVersion || api_->describe == nullptr ||
        grads.size() != outs.size() || grads.empty()) {
      return std::nullopt;
    }
    TensorTable table;
    dlpack::Device device{};
    for (std::size_t k = 0; k < grads.size(); ++k) {
      dlpack::Tensor grad, out;
      if (!describe(grads[k], &grad) || !describe(outs[k], &out)) return std::nullopt;
      if (flag(outs[k].ptr(), requires_grad_)) return std::nullopt;
      if (grad.num_dims < 1 || out.num_dims != grad.num_dims - 1) return std::nullopt;
      if (k == 0) {
        device = grad.device;
        table.num_rows = grad.shape[0];
      }
      if (grad.shape[0] != table.num_rows || !same(grad.device, device) ||
          !same(out.device, device)) {
        return std::nullopt;
      }
      std::int64_t numel = 1;
      for (int d = 0; d < out.num_dims; ++d) {
        if (out.shape[d] != grad.shape[d + 1]) return std::nullopt;
        numel *= out.shape[d];
      }
      const std::optional<DType> dtype = dtype_of(grad.dtype);
      const DType wanted = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
      if (!dtype || dtype_of(out.dtype) != wanted || numel > math::kMaxNoiseElements) {
        return std::nullopt;
      }
      table.tensors.push_back({address(grad), address(out), numel, numel, *dtype, 0, false});
    }
    if (device.type != dlpack::kCPU && device.type != dlpack::kCUDA) return std::nullopt;
    return table;
  }

 private:
  static bool same(const dlpack::Device& a, const dlpack::Device& b) {
    return a.type == b.type && a.index == b.index;
  }

  static char* address(const dlpack::Tensor& tensor) {
    return static_cast<char*>(tensor.data) + tensor.byte_offset;
  }

  static bool flag(PyObject* object, const py::str& name) {
    const py::object value =
        py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name.ptr()));
    if (!value) throw py::error_already_set();
    return value.ptr() == Py_True;
  }

  // A tensor of torch's own types that is contiguous and holds its values as they are.
  bool describe(const py::handle& object, dlpack::Tensor* tensor) const {
    bool known = false;
    for (const py::handle type : types_) known |= type.ptr() == (PyObject*)Py_TYPE(object.ptr());
    if (!known) return false;
    if (api_->describe(object.ptr(), tensor) != 0) {
      PyErr_Clear();
      return false;
    }
    if (!is_contiguous(*tensor)) return false;
    const py::object negative =
        py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object.ptr(), is_neg_.ptr()));
    if (!negative) throw py::error_already_set();
    return negative.ptr() == Py_False;
  }

  const dlpack::ExchangeApi* api_;
  py::tuple types_;
  py::str requires_grad_{"requires_grad"};
  py::str is_neg_{"is_neg"};
};

}  // namespace

void bind_tensors(py::module_& module) {
  py::class_<TensorTable>(module, "TensorTable")
      .def(py::init(&table_of_tuples), py::arg("tensors"), py::arg("num_rows"))
      .def_readonly("num_rows", &TensorTable::num_rows);
  py::class_<PlainReader>(module, "PlainReader")
      .def(py::init<const py::capsule&, const py::tuple&>(), py::arg("api"), py::arg("types"))
      .def("read", &PlainReader::read, py::arg("grads"), py::arg("outs"));
}

}  // namespace dpfast::bindings

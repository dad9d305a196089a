// The one file that knows Python. Tensors come as addresses and sizes; every check is in llmbuilder/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "cpu/isa.h"

namespace py = pybind11;
using namespace llmbuilder;

namespace {

using Address = uint64_t;  // of a tensor's memory

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

/// A table of addresses as the kernels read it; null when there is none.
template <class T>
T* const* table(const std::vector<Address>& addresses) {
  static_assert(sizeof(Address) == sizeof(T*), "addresses have 64 bits");
  return addresses.empty() ? nullptr : reinterpret_cast<T* const*>(addresses.data());
}

/// `seed` is the address of an int64; without dropout there may be none.
MaskKey mask_key(Address seed, uint32_t stream, uint32_t threshold) {
  return {threshold ? *at<const uint64_t>(seed) : 0, stream, threshold};
}

py::list isas() {
  py::list names;
  for (int i = 0; available_isa(i); i++) names.append(available_isa(i));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "The compiled kernels of llmbuilder, without torch: addresses as integers, sizes, a DType, the address of the "
      "seed, "
      "the number of threads. Nothing is checked here and the GIL is released; use llmbuilder.ops.";
  const py::call_guard<py::gil_scoped_release> free;

  py::enum_<DType>(m, "DType").value("f32", DType::f32).value("bf16", DType::bf16).value("f16", DType::f16);

  m.def("isa", &isa, "Name of the instruction set in use.");
  m.def("isas", &isas, "Names of the instruction sets that can be used here, best first.");
  m.def("set_isa", &set_isa, py::arg("name"),
        "Use another instruction set from now on; ValueError when it does not fit.");

  m.def(
      "philox",
      [](Address counters, Address words, int64_t n, uint64_t key) {
        kernels().philox(at<const uint32_t>(counters), at<uint32_t>(words), n, key);
      },
      free);
  m.def(
      "dropout",
      [](DType dtype, Address x, Address y, int64_t rows, int64_t columns, Address seed, uint32_t stream,
         uint32_t threshold, int threads) {
        kernels().dropout(dtype, at<const void>(x), at<void>(y), rows, columns, mask_key(seed, stream, threshold),
                          threads);
      },
      free);
  m.def(
      "dropout_mask",
      [](Address keep, int64_t rows, int64_t columns, Address seed, uint32_t stream, uint32_t threshold, int threads) {
        kernels().dropout_mask(at<uint8_t>(keep), rows, columns, mask_key(seed, stream, threshold), threads);
      },
      free);
  m.def(
      "softmax_cross_entropy",
      [](DType dtype, Address logits, int64_t rows, int64_t columns, Address targets, Address row_weights,
         float softcap, bool need_grad, Address losses, Address predictions, int threads) {
        kernels().softmax_cross_entropy(dtype, at<void>(logits), rows, columns, at<const int64_t>(targets),
                                        at<const float>(row_weights), softcap, need_grad, at<float>(losses),
                                        at<int64_t>(predictions), threads);
      },
      free);
  m.def(
      "lora_shrink",
      [](DType dtype, Address x, Address A, Address S, int64_t M, int64_t K, int64_t r, Address seed, uint32_t stream,
         uint32_t threshold, int threads) {
        kernels().lora_shrink(dtype, at<const void>(x), at<const void>(A), at<void>(S), M, K, r,
                              mask_key(seed, stream, threshold), threads);
      },
      free);
  m.def(
      "lora_expand",
      [](DType dtype, Address y, Address S, Address B, int64_t M, int64_t N, int64_t r, float scaling, int threads) {
        kernels().lora_expand(dtype, at<void>(y), at<const void>(S), at<const void>(B), M, N, r, scaling, threads);
      },
      free);
  m.def(
      "lora_grad_sb",
      [](DType dtype, Address dY, Address S, Address B, Address dS, Address dB, int64_t M, int64_t N, int64_t r,
         float scaling, int threads) {
        kernels().lora_grad_sb(dtype, at<const void>(dY), at<const void>(S), at<const void>(B), at<void>(dS),
                               at<float>(dB), M, N, r, scaling, threads);
      },
      free);
  m.def(
      "lora_grad_ax",
      [](DType dtype, Address x, Address dS, Address A, Address dA, Address dX, int64_t M, int64_t K, int64_t r,
         Address seed, uint32_t stream, uint32_t threshold, int threads) {
        kernels().lora_grad_ax(dtype, at<const void>(x), at<const void>(dS), at<const void>(A), at<float>(dA),
                               at<void>(dX), M, K, r, mask_key(seed, stream, threshold), threads);
      },
      free);
  m.def(
      "ewc_penalty",
      [](DType dtype, const std::vector<Address>& params, const std::vector<Address>& anchors,
         const std::vector<Address>& fishers, const std::vector<Address>& grads, const std::vector<int64_t>& sizes,
         double strength, int threads) {
        return kernels().ewc_penalty(dtype, static_cast<int64_t>(sizes.size()), table<const void>(params),
                                     table<const void>(anchors), table<const void>(fishers), table<void>(grads),
                                     sizes.data(), strength, threads);
      },
      free);
  m.def(
      "ewc_accumulate",
      [](DType dtype, const std::vector<Address>& fishers, const std::vector<Address>& grads,
         const std::vector<int64_t>& sizes, double weight, int threads) {
        kernels().ewc_accumulate(dtype, static_cast<int64_t>(sizes.size()), table<void>(fishers),
                                 table<const void>(grads), sizes.data(), weight, threads);
      },
      free);
}

// The one file that knows Python. Tensors come as addresses and sizes; every check is in llmbuilder/ops.
//
// Two builds: the extension `_C`, with the CUDA launchers as `_C.cuda` where LLMBUILDER_CUDA is defined; and, for
// tests, the launchers alone as a module `_emulated` (LLMBUILDER_EMULATED), whose kernels run on the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "llmbuilder/dtype.h"
#if defined(LLMBUILDER_CUDA) || defined(LLMBUILDER_EMULATED)
#include "llmbuilder/cuda.h"
#endif
#ifndef LLMBUILDER_EMULATED
#include "cpu/isa.h"
#endif

namespace py = pybind11;
using namespace llmbuilder;

namespace {

using Address = uint64_t;  // of a tensor's memory
using Release = py::call_guard<py::gil_scoped_release>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

void bind_dtype(py::module_& m) {
  // module_local: the emulated module has the same type beside _C
  py::enum_<DType>(m, "DType", py::module_local())
      .value("f32", DType::f32)
      .value("bf16", DType::bf16)
      .value("f16", DType::f16);
}

#ifndef LLMBUILDER_EMULATED

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

void bind_cpu(py::module_& m) {
  m.def("isa", &isa, "Name of the instruction set in use.");
  m.def("isas", &isas, "Names of the instruction sets that can be used here, best first.");
  m.def("set_isa", &set_isa, py::arg("name"),
        "Use another instruction set from now on; ValueError when it does not fit.");

  m.def(
      "philox",
      [](Address counters, Address words, int64_t n, uint64_t key) {
        kernels().philox(at<const uint32_t>(counters), at<uint32_t>(words), n, key);
      },
      Release());
  m.def(
      "dropout",
      [](DType dtype, Address x, Address y, int64_t rows, int64_t columns, Address seed, uint32_t stream,
         uint32_t threshold, int threads) {
        kernels().dropout(dtype, at<const void>(x), at<void>(y), rows, columns, mask_key(seed, stream, threshold),
                          threads);
      },
      Release());
  m.def(
      "dropout_mask",
      [](Address keep, int64_t rows, int64_t columns, Address seed, uint32_t stream, uint32_t threshold, int threads) {
        kernels().dropout_mask(at<uint8_t>(keep), rows, columns, mask_key(seed, stream, threshold), threads);
      },
      Release());
  m.def(
      "softmax_cross_entropy",
      [](DType dtype, Address logits, int64_t rows, int64_t columns, Address targets, Address row_weights,
         float softcap, bool need_grad, Address losses, Address predictions, int threads) {
        kernels().softmax_cross_entropy(dtype, at<void>(logits), rows, columns, at<const int64_t>(targets),
                                        at<const float>(row_weights), softcap, need_grad, at<float>(losses),
                                        at<int64_t>(predictions), threads);
      },
      Release());
  m.def(
      "lora_shrink",
      [](DType dtype, Address x, Address A, Address S, int64_t M, int64_t K, int64_t r, Address seed, uint32_t stream,
         uint32_t threshold, int threads) {
        kernels().lora_shrink(dtype, at<const void>(x), at<const void>(A), at<void>(S), M, K, r,
                              mask_key(seed, stream, threshold), threads);
      },
      Release());
  m.def(
      "lora_expand",
      [](DType dtype, Address y, Address S, Address B, int64_t M, int64_t N, int64_t r, float scaling, int threads) {
        kernels().lora_expand(dtype, at<void>(y), at<const void>(S), at<const void>(B), M, N, r, scaling, threads);
      },
      Release());
  m.def(
      "lora_grad_sb",
      [](DType dtype, Address dY, Address S, Address B, Address dS, Address dB, int64_t M, int64_t N, int64_t r,
         float scaling, int threads) {
        kernels().lora_grad_sb(dtype, at<const void>(dY), at<const void>(S), at<const void>(B), at<void>(dS),
                               at<float>(dB), M, N, r, scaling, threads);
      },
      Release());
  m.def(
      "lora_grad_ax",
      [](DType dtype, Address x, Address dS, Address A, Address dA, Address dX, int64_t M, int64_t K, int64_t r,
         Address seed, uint32_t stream, uint32_t threshold, int threads) {
        kernels().lora_grad_ax(dtype, at<const void>(x), at<const void>(dS), at<const void>(A), at<float>(dA),
                               at<void>(dX), M, K, r, mask_key(seed, stream, threshold), threads);
      },
      Release());
  m.def(
      "ewc_penalty",
      [](DType dtype, const std::vector<Address>& params, const std::vector<Address>& anchors,
         const std::vector<Address>& fishers, const std::vector<Address>& grads, const std::vector<int64_t>& sizes,
         double strength, int threads) {
        return kernels().ewc_penalty(dtype, static_cast<int64_t>(sizes.size()), table<const void>(params),
                                     table<const void>(anchors), table<const void>(fishers), table<void>(grads),
                                     sizes.data(), strength, threads);
      },
      Release());
  m.def(
      "ewc_accumulate",
      [](DType dtype, const std::vector<Address>& fishers, const std::vector<Address>& grads,
         const std::vector<int64_t>& sizes, double weight, int threads) {
        kernels().ewc_accumulate(dtype, static_cast<int64_t>(sizes.size()), table<void>(fishers),
                                 table<const void>(grads), sizes.data(), weight, threads);
      },
      Release());
}

#endif

#if defined(LLMBUILDER_CUDA) || defined(LLMBUILDER_EMULATED)

using MatrixArgument = std::tuple<Address, int64_t, int64_t, int64_t>;  // memory, rows, columns, stride of the rows
using MaskArgument = std::tuple<Address, uint32_t, uint32_t>;           // seed, stream, threshold

gpu::Matrix matrix(const MatrixArgument& m) {
  return {at<void>(std::get<0>(m)), std::get<1>(m), std::get<2>(m), std::get<3>(m)};
}
gpu::DeviceMask mask(const MaskArgument& m) {
  return {at<const uint64_t>(std::get<0>(m)), std::get<1>(m), std::get<2>(m)};
}
gpu::Launch launch(int device, Address stream) { return {device, at<void>(stream)}; }

/// Refused arguments are the caller's mistake (ValueError), what failed is the machine's (RuntimeError).
void check(const gpu::Status& status) {
  if (status.kind == gpu::Status::REFUSED) throw std::invalid_argument(status.message);
  if (status.kind == gpu::Status::FAILED) throw std::runtime_error(status.message);
}

void bind_cuda_lora(py::module_& m) {
  m.def(
      "lora_shrink",
      [](DType dtype, MatrixArgument x, MatrixArgument A, MatrixArgument S, MaskArgument keep, bool tf32,
         Address workspace, int device, Address stream) {
        check(gpu::lora_shrink(launch(device, stream), dtype, matrix(x), matrix(A), matrix(S), mask(keep), tf32,
                               at<void>(workspace)));
      },
      Release());
  m.def("lora_shrink_workspace", &gpu::lora_shrink_workspace);
  m.def(
      "lora_expand",
      [](DType dtype, MatrixArgument S, MatrixArgument B, Address bias, float scaling, bool accumulate,
         MatrixArgument y, bool tf32, int device, Address stream) {
        check(gpu::lora_expand(launch(device, stream), dtype, matrix(S), matrix(B), at<const void>(bias), scaling,
                               accumulate, matrix(y), tf32));
      },
      Release());
  m.def(
      "lora_grad_sb",
      [](DType dtype, MatrixArgument dY, MatrixArgument S, MatrixArgument B, float scaling, MatrixArgument dS,
         Address dB, bool tf32, Address workspace, int device, Address stream) {
        check(gpu::lora_grad_sb(launch(device, stream), dtype, matrix(dY), matrix(S), matrix(B), scaling, matrix(dS),
                                at<float>(dB), tf32, at<void>(workspace)));
      },
      Release());
  m.def("lora_grad_sb_workspace", &gpu::lora_grad_sb_workspace);
  m.def(
      "lora_grad_ax",
      [](DType dtype, MatrixArgument x, MatrixArgument dS, MatrixArgument A, MaskArgument keep, Address dA,
         MatrixArgument dX, bool tf32, Address workspace, int device, Address stream) {
        check(gpu::lora_grad_ax(launch(device, stream), dtype, matrix(x), matrix(dS), matrix(A), mask(keep),
                                at<float>(dA), matrix(dX), tf32, at<void>(workspace)));
      },
      Release());
  m.def("lora_grad_ax_workspace", &gpu::lora_grad_ax_workspace);
  m.def(
      "lora_fused",
      [](DType dtype, MatrixArgument x, MatrixArgument W, Address bias, MatrixArgument S, MatrixArgument B,
         float scaling, MatrixArgument y, bool tf32, int device, Address stream) {
        check(gpu::lora_fused(launch(device, stream), dtype, matrix(x), matrix(W), at<const void>(bias), matrix(S),
                              matrix(B), scaling, matrix(y), tf32));
      },
      Release());
  m.def(
      "lora_fused_grad",
      [](DType dtype, MatrixArgument dY, MatrixArgument W, MatrixArgument dS, MatrixArgument A, MaskArgument keep,
         MatrixArgument dX, bool tf32, int device, Address stream) {
        check(gpu::lora_fused_grad(launch(device, stream), dtype, matrix(dY), matrix(W), matrix(dS), matrix(A),
                                   mask(keep), matrix(dX), tf32));
      },
      Release());
}

/// Empty groups stand for null addresses.
int64_t ewc_table(Address memory, const std::vector<Address>& params, const std::vector<Address>& anchors,
                  const std::vector<Address>& fishers, const std::vector<Address>& grads,
                  const std::vector<int64_t>& sizes) {
  const auto of = [](const std::vector<Address>& group, size_t i) { return group.empty() ? 0 : group.at(i); };
  std::vector<gpu::EwcTensor> tensors(sizes.size());
  for (size_t i = 0; i < sizes.size(); i++)
    tensors[i] = {at<const void>(of(params, i)), at<const void>(of(anchors, i)), at<void>(of(fishers, i)),
                  at<void>(of(grads, i)), sizes[i]};
  return gpu::ewc_table(tensors.data(), static_cast<int64_t>(tensors.size()), at<void>(memory));
}

void bind_cuda(py::module_& m) {
#ifndef LLMBUILDER_EMULATED
  m.def("driver_version", &gpu::driver_version, "CUDA's version that the driver speaks, as 13000; 0 without a driver.");
  m.def("runtime_version", &gpu::runtime_version, "CUDA's version that the kernels were built with, as 13000.");
#endif
  bind_cuda_lora(m);
  m.def(
      "dropout",
      [](DType dtype, Address x, Address y, int64_t rows, int64_t columns, MaskArgument keep, int device,
         Address stream) {
        check(gpu::dropout(launch(device, stream), dtype, at<const void>(x), at<void>(y), rows, columns, mask(keep)));
      },
      Release());
  m.def(
      "dropout_mask",
      [](Address keep, int64_t rows, int64_t columns, MaskArgument key, int device, Address stream) {
        check(gpu::dropout_mask(launch(device, stream), at<uint8_t>(keep), rows, columns, mask(key)));
      },
      Release());
  m.def("ewc_table", &ewc_table);
  m.def("ewc_table_bytes", &gpu::ewc_table_bytes);
  m.def(
      "ewc_penalty",
      [](DType dtype, Address table, int64_t count, int64_t chunks, bool weighted, double strength, Address value,
         Address workspace, int device, Address stream) {
        check(gpu::ewc_penalty(launch(device, stream), dtype, at<const void>(table), count, chunks, weighted, strength,
                               at<double>(value), at<void>(workspace)));
      },
      Release());
  m.def("ewc_penalty_workspace", &gpu::ewc_penalty_workspace);
  m.def(
      "ewc_accumulate",
      [](DType dtype, Address table, int64_t count, int64_t chunks, double weight, int device, Address stream) {
        check(gpu::ewc_accumulate(launch(device, stream), dtype, at<const void>(table), count, chunks, weight));
      },
      Release());
  m.def(
      "softmax_cross_entropy",
      [](DType dtype, MatrixArgument logits, Address targets, Address row_weights, float softcap, bool need_grad,
         Address losses, Address predictions, int device, Address stream) {
        check(gpu::softmax_cross_entropy(launch(device, stream), dtype, matrix(logits), at<const int64_t>(targets),
                                         at<const float>(row_weights), softcap, need_grad, at<float>(losses),
                                         at<int64_t>(predictions)));
      },
      Release());
}
#endif

}  // namespace

#ifdef LLMBUILDER_EMULATED
PYBIND11_MODULE(_emulated, m) {
  m.doc() =
      "The CUDA launchers of llmbuilder, whose kernels run on the CPU: in tests it stands for llmbuilder._C.cuda.";
  bind_dtype(m);
  bind_cuda(m);
}
#else
PYBIND11_MODULE(_C, m) {
  m.doc() =
      "The compiled kernels of llmbuilder, without torch: addresses as integers, sizes, a DType, the address of the "
      "seed, the number of threads. Nothing is checked here and the GIL is released; use llmbuilder.ops.";
  bind_dtype(m);
  bind_cpu(m);
#ifdef LLMBUILDER_CUDA
  py::module_ cuda = m.def_submodule("cuda", "The CUDA launchers: as above, with a device and its stream at the end.");
  cuda.attr("DType") = m.attr("DType");
  cuda.attr("code") = LLMBUILDER_CUDA_CODE;  // what nvcc made: compute_80 is PTX, sm_90 a GPU's own
  bind_cuda(cuda);
#endif
  m.attr("cuda_why_not") = LLMBUILDER_CUDA_WHY_NOT;
}
#endif

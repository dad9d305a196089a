// The launchers of csrc/cuda, free of CUDA's headers. A launcher checks its arguments, puts kernels on a stream and
// returns; it never allocates, copies or waits, so that it can be captured in a CUDA graph. Memory that a kernel needs
// for itself comes from the caller, as many bytes as the *_workspace function says, 16-byte aligned; none when that is
// 0.
//
// The arithmetic is that of dropout.h, lora.h, ewc.h and cross_entropy.h. Sums are taken in an order that depends on
// the shape alone, so equal inputs give equal bits. Empty matrices are allowed.
#pragma once
#include <string>

#include "llmbuilder/dtype.h"

namespace llmbuilder::gpu {

/// Where a kernel runs: `stream` is a cudaStream_t of `device`.
struct Launch {
  int device;
  void* stream;
};

/// What became of a launch.
struct [[nodiscard]] Status {
  enum Kind { OK, REFUSED, FAILED };  // REFUSED: the arguments, before anything was launched. FAILED: CUDA says so

  Kind kind = OK;
  std::string message;

  explicit operator bool() const { return kind == OK; }
  static Status refused(std::string message) { return {REFUSED, std::move(message)}; }
  static Status failed(std::string message) { return {FAILED, std::move(message)}; }
};

/// rows x columns elements in memory of the device, columns side by side, rows `stride` elements apart.
struct ConstMatrix {
  const void* data;
  int64_t rows, columns, stride;
};
struct Matrix {
  void* data;
  int64_t rows, columns, stride;

  operator ConstMatrix() const { return {data, rows, columns, stride}; }
};

/// MaskKey (philox.h) with its seed still in memory of the device, where the kernel reads it. threshold = 0: no
/// dropout, and `seed` may be null.
struct DeviceMask {
  const uint64_t* seed;
  uint32_t stream;
  uint32_t threshold;
};

/// The version of CUDA that the driver speaks (0: none is loaded), and that of the runtime linked in: 13000 for 13.0.
int driver_version();
int runtime_version();

// ------------------------------------------------------------------------------------------------------------ dropout

/// y = drop(x); x, y: [rows, columns], contiguous, of `dtype`; they may be the same memory.
Status dropout(const Launch&, DType, const void* x, void* y, int64_t rows, int64_t columns, DeviceMask);

/// keep[rows, columns] = 1 where the mask keeps and 0 where it drops.
Status dropout_mask(const Launch&, uint8_t* keep, int64_t rows, int64_t columns, DeviceMask);

// --------------------------------------------------------------------------------------------------------------- lora
// Matrices are of `dtype` but for dA and dB, which are fp32. `tf32` lets fp32 products round their operands to tf32; it
// says nothing to the other types.

/// S[M, r] = drop(x[M, K]) A[r, K]^T
Status lora_shrink(const Launch&, DType, ConstMatrix x, ConstMatrix A, Matrix S, DeviceMask, bool tf32,
                   void* workspace);
int64_t lora_shrink_workspace(DType, int64_t M, int64_t K, int64_t r);

/// y[M, N] = scaling S[M, r] B[N, r]^T + bias[N], written only; `bias` may be null. With `accumulate` it is added to y
/// instead, and there is no bias.
Status lora_expand(const Launch&, DType, ConstMatrix S, ConstMatrix B, const void* bias, float scaling, bool accumulate,
                   Matrix y, bool tf32);

/// dS[M, r] = scaling dY[M, N] B[N, r] and dB[N, r] = scaling dY^T S[M, r]
Status lora_grad_sb(const Launch&, DType, ConstMatrix dY, ConstMatrix S, ConstMatrix B, float scaling, Matrix dS,
                    float* dB, bool tf32, void* workspace);
int64_t lora_grad_sb_workspace(DType, int64_t M, int64_t N, int64_t r);

/// dA[r, K] = dS[M, r]^T drop(x[M, K]) and, unless dX.data is null, dX[M, K] = drop'(dS A), written only.
Status lora_grad_ax(const Launch&, DType, ConstMatrix x, ConstMatrix dS, ConstMatrix A, DeviceMask, float* dA,
                    Matrix dX, bool tf32, void* workspace);
int64_t lora_grad_ax_workspace(DType, int64_t M, int64_t K, int64_t r);

/// y[M, N] = x[M, K] W[N, K]^T + scaling S[M, r] B[N, r]^T + bias[N], written only; `bias` may be null.
Status lora_fused(const Launch&, DType, ConstMatrix x, ConstMatrix W, const void* bias, ConstMatrix S, ConstMatrix B,
                  float scaling, Matrix y, bool tf32);

/// dX[M, K] = dY[M, N] W[N, K] + drop'(dS[M, r] A[r, K]), written only.
Status lora_fused_grad(const Launch&, DType, ConstMatrix dY, ConstMatrix W, ConstMatrix dS, ConstMatrix A, DeviceMask,
                       Matrix dX, bool tf32);

// ---------------------------------------------------------------------------------------------------------------- ewc

/// One tensor and what belongs to it, each `size` elements, contiguous, in memory of the device. A null fisher stands
/// for ones; ewc_accumulate uses fisher and grad alone.
struct EwcTensor {
  const void* theta;
  const void* anchor;
  void* fisher;
  void* grad;
  int64_t size;
};

/// The table of `count` tensors as the kernels read it: the caller has ewc_table write it to `memory` on the host, and
/// copies it to the device. Returns how many chunks of work the tensors make.
int64_t ewc_table(const EwcTensor* tensors, int64_t count, void* memory);
int64_t ewc_table_bytes(int64_t count);

/// value = strength/2 sum F (theta - anchor)^2; grad += strength F (theta - anchor).
Status ewc_penalty(const Launch&, DType, const void* table, int64_t count, int64_t chunks, bool weighted,
                   double strength, double* value, void* workspace);
int64_t ewc_penalty_workspace(int64_t chunks);

/// F += weight g^2 in place.
Status ewc_accumulate(const Launch&, DType, const void* table, int64_t count, int64_t chunks, double weight);

// ------------------------------------------------------------------------------------------------------ cross-entropy

/// SoftmaxCrossEntropy of cross_entropy.h over logits[rows, columns].
Status softmax_cross_entropy(const Launch&, DType, Matrix logits, const int64_t* targets, const float* row_weights,
                             float softcap, bool need_grad, float* losses, int64_t* predictions);

}  // namespace llmbuilder::gpu

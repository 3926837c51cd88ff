// act(x weight^T + bias + residual) as one cuBLASLt call, over row-major matrices: x [m,k], weight [n,k], out [m,n]; or
// over several x, evenly spaced, and as many residuals and results, which lie one behind the other.
// The problem also names what is none of cuBLASLt's: gates, and an x that lies in two matrices.
#pragma once

#include <cublasLt.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace sfast {

// Those from kGelu on are none of cuBLASLt's: its product is activated in a second pass. Gated ones have weight [2n,k]
// and give value * gelu(gate) of [value, gate] = x weight^T + bias; kSwiglu has a weight [n,k] for each of the two.
enum class Epilogue : int64_t { kNone, kRelu, kGeluTanh, kGelu, kSilu, kGeglu, kGegluTanh, kSwiglu };

struct MatmulProblem {
  int64_t device, dtype;  // dtype: a cudaDataType_t
  int64_t m, n, k;
  int64_t batches, batch_x;              // how many x, and the elements from one to the next, of several
  int64_t ld_x, ld_weight, ld_residual;  // elements from row to row
  int64_t has_bias, has_residual;
  Epilogue epilogue;
  int64_t k2, ld_x2;  // of x2 [m,k2] at x's side, or 0; weight [n,k+k2]

  bool is_gated() const { return epilogue >= Epilogue::kGeglu; }
  bool has_two_weights() const { return epilogue == Epilogue::kSwiglu; }
  bool is_one_call() const { return epilogue <= Epilogue::kGeluTanh; }  // of cuBLASLt
  static constexpr size_t kFields = 15;
  std::array<int64_t, kFields> key() const;
  std::string describe() const;
};

struct MatmulPointers {
  const void* x;
  const void* weight;
  const void* bias;
  const void* residual;
  void* out;
  const void* x2 = nullptr;
  const void* gate_weight = nullptr;
  const void* gate_bias = nullptr;
};

struct MatmulAlgorithm {
  cublasLtMatmulAlgo_t algorithm;
  int64_t workspace = 0;  // bytes
};

// The heuristics' proposals, best first; empty where cuBLASLt has no kernel for the problem.
std::vector<MatmulAlgorithm> matmul_algorithms(cublasLtHandle_t handle, const MatmulProblem& problem, int most);

// An algorithm as text, for this version of cuBLASLt; and the way back, which gives none for a text that does not fit.
std::string recipe_of(const MatmulAlgorithm& algorithm);
std::vector<MatmulAlgorithm> recalled_algorithm(cublasLtHandle_t handle, const MatmulProblem& problem,
                                                const std::string& recipe);

void launch(cublasLtHandle_t handle, const MatmulProblem& problem, const MatmulAlgorithm& algorithm,
            const MatmulPointers& pointers, void* workspace, cudaStream_t stream);

}  // namespace sfast

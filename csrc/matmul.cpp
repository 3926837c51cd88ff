#include "matmul.h"

#include <iomanip>
#include <sstream>

#include "check.h"

namespace sfast {
namespace {

constexpr uint32_t kAlignment = 16;               // bytes; checked by the caller
constexpr uint64_t kMostWorkspace = 32ull << 20;  // bytes
constexpr const char* kRecipe = "cublasLt";

// A matrix layout or matmul description, which cuBLASLt lets live on the stack: building one costs next to nothing.
cublasLtMatrixLayoutOpaque_t layout(const MatmulProblem& problem, int64_t rows, int64_t columns, int64_t ld,
                                    int64_t spacing) {
  cublasLtMatrixLayoutOpaque_t made;
  CUBLAS_CHECK(cublasLtMatrixLayoutInit(&made, static_cast<cudaDataType_t>(problem.dtype), rows, columns, ld));
  if (problem.batches > 1) {
    const auto batches = static_cast<int32_t>(problem.batches);
    CUBLAS_CHECK(
        cublasLtMatrixLayoutSetAttribute(&made, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batches, sizeof(batches)));
    CUBLAS_CHECK(cublasLtMatrixLayoutSetAttribute(&made, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &spacing,
                                                  sizeof(spacing)));
  }
  return made;
}

template <typename T>
void set(cublasLtMatmulDescOpaque_t* description, cublasLtMatmulDescAttributes_t name, const T& value) {
  CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(description, name, &value, sizeof(value)));
}

cublasLtEpilogue_t epilogue_of(const MatmulProblem& problem) {
  switch (problem.epilogue) {
    case Epilogue::kRelu:
      return problem.has_bias ? CUBLASLT_EPILOGUE_RELU_BIAS : CUBLASLT_EPILOGUE_RELU;
    case Epilogue::kGeluTanh:
      return problem.has_bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
    default:
      return problem.has_bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
  }
}

// cuBLASLt counts columns first, so it computes out^T [n,m] = weight [n,k] x^T [k,m].
struct Described {
  cublasLtMatmulDescOpaque_t matmul;
  cublasLtMatrixLayoutOpaque_t weight, x, residual, out;

  explicit Described(const MatmulProblem& p)
      : weight(layout(p, p.k, p.n, p.ld_weight, 0)),
        x(layout(p, p.k, p.m, p.ld_x, p.batch_x)),
        residual(
            layout(p, p.n, p.m, p.has_residual ? p.ld_residual : p.n, p.m * (p.has_residual ? p.ld_residual : p.n))),
        out(layout(p, p.n, p.m, p.n, p.m * p.n)) {
    CUBLAS_CHECK(cublasLtMatmulDescInit(&matmul, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set(&matmul, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
    set(&matmul, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue_of(p));
    if (p.has_bias) set(&matmul, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, static_cast<cudaDataType_t>(p.dtype));
  }
};

}  // namespace

std::array<int64_t, MatmulProblem::kFields> MatmulProblem::key() const {
  return {device,
          dtype,
          m,
          n,
          k,
          batches,
          batch_x,
          ld_x,
          ld_weight,
          has_bias,
          has_residual,
          has_residual ? ld_residual : 0,
          static_cast<int64_t>(epilogue),
          k2,
          ld_x2};
}

std::string MatmulProblem::describe() const {
  static const char* const kEpilogues[] = {"",      " relu",  " gelu_tanh",  " gelu",
                                           " silu", " geglu", " geglu_tanh", " swiglu"};
  std::ostringstream text;
  text << (dtype == CUDA_R_16F ? "float16" : "bfloat16") << " x [";
  if (batches > 1) text << batches << ",";
  text << m << "," << k;
  if (k2 > 0) text << "+" << k2;
  text << "] weight [" << n << "," << k + k2 << "]" << (has_bias ? " bias" : "") << (has_residual ? " residual" : "")
       << kEpilogues[static_cast<int64_t>(epilogue)];
  return text.str();
}

namespace {

// The heuristics' proposals that need no more than so many bytes of workspace.
std::vector<MatmulAlgorithm> proposals(cublasLtHandle_t handle, const MatmulProblem& problem, int most,
                                       uint64_t workspace) {
  Described d(problem);
  cublasLtMatmulPreferenceOpaque_t preference;
  CUBLAS_CHECK(cublasLtMatmulPreferenceInit(&preference));
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t name, const auto& value) {
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(&preference, name, &value, sizeof(value)));
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace);
  // Partial sums of a split k stay in fp32: nothing is rounded before the end.
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
         static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  for (auto name : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    prefer(name, kAlignment);
  }

  std::vector<cublasLtMatmulHeuristicResult_t> results(most);
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle, &d.matmul, &d.weight, &d.x, &d.residual, &d.out,
                                                               &preference, most, results.data(), &found);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED) return {};
  CUBLAS_CHECK(status);
  std::vector<MatmulAlgorithm> algorithms;
  for (int i = 0; i < found; ++i) {
    if (results[i].state != CUBLAS_STATUS_SUCCESS) continue;
    algorithms.push_back({results[i].algo, static_cast<int64_t>(results[i].workspaceSize)});
  }
  return algorithms;
}

}  // namespace

std::vector<MatmulAlgorithm> matmul_algorithms(cublasLtHandle_t handle, const MatmulProblem& problem, int most) {
  // Given a word of workspace, the kernels for many tiles count there which tile is next, and clear it by a call of its
  // own before. Without it each block knows its tiles: measured to be faster by 1 to 10 % where the GPU is at its power
  // limit, and a node less in a captured graph.
  constexpr int64_t kCounter = 1024;  // bytes; partial sums take more
  std::vector<MatmulAlgorithm> algorithms = proposals(handle, problem, most, 0);
  const bool without = !algorithms.empty();
  if (static_cast<int>(algorithms.size()) >= most) return algorithms;
  for (const MatmulAlgorithm& algorithm : proposals(handle, problem, most, kMostWorkspace)) {
    if (!without || algorithm.workspace > kCounter) algorithms.push_back(algorithm);
  }
  return algorithms;
}

std::string recipe_of(const MatmulAlgorithm& algorithm) {
  std::ostringstream text;
  text << kRecipe << std::hex;
  for (const uint64_t word : algorithm.algorithm.data) text << " " << word;
  text << " " << algorithm.workspace;
  return text.str();
}

std::vector<MatmulAlgorithm> recalled_algorithm(cublasLtHandle_t handle, const MatmulProblem& problem,
                                                const std::string& recipe) {
  std::istringstream text(recipe);
  std::string kind;
  MatmulAlgorithm algorithm{};
  text >> kind >> std::hex;
  for (uint64_t& word : algorithm.algorithm.data) text >> word;
  text >> algorithm.workspace;  // less than asked for below where the kernel is to do without a counter
  if (kind != kRecipe || !text) return {};
  Described d(problem);
  cublasLtMatmulHeuristicResult_t result{};
  const cublasStatus_t status =
      cublasLtMatmulAlgoCheck(handle, &d.matmul, &d.weight, &d.x, &d.residual, &d.out, &algorithm.algorithm, &result);
  if (status != CUBLAS_STATUS_SUCCESS || result.state != CUBLAS_STATUS_SUCCESS) return {};
  const auto most = static_cast<int64_t>(kMostWorkspace);
  if (result.workspaceSize > kMostWorkspace || algorithm.workspace < 0 || algorithm.workspace > most) return {};
  return {algorithm};
}

void launch(cublasLtHandle_t handle, const MatmulProblem& problem, const MatmulAlgorithm& algorithm,
            const MatmulPointers& pointers, void* workspace, cudaStream_t stream) {
  Described d(problem);
  if (problem.has_bias) set(&d.matmul, CUBLASLT_MATMUL_DESC_BIAS_POINTER, pointers.bias);
  const float alpha = 1.0f, beta = problem.has_residual ? 1.0f : 0.0f;
  CUBLAS_CHECK(cublasLtMatmul(handle, &d.matmul, &alpha, pointers.weight, &d.weight, pointers.x, &d.x, &beta,
                              problem.has_residual ? pointers.residual : pointers.out, &d.residual, pointers.out,
                              &d.out, &algorithm.algorithm, workspace, algorithm.workspace, stream));
}

}  // namespace sfast

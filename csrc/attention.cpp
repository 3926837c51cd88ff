#include "attention.h"

#include <torch/csrc/stable/accelerator.h>

#include <cmath>

#include "check.h"
#include "ops.h"
#include "runtime.h"

namespace sfast {
#ifdef SFAST_HOPPER
namespace {

constexpr const char* kOp = "sfast_native::attention";

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

AttentionOperand operand(const Tensor& tensor, const char* name, const Tensor& query) {
  check_operand(tensor, name, query, kOp);
  SFAST_CHECK(tensor.stride(3) == 1, kOp, ": ", name, " must be contiguous in its last dimension, got strides ",
              to_string(tensor.strides()));
  AttentionOperand result{tensor.const_data_ptr(), 0, 0, 0};
  int64_t* const spacings[] = {&result.batch, &result.head, &result.token};
  for (int d = 0; d < 3; ++d) {
    *spacings[d] = tensor.size(d) == 1 ? tensor.size(3) : tensor.stride(d);  // of one there is no spacing
    SFAST_CHECK(*spacings[d] % 8 == 0 && *spacings[d] > 0, kOp, ": rows of ", name,
                " must start at multiples of 16 bytes, got strides ", to_string(tensor.strides()));
  }
  return result;
}

AttentionMask mask_of(const Tensor& mask, const Tensor& query, const Tensor& key) {
  using torch::headeronly::ScalarType;
  const bool boolean = mask.scalar_type() == ScalarType::Bool;
  SFAST_CHECK((boolean || mask.scalar_type() == query.scalar_type()) && mask.is_cuda() &&
                  mask.get_device_index() == query.get_device_index(),
              kOp, ": mask must be boolean or of the type of query, on its device");
  SFAST_CHECK(mask.dim() == 4 && mask.size(0) == query.size(0) && mask.size(1) == query.size(1) && mask.size(2) == 1 &&
                  mask.size(3) == key.size(2) && (mask.stride(3) == 1 || mask.size(3) == 1),
              kOp, ": mask must be [batch, heads, 1, keys] with contiguous keys, got ", to_string(mask.sizes()),
              " strides ", to_string(mask.strides()));
  return {mask.const_data_ptr(), mask.stride(0), mask.stride(1), boolean};
}

}  // namespace

Tensor attention(Tensor query, Tensor key, Tensor value, double scale, std::optional<Tensor> mask) {
  const auto dtype = half_dtype(query, kOp);
  SFAST_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4 && query.numel() > 0 && key.numel() > 0, kOp,
              ": query, key and value must be [batch, heads, tokens, head size], got ", to_string(query.sizes()), ", ",
              to_string(key.sizes()), " and ", to_string(value.sizes()));
  for (const int d : {0, 1, 3}) {
    SFAST_CHECK(key.size(d) == query.size(d) && value.size(d) == query.size(d), kOp,
                ": batch, heads and head size must agree, got ", to_string(query.sizes()), ", ", to_string(key.sizes()),
                " and ", to_string(value.sizes()));
  }
  SFAST_CHECK(key.size(2) == value.size(2), kOp, ": there must be a value for each key, got ", to_string(key.sizes()),
              " and ", to_string(value.sizes()));
  SFAST_CHECK(query.size(3) % 8 == 0 && query.size(3) <= kWidestHead, kOp,
              ": the head size must be a multiple of 8 up to ", kWidestHead, ", got ", query.size(3));
  SFAST_CHECK(scale > 0 && std::isfinite(scale), kOp, ": scale must be positive, got ", scale);
  const int device = query.get_device_index();
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  SFAST_CHECK(major == 9, kOp, ": needs a GPU of compute capability 9.0, got ", major, ".x");
  const torch::stable::accelerator::DeviceGuard guard(device);

  AttentionProblem problem{};
  problem.query = operand(query, "query", query);
  problem.key = operand(key, "key", query);
  problem.value = operand(value, "value", query);
  std::optional<Tensor> terms;
  if (mask) {
    problem.mask = mask_of(*mask, query, key);
    const int64_t rows = query.size(0) * (problem.mask.head == 0 ? 1 : query.size(1));
    const int64_t padded = (key.size(2) + kMaskUnit - 1) / kMaskUnit * kMaskUnit;
    terms = empty_strided({2 * rows * padded}, {1}, query);  // of two bytes
    problem.terms = static_cast<float*>(terms->mutable_data_ptr());
  }
  problem.batch = query.size(0), problem.heads = query.size(1), problem.queries = query.size(2);
  problem.keys = key.size(2), problem.head_size = query.size(3);
  problem.scale = static_cast<float>(scale);
  problem.bfloat16 = dtype == torch::headeronly::ScalarType::BFloat16;
  problem.processors = attribute(cudaDevAttrMultiProcessorCount, device);

  const int64_t row = problem.head_size, token = problem.heads * row, batch = problem.queries * token;
  Tensor out = empty_strided({query.size(0), query.size(1), query.size(2), row}, {batch, row, token, 1}, query);
  problem.out = {out.mutable_data_ptr(), batch, row, token};
  (problem.bfloat16 ? launch_attention_bfloat16 : launch_attention_float16)(problem, current_stream(device));
  return out;
}

#else

Tensor attention(Tensor, Tensor, Tensor, double, std::optional<Tensor>) {
  fail("sfast_native::attention: this build has no kernels of our own (nvcc was not found)");
}

#endif
}  // namespace sfast

#include "group_norm.h"

#include <torch/csrc/stable/accelerator.h>

#include "check.h"
#include "ops.h"
#include "runtime.h"

namespace sfast {
namespace {

constexpr const char* kOp = "sfast_native::group_norm";

GroupNormProblem describe(const Tensor& x, int64_t num_groups) {
  const auto dtype = half_dtype(x, kOp);
  SFAST_CHECK(x.dim() == 3 && x.numel() > 0 && x.is_contiguous(), kOp, ": x must be contiguous [N, S, C], got ",
              to_string(x.sizes()), " with strides ", to_string(x.strides()));
  SFAST_CHECK(num_groups >= 1 && x.size(2) % num_groups == 0, kOp, ": num_groups must divide the channels, got ",
              num_groups, " groups for ", x.size(2), " channels");
  GroupNormProblem problem{};
  problem.device = x.get_device_index();
  problem.bfloat16 = dtype == torch::headeronly::ScalarType::BFloat16;
  problem.n = x.size(0), problem.rows = x.size(1), problem.channels = x.size(2), problem.groups = num_groups;
  return problem;
}

void check_parameter(const std::optional<Tensor>& parameter, const char* name, const Tensor& x) {
  if (!parameter) return;
  SFAST_CHECK(parameter->scalar_type() == x.scalar_type() && parameter->is_cuda() &&
                  parameter->get_device_index() == x.get_device_index(),
              kOp, ": ", name, " must have x's dtype and device");
  SFAST_CHECK(parameter->dim() == 1 && parameter->size(0) == x.size(2) && parameter->is_contiguous(), kOp, ": ", name,
              " must be contiguous [", x.size(2), "], got ", to_string(parameter->sizes()));
}

}  // namespace

#ifdef SFAST_HOPPER

bool group_norm_takes(Tensor x, int64_t num_groups) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && group_norm_fits(describe(x, num_groups));
}

Tensor group_norm(Tensor x, std::optional<Tensor> shift, int64_t num_groups, std::optional<Tensor> weight,
                  std::optional<Tensor> bias, double eps, bool silu) {
  GroupNormProblem problem = describe(x, num_groups);
  check_operand(x, "x", x, kOp);
  const torch::stable::accelerator::DeviceGuard guard(problem.device);
  check_parameter(weight, "weight", x);
  check_parameter(bias, "bias", x);
  if (shift) {
    SFAST_CHECK(shift->scalar_type() == x.scalar_type() && shift->is_cuda() &&
                    shift->get_device_index() == problem.device && shift->dim() == 2 && shift->size(0) == problem.n &&
                    shift->size(1) == problem.channels && (shift->stride(1) == 1 || problem.channels == 1),
                kOp, ": shift must be [N, C] like x with contiguous channels, got ", to_string(shift->sizes()),
                " with strides ", to_string(shift->strides()));
    problem.shift_stride = shift->stride(0);
  }
  problem.eps = static_cast<float>(eps);
  problem.silu = silu;
  Tensor out = empty_strided({problem.n, problem.rows, problem.channels},
                             {problem.rows * problem.channels, problem.channels, 1}, x);
  const GroupNormPointers pointers{x.const_data_ptr(), shift ? shift->const_data_ptr() : nullptr,
                                   weight ? weight->const_data_ptr() : nullptr, bias ? bias->const_data_ptr() : nullptr,
                                   out.mutable_data_ptr()};
  launch_group_norm(problem, pointers, current_stream(problem.device));
  return out;
}

#else

bool group_norm_takes(Tensor, int64_t) {
  return false;
}

Tensor group_norm(Tensor x, std::optional<Tensor>, int64_t num_groups, std::optional<Tensor>, std::optional<Tensor>,
                  double, bool) {
  describe(x, num_groups);
  fail(kOp, ": this build has no kernels of our own");
}

#endif

}  // namespace sfast

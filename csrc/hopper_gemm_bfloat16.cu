#include "hopper_gemm.cuh"

namespace sfast {

const std::vector<HopperKernel>& hopper_kernels_bfloat16() {
  static const std::vector<HopperKernel> kernels = hopper::all_kernels<__nv_bfloat16>();
  return kernels;
}

}  // namespace sfast

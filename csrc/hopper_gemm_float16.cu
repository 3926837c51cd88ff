#include "hopper_gemm.cuh"

namespace sfast {

const std::vector<HopperKernel>& hopper_kernels_float16() {
  static const std::vector<HopperKernel> kernels = hopper::all_kernels<__half>();
  return kernels;
}

}  // namespace sfast

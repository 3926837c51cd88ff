#ifdef SFAST_HOPPER  // cuda.h comes with a toolkit, which only the kernels need
#include "tensor_map.h"

#include <cudaTypedefs.h>

#include <array>
#include <numeric>

#include "check.h"

namespace sfast {
namespace {

// Asked of the runtime, so that nothing links to the driver: this library also loads where there is none.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto found = [] {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000, cudaEnableDefault, &result));
#else
    CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &address, cudaEnableDefault, &result));
#endif
    SFAST_CHECK(result == cudaDriverEntryPointSuccess, "sfast_native: the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(address);
  }();
  return found;
}

}  // namespace

CUtensorMap encode_tensor_map(const TiledTensor& tensor) {
  constexpr size_t kMost = 5;
  const size_t rank = tensor.sizes.size();
  SFAST_CHECK(rank >= 1 && rank <= kMost && tensor.strides.size() == rank - 1 && tensor.tile.size() == rank,
              "sfast_native: a tensor map of ", rank, " dimensions");
  std::array<cuuint64_t, kMost> sizes{}, strides{};
  std::array<cuuint32_t, kMost> tile{}, step{};
  step.fill(1);
  for (size_t d = 0; d < rank; ++d) {
    sizes[d] = tensor.sizes[d];
    tile[d] = tensor.tile[d];
    if (!tensor.step.empty()) step[d] = tensor.step[d];
    if (d > 0) strides[d - 1] = 2 * tensor.strides[d - 1];  // bytes
  }
  CUtensorMap map;
  const auto encode = [&] {
    return encoder()(&map, tensor.bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                     static_cast<cuuint32_t>(rank), const_cast<void*>(tensor.address), sizes.data(), strides.data(),
                     tile.data(), step.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult status = encode();
  if (status == CUDA_ERROR_INVALID_CONTEXT) {  // a thread whose first call this is
    int device = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaSetDevice(device));  // binds the thread to the device's context
    status = encode();
  }
  SFAST_CHECK(status == CUDA_SUCCESS, "sfast_native: cuTensorMapEncodeTiled failed with error ",
              static_cast<int>(status));
  return map;
}

}  // namespace sfast
#endif  // SFAST_HOPPER

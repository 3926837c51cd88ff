// What follows a product where no epilogue of it can: one pass over the product, fp16 or bf16, computed in fp32.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "hopper_gemm.h"

namespace sfast {

// out [rows, columns] = act(product [rows, columns]), in place where the two are one; columns a multiple of 8.
cudaError_t activate(bool bfloat16, const void* product, void* out, int64_t rows, int64_t columns,
                     HopperActivation activation, cudaStream_t stream);

// out [rows, columns] = value * act(gate) for product [rows, 2 columns] = [value, gate]; columns a multiple of 8.
cudaError_t gate(bool bfloat16, const void* product, void* out, int64_t rows, int64_t columns,
                 HopperActivation activation, cudaStream_t stream);

}  // namespace sfast

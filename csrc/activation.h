// What follows a product where no epilogue of it can: one pass over the product, fp16 or bf16, computed in fp32.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "hopper_gemm.h"

namespace sfast {

// out [rows, columns] = act(product [rows, columns]), in place where the two are one; columns a multiple of 8.
cudaError_t activate(bool bfloat16, const void* product, void* out, int64_t rows, int64_t columns,
                     HopperActivation activation, cudaStream_t stream);

// out [rows, columns] = value * act(gate), rows of both `ld` elements apart; columns and ld multiples of 8. The result
// may take the place of a value with ld = columns.
cudaError_t gate(bool bfloat16, const void* value, const void* gate, void* out, int64_t rows, int64_t columns,
                 int64_t ld, HopperActivation activation, cudaStream_t stream);

}  // namespace sfast

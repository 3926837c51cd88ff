// What launching the two kernels of attention shares.
#pragma once

#include <stdexcept>
#include <string>

#include "attention.h"
#include "tensor_map.h"

namespace sfast::attention {

constexpr float kLog2E = 1.4426950408889634f;

constexpr int divide_up(int a, int b) {
  return (a + b - 1) / b;
}

// Tiles of `rows` tokens x 64 columns of one head.
inline CUtensorMap map_rows(const AttentionProblem& problem, const AttentionOperand& operand, int tokens, int rows) {
  return encode_tensor_map({operand.address,
                            problem.bfloat16,
                            {problem.head_size, tokens, problem.heads, problem.batch},
                            {operand.token, operand.head, operand.batch},
                            {64, rows, 1, 1}});
}

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // its error must not surface in a later call
    throw std::runtime_error(std::string("sfast_native::attention: ") + what + ": " + cudaGetErrorString(status));
  }
}

// The kernel may be set up while the one before it ends: it waits for that one itself.
template <typename Arguments>
void launch(void (*kernel)(Arguments), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
            const Arguments& arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "shared memory");
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared_bytes;
  config.stream = stream, config.attrs = &overlap, config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments), "launch");
}

}  // namespace sfast::attention

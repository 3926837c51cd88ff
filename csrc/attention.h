// What the kernels of attention and the operator around them agree on.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sfast {

// A view [batch, heads, tokens, head size] with contiguous heads: spacings in elements, multiples of 8.
struct AttentionOperand {
  const void* address;
  int64_t batch, head, token;
};

// softmax(scale query key^T) value.
struct AttentionProblem {
  AttentionOperand query, key, value, out;
  int batch, heads, queries, keys;
  int head_size;  // 40, 64, 80, 128 or 160
  float scale;    // positive
  bool bfloat16;
  int processors;  // of the device
};

// By the kernel that suits the shape. Raise where the launch fails.
void launch_attention_float16(const AttentionProblem& problem, cudaStream_t stream);
void launch_attention_bfloat16(const AttentionProblem& problem, cudaStream_t stream);

}  // namespace sfast

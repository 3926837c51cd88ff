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

constexpr int kWidestHead = 160;
constexpr int kMaskUnit = 128;

// [batch, heads, keys] with contiguous keys: spacings in elements, 0 where all are the same. Of the operands' type and
// to be added to the scores, or boolean and false where a key does not count.
struct AttentionMask {
  const void* address;  // null for none
  int64_t batch, head;
  bool boolean;
};

// softmax(scale query key^T + mask) value. Rows whose keys all do not count become 0.
struct AttentionProblem {
  AttentionOperand query, key, value, out;
  AttentionMask mask;
  float* terms;  // with a mask, room for [batch, heads (or 1, if they share it), keys up to a multiple of kMaskUnit]
  int batch, heads, queries, keys;
  int head_size;  // a multiple of 8, at most kWidestHead
  float scale;    // positive
  bool bfloat16;
  int processors;  // of the device
};

// By the kernel that suits the shape. Raise where the launch fails.
void launch_attention_float16(const AttentionProblem& problem, cudaStream_t stream);
void launch_attention_bfloat16(const AttentionProblem& problem, cudaStream_t stream);

}  // namespace sfast

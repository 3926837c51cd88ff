// GroupNorm of channels-last memory in one launch: a cluster of blocks keeps some groups of a sample in shared memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sfast {

// x and out [n, rows, channels], dense, float16 or bfloat16.
struct GroupNormProblem {
  int device;
  bool bfloat16;
  int64_t n, rows, channels, groups;
  int64_t shift_stride;  // elements from one sample's shift to the next one's
  float eps;
  bool silu;
};

// shift [n, channels], weight and bias [channels] are null where there are none.
struct GroupNormPointers {
  const void* x;
  const void* shift;
  const void* weight;
  const void* bias;
  void* out;
};

// Whether `launch_group_norm` can compute it: on this GPU, with whole groups in whole vectors, and the data in the
// shared memory of not more blocks than run at once.
bool group_norm_fits(const GroupNormProblem& problem);

void launch_group_norm(const GroupNormProblem& problem, const GroupNormPointers& pointers, cudaStream_t stream);

}  // namespace sfast

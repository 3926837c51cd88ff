#include "attention_ways.cuh"

namespace sfast {

void launch_attention_bfloat16(const AttentionProblem& problem, cudaStream_t stream) {
  attention::attend<__nv_bfloat16>(problem, stream);
}

}  // namespace sfast

#include "attention_ways.cuh"

namespace sfast {

void launch_attention_float16(const AttentionProblem& problem, cudaStream_t stream) {
  attention::attend<__half>(problem, stream);
}

}  // namespace sfast

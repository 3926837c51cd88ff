// Which kernel runs at which shape, as measured on an H200.
#pragma once

#include "attention_long.cuh"
#include "attention_short.cuh"

namespace sfast::attention {

// Up to N keys. Wide heads and many keys leave room for fewer warpgroups on a processor.
template <typename T, int D, int N>
void attend_at_once(const AttentionProblem& problem, cudaStream_t stream) {
  constexpr int kWarpgroups = N == 80 && (D == 40 || D == 80) ? 2 : 1;
  constexpr int kResident = (D <= 80 ? 4 : 3) - (N > 80);  // warpgroups on a processor
  using K = ShortKernel<T, D, kWarpgroups, N, kResident / kWarpgroups>;
  const int units = divide_up(problem.queries, kUnit) * problem.heads * problem.batch;
  launch_short<K>(problem, divide_up(units, problem.processors * kResident), stream);
}

// How long K takes on the whole GPU, in quarters of the time that two warpgroups need for one tile. At head sizes 40
// and 64 three warpgroups were measured to need 1.1 to 1.3 times that for theirs; one is taken to need three quarters.
template <class K>
int cost(const AttentionProblem& problem) {
  constexpr int kQuarters[] = {3, 4, 5};
  const int tiles = divide_up(problem.queries, K::kWarpgroups * kUnit) * problem.heads * problem.batch;
  return divide_up(tiles, problem.processors) * kQuarters[K::kWarpgroups - 1];
}

template <class One, class Two, class Three>
void attend_in_blocks(const AttentionProblem& problem, cudaStream_t stream) {
  const int one = cost<One>(problem), two = cost<Two>(problem), three = cost<Three>(problem);
  if (three <= two && three <= one) {
    launch_long<Three>(problem, stream);
  } else if (two <= one) {
    launch_long<Two>(problem, stream);
  } else {
    launch_long<One>(problem, stream);
  }
}

template <typename T, int D>
void attend(const AttentionProblem& problem, cudaStream_t stream) {
  if (problem.keys <= 80) {
    attend_at_once<T, D, 80>(problem, stream);
  } else if (problem.keys <= 128) {
    attend_at_once<T, D, 128>(problem, stream);
  } else {
    constexpr int N = D == 160 ? 64 : 128;
    using Two = LongKernel<T, D, 2, N>;
    // Three need registers, and shared memory, that a wide head has not.
    using Three = std::conditional_t<(D <= 64), LongKernel<T, D, 3, N>, Two>;
    attend_in_blocks<LongKernel<T, D, 1, N>, Two, Three>(problem, stream);
  }
}

template <typename T>
void attend(const AttentionProblem& problem, cudaStream_t stream) {
  switch (problem.head_size) {
    case 40:
      return attend<T, 40>(problem, stream);
    case 64:
      return attend<T, 64>(problem, stream);
    case 80:
      return attend<T, 80>(problem, stream);
    case 128:
      return attend<T, 128>(problem, stream);
    case 160:
      return attend<T, 160>(problem, stream);
    default:
      throw std::runtime_error("sfast_native::attention: no kernel for head size " + std::to_string(problem.head_size));
  }
}

}  // namespace sfast::attention

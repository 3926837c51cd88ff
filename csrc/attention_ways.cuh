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

// How long K takes on the whole GPU, in quarters of the time that two warpgroups need for one tile: so many does a
// tile for 0, 1, 2 or 3 of them take.
template <class K>
int cost(const AttentionProblem& problem) {
  constexpr int kQuarters[] = {0, 3, 4, 5};
  const Rounds rounds = plan_rounds<K>(problem, problem.processors);
  return rounds.whole * kQuarters[K::kWarpgroups] + kQuarters[rounds.last_units];
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
  constexpr int N = D == 160 ? 64 : 128;
  if (problem.mask.address != nullptr) {
    using Two = LongKernel<T, D, 2, N, false, true>;
    attend_in_blocks<LongKernel<T, D, 1, N, false, true>, Two, Two>(problem, stream);
  } else if (problem.keys <= 80) {
    attend_at_once<T, D, 80>(problem, stream);
  } else if (problem.keys <= 128) {
    attend_at_once<T, D, 128>(problem, stream);
  } else {
    using Two = LongKernel<T, D, 2, N, true>;
    // Three need registers, and shared memory, that a wide head has not.
    using Three = std::conditional_t<(D <= 80), LongKernel<T, D, 3, (D == 80 ? 96 : 128), D != 64>, Two>;
    attend_in_blocks<LongKernel<T, D, 1, N, true>, Two, Three>(problem, stream);
  }
}

// By the kernel for the next larger head: the TMA fills a head up with zeros, and does not store what comes of them.
template <typename T>
void attend(const AttentionProblem& problem, cudaStream_t stream) {
  const int size = problem.head_size;
  if (size <= 40) return attend<T, 40>(problem, stream);
  if (size <= 64) return attend<T, 64>(problem, stream);
  if (size <= 80) return attend<T, 80>(problem, stream);
  if (size <= 96) return attend<T, 96>(problem, stream);
  if (size <= 128) return attend<T, 128>(problem, stream);
  attend<T, 160>(problem, stream);
}

}  // namespace sfast::attention

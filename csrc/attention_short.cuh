// Attention over few keys (a prompt's): one product, one softmax, one product; bound by latency and by memory.
//
// A thread block copies the keys and values of one head once; each of its warpgroups goes over `units` x 64 rows of
// queries, the next 64 on their way while it works on these. Many blocks share a processor and hide each other's waits.
#pragma once

#include "attention_launch.cuh"
#include "attention_tile.cuh"

namespace sfast::attention {

struct ShortArguments {
  CUtensorMap query, key, value, out;
  int heads, queries, keys, units;
  float scale;  // times log2(e)
};

template <typename T_, int D_, int kWarpgroups_, int N_, int kBlocks_>
struct ShortKernel {
  using T = T_;
  static constexpr int D = D_, N = N_, kWarpgroups = kWarpgroups_, kThreads = 128 * kWarpgroups;
  static constexpr int kBlocks = kBlocks_;  // on a processor
  static constexpr int kUnitBytes = tile_bytes<D>(kUnit), kKeysBytes = tile_bytes<D>(N);
  struct Shared {
    alignas(1024) uint8_t key[kKeysBytes];
    uint8_t value[kKeysBytes];
    uint8_t query[kWarpgroups][2][kUnitBytes];  // and then the result
    uint64_t key_full, value_full, query_full[kWarpgroups][2];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;  // to start at a multiple of 1024
};

template <class K>
__global__ void __launch_bounds__(K::kThreads, K::kBlocks)
    attention_short(const __grid_constant__ ShortArguments arguments) {
  using T = typename K::T;
  constexpr int D = K::D, N = K::N;
  extern __shared__ uint8_t memory[];
  auto& shared =
      *reinterpret_cast<typename K::Shared*>((reinterpret_cast<uintptr_t>(memory) + 1023) & ~uintptr_t{1023});
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const bool copies = threadIdx.x % 128 == 0;  // one thread of each warpgroup
  const int batch = blockIdx.y / arguments.heads, head = blockIdx.y % arguments.heads;
  const int first = (blockIdx.x * K::kWarpgroups + warpgroup) * arguments.units;
  const int last = min(first + arguments.units, (arguments.queries + kUnit - 1) / kUnit);

  if (threadIdx.x == 0) {
    init_barrier(&shared.key_full, 1);
    init_barrier(&shared.value_full, 1);
    for (int w = 0; w < K::kWarpgroups; ++w)
      init_barrier(&shared.query_full[w][0], 1), init_barrier(&shared.query_full[w][1], 1);
    fence_barrier_init();
    prefetch_tensor_map(&arguments.key);
    prefetch_tensor_map(&arguments.query);
    prefetch_tensor_map(&arguments.value);
    prefetch_tensor_map(&arguments.out);
  }
  __syncthreads();
  const auto load_query = [&](int unit, int slot) {
    arrive_expecting(&shared.query_full[warpgroup][slot], K::kUnitBytes);
    load_rows<D>(shared.query[warpgroup][slot], kUnit, &arguments.query, &shared.query_full[warpgroup][slot],
                 unit * kUnit, head, batch);
  };
  if (copies) {
    wait_for_previous_kernel();
    launch_dependents();
    if (threadIdx.x == 0) {
      arrive_expecting(&shared.key_full, K::kKeysBytes);
      load_rows<D>(shared.key, N, &arguments.key, &shared.key_full, 0, head, batch);
    }
    if (first < last) load_query(first, 0);
    if (threadIdx.x == 0) {
      arrive_expecting(&shared.value_full, K::kKeysBytes);
      load_rows<D>(shared.value, N, &arguments.value, &shared.value_full, 0, head, batch);
    }
  }

  wait(&shared.key_full, 0);
  for (int unit = first; unit < last; ++unit) {
    const int turn = unit - first, slot = turn % 2;
    uint8_t* const tile = shared.query[warpgroup][slot];
    float scores[N / 2], sums[D / 2], decay[2];
    uint32_t weights[N / 16][4];
    RowState rows;

    wait(&shared.query_full[warpgroup][slot], turn / 2 % 2);
    begin_products();
    score<T, D, N>(scores, tile, shared.key);
    commit_products();
    if (copies && unit + 1 < last) {
      wait_stores_read<0>();  // the slot was the result before this one
      load_query(unit + 1, slot ^ 1);
    }
    wait_products<0>();
    pin(scores);
    mask_keys<N>(scores, arguments.keys);
    exponentiate<N, true>(scores, rows, decay, arguments.scale);
    to_operand<N, T>(scores, weights);
    if (turn == 0) wait(&shared.value_full, 0);
    begin_products();
    weigh<T, D, N>(sums, weights, shared.value, false);
    commit_products();
    const float factor[2] = {1 / row_sum(rows.sum[0]), 1 / row_sum(rows.sum[1])};
    sync_threads(1 + warpgroup, 128);  // all have read their queries
    wait_products<0>();
    pin(sums);
    store_rows<T, D>(tile, sums, factor, &arguments.out, 1 + warpgroup, unit * kUnit, head, batch);
  }
  if (copies) wait_stores_read<0>();
}

template <class K>
void launch_short(const AttentionProblem& problem, int units, cudaStream_t stream) {
  constexpr int kMostHeads = 65535;  // of all batches: the second dimension of a grid
  check(problem.heads * problem.batch <= kMostHeads ? cudaSuccess : cudaErrorInvalidConfiguration, "too many heads");
  ShortArguments arguments;
  arguments.query = map_rows(problem, problem.query, problem.queries, kUnit);
  arguments.key = map_rows(problem, problem.key, problem.keys, K::N);
  arguments.value = map_rows(problem, problem.value, problem.keys, K::N);
  arguments.out = map_rows(problem, problem.out, problem.queries, kUnit);
  arguments.heads = problem.heads, arguments.queries = problem.queries, arguments.keys = problem.keys;
  arguments.units = units;
  arguments.scale = problem.scale * kLog2E;
  const dim3 grid(divide_up(problem.queries, K::kWarpgroups * units * kUnit), problem.heads * problem.batch);
  launch(attention_short<K>, grid, K::kThreads, K::kSharedBytes, stream, arguments);
}

}  // namespace sfast::attention

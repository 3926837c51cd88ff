// Attention over any number of keys, block by block (flash attention), for Hopper.
//
// One warpgroup copies (TMA, a ring of stages), the others compute, 64 rows of queries each on the same keys and
// values. Within a warpgroup the scores of the next block of keys are computed by the tensor cores while nothing waits
// for them but the exponentials of that block, and the values of the block before are summed behind those exponentials;
// between warpgroups a baton makes them issue their products in turn, so that one's exponentials run beside another's
// products. The blocks go from the last to the first: only the first one done must mask keys that do not exist. A
// thread block goes on to its next tile of queries while the copies for it are under way; what whole rounds of tiles
// leave is shared out in smaller ones.
#pragma once

#include "attention_mask.cuh"
#include "attention_tile.cuh"

namespace sfast::attention {

struct LongArguments {
  CUtensorMap query, key, value, out;
  int all_heads, heads, queries, keys;
  int units;               // of a head
  int rounds, last_units;  // whole rounds of tiles, and how much each block does in the one behind them
  float scale;             // times log2(e)
  MaskTerms terms;
};

// kHeld: queries stay in registers, which spares reading them from shared memory for each block of keys.
template <typename T_, int D_, int kWarpgroups_, int N_, bool kHeld_, bool kMasked_ = false>
struct LongKernel {
  using T = T_;
  static constexpr bool kHeld = kHeld_, kMasked = kMasked_;
  static constexpr int D = D_, N = N_, kWarpgroups = kWarpgroups_, kStages = 2;
  static constexpr int kThreads = 128 * (1 + kWarpgroups);
  static constexpr int kBlocks = kWarpgroups == 1 ? 2 : 1;  // on a processor
  static constexpr int kGiven = kWarpgroups == 3 ? 32 : 24;
  static constexpr int kTaken = kWarpgroups == 3 ? 160 : kWarpgroups == 2 ? 240 : 232;

  static constexpr int kUnitBytes = tile_bytes<D>(kUnit), kBlockBytes = tile_bytes<D>(N);
  struct Shared {
    alignas(1024) uint8_t query[kWarpgroups][kUnitBytes];
    uint8_t out[kWarpgroups][kUnitBytes];
    uint8_t key[kStages][kBlockBytes], value[kStages][kBlockBytes];
    uint64_t query_full[kWarpgroups], query_empty[kWarpgroups];
    uint64_t key_full[kStages], key_empty[kStages], value_full[kStages], value_empty[kStages];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;  // to start at a multiple of 1024
};

// A place in the ring of stages, and the parity of the phase that fills it.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  __device__ inline void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// What a thread block works on in a round. All heads have as many units of rows, a multiple of the warpgroups, of which
// the last ones may not exist; `active` warpgroups have some.
struct QueryTile {
  int batch, head, row, active;

  __device__ inline QueryTile(const LongArguments& arguments, int round, int warpgroups) {
    const int before = round * gridDim.x * warpgroups,
              here = round < arguments.rounds ? warpgroups : arguments.last_units;
    const int unit = before + blockIdx.x * here, all_heads = unit / arguments.units;
    batch = all_heads / arguments.heads;
    head = all_heads % arguments.heads;
    row = unit % arguments.units * kUnit;
    active = all_heads < arguments.all_heads ? max(0, min(here, (arguments.queries - row + kUnit - 1) / kUnit)) : 0;
  }
};

template <class K>
__device__ inline void produce(typename K::Shared& shared, const LongArguments& arguments) {
  const int key_blocks = (arguments.keys + K::N - 1) / K::N;
  RingPlace<K::kStages> place;
  uint32_t query_parity[K::kWarpgroups] = {};
  wait_for_previous_kernel();
  for (int round = 0; round <= arguments.rounds; ++round) {
    const QueryTile tile(arguments, round, K::kWarpgroups);
    if (tile.active == 0) continue;
#pragma unroll
    for (int w = 0; w < K::kWarpgroups; ++w) {
      if (w >= tile.active) continue;
      wait(&shared.query_empty[w], query_parity[w] ^ 1);
      query_parity[w] ^= 1;
      arrive_expecting(&shared.query_full[w], K::kUnitBytes);
      load_rows<K::D>(shared.query[w], kUnit, &arguments.query, &shared.query_full[w], tile.row + w * kUnit, tile.head,
                      tile.batch);
    }
    for (int block = key_blocks - 1; block >= 0; --block) {
      wait(&shared.key_empty[place.stage], place.parity ^ 1);
      arrive_expecting(&shared.key_full[place.stage], K::kBlockBytes);
      load_rows<K::D>(shared.key[place.stage], K::N, &arguments.key, &shared.key_full[place.stage], block * K::N,
                      tile.head, tile.batch);
      wait(&shared.value_empty[place.stage], place.parity ^ 1);
      arrive_expecting(&shared.value_full[place.stage], K::kBlockBytes);
      load_rows<K::D>(shared.value[place.stage], K::N, &arguments.value, &shared.value_full[place.stage], block * K::N,
                      tile.head, tile.batch);
      place.next();
    }
  }
  launch_dependents();
}

// Warpgroups issue their products in turn: each waits for the baton, and hands it on.
template <class K>
struct Baton {
  __device__ static inline void hand_on(int warpgroup) {
    if constexpr (K::kWarpgroups > 1) {
      asm volatile("bar.arrive %0, 256;" ::"r"(1 + (warpgroup + 1) % K::kWarpgroups) : "memory");
    }
  }

  __device__ static inline void await(int warpgroup) {
    if constexpr (K::kWarpgroups > 1) sync_threads(1 + warpgroup, 256);
  }
};

// A warpgroup without rows frees what the others need freed.
template <class K>
__device__ inline void stand_by(typename K::Shared& shared, RingPlace<K::kStages>& place, int key_blocks,
                                int warpgroup) {
  for (int block = 0; block < key_blocks; ++block) {
    wait(&shared.key_full[place.stage], place.parity);
    if (threadIdx.x % 32 == 0) arrive(&shared.key_empty[place.stage]);
    if (block > 0) Baton<K>::await(warpgroup), Baton<K>::hand_on(warpgroup);
    wait(&shared.value_full[place.stage], place.parity);
    if (threadIdx.x % 32 == 0) arrive(&shared.value_empty[place.stage]);
    place.next();
  }
}

template <class K>
__device__ inline void consume(typename K::Shared& shared, const LongArguments& arguments, int warpgroup) {
  using T = typename K::T;
  constexpr int D = K::D, N = K::N;
  const int key_blocks = (arguments.keys + N - 1) / N;
  const bool signals = threadIdx.x % 32 == 0;  // one thread of each warp
  RingPlace<K::kStages> place;
  uint32_t query_parity = 0;
  float scores[N / 2], sums[D / 2], decay[2];
  float2 terms[N / 8];
  uint32_t weights[N / 16][4], held[kSteps<D>][4];
  RowState rows;

  if (K::kMasked) wait_for_previous_kernel();
  if (warpgroup == K::kWarpgroups - 1) Baton<K>::hand_on(warpgroup);
  for (int round = 0; round <= arguments.rounds; ++round) {
    const QueryTile tile(arguments, round, K::kWarpgroups);
    if (tile.active == 0) continue;
    if (warpgroup >= tile.active) {
      stand_by<K>(shared, place, key_blocks, warpgroup);
      continue;
    }
    const uint8_t* query = shared.query[warpgroup];
    wait(&shared.query_full[warpgroup], query_parity);
    query_parity ^= 1;
    if constexpr (K::kHeld) {
#pragma unroll
      for (int k = 0; k < kSteps<D>; ++k) load_operand(held[k], query, k);
    }
    const auto score_all = [&](const uint8_t* key) {
      if constexpr (K::kHeld) {
        score<T, D, N>(scores, held, key);
      } else {
        score<T, D, N>(scores, query, key);
      }
    };

    wait(&shared.key_full[place.stage], place.parity);
    begin_products();
    score_all(shared.key[place.stage]);
    commit_products();
    const float* const all_terms = K::kMasked ? arguments.terms.row(tile.batch, tile.head) : nullptr;
    if constexpr (K::kMasked) load_terms<N>(terms, all_terms + (key_blocks - 1) * N);
    wait_products<0>();
    pin(scores);
    if (signals) arrive(&shared.key_empty[place.stage]);
    if constexpr (K::kMasked) {
      add_terms<N>(scores, terms);
    } else {
      mask_keys<N>(scores, arguments.keys - (key_blocks - 1) * N);
    }
    exponentiate<N, true, K::kMasked>(scores, rows, decay, arguments.scale);
    to_operand<N, T>(scores, weights);

    for (int block = 1; block < key_blocks; ++block) {
      const RingPlace<K::kStages> previous = place;
      place.next();
      wait(&shared.key_full[place.stage], place.parity);
      wait(&shared.value_full[previous.stage], previous.parity);
      Baton<K>::await(warpgroup);
      pin(scores);
      pin(sums);
      begin_products();
      score_all(shared.key[place.stage]);
      commit_products();
      weigh<T, D, N>(sums, weights, shared.value[previous.stage], block > 1);
      commit_products();
      Baton<K>::hand_on(warpgroup);
      if constexpr (K::kMasked) load_terms<N>(terms, all_terms + (key_blocks - 1 - block) * N);
      wait_products<1>();
      pin(scores);
      bool decays;
      if constexpr (K::kMasked) {
        if (signals) arrive(&shared.key_empty[place.stage]);
        add_terms<N>(scores, terms);
        decays = exponentiate<N, false, true>(scores, rows, decay, arguments.scale);
      } else {
        decays = exponentiate_boldly<N>(scores, rows, decay, arguments.scale,
                                        [&] { score_of_warp<T, D, N>(scores, query, shared.key[place.stage]); });
        if (signals) arrive(&shared.key_empty[place.stage]);
      }
      wait_products<0>();
      pin(sums);
      if (signals) arrive(&shared.value_empty[previous.stage]);
      if (decays) {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) sums[i] *= decay[i / 2 % 2];
      }
      to_operand<N, T>(scores, weights);
    }
    if (signals) arrive(&shared.query_empty[warpgroup]);

    wait(&shared.value_full[place.stage], place.parity);
    pin(sums);
    begin_products();
    weigh<T, D, N>(sums, weights, shared.value[place.stage], key_blocks > 1);
    commit_products();
    float factor[2] = {1 / row_sum(rows.sum[0]), 1 / row_sum(rows.sum[1])};
    if (K::kMasked) {
      for (float& f : factor) f = isinf(f) ? 0 : f;
    }
    if (threadIdx.x % 128 == 0) wait_stores_read<0>();  // of the tile before
    sync_threads(4 + warpgroup, 128);
    wait_products<0>();
    pin(sums);
    if (signals) arrive(&shared.value_empty[place.stage]);
    place.next();
    store_rows<T, D>(shared.out[warpgroup], sums, factor, &arguments.out, 4 + warpgroup, tile.row + warpgroup * kUnit,
                     tile.head, tile.batch);
  }
  if (threadIdx.x % 128 == 0) wait_stores_read<0>();
}

template <class K>
__global__ void __launch_bounds__(K::kThreads, K::kBlocks)
    attention_long(const __grid_constant__ LongArguments arguments) {
  extern __shared__ uint8_t memory[];
  auto& shared =
      *reinterpret_cast<typename K::Shared*>((reinterpret_cast<uintptr_t>(memory) + 1023) & ~uintptr_t{1023});
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&arguments.query);
    prefetch_tensor_map(&arguments.key);
    prefetch_tensor_map(&arguments.value);
    prefetch_tensor_map(&arguments.out);
    constexpr int kWarps = 4;
    for (int w = 0; w < K::kWarpgroups; ++w) {
      init_barrier(&shared.query_full[w], 1);
      init_barrier(&shared.query_empty[w], kWarps);
    }
    for (int stage = 0; stage < K::kStages; ++stage) {
      init_barrier(&shared.key_full[stage], 1);
      init_barrier(&shared.value_full[stage], 1);
      init_barrier(&shared.key_empty[stage], kWarps * K::kWarpgroups);
      init_barrier(&shared.value_empty[stage], kWarps * K::kWarpgroups);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // known to the compiler to be the same in a warp
  if (warpgroup == 0) {
    give_registers<K::kGiven>();
    if (threadIdx.x == 0) produce<K>(shared, arguments);
  } else {
    take_registers<K::kTaken>();
    consume<K>(shared, arguments, warpgroup - 1);
  }
}

struct Rounds {
  int blocks, units, whole, last_units;
};

// Whole rounds of tiles, one for each block, and a last one of what is left: fewer rows for each block, where heads and
// what begins there can be divided so.
template <class K>
Rounds plan_rounds(const AttentionProblem& problem, int most_blocks) {
  Rounds made;
  const int per_head = divide_up(problem.queries, K::kWarpgroups * kUnit);
  const int tiles = per_head * problem.heads * problem.batch;
  made.blocks = tiles < most_blocks ? tiles : most_blocks;
  made.units = per_head * K::kWarpgroups;
  made.whole = tiles / made.blocks;
  const int left = tiles % made.blocks * K::kWarpgroups, done = made.whole * made.blocks * K::kWarpgroups;
  made.last_units = divide_up(left, made.blocks);
  while (made.last_units > 0 && (made.units % made.last_units != 0 || done % made.last_units != 0)) ++made.last_units;
  return made;
}

template <class K>
void launch_long(const AttentionProblem& problem, cudaStream_t stream) {
  LongArguments arguments;
  arguments.query = map_rows(problem, problem.query, problem.queries, kUnit);
  arguments.key = map_rows(problem, problem.key, problem.keys, K::N);
  arguments.value = map_rows(problem, problem.value, problem.keys, K::N);
  arguments.out = map_rows(problem, problem.out, problem.queries, kUnit);
  arguments.heads = problem.heads, arguments.queries = problem.queries, arguments.keys = problem.keys;
  arguments.all_heads = problem.heads * problem.batch;
  const Rounds rounds = plan_rounds<K>(problem, K::kBlocks * problem.processors);
  arguments.units = rounds.units, arguments.rounds = rounds.whole, arguments.last_units = rounds.last_units;
  arguments.scale = problem.scale * kLog2E;
  if constexpr (K::kMasked) arguments.terms = launch_mask_terms<typename K::T>(problem, stream);
  launch(attention_long<K>, dim3(rounds.blocks), K::kThreads, K::kSharedBytes, stream, arguments);
}

}  // namespace sfast::attention

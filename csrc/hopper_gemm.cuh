// The kernel: one warpgroup fetches tiles by TMA into a ring of stages, the others multiply them with wgmma.
//
// A block stays on its SM and takes tile after tile, so that the fetching of a tile hides behind the product before it.
//  - pair: two blocks of a cluster, one below the other, each load half of the weights' tile into both.
//  - splits: the blocks of a cluster each sum over a part of k, and add the parts up through each other's shared
//  memory.
//  - alternating: each multiplying warpgroup has tiles of its own, and one's epilogue hides behind the other's product.
#pragma once

#include "hopper_epilogue.cuh"
#include "hopper_wgmma.cuh"

namespace sfast::hopper {

constexpr int kStep = 64;                // columns of k in a stage: the 128 bytes of a swizzled row
constexpr int kMostShared = 227 * 1024;  // bytes of a block
constexpr int kProducerRegisters = 40;
template <int kConsumers>
constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 152;  // of 65536 for all

template <int kFragments, int kConsumers, bool kAlternate, int kN, bool kStaged, int kColumns>
struct Cut {
  static constexpr int kRows = 64 * kFragments * (kAlternate ? 1 : kConsumers);
  static constexpr int kStageBytes = (kRows + kN) * kStep * 2;
  static constexpr int kResultBytes = kStaged ? kRows * kColumns * 2 : 0;  // on its way out
  static constexpr int kFit = (kMostShared - (kStaged ? 4096 : 2048) - kResultBytes) / kStageBytes;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kSharedBytes = kStages * kStageBytes + kResultBytes + 1024;  // 1024 to align the first
  static constexpr int kSumStride = kN + 8;                                         // floats; no bank conflicts
  static constexpr int kStaticBytes = 2 * kConsumers * kN * 2 + (2 * kStages + kConsumers) * 8;
  static_assert(kRows * kSumStride * 4 <= kStages * kStageBytes + kResultBytes &&
                kSharedBytes + kStaticBytes <= kMostShared);
};

// The place in the ring of stages, and the parity of the phase that is due there.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance(int steps) {
    stage += steps;
    parity ^= (stage / kStages) & 1;
    stage %= kStages;
  }
  __device__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// ---- The two roles ----

// One thread: fills stage after stage, steps first to last of k of each tile.
template <typename C, int kN>
__device__ inline void fetch(const HopperArguments& p, const Tile& tile, int first, int last, uint8_t* stages,
                             uint64_t* full, uint64_t* empty, Place<C::kStages>* place) {
  const int half = p.pair > 1 ? static_cast<int>(block_in_cluster()) : 0;
  const int x0 = tile.x * p.stride_w - p.padding_w, y0 = tile.y * p.stride_h - p.padding_h;
  int tap = first / p.chunks, chunk = first - tap * p.chunks;
  int tap_y = tap / p.filter_w, tap_x = tap - tap_y * p.filter_w;
  for (int step = first; step < last; ++step) {
    uint8_t* const x_tile = stages + place->stage * C::kStageBytes;
    uint8_t* const weight_tile = x_tile + C::kRows * kStep * 2;
    uint64_t* const barrier = full + place->stage;
    const int column = tap * p.channels + chunk * kStep;
    wait(empty + place->stage, place->parity ^ 1);
    arrive_expecting(barrier, C::kStageBytes);
    const bool behind = chunk >= p.chunks_before;  // in the second matrix
    load_tile(x_tile, behind ? &p.x2 : &p.x, barrier, (behind ? chunk - p.chunks_before : chunk) * kStep,
              x0 + tap_x * p.dilation_w, y0 + tap_y * p.dilation_h, tile.image);
    if (p.pair > 1) {
      load_tile_to(3, weight_tile + half * kN * kStep, half ? &p.weight2 : &p.weight, barrier, column,
                   tile.column + half * p.second_half);
    } else {
      load_tile(weight_tile, &p.weight, barrier, column, tile.column);
      load_tile(weight_tile + kN * kStep, &p.weight2, barrier, column, tile.column + p.second_half);
    }
    if (++chunk == p.chunks) {
      chunk = 0, ++tap;
      if (++tap_x == p.filter_w) tap_x = 0, ++tap_y;
    }
    place->next();
  }
}

// The barrier `empty` of a stage hears of a warp that has read it, in all blocks that the stage came to.
struct Released {
  uint64_t* empty;
  int blocks;
  uint32_t remote;  // the first stage's barrier in the block of the cluster that this lane is for

  __device__ Released(uint64_t* empty, int blocks) : empty(empty), blocks(blocks), remote(0) {
    if (blocks > 1) remote = map_shared(empty, threadIdx.x & 1);
  }
  __device__ void say(int stage) const {
    if (blocks > 1) {
      if (threadIdx.x % 32 < 2) arrive_at(remote + 8 * stage);
    } else {
      if (threadIdx.x % 32 == 0) arrive(empty + stage);
    }
  }
};

// A warpgroup: d = the sum of the stages' products, of the rows from first_row on. `next_turn` hears of the last one.
template <typename T, typename C, int kFragments, int kN>
__device__ inline void multiply(float (&d)[kFragments][kN / 2], int steps, int first_row, const uint8_t* stages,
                                uint64_t* full, const Released& released, uint64_t* next_turn,
                                Place<C::kStages>* place) {
  // Of the descriptors, only the low words differ.
  const uint32_t a_first = low_descriptor(stages + first_row * kStep * 2);
  const uint32_t b_first = low_descriptor(stages + C::kRows * kStep * 2);
  int before = 0;
  for (int step = 0; step < steps; ++step) {
    const uint32_t a = a_first + place->stage * (C::kStageBytes >> 4);
    const uint32_t b = b_first + place->stage * (C::kStageBytes >> 4);
    wait(full + place->stage, place->parity);
    begin_products();
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        Product<kN, T>::run(d[f], whole_descriptor(a + (f * 64 * kStep * 2 + 32 * k) / 16, 1024),
                            whole_descriptor(b + 2 * k, 1024), step > 0 || k > 0);
      }
    }
    commit_products();
    // The products of the stage before are done now: its memory may be filled again.
    wait_products<1>();
    if (step > 0) released.say(before);
    before = place->stage;
    place->next();
  }
  if (next_turn != nullptr && threadIdx.x % 32 == 0) arrive(next_turn);
  wait_products<0>();
#pragma unroll
  for (int f = 0; f < kFragments; ++f) pin(d[f]);
  released.say(before);
}

template <typename T, int kFragments, int kConsumers, bool kAlternate, int kN, Family kFamily, bool kStaged>
__global__ __launch_bounds__(128 * (1 + kConsumers), 1) void multiply_tiles(const __grid_constant__ HopperArguments p) {
  constexpr bool kGate = kFamily == Family::kGated;
  constexpr int kColumns = kGate ? kN / 2 : kN, kGroups = kColumns / 32;
  using C = Cut<kFragments, kConsumers, kAlternate, kN, kStaged, kColumns>;
  // Whether what is needed of the residual finds room beside the sums, so that it can be asked for ahead of time.
  constexpr bool kAhead = !kGate && kFragments * kN / 2 + 8 * kGroups <= (kConsumers == 2 ? 160 : 120);  // registers
  constexpr int kDeep = kAhead || kGroups < 4 ? kGroups : 4;
  extern __shared__ uint8_t memory[];
  __shared__ uint64_t full[C::kStages], empty[C::kStages];
  __shared__ uint64_t turn[kConsumers];  // a phase ends when the stages of this warpgroup's tile are the next ones due
  __shared__ alignas(16) uint32_t biases[2][kConsumers][kN / 2];  // of this tile and the next
  uint8_t* const stages = memory + (1024 - shared_address(memory) % 1024) % 1024;
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // which the compiler sees to be the same in a warp

  launch_dependents();
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&p.x);
    prefetch_tensor_map(&p.x2);
    prefetch_tensor_map(&p.weight);
    prefetch_tensor_map(&p.weight2);
    if (kStaged) prefetch_tensor_map(&p.out_map);
    for (int i = 0; i < C::kStages; ++i) {
      init_barrier(full + i, 1);
      init_barrier(empty + i, 4 * (kAlternate ? 1 : kConsumers) * p.pair);
    }
    for (int i = 0; i < kConsumers; ++i) init_barrier(turn + i, 4);
    fence_barrier_init();
  }
  const int cluster = p.pair * p.splits;  // one of the two is 1
  if (cluster > 1) {
    meet_cluster();
  } else {
    __syncthreads();
  }

  const int units = (p.tiles_m + p.pair - 1) / p.pair * p.tiles_n;
  const int first_unit = blockIdx.x / cluster, stride = gridDim.x / cluster;
  const int part = p.splits > 1 ? static_cast<int>(block_in_cluster()) : 0;
  const int all_steps = p.taps * p.chunks;
  const int first = all_steps * part / p.splits, last = all_steps * (part + 1) / p.splits;
  Place<C::kStages> place;

  if (warpgroup == 0) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) {
      wait_for_previous_kernel();
      for (int unit = first_unit; unit < units; unit += stride) {
        fetch<C, kN>(p, find_tile<C::kRows, kColumns>(p, unit), first, last, stages, full, empty, &place);
      }
    }
    if (p.splits > 1) {
      __syncwarp();
      sync_cluster();
    }
  } else {
    take_registers<kConsumerRegisters<kConsumers>>();
    const int consumer = warpgroup - 1, thread = threadIdx.x - 128;
    const int first_row = kAlternate ? 0 : consumer * 64 * kFragments;
    const int row = first_row + thread % 128 / 32 * 16 + thread % 32 / 4;
    int unit = first_unit;
    if (kAlternate) {
      unit += consumer * stride;
      place.advance(consumer * (last - first));
    }
    uint32_t turn_parity = consumer == 0 ? 1 : 0;  // the first need not wait
    uint64_t* const next_turn = kAlternate ? turn + (consumer + 1) % kConsumers : nullptr;
    const Released released(empty, p.pair);
    uint8_t* const results = stages + C::kStages * C::kStageBytes + (threadIdx.x / 32 - 4) * kFragments * 32 * kColumns;
    wait_for_previous_kernel();
    for (; unit < units; unit += kAlternate ? kConsumers * stride : stride) {
      const Tile tile = find_tile<C::kRows, kColumns>(p, unit);
      float d[kFragments][kN / 2];
      // Asked for now, while there is something to multiply.
      const uint32_t bias = load_bias<T, kN, kGate>(p, tile, thread % 128);
      Residual<T, C::kRows, kGroups, kDeep> residual;
      if (kAhead && p.residual != nullptr && p.splits == 1) residual.load(p, tile, row);
      // A stage's parity tells apart only neighbouring phases, so nobody may wait for one that is further away.
      if (kAlternate) wait(turn + consumer, turn_parity);
      turn_parity ^= 1;
      multiply<T, C, kFragments, kN>(d, last - first, first_row, stages, full, released, next_turn, &place);
      if (kAlternate) place.advance((kConsumers - 1) * (last - first));
      if (!kAlternate && p.splits > 1) {
        // A cluster has one tile; nobody reads the stages any more once all warpgroups are here.
        sync_threads(1, 128 * kConsumers);
        float* const sums = reinterpret_cast<float*>(stages);
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float* const to = sums + (row + 64 * f + 8 * i) * C::kSumStride + 2 * (thread % 4);
#pragma unroll
            for (int j = 0; j < kN / 8; ++j) {
              *reinterpret_cast<float2*>(to + 8 * j) = make_float2(d[f][4 * j + 2 * i], d[f][4 * j + 2 * i + 1]);
            }
          }
        }
        sync_cluster();
        with_activation<kFamily>(p.activation, [&](auto activation) {
          write_share<T, C::kRows, kN, kGate, C::kSumStride, activation.value>(p, tile, sums, thread, 128 * kConsumers);
        });
      } else {
        // Two buffers: who writes one has met everybody who read the other, and they had read this one before.
        uint32_t* const shared_bias = biases[turn_parity][consumer];
        if (thread % 128 < kN / 2) shared_bias[bias_place(thread % 128)] = bias;
        if (!kGate && !kAhead && p.residual != nullptr) residual.load(p, tile, row);
        sync_threads(2 + consumer, 128);
        with_activation<kFamily>(p.activation, [&](auto activation) {
          write_rows<T, C::kRows, kFragments, kN, kGate, activation.value, kStaged>(p, tile, row, d, shared_bias,
                                                                                    residual, results);
        });
      }
    }
  }
  // No block leaves while its results are being read from shared memory, or another block may still write to it or read
  // from it.
  if (kStaged) wait_stores_read<0>();
  if (cluster > 1) {
    __syncwarp();
    meet_cluster();
  }
}

template <typename T, int kFragments, int kConsumers, bool kAlternate, int kN, Family kFamily, bool kStaged = false>
HopperKernel kernel_of() {
  constexpr bool kGate = kFamily == Family::kGated;
  using C = Cut<kFragments, kConsumers, kAlternate, kN, kStaged, kGate ? kN / 2 : kN>;
  return {C::kRows,
          kN,
          kGate,
          kStaged,
          kFamily == Family::kActivated,
          kAlternate ? kConsumers : 1,
          C::kThreads,
          C::kSharedBytes,
          reinterpret_cast<const void*>(&multiply_tiles<T, kFragments, kConsumers, kAlternate, kN, kFamily, kStaged>)};
}

// The cuts that pay: 320 and 640 columns are divided by 160, most others by 128 or 256.
template <typename T>
std::vector<HopperKernel> all_kernels() {
  constexpr Family kPlain = Family::kPlain, kActivated = Family::kActivated, kGated = Family::kGated;
  return {
      kernel_of<T, 1, 2, false, 256, kPlain>(),
      kernel_of<T, 1, 2, false, 192, kPlain>(),
      kernel_of<T, 1, 2, false, 160, kPlain>(),
      kernel_of<T, 1, 2, false, 128, kPlain>(),
      kernel_of<T, 1, 2, false, 96, kPlain>(),
      kernel_of<T, 1, 2, false, 64, kPlain>(),
      kernel_of<T, 2, 2, false, 128, kPlain>(),
      kernel_of<T, 2, 2, false, 160, kPlain>(),
      kernel_of<T, 2, 2, true, 128, kPlain>(),
      kernel_of<T, 1, 2, false, 256, kActivated>(),
      kernel_of<T, 1, 2, false, 160, kActivated>(),
      kernel_of<T, 1, 2, false, 128, kActivated>(),
      kernel_of<T, 1, 2, false, 256, kGated>(),
      kernel_of<T, 1, 2, false, 128, kGated>(),
      kernel_of<T, 2, 2, false, 128, kGated>(),
      kernel_of<T, 2, 2, true, 128, kGated>(),
      kernel_of<T, 1, 2, false, 256, kPlain, true>(),
      kernel_of<T, 1, 3, false, 192, kPlain, true>(),
      kernel_of<T, 1, 2, false, 192, kPlain, true>(),
      kernel_of<T, 1, 2, false, 256, kActivated, true>(),
      kernel_of<T, 1, 3, false, 192, kActivated, true>(),
      kernel_of<T, 1, 2, false, 192, kActivated, true>(),
      kernel_of<T, 1, 2, false, 256, kGated, true>(),
  };
}

}  // namespace sfast::hopper

// The kernel: one warpgroup fetches tiles by TMA into a ring of stages, the others multiply them with wgmma.
//
// A block stays on its SM and takes tile after tile, so that the fetching of a tile hides behind the product before it.
// The sums leave the registers without shared memory in between: four threads hold 32 neighbouring columns of a row in
// pieces of 2, trade pieces, and each writes 8 of them. All of shared memory is left to the stages.
//  - pair: two blocks of a cluster, one below the other, each load half of the weights' tile into both.
//  - splits: the blocks of a cluster each sum over a part of k, and add the parts up through each other's shared
//  memory.
//  - alternating: each multiplying warpgroup has tiles of its own, and one's epilogue hides behind the other's product.
#pragma once

#include "hopper_numbers.cuh"
#include "hopper_wgmma.cuh"

namespace sfast::hopper {

constexpr int kStep = 64;                // columns of k in a stage: the 128 bytes of a swizzled row
constexpr int kMostShared = 227 * 1024;  // bytes of a block
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

template <int kFragments, int kConsumers, bool kAlternate, int kN>
struct Cut {
  static constexpr int kRows = 64 * kFragments * (kAlternate ? 1 : kConsumers);
  static constexpr int kStageBytes = (kRows + kN) * kStep * 2;
  static constexpr int kFit = (kMostShared - 2048) / kStageBytes;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kSharedBytes = kStages * kStageBytes + 1024;  // 1024 to align the first
  static constexpr int kSumStride = kN + 8;                          // floats; no bank conflicts
  static_assert(kRows * kSumStride * 4 <= kStages * kStageBytes);
};

// Word j of thread i of each four goes to word i of thread j.
__device__ inline void trade(uint32_t (&words)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(~0u, odd ? words[i] : words[i + 1], 1);
    (odd ? words[i] : words[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(~0u, upper ? words[i] : words[i + 2], 2);
    (upper ? words[i] : words[i + 2]) = got;
  }
}

// ---- Tiles and stages ----

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

struct Tile {
  int x, y, image;  // first pixel of the result
  int column;       // first column of the result
};

// Neighbours in time are neighbours in a band of a few tiles' height, so that they find their operands in the L2 cache.
template <int kRows, int kColumns>
__device__ inline Tile find_tile(const HopperArguments& p, int unit) {
  constexpr int kBand = kRows >= 256 ? 8 : 16;  // tiles
  const int units_m = (p.tiles_m + p.pair - 1) / p.pair, band_height = kBand / p.pair;
  const int band = unit / (band_height * p.tiles_n), in_band = unit - band * band_height * p.tiles_n;
  const int height = min(band_height, units_m - band * band_height);
  int m = band * band_height + in_band % height;
  if (p.pair > 1) m = m * p.pair + static_cast<int>(block_in_cluster());
  Tile tile;
  tile.column = in_band / height * kColumns;
  tile.x = m % p.tiles_x << p.log_tile_width;
  tile.y = m / p.tiles_x % p.tiles_y << p.log_tile_height;
  tile.image = m / (p.tiles_x * p.tiles_y) * (kRows >> (p.log_tile_width + p.log_tile_height));
  return tile;
}

// The number of the pixel that is row `row` of a tile, or -1 where the tile hangs over the result.
__device__ inline int64_t pixel_of(const HopperArguments& p, const Tile& tile, int row) {
  const int x = tile.x + (row & ((1 << p.log_tile_width) - 1));
  const int y = tile.y + (row >> p.log_tile_width & ((1 << p.log_tile_height) - 1));
  const int image = tile.image + (row >> (p.log_tile_width + p.log_tile_height));
  if (x >= p.out_width || y >= p.out_height || image >= p.images) return -1;
  return (static_cast<int64_t>(image) * p.out_height + y) * p.out_width + x;
}

// ---- Epilogue ----

// Row `row` of the tile: this thread's part of the sums is at d[8 j + {0, 1}] for columns 8 j + 2 (t % 4).
template <typename T, int kN, bool kGate>
__device__ inline void write_row(const HopperArguments& p, const Tile& tile, int row, const float* d) {
  constexpr int kColumns = kGate ? kN / 2 : kN, kGroups = kColumns / 32;
  const int quarter = threadIdx.x % 4;
  const int64_t pixel = pixel_of(p, tile, row);
  const T* bias = static_cast<const T*>(p.bias);
  uint4 residual[kGroups];
  if (p.residual != nullptr) {
    const T* source = static_cast<const T*>(p.residual) + pixel * p.ld_residual + tile.column + 8 * quarter;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const bool inside = pixel >= 0 && tile.column + 32 * g + 8 * quarter < p.out_channels;
      residual[g] = inside ? __ldg(reinterpret_cast<const uint4*>(source + 32 * g)) : uint4{};
    }
  }
  T* out = static_cast<T*>(p.out) + pixel * p.out_channels + tile.column + 8 * quarter;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    float values[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      values[2 * j] = d[4 * (4 * g + j)], values[2 * j + 1] = d[4 * (4 * g + j) + 1];
      const int column = tile.column + 32 * g + 8 * j + 2 * quarter;
      if (bias != nullptr && column < p.out_channels) {
        const float2 b = Pair<T>::unpack(__ldg(reinterpret_cast<const uint32_t*>(bias + column)));
        values[2 * j] += b.x, values[2 * j + 1] += b.y;
      }
    }
    if constexpr (kGate) {
      float gate[8];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        gate[2 * j] = d[kN / 4 + 4 * (4 * g + j)], gate[2 * j + 1] = d[kN / 4 + 4 * (4 * g + j) + 1];
        const int column = tile.column + 32 * g + 8 * j + 2 * quarter;
        if (bias != nullptr && column < p.out_channels) {
          const float2 b = Pair<T>::unpack(__ldg(reinterpret_cast<const uint32_t*>(bias + p.out_channels + column)));
          gate[2 * j] += b.x, gate[2 * j + 1] += b.y;
        }
      }
      activate(gate, p.activation);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] *= gate[i];
    }
    if (p.residual != nullptr) {
      uint32_t words[4] = {residual[g].x, residual[g].y, residual[g].z, residual[g].w};
      trade(words);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 r = Pair<T>::unpack(words[j]);
        values[2 * j] += r.x, values[2 * j + 1] += r.y;
      }
    }
    if constexpr (!kGate) activate(values, p.activation);
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = Pair<T>::pack(values[2 * j], values[2 * j + 1]);
    trade(words);
    if (pixel >= 0 && tile.column + 32 * g + 8 * quarter < p.out_channels) {
      *reinterpret_cast<uint4*>(out + 32 * g) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// 8 sums at the same place of the shared memory of each block of the cluster, added up in the order of the blocks.
__device__ inline void add_parts(float (&values)[8], const float* place, int parts) {
  const uint32_t address = shared_address(place);
#pragma unroll
  for (float& v : values) v = 0;
  for (int part = 0; part < parts; ++part) {
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(part));
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      float4 four;
      asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w)
                   : "r"(remote + 4 * i)
                   : "memory");
      values[i] += four.x, values[i + 1] += four.y, values[i + 2] += four.z, values[i + 3] += four.w;
    }
  }
}

template <typename T>
__device__ inline void add_eight(float (&values)[8], const T* source) {
  const uint4 eight = __ldg(reinterpret_cast<const uint4*>(source));
  const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 pair = Pair<T>::unpack(words[j]);
    values[2 * j] += pair.x, values[2 * j + 1] += pair.y;
  }
}

// This block's share of a tile whose sums lie in parts in the shared memory of all blocks, [rows, kStride] each.
template <typename T, int kRows, int kN, bool kGate, int kStride>
__device__ inline void write_share(const HopperArguments& p, const Tile& tile, const float* sums, int thread,
                                   int threads) {
  constexpr int kColumns = kGate ? kN / 2 : kN, kPieces = kRows * kColumns / 8;
  const int part = block_in_cluster();
  for (int piece = part * threads + thread; piece < kPieces; piece += p.splits * threads) {
    const int row = piece / (kColumns / 8), column = piece % (kColumns / 8) * 8;
    const int64_t pixel = pixel_of(p, tile, row);
    const int at = tile.column + column;
    if (pixel < 0 || at >= p.out_channels) continue;
    float values[8];
    add_parts(values, sums + row * kStride + column, p.splits);
    if (p.bias != nullptr) add_eight(values, static_cast<const T*>(p.bias) + at);
    if constexpr (kGate) {
      float gate[8];
      add_parts(gate, sums + row * kStride + kN / 2 + column, p.splits);
      if (p.bias != nullptr) add_eight(gate, static_cast<const T*>(p.bias) + p.out_channels + at);
      activate(gate, p.activation);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] *= gate[i];
    }
    if (p.residual != nullptr) add_eight(values, static_cast<const T*>(p.residual) + pixel * p.ld_residual + at);
    if constexpr (!kGate) activate(values, p.activation);
    *reinterpret_cast<uint4*>(static_cast<T*>(p.out) + pixel * p.out_channels + at) =
        make_uint4(Pair<T>::pack(values[0], values[1]), Pair<T>::pack(values[2], values[3]),
                   Pair<T>::pack(values[4], values[5]), Pair<T>::pack(values[6], values[7]));
  }
}

// ---- The two roles ----

// One thread: fills stage after stage, steps first to last of k of each tile.
template <typename C, int kN>
__device__ inline void fetch(const HopperArguments& p, const Tile& tile, int first, int last, uint8_t* stages,
                             uint64_t* full, uint64_t* empty, Place<C::kStages>* place) {
  const int half = p.pair > 1 ? static_cast<int>(block_in_cluster()) : 0;
  int tap = first / p.chunks, chunk = first - tap * p.chunks;
  for (int step = first; step < last; ++step) {
    uint8_t* const x_tile = stages + place->stage * C::kStageBytes;
    uint8_t* const weight_tile = x_tile + C::kRows * kStep * 2;
    uint64_t* const barrier = full + place->stage;
    const int column = tap * p.channels + chunk * kStep;
    wait(empty + place->stage, place->parity ^ 1);
    arrive_expecting(barrier, C::kStageBytes);
    load_tile(x_tile, &p.x, barrier, chunk * kStep, tile.x * p.stride_w - p.padding_w + tap % p.filter_w * p.dilation_w,
              tile.y * p.stride_h - p.padding_h + tap / p.filter_w * p.dilation_h, tile.image);
    if (p.pair > 1) {
      load_tile_to(3, weight_tile + half * kN * kStep, &p.weight, barrier, column, tile.column + half * p.second_half);
    } else {
      load_tile(weight_tile, &p.weight, barrier, column, tile.column);
      load_tile(weight_tile + kN * kStep, &p.weight, barrier, column, tile.column + p.second_half);
    }
    if (++chunk == p.chunks) chunk = 0, ++tap;
    place->next();
  }
}

// A warpgroup: d = the sum of the stages' products, of the rows from first_row on. `next_turn` hears of the last one.
template <typename T, typename C, int kFragments, int kN>
__device__ inline void multiply(float (&d)[kFragments][kN / 2], int steps, int first_row, int blocks, uint8_t* stages,
                                uint64_t* full, uint64_t* empty, uint64_t* next_turn, Place<C::kStages>* place) {
  int before = 0;
  for (int step = 0; step < steps; ++step) {
    const uint8_t* const x_tile = stages + place->stage * C::kStageBytes;
    const uint64_t a = descriptor(x_tile + first_row * kStep * 2, 1024);
    const uint64_t b = descriptor(x_tile + C::kRows * kStep * 2, 1024);
    wait(full + place->stage, place->parity);
    begin_products();
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        Product<kN, T>::run(d[f], advance(a, f * 64 * kStep * 2 + 32 * k), advance(b, 32 * k), step > 0 || k > 0);
      }
    }
    commit_products();
    // The products of the stage before are done now: its memory may be filled again, in all blocks that it came to.
    wait_products<1>();
    const int lane = threadIdx.x % 32;
    if (step > 0 && lane < blocks) {
      if (blocks > 1) {
        arrive_at(empty + before, lane);
      } else {
        arrive(empty + before);
      }
    }
    before = place->stage;
    place->next();
  }
  if (next_turn != nullptr && threadIdx.x % 32 == 0) arrive(next_turn);
  wait_products<0>();
#pragma unroll
  for (int f = 0; f < kFragments; ++f) pin(d[f]);
  const int lane = threadIdx.x % 32;
  if (lane < blocks) {
    if (blocks > 1) {
      arrive_at(empty + before, lane);
    } else {
      arrive(empty + before);
    }
  }
}

template <typename T, int kFragments, int kConsumers, bool kAlternate, int kN, bool kGate>
__global__ __launch_bounds__(128 * (1 + kConsumers), 1) void multiply_tiles(const __grid_constant__ HopperArguments p) {
  using C = Cut<kFragments, kConsumers, kAlternate, kN>;
  constexpr int kColumns = kGate ? kN / 2 : kN;
  extern __shared__ uint8_t memory[];
  __shared__ uint64_t full[C::kStages], empty[C::kStages];
  __shared__ uint64_t turn[kConsumers];  // a phase ends when the stages of this warpgroup's tile are the next ones due
  uint8_t* const stages = memory + (1024 - shared_address(memory) % 1024) % 1024;
  const int warpgroup = threadIdx.x / 128;

  launch_dependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      init_barrier(full + i, 1);
      init_barrier(empty + i, 4 * (kAlternate ? 1 : kConsumers) * p.pair);
    }
    for (int i = 0; i < kConsumers; ++i) init_barrier(turn + i, 4);
    fence_barrier_init();
  }
  const int cluster = p.pair * p.splits;  // one of the two is 1
  if (cluster > 1) {
    sync_cluster();
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
      prefetch_tensor_map(&p.x);
      prefetch_tensor_map(&p.weight);
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
    take_registers<kConsumerRegisters>();
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
    wait_for_previous_kernel();
    for (; unit < units; unit += kAlternate ? kConsumers * stride : stride) {
      const Tile tile = find_tile<C::kRows, kColumns>(p, unit);
      float d[kFragments][kN / 2];
      // A stage's parity tells apart only neighbouring phases, so nobody may wait for one that is further away.
      if (kAlternate) wait(turn + consumer, turn_parity);
      turn_parity ^= 1;
      multiply<T, C, kFragments, kN>(d, last - first, first_row, p.pair, stages, full, empty, next_turn, &place);
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
        write_share<T, C::kRows, kN, kGate, C::kSumStride>(p, tile, sums, thread, 128 * kConsumers);
      } else {
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
#pragma unroll
          for (int i = 0; i < 2; ++i) write_row<T, kN, kGate>(p, tile, row + 64 * f + 8 * i, d[f] + 2 * i);
        }
      }
    }
  }
  // No block leaves while another may still write to it or read from it.
  if (cluster > 1) {
    __syncwarp();
    sync_cluster();
  }
}

template <typename T, int kFragments, int kConsumers, bool kAlternate, int kN, bool kGate>
HopperKernel kernel_of() {
  using C = Cut<kFragments, kConsumers, kAlternate, kN>;
  return {C::kRows,
          kN,
          kGate,
          kAlternate ? kConsumers : 1,
          C::kThreads,
          C::kSharedBytes,
          reinterpret_cast<const void*>(&multiply_tiles<T, kFragments, kConsumers, kAlternate, kN, kGate>)};
}

// The cuts that pay: 320 and 640 columns are divided by 160, most others by 128 or 256.
template <typename T>
std::vector<HopperKernel> all_kernels() {
  return {
      kernel_of<T, 1, 2, false, 256, false>(), kernel_of<T, 1, 2, false, 192, false>(),
      kernel_of<T, 1, 2, false, 160, false>(), kernel_of<T, 1, 2, false, 128, false>(),
      kernel_of<T, 1, 2, false, 64, false>(),  kernel_of<T, 2, 2, false, 128, false>(),
      kernel_of<T, 2, 2, false, 160, false>(), kernel_of<T, 2, 2, true, 128, false>(),
      kernel_of<T, 1, 2, false, 256, true>(),  kernel_of<T, 1, 2, false, 128, true>(),
      kernel_of<T, 2, 2, false, 128, true>(),  kernel_of<T, 2, 2, true, 128, true>(),
  };
}

}  // namespace sfast::hopper

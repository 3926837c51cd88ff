// Where a tile of a product lies in the result, and how its sums are finished and written there.
//
// Two ways out. Staged: through shared memory of their own to the TMA, which writes while the next tile is multiplied;
// all blocks end their tiles at about the same time, and would wait for each other's writes. It costs a stage, and
// takes matrices only. Or without shared memory in between: four threads hold 32 neighbouring columns of a row in
// pieces of 2, neighbours trade pieces, and each writes 4 at a time.
#pragma once

#include <type_traits>

#include "hopper_numbers.cuh"

namespace sfast::hopper {

// What an epilogue can do: each activation is code of its own, and most products have none.
enum class Family { kPlain, kActivated, kGated };

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
  if constexpr ((kRows & (kRows - 1)) != 0) {  // rows of a matrix
    tile.x = m * kRows, tile.y = 0, tile.image = 0;
    return tile;
  }
  tile.x = m % p.tiles_x << p.log_tile_width;
  tile.y = m / p.tiles_x % p.tiles_y << p.log_tile_height;
  tile.image = m / (p.tiles_x * p.tiles_y) * (kRows >> (p.log_tile_width + p.log_tile_height));
  return tile;
}

// The number of the pixel that is row `row` of a tile, or -1 where the tile hangs over the result.
template <int kRows>
__device__ inline int64_t pixel_of(const HopperArguments& p, const Tile& tile, int row) {
  if constexpr ((kRows & (kRows - 1)) != 0) return tile.x + row < p.out_width ? tile.x + row : -1;
  const int x = tile.x + (row & ((1 << p.log_tile_width) - 1));
  const int y = tile.y + (row >> p.log_tile_width & ((1 << p.log_tile_height) - 1));
  const int image = tile.image + (row >> (p.log_tile_width + p.log_tile_height));
  if (x >= p.out_width || y >= p.out_height || image >= p.images) return -1;
  return (static_cast<int64_t>(image) * p.out_height + y) * p.out_width + x;
}

// Between neighbours, of which the first has two words a and the second two words b: a[0] b[0] go to the first, a[1]
// b[1] to the second. The same again undoes it.
__device__ inline uint2 trade(uint2 words) {
  const bool odd = threadIdx.x & 1;
  const uint32_t got = __shfl_xor_sync(~0u, odd ? words.x : words.y, 1);
  return odd ? make_uint2(got, words.y) : make_uint2(words.x, got);
}

// The first of the four columns, of each 16, that a thread writes after trading.
__device__ inline int traded_column() {
  return 8 * (threadIdx.x & 1) + 2 * (threadIdx.x & 2);
}

// Eight neighbouring values of a row, from its words.
template <typename T>
__device__ inline void add_words(float (&values)[8], const uint32_t (&words)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 pair = Pair<T>::unpack(words[j]);
    values[2 * j] += pair.x, values[2 * j + 1] += pair.y;
  }
}

template <typename T>
__device__ inline uint4 pack_eight(const float (&values)[8]) {
  return make_uint4(Pair<T>::pack(values[0], values[1]), Pair<T>::pack(values[2], values[3]),
                    Pair<T>::pack(values[4], values[5]), Pair<T>::pack(values[6], values[7]));
}

// What a thread needs of the residual: of two rows, 8 columns in each group of 32, the next kDeep groups.
template <typename T, int kRows, int kGroups, int kDeep>
struct Residual {
  uint2 pieces[kDeep][2][2];

  __device__ void load(const HopperArguments& p, const Tile& tile, int row) {
#pragma unroll
    for (int n = 0; n < kDeep; ++n) load(p, tile, row, n);
  }
  // Group n, counted over all fragments.
  __device__ void load(const HopperArguments& p, const Tile& tile, int row, int n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t pixel = pixel_of<kRows>(p, tile, row + n / kGroups * 64 + 8 * i);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int column = tile.column + n % kGroups * 32 + 16 * h + traded_column();
        const T* const source = static_cast<const T*>(p.residual) + pixel * p.ld_residual + column;
        const bool inside = pixel >= 0 && column < p.out_channels;
        pieces[n % kDeep][i][h] = inside ? *reinterpret_cast<const uint2*>(source) : uint2{};
      }
    }
  }
};

// Of the biases of a tile's columns, value and gate, this thread's two in a word, zero behind the last.
template <typename T, int kN, bool kGate>
__device__ inline uint32_t load_bias(const HopperArguments& p, const Tile& tile, int thread) {
  constexpr int kColumns = kGate ? kN / 2 : kN;
  const int column = 2 * thread;
  const int at = tile.column + column % kColumns;
  if (p.bias == nullptr || column >= kN || at >= p.out_channels) return 0;
  const T* from = static_cast<const T*>(column < kColumns ? p.bias : p.bias2) + at;
  return __ldg(reinterpret_cast<const uint32_t*>(from));
}

// The place of pair `pair` of a tile's biases: the four that a thread needs for a group of 32 columns lie together.
__device__ inline int bias_place(int pair) {
  return pair / 16 * 16 + pair % 4 * 4 + pair % 16 / 4;
}

// Activates and writes this thread's sums: of rows 64 f + 8 i from `row` on, columns 8 j + 2 (t % 4) + {0, 1} in
// d[f][4 j + 2 i + {0, 1}]. Both rows at a time, so that one hides how long the other's instructions take. The code is
// long, as registers have no index: so the activation is chosen outside of it. `staging`: for the warp's results, in
// boxes [16 rows, 64 columns], one row of boxes for each fragment; kStaged or not used.
template <typename T, int kRows, int kFragments, int kN, bool kGate, HopperActivation kActivation, bool kStaged,
          int kGroups, int kDeep>
__device__ inline void write_rows(const HopperArguments& p, const Tile& tile, int row,
                                  const float (&d)[kFragments][kN / 2], const uint32_t* bias,
                                  Residual<T, kRows, kGroups, kDeep>& residual, uint8_t* staging) {
  constexpr int kBoxBytes = 16 * 128;
  const int quarter = threadIdx.x % 4, first = tile.column + traded_column();
  const int lane = threadIdx.x % 32;
  // In a box: this lane's row and matrix of four, and the swizzle that the TMA undoes.
  const uint32_t place = shared_address(staging) + lane % 8 * 128 + (lane / 8 ^ lane % 8) * 16;
  if (kStaged) {  // the warp's results of the tile before must have been read
    if (lane == 0) wait_stores_read<0>();
    __syncwarp();
  }
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    bool inside[2];
    T* out[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t pixel = pixel_of<kRows>(p, tile, row + 64 * f + 8 * i);
      inside[i] = pixel >= 0;
      out[i] = static_cast<T*>(p.out) + pixel * p.out_channels + first;
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const auto biases = reinterpret_cast<const uint4*>(bias + 16 * g + 4 * quarter);
      const uint4 b = biases[0], c = kGate ? biases[kN / 16] : uint4{};
      const uint32_t value_bias[4] = {b.x, b.y, b.z, b.w}, gate_bias[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float values[8];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 add = Pair<T>::unpack(value_bias[j]);
          values[2 * j] = d[f][4 * (4 * g + j) + 2 * i] + add.x;
          values[2 * j + 1] = d[f][4 * (4 * g + j) + 2 * i + 1] + add.y;
        }
        if constexpr (kGate) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float2 add = Pair<T>::unpack(gate_bias[j]);
            values[2 * j] *= activate<T, kActivation>(d[f][kN / 4 + 4 * (4 * g + j) + 2 * i] + add.x);
            values[2 * j + 1] *= activate<T, kActivation>(d[f][kN / 4 + 4 * (4 * g + j) + 2 * i + 1] + add.y);
          }
        } else {
          if (p.residual != nullptr) {
            const uint2 early = trade(residual.pieces[(f * kGroups + g) % kDeep][i][0]);
            const uint2 late = trade(residual.pieces[(f * kGroups + g) % kDeep][i][1]);
            add_words<T>(values, {early.x, early.y, late.x, late.y});
          }
#pragma unroll
          for (float& v : values) v = activate<T, kActivation>(v);
        }
        const uint4 words = pack_eight<T>(values);
        if constexpr (kStaged) {
          const int box = f * (kGroups / 2) + g / 2;
          store_matrices((place ^ g % 2 * 64) + box * kBoxBytes + i * 1024, {words.x, words.y, words.z, words.w});
          continue;
        }
        const uint2 early = trade(make_uint2(words.x, words.y)), late = trade(make_uint2(words.z, words.w));
        if (inside[i] && first + 32 * g < p.out_channels) *reinterpret_cast<uint2*>(out[i] + 32 * g) = early;
        if (inside[i] && first + 32 * g + 16 < p.out_channels) *reinterpret_cast<uint2*>(out[i] + 32 * g + 16) = late;
      }
      if (kStaged && g % 2 == 1) {
        fence_shared_writes();
        __syncwarp();
        const int column = tile.column + g / 2 * 64;
        // Of a pair of tiles, the second may lie behind the last row; what hangs over it, the TMA clips.
        if (lane == 0 && column < p.out_channels && tile.image == 0) {
          store_tile(&p.out_map, staging + (f * (kGroups / 2) + g / 2) * kBoxBytes, column, tile.x + row + 64 * f);
          commit_stores();
        }
      }
      if (!kGate && p.residual != nullptr && f * kGroups + g + kDeep < kFragments * kGroups) {
        residual.load(p, tile, row, f * kGroups + g + kDeep);
      }
    }
  }
}

// 8 sums at the same place of the shared memory of each block of the cluster, added up in the order of the blocks.
__device__ inline void add_parts(float (&values)[8], const float* place, int parts) {
  const uint32_t address = shared_address(place);
#pragma unroll
  for (float& v : values) v = 0;
#pragma unroll 4
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
  const uint4 eight = *reinterpret_cast<const uint4*>(source);
  const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
  add_words<T>(values, words);
}

// This block's share of a tile whose sums lie in parts in the shared memory of all blocks, [rows, kStride] each.
template <typename T, int kRows, int kN, bool kGate, int kStride, HopperActivation kActivation>
__device__ inline void write_share(const HopperArguments& p, const Tile& tile, const float* sums, int thread,
                                   int threads) {
  constexpr int kColumns = kGate ? kN / 2 : kN, kPieces = kRows * kColumns / 8;
  const int part = block_in_cluster();
  for (int piece = part * threads + thread; piece < kPieces; piece += p.splits * threads) {
    const int row = piece / (kColumns / 8), column = piece % (kColumns / 8) * 8;
    const int64_t pixel = pixel_of<kRows>(p, tile, row);
    const int at = tile.column + column;
    if (pixel < 0 || at >= p.out_channels) continue;
    float values[8];
    add_parts(values, sums + row * kStride + column, p.splits);
    if (p.bias != nullptr) add_eight(values, static_cast<const T*>(p.bias) + at);
    if constexpr (kGate) {
      float gate[8];
      add_parts(gate, sums + row * kStride + kN / 2 + column, p.splits);
      if (p.bias != nullptr) add_eight(gate, static_cast<const T*>(p.bias2) + at);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] *= activate<T, kActivation>(gate[i]);
    } else {
      if (p.residual != nullptr) add_eight(values, static_cast<const T*>(p.residual) + pixel * p.ld_residual + at);
#pragma unroll
      for (float& v : values) v = activate<T, kActivation>(v);
    }
    *reinterpret_cast<uint4*>(static_cast<T*>(p.out) + pixel * p.out_channels + at) = pack_eight<T>(values);
  }
}

// Calls `work` with the activation as a constant, one of those that the family knows.
template <Family kFamily, typename Work>
__device__ inline void with_activation(HopperActivation activation, const Work& work) {
  using A = HopperActivation;
  if constexpr (kFamily == Family::kPlain) {
    work(std::integral_constant<A, A::kNone>());
  } else if constexpr (kFamily == Family::kGated) {
    switch (activation) {
      case A::kGelu:
        return work(std::integral_constant<A, A::kGelu>());
      case A::kGeluTanh:
        return work(std::integral_constant<A, A::kGeluTanh>());
      default:
        return work(std::integral_constant<A, A::kSilu>());
    }
  } else {
    switch (activation) {
      case A::kRelu:
        return work(std::integral_constant<A, A::kRelu>());
      case A::kGeluTanh:
        return work(std::integral_constant<A, A::kGeluTanh>());
      case A::kGelu:
        return work(std::integral_constant<A, A::kGelu>());
      default:
        return work(std::integral_constant<A, A::kSilu>());
    }
  }
}

}  // namespace sfast::hopper

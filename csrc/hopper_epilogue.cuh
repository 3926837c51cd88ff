// Where a tile of a product lies in the result, and how its sums are finished and written there.
//
// The sums leave the registers without shared memory in between: four threads hold 32 neighbouring columns of a row in
// pieces of 2, trade pieces, and each writes 8 of them. All of shared memory is left to the stages.
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

// A thread's pieces of one row of the residual, 8 columns in each 32.
template <typename T, int kGroups, bool kAhead>
struct ResidualRow {
  uint4 pieces[kGroups];

  __device__ void load(const HopperArguments& p, const Tile& tile, int64_t pixel) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) load(p, tile, pixel, g);
  }
  __device__ void load(const HopperArguments& p, const Tile& tile, int64_t pixel, int g) {
    const int column = tile.column + 32 * g + threadIdx.x % 4 * 8;
    const T* const source = static_cast<const T*>(p.residual) + pixel * p.ld_residual + column;
    pieces[g] = pixel >= 0 && column < p.out_channels ? *reinterpret_cast<const uint4*>(source) : uint4{};
  }
};

// Of the biases of a tile's columns, value and gate, this thread's two in a word, zero behind the last.
template <typename T, int kN, bool kGate>
__device__ inline uint32_t load_bias(const HopperArguments& p, const Tile& tile, int thread) {
  constexpr int kColumns = kGate ? kN / 2 : kN;
  const int column = 2 * thread;
  const int at = tile.column + column % kColumns;
  if (p.bias == nullptr || column >= kN || at >= p.out_channels) return 0;
  const T* from = static_cast<const T*>(p.bias) + at + column / kColumns * p.out_channels;
  return __ldg(reinterpret_cast<const uint32_t*>(from));
}

// A word of shared memory, read each time: keeping it would cost a register that the sums need.
__device__ inline uint32_t read_again(const uint32_t* from) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(shared_address(from)));
  return word;
}

// Activates and writes this thread's sums: of rows 64 f + 8 i from `row` on, columns 8 j + 2 (t % 4) + {0, 1} in
// d[f][4 j + 2 i + {0, 1}]. The code is long, as registers have no index: so the activation is chosen outside of it.
template <typename T, int kFragments, int kN, bool kGate, HopperActivation kActivation, int kGroups, bool kAhead>
__device__ inline void write_rows(const HopperArguments& p, const Tile& tile, int row,
                                  const float (&d)[kFragments][kN / 2], const uint32_t* bias,
                                  ResidualRow<T, kGroups, kAhead>& residual) {
  const int quarter = threadIdx.x % 4, first = tile.column + 8 * quarter;
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t pixel = pixel_of(p, tile, row + 64 * f + 8 * i);
      const int64_t next_pixel = pixel_of(p, tile, row + 64 * (f + i) + 8 * (1 - i));
      T* const out = static_cast<T*>(p.out) + pixel * p.out_channels + first;
      if (!kGate && !kAhead && p.residual != nullptr) residual.load(p, tile, pixel);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        float values[8];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 b = Pair<T>::unpack(read_again(bias + 16 * g + 4 * j + quarter));
          values[2 * j] = d[f][4 * (4 * g + j) + 2 * i] + b.x;
          values[2 * j + 1] = d[f][4 * (4 * g + j) + 2 * i + 1] + b.y;
        }
        if constexpr (kGate) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float2 b = Pair<T>::unpack(read_again(bias + kN / 4 + 16 * g + 4 * j + quarter));
            values[2 * j] *= activate<kActivation>(d[f][kN / 4 + 4 * (4 * g + j) + 2 * i] + b.x);
            values[2 * j + 1] *= activate<kActivation>(d[f][kN / 4 + 4 * (4 * g + j) + 2 * i + 1] + b.y);
          }
        } else {
          if (p.residual != nullptr) {
            const uint4 piece = residual.pieces[g];
            uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
            if (kAhead && 2 * f + i + 1 < 2 * kFragments) residual.load(p, tile, next_pixel, g);
            trade(words);
            add_words<T>(values, words);
          }
#pragma unroll
          for (float& v : values) v = activate<kActivation>(v);
        }
        uint4 piece = pack_eight<T>(values);
        uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
        trade(words);
        if (pixel >= 0 && first + 32 * g < p.out_channels) {
          *reinterpret_cast<uint4*>(out + 32 * g) = make_uint4(words[0], words[1], words[2], words[3]);
        }
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
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] *= activate<kActivation>(gate[i]);
    } else {
      if (p.residual != nullptr) add_eight(values, static_cast<const T*>(p.residual) + pixel * p.ld_residual + at);
#pragma unroll
      for (float& v : values) v = activate<kActivation>(v);
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
    if (activation == A::kGelu) {
      work(std::integral_constant<A, A::kGelu>());
    } else {
      work(std::integral_constant<A, A::kGeluTanh>());
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

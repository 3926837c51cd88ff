// Tiles of attention in shared memory, and the two matrix products on them.
//
// A tile of rows x head size lies as panels of 64 columns, each row of a panel 128 bytes in TMA's 128-byte swizzle;
// what the last panel has beyond the head size is zeros that the TMA fills in, and is left out of the products: head
// size 40 costs 48 columns in query key^T (whose depth goes by 16) and 40 in weights value (whose width goes by 8).
#pragma once

#include "attention_softmax.cuh"
#include "hopper.cuh"
#include "hopper_wgmma.cuh"

namespace sfast::attention {

using namespace sfast::hopper;

constexpr int kUnit = 64;       // rows of queries that one warpgroup works on
constexpr int kRowBytes = 128;  // of a panel
constexpr int kPanelColumns = 64;

template <int D>
constexpr int kPanels = (D + kPanelColumns - 1) / kPanelColumns;

template <int D>
constexpr int kSteps = (D + 15) / 16;  // of a product along the head

template <int D>
constexpr int tile_bytes(int rows) {
  return kPanels<D> * rows * kRowBytes;
}

// One thread copies rows of one head, from `row` on; `barrier` expects tile_bytes(rows).
template <int D>
__device__ inline void load_rows(uint8_t* tile, int rows, const CUtensorMap* map, uint64_t* barrier, int row, int head,
                                 int batch) {
#pragma unroll
  for (int panel = 0; panel < kPanels<D>; ++panel) {
    load_tile(tile + panel * rows * kRowBytes, map, barrier, panel * kPanelColumns, row, head, batch);
  }
}

// d [16, 8] += a [16, 16] b [16, 8], of one warp.
#define SFAST_MULTIPLY(T, TYPE)                                                                  \
  __device__ inline void multiply(float* d, const uint32_t (&a)[4], const uint32_t (&b)[2], T) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                          \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"          \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));            \
  }
SFAST_MULTIPLY(__half, "f16")
SFAST_MULTIPLY(__nv_bfloat16, "bf16")
#undef SFAST_MULTIPLY

// scores [64, N] = query [64, D] key [N, D]^T. Issued, not awaited.
template <typename T, int D, int N>
__device__ inline void score(float (&scores)[N / 2], const uint8_t* query, const uint8_t* key) {
  const uint64_t a = descriptor(query, 8 * kRowBytes), b = descriptor(key, 8 * kRowBytes);
#pragma unroll
  for (int k = 0; k < kSteps<D>; ++k) {
    Product<N, T>::run(scores, advance(a, k / 4 * kUnit * kRowBytes + k % 4 * 32),
                       advance(b, k / 4 * N * kRowBytes + k % 4 * 32), k > 0);
  }
}

// The same with the query in registers, as `load_operand` brings it there.
template <typename T, int D, int N>
__device__ inline void score(float (&scores)[N / 2], const uint32_t (&query)[kSteps<D>][4], const uint8_t* key) {
  const uint64_t b = descriptor(key, 8 * kRowBytes);
#pragma unroll
  for (int k = 0; k < kSteps<D>; ++k) {
    Product<N, T>::run(scores, query[k], advance(b, k / 4 * N * kRowBytes + k % 4 * 32), k > 0);
  }
}

// Of a panel's row, in shared memory: where 8 columns lie, which are number `chunk` of the tile's.
__device__ inline uint32_t chunk_address(const uint8_t* tile, int rows, int row, int chunk) {
  return shared_address(tile) + (chunk / 8 * rows + row) * kRowBytes + ((chunk ^ row) % 8) * 16;
}

// Rows and 16 columns, from 16 k on, of a tile [64, D] as a first operand: of the warp's own 16 rows.
__device__ inline void load_operand(uint32_t (&a)[4], const uint8_t* tile, int k) {
  const int lane = threadIdx.x % 32;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(chunk_address(tile, kUnit, threadIdx.x % 128 / 32 * 16 + lane % 16, 2 * k + lane / 16))
               : "memory");
}

// One warp's part of `score`, by the instruction for warps: where the others go on, and few pass.
template <typename T, int D, int N>
__device__ inline void score_of_warp(float (&scores)[N / 2], const uint8_t* query, const uint8_t* key) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) scores[i] = 0;
#pragma unroll
  for (int k = 0; k < kSteps<D>; ++k) {
    uint32_t a[4], b[2];
    load_operand(a, query, k);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                   : "=r"(b[0]), "=r"(b[1])
                   : "r"(chunk_address(key, N, 8 * j + lane % 8, 2 * k + lane / 8 % 2))
                   : "memory");
      multiply(&scores[4 * j], a, b, T());
    }
  }
}

// sums [64, D] (+)= weights [64, N] value [N, D]. Issued, not awaited.
template <typename T, int D, int N>
__device__ inline void weigh(float (&sums)[D / 2], const uint32_t (&weights)[N / 16][4], const uint8_t* value,
                             bool add) {
  const uint64_t b = descriptor(value, 8 * kRowBytes, N * kRowBytes);
#pragma unroll
  for (int k = 0; k < N / 16; ++k) {
    Product<D, T, true>::run(sums, weights[k], advance(b, k * 16 * kRowBytes), add || k > 0);
  }
}

// Eight-by-eight matrices from registers into shared memory; thread 8 i + j names row j of matrix i.
__device__ inline void store_matrices(uint32_t to, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(m0), "r"(m1), "r"(m2),
               "r"(m3)
               : "memory");
}

__device__ inline void store_matrices(uint32_t to, uint32_t m0, uint32_t m1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(m0), "r"(m1) : "memory");
}

// The finished 64 rows, each multiplied by its `factor`, into shared memory and from there, by one thread, to `row` of
// the result. `barrier` is the warpgroup's; nobody reads `tile` when this is called.
template <typename T, int D>
__device__ inline void store_rows(uint8_t* tile, const float (&sums)[D / 2], const float (&factor)[2],
                                  const CUtensorMap* map, int barrier, int row, int head, int batch) {
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  const int r = thread / 32 * 16 + lane % 16, half = lane / 16;  // the row and, of two chunks of 8 columns, the chunk
  const uint32_t at_row = shared_address(tile) + r * kRowBytes;
#pragma unroll
  for (int chunk = 0; chunk < D / 8; chunk += 2) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (chunk + i / 2 < D / 8) {
        const float* pair = &sums[4 * chunk + 2 * i];
        packed[i] = pack(pair[0] * factor[i % 2], pair[1] * factor[i % 2], T());
      }
    }
    const uint32_t to = at_row + chunk / 8 * kUnit * kRowBytes + ((chunk % 8 + half) ^ (r % 8)) * 16;
    if (chunk + 1 < D / 8) {
      store_matrices(to, packed[0], packed[1], packed[2], packed[3]);
    } else {
      store_matrices(to, packed[0], packed[1]);
    }
  }
  fence_shared_writes();
  sync_threads(barrier, 128);
  if (thread == 0) {
#pragma unroll
    for (int panel = 0; panel < kPanels<D>; ++panel) {
      store_tile(map, tile + panel * kUnit * kRowBytes, panel * kPanelColumns, row, head, batch);
    }
    commit_stores();
  }
}

}  // namespace sfast::attention

// Matrix products of a warpgroup (wgmma): d [64, N] += a [64, 16] b [16, N], fp32 sums of fp16 or bf16 products.
//
// Shared operands are named by descriptors. A tile whose rows are 64 elements along k (128 bytes, as TMA's 128-byte
// swizzle writes them, starting at a multiple of 1024 bytes) has descriptor(tile, 1024); the next 16 columns along k
// are 32 bytes further, the next 64 rows 8192. Thread t of the warpgroup holds of row 16 (t / 32) + t / 4 % 8 + 8 i the
// columns 8 j + 2 (t % 4) + {0, 1} in d[4 j + 2 i + {0, 1}], and hands over a in the same order as half pairs, for j
// < 2.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "hopper.cuh"

namespace sfast::hopper {

// k contiguous: `stride` is the bytes from 8 rows to the next 8, `leading` is not looked at.
// n contiguous (kTransposed): `stride` is the bytes from 8 rows of k to the next 8, `leading` from 64 columns to the
// next.
__device__ inline uint64_t descriptor(const void* tile, uint32_t stride, uint32_t leading = 16) {
  constexpr uint64_t kSwizzle128 = 1;
  return static_cast<uint64_t>((shared_address(tile) & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | kSwizzle128 << 62;
}

// The same in two steps, of which the first is as good for every tile: 16 bytes further is one more.
__device__ inline uint32_t low_descriptor(const void* tile) {
  return (shared_address(tile) & 0x3ffff) >> 4 | 1u << 16;
}

__device__ inline uint64_t whole_descriptor(uint32_t low, uint32_t stride) {
  uint64_t made;
  asm("mov.b64 %0, {%1, %2};" : "=l"(made) : "r"(low), "r"(stride >> 4 | 1u << 30));
  return made;
}

// The descriptor of the same tile, `bytes` further.
__device__ inline uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// Around every group of products: registers written before are ready; all issued since form a group; the group is done.
__device__ inline void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads and writes of sums over this point, while products run in the background.
template <int kCount>
__device__ inline void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// T: __half or __nv_bfloat16. kTransposed: b lies with n contiguous.
template <int N, typename T, bool kTransposed = false>
struct Product;

// The sums' places in the instruction, and the registers that fill them, four (eight columns) at a time.
// clang-format off
#define SFAST_P1 "%0, %1, %2, %3"
#define SFAST_P2 SFAST_P1 ", %4, %5, %6, %7"
#define SFAST_P3 SFAST_P2 ", %8, %9, %10, %11"
#define SFAST_P4 SFAST_P3 ", %12, %13, %14, %15"
#define SFAST_P5 SFAST_P4 ", %16, %17, %18, %19"
#define SFAST_P6 SFAST_P5 ", %20, %21, %22, %23"
#define SFAST_P7 SFAST_P6 ", %24, %25, %26, %27"
#define SFAST_P8 SFAST_P7 ", %28, %29, %30, %31"
#define SFAST_P9 SFAST_P8 ", %32, %33, %34, %35"
#define SFAST_P10 SFAST_P9 ", %36, %37, %38, %39"
#define SFAST_P11 SFAST_P10 ", %40, %41, %42, %43"
#define SFAST_P12 SFAST_P11 ", %44, %45, %46, %47"
#define SFAST_P13 SFAST_P12 ", %48, %49, %50, %51"
#define SFAST_P14 SFAST_P13 ", %52, %53, %54, %55"
#define SFAST_P15 SFAST_P14 ", %56, %57, %58, %59"
#define SFAST_P16 SFAST_P15 ", %60, %61, %62, %63"
#define SFAST_P17 SFAST_P16 ", %64, %65, %66, %67"
#define SFAST_P18 SFAST_P17 ", %68, %69, %70, %71"
#define SFAST_P19 SFAST_P18 ", %72, %73, %74, %75"
#define SFAST_P20 SFAST_P19 ", %76, %77, %78, %79"
#define SFAST_P21 SFAST_P20 ", %80, %81, %82, %83"
#define SFAST_P22 SFAST_P21 ", %84, %85, %86, %87"
#define SFAST_P23 SFAST_P22 ", %88, %89, %90, %91"
#define SFAST_P24 SFAST_P23 ", %92, %93, %94, %95"
#define SFAST_P25 SFAST_P24 ", %96, %97, %98, %99"
#define SFAST_P26 SFAST_P25 ", %100, %101, %102, %103"
#define SFAST_P27 SFAST_P26 ", %104, %105, %106, %107"
#define SFAST_P28 SFAST_P27 ", %108, %109, %110, %111"
#define SFAST_P29 SFAST_P28 ", %112, %113, %114, %115"
#define SFAST_P30 SFAST_P29 ", %116, %117, %118, %119"
#define SFAST_P31 SFAST_P30 ", %120, %121, %122, %123"
#define SFAST_P32 SFAST_P31 ", %124, %125, %126, %127"
#define SFAST_D1 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define SFAST_D2 SFAST_D1, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define SFAST_D3 SFAST_D2, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define SFAST_D4 SFAST_D3, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define SFAST_D5 SFAST_D4, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define SFAST_D6 SFAST_D5, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define SFAST_D7 SFAST_D6, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define SFAST_D8 SFAST_D7, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define SFAST_D9 SFAST_D8, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define SFAST_D10 SFAST_D9, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define SFAST_D11 SFAST_D10, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define SFAST_D12 SFAST_D11, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define SFAST_D13 SFAST_D12, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define SFAST_D14 SFAST_D13, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define SFAST_D15 SFAST_D14, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define SFAST_D16 SFAST_D15, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define SFAST_D17 SFAST_D16, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define SFAST_D18 SFAST_D17, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define SFAST_D19 SFAST_D18, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define SFAST_D20 SFAST_D19, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define SFAST_D21 SFAST_D20, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define SFAST_D22 SFAST_D21, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define SFAST_D23 SFAST_D22, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define SFAST_D24 SFAST_D23, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define SFAST_D25 SFAST_D24, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define SFAST_D26 SFAST_D25, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define SFAST_D27 SFAST_D26, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define SFAST_D28 SFAST_D27, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define SFAST_D29 SFAST_D28, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define SFAST_D30 SFAST_D29, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define SFAST_D31 SFAST_D30, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define SFAST_D32 SFAST_D31, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
// clang-format on

// R0 to R6: the numbers of the operands behind the sums.
#define SFAST_PRODUCT_OF(N, CHUNKS, T, TYPE, R0, R1, R2, R3, R4, R5, R6)                                           \
  template <bool kTransposed>                                                                                      \
  struct Product<N, T, kTransposed> {                                                                              \
    /* Both operands in shared memory; `add` 0 overwrites d. */                                                    \
    __device__ static inline void run(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {                        \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" R2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N        \
                   "k16.f32." TYPE "." TYPE " {" SFAST_P##CHUNKS "}, %" R0 ", %" R1 ", add, 1, 1, 0, %" R3 ";\n}"  \
                   : SFAST_D##CHUNKS                                                                               \
                   : "l"(a), "l"(b), "r"(add), "n"(static_cast<int>(kTransposed)));                                \
    }                                                                                                              \
    /* a in registers. */                                                                                          \
    __device__ static inline void run(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int add) {            \
      asm volatile(                                                                                                \
          "{\n.reg .pred add;\nsetp.ne.b32 add, %" R5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
          "." TYPE " {" SFAST_P##CHUNKS "}, {%" R0 ", %" R1 ", %" R2 ", %" R3 "}, %" R4 ", add, 1, 1, %" R6 ";\n}" \
          : SFAST_D##CHUNKS                                                                                        \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(static_cast<int>(kTransposed)));     \
    }                                                                                                              \
  };
#define SFAST_PRODUCT(N, CHUNKS, ...)                     \
  SFAST_PRODUCT_OF(N, CHUNKS, __half, "f16", __VA_ARGS__) \
  SFAST_PRODUCT_OF(N, CHUNKS, __nv_bfloat16, "bf16", __VA_ARGS__)

SFAST_PRODUCT(40, 5, "20", "21", "22", "23", "24", "25", "26")
SFAST_PRODUCT(64, 8, "32", "33", "34", "35", "36", "37", "38")
SFAST_PRODUCT(80, 10, "40", "41", "42", "43", "44", "45", "46")
SFAST_PRODUCT(96, 12, "48", "49", "50", "51", "52", "53", "54")
SFAST_PRODUCT(128, 16, "64", "65", "66", "67", "68", "69", "70")
SFAST_PRODUCT(160, 20, "80", "81", "82", "83", "84", "85", "86")
SFAST_PRODUCT(192, 24, "96", "97", "98", "99", "100", "101", "102")
SFAST_PRODUCT(256, 32, "128", "129", "130", "131", "132", "133", "134")

#undef SFAST_PRODUCT
#undef SFAST_PRODUCT_OF

}  // namespace sfast::hopper

// Hopper's instructions for matrix kernels, one thin function each: barriers in shared memory, tiles copied by the
// tensor memory accelerator (TMA), products of whole warpgroups (hopper_wgmma.cuh), registers moved between them.
// Device code for sm_90a only.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace sfast::hopper {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- Barriers: a phase ends when all arrivals and all announced bytes are in; the parity of phases alternates. ----

__device__ inline void init_barrier(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Once after all init_barrier calls, before the block (or the cluster) synchronizes.
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Where something of this block's shared memory lies in another block of the cluster.
__device__ inline uint32_t map_shared(const void* pointer, uint32_t block) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(pointer)), "r"(block));
  return remote;
}

// At a mapped barrier. Orders no writes of this thread for the other block: that would cost a fence over the whole GPU.
__device__ inline void arrive_at(uint32_t remote) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
}

// Arrives once, and makes the phase wait for that many bytes from the TMA.
__device__ inline void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Until the phase of this parity has ended. A fresh barrier counts as having ended a phase of parity 1.
__device__ inline void wait(uint64_t* barrier, uint32_t parity) {
#ifdef SFAST_WAIT_LIMIT  // for trying kernels out: a wait that never ends becomes an error
  for (int64_t round = 0; round < SFAST_WAIT_LIMIT; ++round) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    if (done) return;
  }
  __trap();
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// ---- TMA. Coordinates count elements, innermost dimension first; one thread issues. ----

__device__ inline void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

#define SFAST_TMA_LOAD "cp.async.bulk.tensor."
#define SFAST_TMA_LOAD_TAIL ".shared::cluster.global.tile.mbarrier::complete_tx::bytes"

__device__ inline void load_tile(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  asm volatile(SFAST_TMA_LOAD "2d" SFAST_TMA_LOAD_TAIL " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
               "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
               : "memory");
}

__device__ inline void load_tile(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z, int w) {
  asm volatile(SFAST_TMA_LOAD "4d" SFAST_TMA_LOAD_TAIL " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
               "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}

// To the same place in each block of the cluster whose bit is set, each told through its own barrier.
__device__ inline void load_tile_to(uint16_t blocks, void* to, const CUtensorMap* map, uint64_t* barrier, int x,
                                    int y) {
  asm volatile(SFAST_TMA_LOAD "2d" SFAST_TMA_LOAD_TAIL
                              ".multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared_address(to)),
               "l"(map), "r"(shared_address(barrier)), "h"(blocks), "r"(x), "r"(y)
               : "memory");
}

#undef SFAST_TMA_LOAD
#undef SFAST_TMA_LOAD_TAIL

// What lies outside of the tensor is clipped.
__device__ inline void store_tile(const CUtensorMap* map, const void* from, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}

__device__ inline void store_tile(const CUtensorMap* map, const void* from, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(x), "r"(y)
               : "memory");
}

__device__ inline void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until the memory of all but the latest `kPending` groups of stores may be written to again.
template <int kPending>
__device__ inline void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Makes what this thread wrote into shared memory visible to TMA stores and to wgmma.
__device__ inline void fence_shared_writes() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Four 8x8 matrices of 2-byte elements, as products leave them in the registers of a warp; lane 8 j + r says where row
// r of matrix j goes, 16 bytes each.
__device__ inline void store_matrices(uint32_t to, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// ---- Blocks, clusters, warpgroups ----

// `id` 1 to 15; 0 is __syncthreads's.
__device__ inline void sync_threads(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline uint32_t block_in_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Without any order between writes before and reads behind it.
__device__ inline void meet_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ inline void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The whole warpgroup; every warpgroup of the block calls one of the two.
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Programmatic dependent launch: the next kernel may be set up now; what the previous one wrote is visible after this.
__device__ inline void launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ inline void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

}  // namespace sfast::hopper

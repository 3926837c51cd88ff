// One read, one write, one launch. A group of a UNet is a few hundred kilobytes: too much for a block, little enough
// for the shared memory of a cluster. Each block of a cluster loads its rows of a span of channels (whole groups, whole
// vectors of 16 bytes), sums x - pilot while they arrive, and tells the others of its cluster the mean and M2 (the sum
// of squared deviations) of each group; Chan's formula merges them, and the block writes what it has kept.
//
// The pilot of a channel is the block's own first row: however far the data is from zero nothing cancels, because a
// pilot is never more than sqrt(rows) standard deviations from the mean of the rows that it belongs to.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <numeric>

#include "check.h"
#include "group_norm.h"

namespace sfast {
namespace {

constexpr int kVector = 8;                         // elements, 16 bytes
constexpr int kInFlight = 8;                       // vectors that a thread loads before it uses the first
constexpr int kThreads = 384;                      // of a block
constexpr int kMostCluster = 8;                    // blocks; what every GPU with clusters can do
constexpr int kMostSpan = 256;                     // channels
constexpr int kColumns = kMostSpan / kVector + 1;  // of the tables below, which have a row for each place in a vector
constexpr int kMostGroup = 128;                    // channels: four for each lane of a warp
constexpr int kFairShare = 48 << 10;  // bytes of x for a block: with less, telling the others takes longer than loading
constexpr int kFixed = 20 << 10;      // bytes: what the kernel's other arrays take in shared memory, and a little more

struct Layout {
  int span, cluster, rows, rounds;  // channels and blocks of a cluster; rows of a block; vectors of a thread
  size_t shared;                    // bytes of a block
};

struct Arguments {
  const uint4* x;
  const void *shift, *weight, *bias;
  uint4* out;
  int64_t shift_stride;
  int rows, channels, per_group, span, block_rows, rounds;
  float eps;
  bool silu;
};

template <typename T>
struct Pair;
template <>
struct Pair<__half> {
  using type = __half2;
  static __device__ float2 unpack(__half2 v) { return __half22float2(v); }
  static __device__ __half2 pack(float a, float b) { return __floats2half2_rn(a, b); }
};
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static __device__ float2 unpack(__nv_bfloat162 v) { return __bfloat1622float2(v); }
  static __device__ __nv_bfloat162 pack(float a, float b) { return __floats2bfloat162_rn(a, b); }
};

template <typename T>
__device__ void unpack(const uint4& vector, float (&values)[kVector]) {
  const auto* pairs = reinterpret_cast<const typename Pair<T>::type*>(&vector);
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    const float2 pair = Pair<T>::unpack(pairs[i]);
    values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
  }
}

__device__ float sum_of_warp(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

__device__ uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return size;
}

__device__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(rank));
  return rank;
}

// Writes to the same place in the shared memory of another block of the cluster.
__device__ void store_at(uint32_t block, float2* place, float2 value) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v2.f32 [remote], {%2, %3};\n"
      "}" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(place))),
      "r"(block), "f"(value.x), "f"(value.y)
      : "memory");
}

__device__ void arrive_at_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ void wait_for_cluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) group_norm(Arguments a) {
  extern __shared__ uint4 kept[];  // [rounds, kThreads]: each thread's own vectors
  __shared__ float2 sums[kThreads * kVector / 4 + kMostSpan + kVector];  // of x - pilot and of its square, by lines
  __shared__ float2 moments[kMostCluster][kMostSpan / 4];  // mean and M2 of each block's share of each group
  __shared__ float2 table[kVector * kColumns];             // scale and center of each channel
  __shared__ float offsets[kVector * kColumns];
  __shared__ float pilots[kMostSpan], shifts[kMostSpan];

  const int thread = threadIdx.x;
  const int vectors = a.span / kVector, lines = kThreads / vectors;  // of a row; rows of a round
  const int line = thread / vectors, column = thread % vectors;
  const int rank = cluster_rank(), blocks = cluster_size();
  const int first_channel = blockIdx.x / blocks * a.span;
  const int n = blockIdx.y;
  const int begin = rank * a.block_rows;
  const int rows = min(a.block_rows, a.rows - begin);
  const bool works = line < lines;
  const int row_vectors = a.channels / kVector;
  const int64_t corner = (static_cast<int64_t>(n) * a.rows + begin) * row_vectors + first_channel / kVector + column;

  arrive_at_cluster();  // here I am: from the wait below on, others may write to my memory
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");

  float shift = 0, weight = 1, bias = 0;  // of this thread's channel; on their way while x is loaded
  if (thread < a.span) {
    const int channel = first_channel + thread;
    if (a.shift) shift = static_cast<float>(static_cast<const T*>(a.shift)[n * a.shift_stride + channel]);
    if (a.weight) weight = static_cast<float>(static_cast<const T*>(a.weight)[channel]);
    if (a.bias) bias = static_cast<float>(static_cast<const T*>(a.bias)[channel]);
  }

  float s1[kVector] = {}, s2[kVector] = {}, pilot[kVector];
  if (works) {
    const uint4 first = a.x[corner];
    for (int round = 0; round < a.rounds; round += kInFlight) {
      uint4 loaded[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int row = (round + i) * lines + line;
        if (row < rows) loaded[i] = a.x[corner + static_cast<int64_t>(row) * row_vectors];
      }
      unpack<T>(first, pilot);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int row = (round + i) * lines + line;
        if (row >= rows) break;
        kept[(round + i) * kThreads + thread] = loaded[i];
        float values[kVector];
        unpack<T>(loaded[i], values);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          const float d = values[j] - pilot[j];
          s1[j] += d;
          s2[j] = fmaf(d, d, s2[j]);
        }
      }
    }
    if (line == 0) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) pilots[column * kVector + j] = pilot[j];
    }
  }

  if (thread < a.span) shifts[thread] = shift;

  // Sums of a channel: over the lines, a quarter of them at a time, which is what `sums` has room for.
  const int quarter = (lines + 3) / 4, plane = quarter * vectors | 1;
  for (int part = 3; part >= 0; --part) {
    if (works && line / quarter == part) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        float2& place = sums[j * plane + thread - part * quarter * vectors];  // neighbours side by side: no conflicts
        const bool is_first = line + quarter >= lines;
        place = is_first ? make_float2(s1[j], s2[j]) : make_float2(place.x + s1[j], place.y + s2[j]);
      }
    }
    __syncthreads();
  }

  wait_for_cluster();
  // A warp for each group: its channels' sums, their means and M2, and those of the group in this block.
  const int groups = a.span / a.per_group, warp = thread / 32, lane = thread % 32;
  const float count = static_cast<float>(rows);
  for (int group = warp; group < groups; group += kThreads / 32) {
    float mean[kMostGroup / 32], m2 = 0, total = 0;
#pragma unroll
    for (int i = 0; i < kMostGroup / 32; ++i) {
      const int c = lane + 32 * i, channel = group * a.per_group + c;
      if (c >= a.per_group) break;
      float2 sum = make_float2(0, 0);
      for (int l = 0; l < quarter; ++l) {
        const float2 of_line = sums[channel % kVector * plane + l * vectors + channel / kVector];
        sum.x += of_line.x, sum.y += of_line.y;
      }
      mean[i] = pilots[channel] + shifts[channel] + sum.x / count;
      m2 += sum.y - sum.x * sum.x / count;
      total += mean[i];
    }
    const float center = sum_of_warp(total) / a.per_group;
#pragma unroll
    for (int i = 0; i < kMostGroup / 32; ++i) {
      if (lane + 32 * i >= a.per_group) break;
      m2 = fmaf((mean[i] - center) * (mean[i] - center), count, m2);
    }
    m2 = sum_of_warp(m2);
    if (lane < blocks) store_at(lane, &moments[rank][group], make_float2(center, m2));
  }
  arrive_at_cluster();
  wait_for_cluster();

  if (thread < a.span) {
    const int group = thread / a.per_group;
    const float pilot_mean = moments[0][group].x;
    float excess = 0;
    for (int b = 0; b < blocks; ++b) {
      excess += (moments[b][group].x - pilot_mean) * min(a.block_rows, a.rows - b * a.block_rows);
    }
    const float center = pilot_mean + excess / a.rows;
    float m2 = 0;
    for (int b = 0; b < blocks; ++b) {
      const float gap = moments[b][group].x - center;
      m2 += moments[b][group].y + gap * gap * min(a.block_rows, a.rows - b * a.block_rows) * a.per_group;
    }
    const float scale = rsqrtf(m2 / (static_cast<float>(a.rows) * a.per_group) + a.eps) * weight;
    const int place = thread % kVector * kColumns + thread / kVector;
    table[place] = make_float2(scale, center - shift);
    offsets[place] = bias;
  }
  __syncthreads();
  if (!works) return;

  float scale[kVector], center[kVector], offset[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const float2 entry = table[j * kColumns + column];
    scale[j] = entry.x, center[j] = entry.y, offset[j] = offsets[j * kColumns + column];
  }
  for (int row = line, round = 0; row < rows; row += lines, ++round) {
    float values[kVector];
    unpack<T>(kept[round * kThreads + thread], values);
    uint4 result;
    auto* pairs = reinterpret_cast<typename Pair<T>::type*>(&result);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      values[j] = fmaf(values[j] - center[j], scale[j], offset[j]);
      if (a.silu) values[j] = __fdividef(values[j], 1.0f + __expf(-values[j]));
    }
#pragma unroll
    for (int j = 0; j < kVector / 2; ++j) pairs[j] = Pair<T>::pack(values[2 * j], values[2 * j + 1]);
    a.out[corner + static_cast<int64_t>(row) * row_vectors] = result;
  }
}

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct Gpu {
  int major = 0, multiprocessors = 0, most_shared = 0;
};

const Gpu& gpu(int device) {
  static std::mutex mutex;
  static Gpu known[64];
  const std::lock_guard<std::mutex> lock(mutex);
  Gpu& it = known[std::clamp(device, 0, 63)];
  if (it.multiprocessors == 0) {
    CUDA_CHECK(cudaDeviceGetAttribute(&it.major, cudaDevAttrComputeCapabilityMajor, device));
    CUDA_CHECK(cudaDeviceGetAttribute(&it.most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    CUDA_CHECK(cudaDeviceGetAttribute(&it.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  }
  return it;
}

template <typename T>
void allow_shared(int device) {
  static std::once_flag once[64];
  std::call_once(once[std::clamp(device, 0, 63)], [&] {
    const int most = gpu(device).most_shared - kFixed;
    CUDA_CHECK(cudaFuncSetAttribute(group_norm<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  });
}

// How a cluster is launched; the kernel may come onto the GPU while the one before it still runs, and waits there.
struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2];

  Launch(dim3 blocks, int cluster, size_t shared, cudaStream_t stream) {
    config.gridDim = blocks;
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = attributes;
    config.numAttrs = 2;
  }
  Launch(const Launch&) = delete;
};

// How many clusters run at once. Clusters do not cross the borders between parts of a GPU, so this is not just the
// number of multiprocessors divided by theirs.
int clusters_at_once(int device, int cluster, size_t shared) {
  static std::mutex mutex;
  static std::map<std::array<int64_t, 3>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, is_new] = known.try_emplace({device, cluster, static_cast<int64_t>(shared)}, 0);
  if (is_new) {
    allow_shared<__half>(device);
    const Launch launch(dim3(cluster), cluster, shared, nullptr);
    CUDA_CHECK(cudaOccupancyMaxActiveClusters(&found->second, group_norm<__half>, &launch.config));
  }
  return found->second;
}

// The smallest span of whole groups and whole vectors, and the smallest cluster whose blocks have a fair share, or else
// the largest. All clusters run at once: a second wave would load only when the first has stored, and then three
// launches at full bandwidth are faster.
bool lay_out(const GroupNormProblem& p, const Gpu& on, Layout* layout) {
  const int64_t per_group = p.channels / p.groups, span = std::lcm(per_group, static_cast<int64_t>(kVector));
  if (per_group > kMostGroup || span > kMostSpan || p.channels % span != 0 || span / per_group > kMostSpan / 4)
    return false;
  const int64_t clusters = p.channels / span * p.n, lines = kThreads / (span / kVector);
  bool found = false;
  for (int64_t cluster = 1; cluster <= kMostCluster && cluster <= p.rows; cluster *= 2) {
    const int64_t rows = divide_up(p.rows, cluster), rounds = divide_up(rows, lines);
    const int64_t shared = rounds * kThreads * kVector * 2;
    if ((cluster - 1) * rows >= p.rows) break;  // nothing left for the last block
    if (shared + kFixed > on.most_shared || clusters * cluster > on.multiprocessors) continue;
    if (clusters > clusters_at_once(p.device, cluster, shared)) continue;
    *layout = {static_cast<int>(span), static_cast<int>(cluster), static_cast<int>(rows), static_cast<int>(rounds),
               static_cast<size_t>(shared)};
    found = true;
    if (rows * span * 2 <= kFairShare) break;
  }
  return found;
}

template <typename T>
void launch(const Layout& layout, const GroupNormProblem& p, const Arguments& arguments, cudaStream_t stream) {
  allow_shared<T>(p.device);
  const dim3 blocks(p.channels / layout.span * layout.cluster, p.n);
  const Launch launch(blocks, layout.cluster, layout.shared, stream);
  CUDA_CHECK(cudaLaunchKernelEx(&launch.config, group_norm<T>, arguments));
}

}  // namespace

bool group_norm_fits(const GroupNormProblem& problem) {
  const Gpu& on = gpu(problem.device);
  Layout layout;
  return on.major == 9 && problem.n < 65536 && lay_out(problem, on, &layout);
}

void launch_group_norm(const GroupNormProblem& p, const GroupNormPointers& at, cudaStream_t stream) {
  Layout layout;
  SFAST_CHECK(lay_out(p, gpu(p.device), &layout), "sfast_native::group_norm: does not fit into shared memory");
  Arguments arguments{};
  arguments.x = static_cast<const uint4*>(at.x);
  arguments.shift = at.shift, arguments.weight = at.weight, arguments.bias = at.bias;
  arguments.out = static_cast<uint4*>(at.out);
  arguments.shift_stride = p.shift_stride;
  arguments.rows = static_cast<int>(p.rows), arguments.channels = static_cast<int>(p.channels);
  arguments.per_group = static_cast<int>(p.channels / p.groups);
  arguments.span = layout.span, arguments.block_rows = layout.rows, arguments.rounds = layout.rounds;
  arguments.eps = p.eps, arguments.silu = p.silu;
  if (p.bfloat16) {
    launch<__nv_bfloat16>(layout, p, arguments, stream);
  } else {
    launch<__half>(layout, p, arguments, stream);
  }
}

}  // namespace sfast

#ifdef SFAST_HOPPER  // without nvcc there are no kernels
#include "hopper_gemm.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <utility>

#include "check.h"
#include "tensor_map.h"

namespace sfast {
namespace {

constexpr int kStep = 64;  // columns of k in a stage

const std::vector<HopperKernel>& kernels(bool bfloat16) {
  return bfloat16 ? hopper_kernels_bfloat16() : hopper_kernels_float16();
}

struct Device {
  int capability = 0;  // major
  int processors = 0;
};

Device describe(int64_t device) {
  static std::mutex mutex;
  static std::map<int64_t, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  Device made;
  CUDA_CHECK(cudaDeviceGetAttribute(&made.capability, cudaDevAttrComputeCapabilityMajor, static_cast<int>(device)));
  CUDA_CHECK(cudaDeviceGetAttribute(&made.processors, cudaDevAttrMultiProcessorCount, static_cast<int>(device)));
  return known[device] = made;
}

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// How a tile's rows lie over the pixels of the result, as powers of two.
struct Footprint {
  int log_width = 0, log_height = 0;
  int64_t width = 1, height = 1, images = 1;  // of a tile
  int64_t across = 1, down = 1, deep = 1;     // tiles
  int64_t tiles() const { return across * down * deep; }
};

bool is_power_of_two(int rows) {
  return (rows & (rows - 1)) == 0;
}

// The fewest tiles; among those the widest, whose rows are the longest in memory. Others than powers of two lie over
// the rows of a matrix.
Footprint footprint(const HopperProblem& p, int rows) {
  if (!is_power_of_two(rows)) {
    Footprint f;
    f.width = rows, f.across = divide_up(p.out_width, rows);
    return f;
  }
  constexpr int kMostBox = 256;  // elements that a tensor map's tile may span
  const int log_rows = static_cast<int>(std::lround(std::log2(rows)));
  Footprint best;
  int64_t least = -1;
  for (int w = log_rows; w >= 0; --w) {
    if ((p.stride[1] << w) > kMostBox) continue;
    for (int h = log_rows - w; h >= 0; --h) {
      if ((p.stride[0] << h) > kMostBox) continue;
      Footprint f;
      f.log_width = w, f.log_height = h, f.images = int64_t{1} << (log_rows - w - h);
      f.width = int64_t{1} << w, f.height = int64_t{1} << h;
      f.across = divide_up(p.out_width, int64_t{1} << w);
      f.down = divide_up(p.out_height, int64_t{1} << h);
      f.deep = divide_up(p.images, f.images);
      if (least < 0 || f.tiles() < least) best = f, least = f.tiles();
    }
  }
  return best;
}

bool is_matrix(const HopperProblem& p) {
  return p.images == 1 && p.height == 1 && p.filter[0] * p.filter[1] == 1 && p.stride[1] == 1 && p.padding[0] == 0 &&
         p.padding[1] == 0;
}

int64_t steps_of(const HopperProblem& p) {
  return p.filter[0] * p.filter[1] * divide_up(p.channels, kStep) + divide_up(p.channels2, kStep);
}

int64_t columns_out(const HopperKernel& kernel) {
  return kernel.gated ? kernel.columns / 2 : kernel.columns;
}

// Clusters that run at the same time; larger ones live within the 16 or 18 processors of one part of the chip.
int64_t slots_of(const HopperPlan& plan, int processors) {
  const int cluster = plan.pair * plan.splits;
  const int slots = cluster > 2 ? processors / 16 * (16 / cluster) : processors / cluster;
  return std::max(slots, 1);  // a slice of a GPU may have fewer than 16
}

int64_t units_of(const HopperProblem& p, const HopperKernel& kernel, const HopperPlan& plan) {
  return divide_up(footprint(p, kernel.rows).tiles(), plan.pair) * divide_up(p.out_channels, columns_out(kernel));
}

// Clock cycles, roughly, fitted to measurements on an H200: what the tensor cores, the L2 cache and the epilogues need,
// in whole waves of tiles.
double estimate(const HopperProblem& p, const HopperKernel& kernel, const HopperPlan& plan, int processors) {
  constexpr double kProductsPerCycle = 2048, kBytesPerCycle = 50, kStart = 5000, kExchange = 4000, kPart = 250;
  constexpr double kCyclesPerSum = 1.0 / 4, kCyclesPerStagedSum = 1.0 / 8, kCyclesPerActivation = 1.0 / 8;
  constexpr double kStall = 1.15, kStallAlternating = 1.5;  // times the bare products
  const double waves = static_cast<double>(divide_up(units_of(p, kernel, plan), slots_of(plan, processors)));
  const double products = static_cast<double>(kernel.rows) * kernel.columns * kStep / kProductsPerCycle;
  const double loads = (kernel.rows + static_cast<double>(kernel.columns) / plan.pair) * kStep * 2 / kBytesPerCycle;
  const double steps = static_cast<double>(divide_up(steps_of(p), plan.splits));
  const double busy = steps * std::max(products * (kernel.in_flight > 1 ? kStallAlternating : kStall), loads);
  const bool activates = kernel.gated || p.activation != HopperActivation::kNone;
  const double sums = static_cast<double>(kernel.rows) * columns_out(kernel);
  double end = sums * ((kernel.staged ? kCyclesPerStagedSum : kCyclesPerSum) + (activates ? kCyclesPerActivation : 0));
  if (plan.splits > 1) {
    const double turns = sums / (8 * 256 * plan.splits);  // of a thread, eight sums each
    end = kExchange + turns * kPart * (plan.splits + 2);
    // A split tile is there to fill processors that would be idle: more than one wave of them does not pay.
    if (waves > 1) return kStart + 4 * waves * (busy + end);
  }
  if (kernel.in_flight > 1) return kStart + waves * std::max(busy, end / kernel.in_flight) + end;
  return kStart + waves * (busy + end);
}

HopperArguments arguments_of(const HopperProblem& p, const HopperKernel& kernel, const HopperPlan& plan,
                             const HopperPointers& pointers) {
  const Footprint f = footprint(p, kernel.rows);
  const int64_t taps = p.filter[0] * p.filter[1];
  HopperArguments a{};
  TiledTensor x;
  x.address = pointers.x, x.bfloat16 = p.bfloat16;
  x.sizes = {p.channels, p.width, p.height, p.images};
  x.strides = {p.ld_x, p.width * p.ld_x, p.height * p.width * p.ld_x};
  x.tile = {kStep, p.stride[1] * f.width, p.stride[0] * f.height, f.images};
  x.step = {1, p.stride[1], p.stride[0], 1};
  a.x = a.x2 = encode_tensor_map(x);
  if (p.channels2 > 0) {
    x.address = pointers.x2;
    x.sizes[0] = p.channels2;
    x.strides = {p.ld_x2, p.width * p.ld_x2, p.height * p.width * p.ld_x2};
    a.x2 = encode_tensor_map(x);
  }
  TiledTensor weight;
  weight.address = pointers.weight, weight.bfloat16 = p.bfloat16;
  weight.sizes = {taps * p.channels + p.channels2, (p.gated && !p.two_weights ? 2 : 1) * p.out_channels};
  weight.strides = {p.ld_weight};
  weight.tile = {kStep, kernel.columns / 2};
  if (kernel.staged) {
    TiledTensor out;
    out.address = pointers.out, out.bfloat16 = p.bfloat16;
    out.sizes = {p.out_channels, p.out_width};
    out.strides = {p.out_channels};
    out.tile = {64, 16};  // what a warp stores at once
    a.out_map = encode_tensor_map(out);
  }
  a.weight = a.weight2 = encode_tensor_map(weight);
  a.second_half = static_cast<int>(p.gated ? p.out_channels : kernel.columns / 2);
  a.bias = pointers.bias;
  if (p.gated && a.bias != nullptr) a.bias2 = static_cast<const char*>(a.bias) + 2 * p.out_channels;
  if (p.two_weights) {
    weight.address = pointers.gate_weight;
    a.weight2 = encode_tensor_map(weight), a.bias2 = pointers.gate_bias, a.second_half = 0;
  }
  a.residual = pointers.residual;
  a.out = pointers.out;
  a.ld_residual = p.ld_residual;
  a.out_channels = static_cast<int>(p.out_channels);
  a.images = static_cast<int>(p.images);
  a.out_height = static_cast<int>(p.out_height), a.out_width = static_cast<int>(p.out_width);
  a.log_tile_width = f.log_width, a.log_tile_height = f.log_height;
  a.tiles_x = static_cast<int>(f.across), a.tiles_y = static_cast<int>(f.down);
  a.tiles_m = static_cast<int>(f.tiles());
  a.tiles_n = static_cast<int>(divide_up(p.out_channels, columns_out(kernel)));
  a.stride_h = static_cast<int>(p.stride[0]), a.stride_w = static_cast<int>(p.stride[1]);
  a.padding_h = static_cast<int>(p.padding[0]), a.padding_w = static_cast<int>(p.padding[1]);
  a.dilation_h = static_cast<int>(p.dilation[0]), a.dilation_w = static_cast<int>(p.dilation[1]);
  a.filter_w = static_cast<int>(p.filter[1]), a.taps = static_cast<int>(taps);
  a.chunks_before = static_cast<int>(divide_up(p.channels, kStep));
  a.chunks = a.chunks_before + static_cast<int>(divide_up(p.channels2, kStep));
  a.channels = static_cast<int>(p.channels);
  a.pair = plan.pair, a.splits = plan.splits;
  a.activation = p.activation;
  return a;
}

bool takes(const HopperProblem& p) {
  const int64_t most = int64_t{1} << 30;
  return p.channels % 8 == 0 && p.out_channels % 8 == 0 && p.ld_x % 8 == 0 && p.ld_weight % 8 == 0 &&
         p.ld_residual % 8 == 0 && p.channels2 % 8 == 0 && p.ld_x2 % 8 == 0 &&
         (p.channels2 == 0 || p.channels % kStep == 0) && p.stride[0] <= 8 && p.stride[1] <= 8 &&
         p.images * p.out_height * p.out_width < most && p.images * p.height * p.width < most &&
         p.filter[0] * p.filter[1] * p.channels < most && p.out_channels < most / 2;
}

// Asked once for each kernel and device: more shared memory than the 48 KiB that every GPU has.
void allow_shared_memory(const HopperKernel& kernel) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, bool> allowed;
  int device = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  bool& done = allowed[{device, kernel.function}];
  if (done) return;
  CUDA_CHECK(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes));
  done = true;
}

}  // namespace

bool has_hopper(int64_t device) {
  return describe(device).capability == 9;
}

std::vector<HopperPlan> hopper_plans(const HopperProblem& problem, int64_t device) {
  constexpr int kMostSplits = 8, kLeastSteps = 4;
  const Device gpu = describe(device);
  if (!has_hopper(device) || !takes(problem)) return {};
  const auto& table = kernels(problem.bfloat16);
  const bool activates = !problem.gated && problem.activation != HopperActivation::kNone;
  std::vector<HopperPlan> plans;
  const auto add = [&](HopperPlan plan) {
    plan.cost = estimate(problem, table[plan.kernel], plan, gpu.processors);
    plans.push_back(plan);
  };
  for (int k = 0; k < static_cast<int>(table.size()); ++k) {
    if (table[k].gated != problem.gated || table[k].activates != activates) continue;
    if ((table[k].staged || !is_power_of_two(table[k].rows)) && !is_matrix(problem)) continue;
    add({k, 1, 1});
    if (footprint(problem, table[k].rows).tiles() > 1) add({k, 2, 1});
    for (int splits = 2; splits <= kMostSplits && table[k].in_flight == 1; ++splits) {
      if (steps_of(problem) >= splits * kLeastSteps) add({k, 1, splits});
    }
  }
  std::stable_sort(plans.begin(), plans.end(), [](const auto& a, const auto& b) { return a.cost < b.cost; });
  return plans;
}

std::string HopperPlan::name() const {
  const HopperKernel& k = kernels(false)[kernel];
  std::ostringstream text;
  text << "hopper " << k.rows << "x" << k.columns << (k.staged ? " staged" : "")
       << (k.in_flight > 1 ? " alternating" : "") << (pair > 1 ? " paired" : "");
  if (splits > 1) text << " split " << splits;
  return text.str();
}

void prepare(const HopperProblem& problem, const HopperPlan& plan) {
  allow_shared_memory(kernels(problem.bfloat16)[plan.kernel]);
}

void launch(const HopperProblem& problem, const HopperPlan& plan, const HopperPointers& pointers, cudaStream_t stream) {
  const HopperKernel& kernel = kernels(problem.bfloat16)[plan.kernel];
  int device = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  allow_shared_memory(kernel);
  HopperArguments arguments = arguments_of(problem, kernel, plan, pointers);
  const int cluster = plan.pair * plan.splits;
  const int units = static_cast<int>(divide_up(arguments.tiles_m, plan.pair)) * arguments.tiles_n;
  // A split tile ends its cluster; others stay and take one tile after the other.
  const int clusters = plan.splits > 1 ? units : std::min(units, describe(device).processors / cluster);

  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(clusters * cluster);
  config.blockDim = dim3(kernel.threads);
  config.dynamicSmemBytes = kernel.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (cluster > 1) {
    cudaLaunchAttribute& made = attributes[config.numAttrs++];
    made.id = cudaLaunchAttributeClusterDimension;
    made.val.clusterDim.x = cluster, made.val.clusterDim.y = 1, made.val.clusterDim.z = 1;
  }
  cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  void* parameters[] = {&arguments};
  CUDA_CHECK(cudaLaunchKernelExC(&config, kernel.function, parameters));
}

}  // namespace sfast
#endif  // SFAST_HOPPER

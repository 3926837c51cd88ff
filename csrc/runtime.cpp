#include "runtime.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>

#include "check.h"

namespace sfast {
namespace {

using Event = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, decltype(&cudaEventDestroy)>;
using Graph = std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, decltype(&cudaGraphDestroy)>;
using GraphExec = std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, decltype(&cudaGraphExecDestroy)>;
using Stream = std::unique_ptr<std::remove_pointer_t<cudaStream_t>, decltype(&cudaStreamDestroy)>;

Event make_event() {
  cudaEvent_t event = nullptr;
  CUDA_CHECK(cudaEventCreate(&event));
  return Event(event, &cudaEventDestroy);
}

Stream make_stream() {
  cudaStream_t stream = nullptr;
  CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return Stream(stream, &cudaStreamDestroy);
}

// The time between two points of a stream, to be read when the stream has passed both.
struct Span {
  Event begin = make_event(), end = make_event();

  float ms() const {
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, begin.get(), end.get()));
    return ms;
  }
};

Span time(const std::function<void()>& work, cudaStream_t stream) {
  Span span;
  CUDA_CHECK(cudaEventRecord(span.begin.get(), stream));
  work();
  CUDA_CHECK(cudaEventRecord(span.end.get(), stream));
  return span;
}

// While it lives, what is put on the stream waits there (but not for ever: a launch might itself wait for the stream).
class Gate {
 public:
  explicit Gate(cudaStream_t stream) : stream_(stream) { CUDA_CHECK(cudaLaunchHostFunc(stream, &Gate::hold, this)); }
  ~Gate() {
    open_ = true;
    cudaStreamSynchronize(stream_);  // `hold` reads this object
  }
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;

 private:
  static void CUDART_CB hold(void* self) {
    constexpr std::chrono::milliseconds kLongest(20);
    const auto end = std::chrono::steady_clock::now() + kLongest;
    const auto& gate = *static_cast<const Gate*>(self);
    while (!gate.open_ && std::chrono::steady_clock::now() < end) std::this_thread::yield();
  }

  cudaStream_t stream_;
  std::atomic<bool> open_{false};
};

// Short work is timed as a graph of many launches, so that the processor's launch time stays out of the figure.
GraphExec repeat_as_graph(const std::function<void(cudaStream_t)>& work, int times, cudaStream_t side) {
  CUDA_CHECK(cudaStreamBeginCapture(side, cudaStreamCaptureModeRelaxed));
  std::exception_ptr error;
  try {
    for (int i = 0; i < times; ++i) work(side);
  } catch (...) {
    error = std::current_exception();
  }
  cudaGraph_t raw_graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(side, &raw_graph);
  const Graph graph(raw_graph, &cudaGraphDestroy);
  if (error) std::rethrow_exception(error);
  CUDA_CHECK(ended);
  cudaGraphExec_t raw_exec = nullptr;
  CUDA_CHECK(cudaGraphInstantiate(&raw_exec, graph.get(), 0));
  return GraphExec(raw_exec, &cudaGraphExecDestroy);
}

}  // namespace

cudaStream_t current_stream(int64_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(static_cast<int32_t>(device), &stream));
  return static_cast<cudaStream_t>(stream);
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

cudnnHandle_t cudnn_handle(int64_t device, cudaStream_t stream) {
  thread_local std::map<int64_t, cudnnHandle_t> handles;  // outlive the thread: destroying one at exit is unsafe
  cudnnHandle_t& handle = handles[device];
  if (handle == nullptr) {
    const RelaxedCapture relaxed;
    CUDNN_CHECK(cudnnCreate(&handle));
  }
  CUDNN_CHECK(cudnnSetStream(handle, stream));
  return handle;
}

cublasLtHandle_t cublaslt_handle(int64_t device) {
  static std::mutex mutex;
  static std::map<int64_t, cublasLtHandle_t> handles;
  const std::lock_guard<std::mutex> lock(mutex);
  cublasLtHandle_t& handle = handles[device];
  if (handle == nullptr) {
    const RelaxedCapture relaxed;
    CUBLAS_CHECK(cublasLtCreate(&handle));
  }
  return handle;
}

Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, const Tensor& like) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle made = nullptr;
  const auto status = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                                               aoti_torch_device_type_cuda(), like.get_device_index(), &made);
  SFAST_CHECK(status == AOTI_TORCH_SUCCESS, "sfast_native: no memory for a result of sizes ",
              to_string({sizes.data(), sizes.size()}));
  return Tensor(made);
}

Workspace::Workspace(int64_t bytes, int64_t device) {
  if (bytes <= 0) return;
  const int64_t stride = 1;
  AtenTensorHandle made = nullptr;
  const auto status = aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(),
                                               aoti_torch_device_type_cuda(), static_cast<int32_t>(device), &made);
  SFAST_CHECK(status == AOTI_TORCH_SUCCESS, "sfast_native: no memory for a workspace of ", bytes, " bytes");
  memory_ = Tensor(made);
  address_ = memory_.mutable_data_ptr();
}

const void* zeros(int64_t bytes, int64_t device) {
  struct Block {
    void* address = nullptr;
    int64_t bytes = 0;
  };
  static std::mutex mutex;
  static std::map<int64_t, Block> blocks;
  const std::lock_guard<std::mutex> lock(mutex);
  Block& block = blocks[device];
  if (block.bytes < bytes) {
    const RelaxedCapture relaxed;
    const Stream side = make_stream();
    block.bytes = std::max<int64_t>(bytes, 16384);  // the one before stays: captured graphs may read it
    CUDA_CHECK(cudaMalloc(&block.address, block.bytes));
    CUDA_CHECK(cudaMemsetAsync(block.address, 0, block.bytes, side.get()));
    CUDA_CHECK(cudaStreamSynchronize(side.get()));
  }
  return block.address;
}

RelaxedCapture::RelaxedCapture() {
  CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode_));
}
RelaxedCapture::~RelaxedCapture() {
  cudaThreadExchangeStreamCaptureMode(&mode_);
}

std::vector<float> time_each(const std::vector<std::function<void(cudaStream_t)>>& candidates, cudaStream_t stream) {
  constexpr float kHopeless = 1.25f, kNoiseMs = 0.01f;  // slower than kHopeless * best + kNoiseMs: not looked at again
  constexpr float kLoadMs = 2.0f;                       // what loading its kernel may add to a candidate's first run
  constexpr float kEnoughMs = 0.25f;                    // a run this long needs no repetition within it
  constexpr size_t kFinalists = 6;
  constexpr int kRounds = 3;
  const float kNever = std::numeric_limits<float>::infinity();
  std::vector<float> rough(candidates.size(), kNever), ms = rough;

  // Rough figures. The first runs load the kernels, and show what is hopeless all the same; the others run again,
  // behind a gate, so that they follow each other without waiting for the processor to launch them.
  std::vector<std::pair<size_t, Span>> spans;
  const auto run_and_time = [&](size_t i) {
    try {
      spans.emplace_back(i, time([&] { candidates[i](stream); }, stream));
    } catch (const std::exception&) {
      cudaGetLastError();  // the candidate stays at infinity; its error must not surface in a later call
    }
  };
  const auto wait = [&] {
    CUDA_CHECK(cudaStreamSynchronize(stream));
    std::fill(rough.begin(), rough.end(), kNever);
    for (const auto& [i, span] : spans) rough[i] = span.ms();
    return spans.empty() ? kNever : *std::min_element(rough.begin(), rough.end());
  };
  for (size_t i = 0; i < candidates.size(); ++i) run_and_time(i);
  float best = wait();
  spans.clear();
  if (best == kNever) return ms;
  {
    const std::vector<float> first = rough;
    const Gate gate(stream);
    for (size_t i = 0; i < candidates.size(); ++i) {
      if (first[i] <= kHopeless * best + kLoadMs) run_and_time(i);
    }
  }
  best = wait();
  spans.clear();

  std::vector<size_t> finalists;
  for (size_t i = 0; i < candidates.size(); ++i) {
    if (rough[i] <= kHopeless * best + kNoiseMs) finalists.push_back(i);
  }
  std::stable_sort(finalists.begin(), finalists.end(), [&](size_t i, size_t j) { return rough[i] < rough[j]; });
  finalists.resize(std::min(finalists.size(), kFinalists));
  if (finalists.size() == 1) {
    ms[finalists[0]] = best;
    return ms;
  }

  // Fine figures: the least of a few rounds. The processor waits for the GPU once.
  const Stream side = make_stream();
  std::vector<std::function<void()>> runs;
  std::vector<int> times;
  for (const size_t i : finalists) {
    times.push_back(std::clamp(static_cast<int>(kEnoughMs / std::max(rough[i], kNoiseMs / 10)), 1, 10));
    if (times.back() == 1) {
      runs.push_back([&candidates, i, stream] { candidates[i](stream); });
    } else {
      const std::shared_ptr<std::remove_pointer_t<cudaGraphExec_t>> graph =
          repeat_as_graph(candidates[i], times.back(), side.get());
      runs.push_back([graph, stream] { CUDA_CHECK(cudaGraphLaunch(graph.get(), stream)); });
    }
  }
  for (int round = 0; round < kRounds; ++round) {
    for (size_t f = 0; f < finalists.size(); ++f) spans.emplace_back(f, time(runs[f], stream));
  }
  CUDA_CHECK(cudaStreamSynchronize(stream));
  for (const auto& [f, span] : spans) {
    float& least = ms[finalists[f]];
    least = std::min(least, span.ms() / static_cast<float>(times[f]));
  }
  return ms;
}

torch::headeronly::ScalarType half_dtype(const Tensor& x, const char* op) {
  SFAST_CHECK(x.is_cuda(), op, ": x must be a CUDA tensor");
  const auto dtype = x.scalar_type();
  SFAST_CHECK(dtype == torch::headeronly::ScalarType::Half || dtype == torch::headeronly::ScalarType::BFloat16, op,
              ": x must be float16 or bfloat16, got scalar type ", static_cast<int>(dtype));
  return dtype;
}

void check_operand(const Tensor& tensor, const char* name, const Tensor& x, const char* op) {
  SFAST_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), op, ": ", name,
              " must lie on x's device");
  SFAST_CHECK(tensor.scalar_type() == x.scalar_type(), op, ": ", name, " must have x's dtype, got scalar types ",
              static_cast<int>(tensor.scalar_type()), " and ", static_cast<int>(x.scalar_type()));
  SFAST_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, op, ": ", name,
              " must start at a multiple of 16 bytes");
}

std::string to_string(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << "]";
  return text.str();
}

}  // namespace sfast

// What both ops ask of PyTorch and CUDA: the current stream, handles, memory from PyTorch's allocator, and the
// stopwatch that picks the fastest of several ways to do the same thing.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <cudnn.h>
#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <string>
#include <vector>

namespace sfast {

using torch::stable::Tensor;

cudaStream_t current_stream(int64_t device);
bool is_capturing(cudaStream_t stream);

// One handle for each thread and device, set to `stream`.
cudnnHandle_t cudnn_handle(int64_t device, cudaStream_t stream);
// One handle for each device; cuBLASLt handles are safe to share.
cublasLtHandle_t cublaslt_handle(int64_t device);

Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, const Tensor& like);
// Scratch memory that returns to PyTorch's allocator in stream order; its address is null when no byte is needed.
class Workspace {
 public:
  Workspace(int64_t bytes, int64_t device);
  void* get() const { return address_; }

 private:
  Tensor memory_;
  void* address_ = nullptr;
};

// At least `bytes` zeros in device memory that are never written and never freed.
const void* zeros(int64_t bytes, int64_t device);

// While it lives, calls of this thread that a stream capture would forbid (loading a kernel, allocating) are allowed.
class RelaxedCapture {
 public:
  RelaxedCapture();
  ~RelaxedCapture();

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Milliseconds of each candidate, run on `stream` with everything warm.
// A candidate enqueues its work on the stream that it is given. Infinity for one that
// throws or is far behind.
std::vector<float> time_each(const std::vector<std::function<void(cudaStream_t)>>& candidates, cudaStream_t stream);

// "float16" or "bfloat16"; raises for every other dtype. `op` opens the message.
torch::headeronly::ScalarType half_dtype(const Tensor& x, const char* op);
// Raises unless `tensor` lies on x's device, has x's dtype and starts at a multiple of 16 bytes.
void check_operand(const Tensor& tensor, const char* name, const Tensor& x, const char* op);
std::string to_string(torch::headeronly::IntHeaderOnlyArrayRef values);

}  // namespace sfast

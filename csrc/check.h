// One macro family for every error: the name, the rule, what came. Python sees a RuntimeError with exactly this text.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <cudnn.h>

#include <sstream>
#include <stdexcept>

namespace sfast {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace sfast

#define SFAST_CHECK(condition, ...)               \
  do {                                            \
    if (!(condition)) ::sfast::fail(__VA_ARGS__); \
  } while (false)

// The error is taken out of CUDA's own record, too: there PyTorch would find it after some later call.
#define CUDA_CHECK(call)                                                                  \
  do {                                                                                    \
    const cudaError_t status_ = (call);                                                   \
    if (status_ != cudaSuccess) cudaGetLastError();                                       \
    SFAST_CHECK(status_ == cudaSuccess, #call, " failed: ", cudaGetErrorString(status_)); \
  } while (false)

#define CUDNN_CHECK(call)                                                                           \
  do {                                                                                              \
    const cudnnStatus_t status_ = (call);                                                           \
    SFAST_CHECK(status_ == CUDNN_STATUS_SUCCESS, #call, " failed: ", cudnnGetErrorString(status_)); \
  } while (false)

#define CUBLAS_CHECK(call)                                                                               \
  do {                                                                                                   \
    const cublasStatus_t status_ = (call);                                                               \
    SFAST_CHECK(status_ == CUBLAS_STATUS_SUCCESS, #call, " failed: ", cublasLtGetStatusString(status_)); \
  } while (false)

// Tensor maps: what the tensor memory accelerator must know of a tensor to copy tiles of it.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <vector>

namespace sfast {

// A tensor of 2-byte elements. Innermost dimension first; it is contiguous and starts at a multiple of 16 bytes.
struct TiledTensor {
  const void* address = nullptr;
  bool bfloat16 = false;         // or float16
  std::vector<int64_t> sizes;    // elements
  std::vector<int64_t> strides;  // elements, of all dimensions but the innermost; multiples of 8
  std::vector<int64_t> tile;     // elements, at most 256 each; the innermost fills at most 128 bytes
  std::vector<int64_t> step;     // takes each step-th element of a dimension; empty: all
};

// Tiles lie in the 128-byte swizzle, and are filled with zeros where they hang over the tensor. Raises what the driver
// says. No stream work.
CUtensorMap encode_tensor_map(const TiledTensor& tensor);

}  // namespace sfast

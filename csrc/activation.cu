#include "activation.h"
#include "hopper_numbers.cuh"

namespace sfast {
namespace {

using hopper::Pair;

template <typename T>
__device__ void read_eight(float (&values)[8], const T* from) {
  const uint4 eight = *reinterpret_cast<const uint4*>(from);
  const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 pair = Pair<T>::unpack(words[j]);
    values[2 * j] = pair.x, values[2 * j + 1] = pair.y;
  }
}

// 8 columns of a row for each thread; `gate` or null.
template <typename T, HopperActivation kActivation>
__global__ void apply(const T* value, const T* gate, T* out, int64_t pieces, int pieces_of_row, int64_t ld) {
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (piece >= pieces) return;
  const int64_t row = piece / pieces_of_row, column = piece % pieces_of_row * 8;
  float values[8], gates[8];
  read_eight(values, value + row * ld + column);
  if (gate != nullptr) {
    read_eight(gates, gate + row * ld + column);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] *= hopper::activate<T, kActivation>(gates[i]);
  } else {
#pragma unroll
    for (float& v : values) v = hopper::activate<T, kActivation>(v);
  }
  *reinterpret_cast<uint4*>(out + piece * 8) =
      make_uint4(Pair<T>::pack(values[0], values[1]), Pair<T>::pack(values[2], values[3]),
                 Pair<T>::pack(values[4], values[5]), Pair<T>::pack(values[6], values[7]));
}

template <typename T>
cudaError_t launch(const void* value, const void* gate, void* out, int64_t rows, int64_t columns, int64_t ld,
                   HopperActivation activation, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int64_t pieces = rows * columns / 8;
  auto kernel = &apply<T, HopperActivation::kGelu>;
  if (activation == HopperActivation::kGeluTanh) kernel = &apply<T, HopperActivation::kGeluTanh>;
  if (activation == HopperActivation::kSilu) kernel = &apply<T, HopperActivation::kSilu>;
  kernel<<<static_cast<unsigned>((pieces + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
      static_cast<const T*>(value), static_cast<const T*>(gate), static_cast<T*>(out), pieces,
      static_cast<int>(columns / 8), ld);
  return cudaGetLastError();
}

}  // namespace

cudaError_t activate(bool bfloat16, const void* product, void* out, int64_t rows, int64_t columns,
                     HopperActivation activation, cudaStream_t stream) {
  if (bfloat16) return launch<__nv_bfloat16>(product, nullptr, out, rows, columns, columns, activation, stream);
  return launch<__half>(product, nullptr, out, rows, columns, columns, activation, stream);
}

cudaError_t gate(bool bfloat16, const void* value, const void* gate, void* out, int64_t rows, int64_t columns,
                 int64_t ld, HopperActivation activation, cudaStream_t stream) {
  if (bfloat16) return launch<__nv_bfloat16>(value, gate, out, rows, columns, ld, activation, stream);
  return launch<__half>(value, gate, out, rows, columns, ld, activation, stream);
}

}  // namespace sfast

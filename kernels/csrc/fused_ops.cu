// Launches of fused_ops.cuh behind a C interface: pointers, sizes and a stream. `kernels/fused_cuda.py` calls it, so
// that the library is tied to no version of torch and is compiled in seconds.

#include "fused_ops.cuh"

#include <cuda_runtime.h>

namespace {

using namespace wan;

constexpr int WARP = 32;
constexpr int MAX_THREADS = 1024;
constexpr int GATE_THREADS = 256;

struct DeviceBlock {
  float* shared;  // one value per warp

  __device__ int index() const { return threadIdx.x; }
  __device__ int count() const { return blockDim.x; }

  __device__ float sum(float value) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = value;
    __syncthreads();
    const int warps = blockDim.x / WARP;
    value = threadIdx.x % WARP < warps ? shared[threadIdx.x % WARP] : 0.0f;
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
    return value;
  }
};

template <int KEPT, bool ALIGNED, typename T>
__global__ void __launch_bounds__(MAX_THREADS)
    rms_norm_kernel(const T* __restrict__ x, const T* __restrict__ weight, T* out, int width, float eps) {
  __shared__ float sums[WARP];
  DeviceBlock block{sums};
  const int64_t row = static_cast<int64_t>(blockIdx.x) * width;
  rms_norm_row<KEPT, ALIGNED>(block, x + row, weight, out + row, width, eps);
}

template <bool ALIGNED, typename Activation, typename T>
__global__ void __launch_bounds__(GATE_THREADS) gate_kernel(const T* gate, const T* up, T* out, int64_t length) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * VECTOR;
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * VECTOR; first < length;
       first += step) {
    gate_vector<ALIGNED, Activation>(gate, up, out, first, length);
  }
}

template <typename... Pointers>
bool aligned(int64_t length, Pointers... pointers) {
  return length % VECTOR == 0 && ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

template <int KEPT, typename T>
cudaError_t launch_rms_norm(const T* x, const T* weight, T* out, int rows, int width, float eps, cudaStream_t stream) {
  const int vectors = (width + VECTOR - 1) / VECTOR;
  const int threads = ((vectors + KEPT - 1) / KEPT + WARP - 1) / WARP * WARP;
  auto kernel = aligned(width, x, weight, out) ? rms_norm_kernel<KEPT, true, T> : rms_norm_kernel<KEPT, false, T>;
  kernel<<<rows, threads, 0, stream>>>(x, weight, out, width, eps);
  return cudaGetLastError();
}

// Widths 1536, 3072 and 5120 fill 192, 192 and 160 threads to the last one.
template <typename T>
cudaError_t rms_norm(const void* x, const void* weight, void* out, int rows, int width, float eps, cudaStream_t stream) {
  auto launch = width <= 2048 ? launch_rms_norm<1, T>
                : width <= 4096 ? launch_rms_norm<2, T>
                                : launch_rms_norm<4, T>;
  return launch(static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(out), rows, width, eps, stream);
}

template <typename Activation, typename T>
cudaError_t gated(const void* gate, const void* up, void* out, int64_t length, cudaStream_t stream) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  constexpr int64_t PER_BLOCK = GATE_THREADS * VECTOR;
  const int64_t needed = (length + PER_BLOCK - 1) / PER_BLOCK, resident = 8L * processors;
  auto kernel = aligned(length, gate, up, out) ? gate_kernel<true, Activation, T> : gate_kernel<false, Activation, T>;
  kernel<<<needed < resident ? needed : resident, GATE_THREADS, 0, stream>>>(
      static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(out), length);
  return cudaGetLastError();
}

}  // namespace

// Numbers of dtypes and activations as in kernels/fused_cuda.py. Each returns a cudaError_t; nothing is launched for
// sizes of zero. Widths of rms_norm go up to 32768.
extern "C" int wan_rms_norm(const void* x, const void* weight, void* out, int rows, int width, float eps, int is_half,
                            cudaStream_t stream) {
  if (rows < 1 || width < 1) return cudaSuccess;
  if (width > 4 * VECTOR * MAX_THREADS) return cudaErrorInvalidValue;
  auto run = is_half ? rms_norm<__half> : rms_norm<__nv_bfloat16>;
  return run(x, weight, out, rows, width, eps, stream);
}

extern "C" int wan_gated(const void* gate, const void* up, void* out, int64_t length, int is_half, int is_silu,
                         cudaStream_t stream) {
  if (length < 1) return cudaSuccess;
  auto run = is_half ? (is_silu ? gated<Silu, __half> : gated<Gelu, __half>)
                     : (is_silu ? gated<Silu, __nv_bfloat16> : gated<Gelu, __nv_bfloat16>);
  return run(gate, up, out, length, stream);
}

extern "C" const char* wan_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

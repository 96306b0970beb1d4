// What one row or one run of values goes through: RMS norm, and a gated activation. Nothing here knows torch, a launch
// or a card, and a block is whatever has `index`, `count` and `sum`, so that the same lines compile for the host and
// are proved there against float64 (tests/kernels/host_fused_ops.cu).
//
// Values are bfloat16 or float16 in memory and float in registers; each is rounded once, when it is stored.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#define WAN_BOTH __host__ __device__ __forceinline__

namespace wan {

constexpr int VECTOR = 8;  // 16 bytes of 16-bit values: the widest access a thread makes

WAN_BOTH float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
WAN_BOTH float to_float(__half x) { return __half2float(x); }

template <typename T>
WAN_BOTH T rounded(float x);
template <>
WAN_BOTH __nv_bfloat16 rounded(float x) {
  return __float2bfloat16_rn(x);
}
template <>
WAN_BOTH __half rounded(float x) {
  return __float2half_rn(x);
}

template <typename T>
struct alignas(16) Vector {
  T at[VECTOR];
};

// Values `first`.. of `length`; what lies beyond is zero and is not read. ALIGNED promises whole vectors on 16 bytes.
template <bool ALIGNED, typename T>
WAN_BOTH Vector<T> load(const T* values, int64_t first, int64_t length) {
  Vector<T> loaded;
  if constexpr (ALIGNED) {
    if (first < length) return *reinterpret_cast<const Vector<T>*>(values + first);
  }
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    loaded.at[i] = !ALIGNED && first + i < length ? values[first + i] : T(0.0f);
  }
  return loaded;
}

template <bool ALIGNED, typename T>
WAN_BOTH void store(const Vector<T>& stored, T* values, int64_t first, int64_t length) {
  if constexpr (ALIGNED) {
    if (first < length) *reinterpret_cast<Vector<T>*>(values + first) = stored;
  } else {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      if (first + i < length) values[first + i] = stored.at[i];
    }
  }
}

// out = x / sqrt(mean(x^2) + eps) * weight over one row. A thread keeps KEPT vectors of it in registers, so that the
// row is read once; all of them are asked for before the first is needed.
template <int KEPT, bool ALIGNED, typename Block, typename T>
WAN_BOTH void rms_norm_row(Block& block, const T* x, const T* weight, T* out, int width, float eps) {
  Vector<T> kept[KEPT];
#pragma unroll
  for (int k = 0; k < KEPT; ++k) {
    kept[k] = load<ALIGNED>(x, (k * block.count() + block.index()) * VECTOR, width);
  }
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < KEPT; ++k) {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) squares += to_float(kept[k].at[i]) * to_float(kept[k].at[i]);
  }
  const float scale = 1.0f / sqrtf(block.sum(squares) / width + eps);
#pragma unroll
  for (int k = 0; k < KEPT; ++k) {
    const int first = (k * block.count() + block.index()) * VECTOR;
    const Vector<T> weights = load<ALIGNED>(weight, first, width);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      kept[k].at[i] = rounded<T>(to_float(kept[k].at[i]) * scale * to_float(weights.at[i]));
    }
    store<ALIGNED>(kept[k], out, first, width);
  }
}

struct Gelu {  // the tanh form, as x * sigmoid(2 z): one exponential, and no inf / inf at either end
  WAN_BOTH float operator()(float x) const {
    const float z = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return x / (1.0f + expf(-2.0f * z));
  }
};

struct Silu {
  WAN_BOTH float operator()(float x) const { return x / (1.0f + expf(-x)); }
};

// out = activation(gate) * up for the vector at `first` of `length` values.
template <bool ALIGNED, typename Activation, typename T>
WAN_BOTH void gate_vector(const T* gate, const T* up, T* out, int64_t first, int64_t length) {
  Vector<T> gates = load<ALIGNED>(gate, first, length);
  const Vector<T> ups = load<ALIGNED>(up, first, length);
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    gates.at[i] = rounded<T>(Activation()(to_float(gates.at[i])) * to_float(ups.at[i]));
  }
  store<ALIGNED>(gates, out, first, length);
}

}  // namespace wan

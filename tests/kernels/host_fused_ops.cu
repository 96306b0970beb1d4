// Runs the arithmetic of fused_ops.cuh on the host: a block of threads is a block of real threads that meet at a
// barrier. Built and called by test_fused_cuda.py.

#include "fused_ops.cuh"

#include <barrier>
#include <thread>
#include <vector>

namespace {

using namespace wan;

struct HostBlock {
  int place;
  std::vector<float>& sums;
  std::barrier<>& meet;

  int index() const { return place; }
  int count() const { return static_cast<int>(sums.size()); }

  float sum(float value) {
    sums[place] = value;
    meet.arrive_and_wait();
    float total = 0.0f;
    for (float part : sums) total += part;
    return total;
  }
};

template <int KEPT, bool ALIGNED, typename T>
void rms_norm(const void* x, const void* weight, void* out, int rows, int width, float eps, int num_threads) {
  for (int row = 0; row < rows; ++row) {
    const int64_t start = static_cast<int64_t>(row) * width;
    std::vector<float> sums(num_threads);
    std::barrier<> meet(num_threads);
    std::vector<std::jthread> threads;
    for (int place = 0; place < num_threads; ++place) {
      threads.emplace_back([&, place] {
        HostBlock block{place, sums, meet};
        rms_norm_row<KEPT, ALIGNED>(block, static_cast<const T*>(x) + start, static_cast<const T*>(weight),
                                    static_cast<T*>(out) + start, width, eps);
      });
    }
  }
}

template <bool ALIGNED, typename Activation, typename T>
void gated(const void* gate, const void* up, void* out, int64_t length) {
  for (int64_t first = 0; first < length; first += VECTOR) {
    gate_vector<ALIGNED, Activation>(static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(out),
                                     first, length);
  }
}

template <typename T>
auto rms_norm_of(int kept, int is_aligned) {
  if (kept == 1) return is_aligned ? rms_norm<1, true, T> : rms_norm<1, false, T>;
  if (kept == 2) return is_aligned ? rms_norm<2, true, T> : rms_norm<2, false, T>;
  return is_aligned ? rms_norm<4, true, T> : rms_norm<4, false, T>;
}

template <bool ALIGNED>
auto gated_of(int is_half, int is_silu) {
  if (is_half) return is_silu ? gated<ALIGNED, Silu, __half> : gated<ALIGNED, Gelu, __half>;
  return is_silu ? gated<ALIGNED, Silu, __nv_bfloat16> : gated<ALIGNED, Gelu, __nv_bfloat16>;
}

}  // namespace

extern "C" void host_rms_norm(const void* x, const void* weight, void* out, int rows, int width, float eps, int is_half,
                              int kept, int is_aligned, int num_threads) {
  auto run = is_half ? rms_norm_of<__half>(kept, is_aligned) : rms_norm_of<__nv_bfloat16>(kept, is_aligned);
  run(x, weight, out, rows, width, eps, num_threads);
}

extern "C" void host_gated(const void* gate, const void* up, void* out, int64_t length, int is_half, int is_silu,
                           int is_aligned) {
  (is_aligned ? gated_of<true>(is_half, is_silu) : gated_of<false>(is_half, is_silu))(gate, up, out, length);
}

// RMS norm, SiLU and the causal convolution's two zero frames in one pass over memory, forward and backward.
// Rows are the channels of one pixel (bfloat16, channels last); the output has `pad` more leading rows per sample.
#include <cmath>
#include <cstdint>
#include <cstring>

static inline float widen(uint16_t v) { uint32_t u = uint32_t(v) << 16; float f; std::memcpy(&f, &u, 4); return f; }
static inline uint16_t narrow(float f) {
    uint32_t u; std::memcpy(&u, &f, 4);
    return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

template <int C>
static void forward(const uint16_t* x, const float* gamma, uint16_t* y, long samples, long rows, long pad) {
    for (long b = 0; b < samples; ++b) {
        uint16_t* out = y + b * (rows + pad) * C;
        std::memset(out, 0, pad * C * 2);
        out += pad * C;
        const uint16_t* in = x + b * rows * C;
        for (long n = 0; n < rows; ++n, in += C, out += C) {
            float v[C], sum = 0;
            for (int c = 0; c < C; ++c) { v[c] = widen(in[c]); sum += v[c] * v[c]; }
            const float r = 1.0f / std::sqrt(sum / C + 1e-12f);
            for (int c = 0; c < C; ++c) {
                const float h = v[c] * r * gamma[c];
                out[c] = narrow(h / (1.0f + std::exp(-h)));
            }
        }
    }
}

template <int C>
static void backward(const uint16_t* x, const float* gamma, const uint16_t* dy, uint16_t* dx, float* dgamma, long samples,
                     long rows, long pad) {
    float total[C] = {};
    for (long b = 0; b < samples; ++b) {
        const uint16_t* grad = dy + (b * (rows + pad) + pad) * C;
        const uint16_t* in = x + b * rows * C;
        uint16_t* out = dx + b * rows * C;
        for (long n = 0; n < rows; ++n, in += C, out += C, grad += C) {
            float v[C], d[C], sum = 0, dot = 0;
            for (int c = 0; c < C; ++c) { v[c] = widen(in[c]); sum += v[c] * v[c]; }
            const float r = 1.0f / std::sqrt(sum / C + 1e-12f);
            for (int c = 0; c < C; ++c) {
                const float u = v[c] * r, h = u * gamma[c];
                const float s = 1.0f / (1.0f + std::exp(-h));
                const float dh = widen(grad[c]) * s * (1.0f + h * (1.0f - s));
                total[c] += dh * u;
                d[c] = dh * gamma[c];
                dot += d[c] * v[c];
            }
            const float k = dot * r * r / C;
            for (int c = 0; c < C; ++c) out[c] = narrow(r * (d[c] - k * v[c]));
        }
    }
    for (int c = 0; c < C; ++c) dgamma[c] = total[c];
}

#define FOR_WIDTH(call) \
    switch (width) {    \
        case 8: call(8); return 0;   \
        case 12: call(12); return 0; \
        case 16: call(16); return 0; \
        case 24: call(24); return 0; \
        case 32: call(32); return 0; \
        case 48: call(48); return 0; \
        case 64: call(64); return 0; \
        default: return 1;           \
    }

extern "C" int norm_silu_forward(const uint16_t* x, const float* gamma, uint16_t* y, long samples, long rows, long pad, int width) {
#define CALL(C) forward<C>(x, gamma, y, samples, rows, pad)
    FOR_WIDTH(CALL)
#undef CALL
}

extern "C" int norm_silu_backward(const uint16_t* x, const float* gamma, const uint16_t* dy, uint16_t* dx, float* dgamma,
                                  long samples, long rows, long pad, int width) {
#define CALL(C) backward<C>(x, gamma, dy, dx, dgamma, samples, rows, pad)
    FOR_WIDTH(CALL)
#undef CALL
}

// The two elementwise-and-recurrent parts of a Mamba mixer on the CPU, forward and backward, in float32.
//
// All arrays are contiguous: [batch, length, channels], or [batch, length, STATES] for B and C. Channels go in groups of
// WIDTH, one vector register; each thread takes whole sequences, so that no two threads add to one number.
// Built by fast_mamba.py with -DSTATES=...; see there for what the functions compute.

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

constexpr int WIDTH = 16;
constexpr int N = STATES;
constexpr int TAPS = 4;
#define LANES _Pragma("omp simd") for (int i = 0; i < WIDTH; i++)

static inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
static inline float softplus(float x) { return x > 15.0f ? x : logf(1.0f + expf(x)); }

extern "C" {

// u = silu(conv(x)), a causal convolution of TAPS taps per channel.
void conv_forward(const float* x, const float* weight, const float* bias, float* u, int batch, int length, int channels) {
#pragma omp parallel for
    for (int b = 0; b < batch; b++)
        for (int t = 0; t < length; t++) {
            const long row = ((long)b * length + t) * channels;
#pragma omp simd
            for (int d = 0; d < channels; d++) {
                float c = bias[d];
                for (int k = 0; k < TAPS; k++)
                    if (t + k >= TAPS - 1) c += weight[k * channels + d] * x[row + d + (long)(k - TAPS + 1) * channels];
                u[row + d] = c * sigmoid(c);
            }
        }
}

// Gradients of conv_forward; d_weight is [batch, TAPS, channels], d_bias is [batch, channels], both zero at first.
void conv_backward(const float* x, const float* weight, const float* bias, const float* d_u, float* d_x,
                   float* d_weight, float* d_bias, int batch, int length, int channels) {
#pragma omp parallel for
    for (int b = 0; b < batch; b++) {
        std::vector<float> d_c(channels);
        float* dw = d_weight + (long)b * TAPS * channels;
        float* db = d_bias + (long)b * channels;
        memset(d_x + (long)b * length * channels, 0, sizeof(float) * length * channels);
        for (int t = 0; t < length; t++) {
            const long row = ((long)b * length + t) * channels;
#pragma omp simd
            for (int d = 0; d < channels; d++) {
                float c = bias[d];
                for (int k = 0; k < TAPS; k++)
                    if (t + k >= TAPS - 1) c += weight[k * channels + d] * x[row + d + (long)(k - TAPS + 1) * channels];
                const float s = sigmoid(c);
                d_c[d] = d_u[row + d] * s * (1.0f + c * (1.0f - s));
                db[d] += d_c[d];
            }
            for (int k = 0; k < TAPS; k++)
                if (t + k >= TAPS - 1) {
                    const long source = row + (long)(k - TAPS + 1) * channels;
#pragma omp simd
                    for (int d = 0; d < channels; d++) {
                        d_x[source + d] += weight[k * channels + d] * d_c[d];
                        dw[k * channels + d] += x[source + d] * d_c[d];
                    }
                }
        }
    }
}

// delta = softplus(dt + bias); h_t = exp(delta A) h_{t-1} + delta B u; out = (C h + D u) silu(z). A is [STATES, channels].
void scan_forward(const float* dt, const float* bias, const float* u, const float* z, const float* A, const float* B,
                  const float* C, const float* D, float* out, int batch, int length, int channels) {
#pragma omp parallel for
    for (int b = 0; b < batch; b++)
        for (int d0 = 0; d0 < channels; d0 += WIDTH) {
            float h[N][WIDTH] = {}, delta[WIDTH], y[WIDTH];
            for (int t = 0; t < length; t++) {
                const long row = ((long)b * length + t) * channels + d0;
                const float* Bt = B + ((long)b * length + t) * N;
                const float* Ct = C + ((long)b * length + t) * N;
                LANES {
                    delta[i] = softplus(dt[row + i] + bias[d0 + i]);
                    y[i] = D[d0 + i] * u[row + i];
                }
                for (int n = 0; n < N; n++) LANES {
                    h[n][i] = expf(delta[i] * A[n * channels + d0 + i]) * h[n][i] + delta[i] * Bt[n] * u[row + i];
                    y[i] += Ct[n] * h[n][i];
                }
                LANES out[row + i] = y[i] * z[row + i] * sigmoid(z[row + i]);
            }
        }
}

// Gradients of scan_forward, whose states are computed again. d_A is [batch, STATES, channels], d_bias and d_D are
// [batch, channels]; d_B and d_C are zero at first.
void scan_backward(const float* dt, const float* bias, const float* u, const float* z, const float* A, const float* B,
                   const float* C, const float* D, const float* d_out, float* d_dt, float* d_bias, float* d_u, float* d_z,
                   float* d_A, float* d_B, float* d_C, float* d_D, int batch, int length, int channels) {
#pragma omp parallel for
    for (int b = 0; b < batch; b++) {
        std::vector<float> states((long)(length + 1) * N * WIDTH), decays((long)length * N * WIDTH), deltas((long)length * WIDTH);
        for (int d0 = 0; d0 < channels; d0 += WIDTH) {
            memset(states.data(), 0, sizeof(float) * N * WIDTH);
            for (int t = 0; t < length; t++) {
                const long row = ((long)b * length + t) * channels + d0;
                const float* Bt = B + ((long)b * length + t) * N;
                float* delta = &deltas[(long)t * WIDTH];
                LANES delta[i] = softplus(dt[row + i] + bias[d0 + i]);
                for (int n = 0; n < N; n++) {
                    const float* before = &states[((long)t * N + n) * WIDTH];
                    float* after = &states[((long)(t + 1) * N + n) * WIDTH];
                    float* decay = &decays[((long)t * N + n) * WIDTH];
                    LANES {
                        decay[i] = expf(delta[i] * A[n * channels + d0 + i]);
                        after[i] = decay[i] * before[i] + delta[i] * Bt[n] * u[row + i];
                    }
                }
            }
            float dh[N][WIDTH] = {}, dA[N][WIDTH] = {}, dbias[WIDTH] = {}, dD[WIDTH] = {};
            for (int t = length - 1; t >= 0; t--) {
                const long row = ((long)b * length + t) * channels + d0;
                const float* Bt = B + ((long)b * length + t) * N;
                const float* Ct = C + ((long)b * length + t) * N;
                float* dBt = d_B + ((long)b * length + t) * N;
                float* dCt = d_C + ((long)b * length + t) * N;
                const float* delta = &deltas[(long)t * WIDTH];
                float dy[WIDTH], y[WIDTH], ddelta[WIDTH], du[WIDTH];
                LANES {
                    const float s = sigmoid(z[row + i]);
                    dy[i] = d_out[row + i] * z[row + i] * s;
                    y[i] = D[d0 + i] * u[row + i];
                    dD[i] += dy[i] * u[row + i];
                    du[i] = dy[i] * D[d0 + i];
                    ddelta[i] = 0.0f;
                }
                for (int n = 0; n < N; n++) {
                    const float* before = &states[((long)t * N + n) * WIDTH];
                    const float* after = &states[((long)(t + 1) * N + n) * WIDTH];
                    const float* decay = &decays[((long)t * N + n) * WIDTH];
                    float to_B = 0.0f, to_C = 0.0f;
#pragma omp simd reduction(+ : to_B, to_C)
                    for (int i = 0; i < WIDTH; i++) {
                        y[i] += Ct[n] * after[i];
                        to_C += dy[i] * after[i];
                        dh[n][i] += dy[i] * Ct[n];
                        const float from_decay = dh[n][i] * before[i] * decay[i];
                        const float drive = dh[n][i] * u[row + i];
                        ddelta[i] += from_decay * A[n * channels + d0 + i] + drive * Bt[n];
                        dA[n][i] += from_decay * delta[i];
                        du[i] += dh[n][i] * delta[i] * Bt[n];
                        to_B += drive * delta[i];
                        dh[n][i] *= decay[i];
                    }
                    dBt[n] += to_B;
                    dCt[n] += to_C;
                }
                LANES {
                    const float s = sigmoid(z[row + i]);
                    d_z[row + i] = d_out[row + i] * y[i] * s * (1.0f + z[row + i] * (1.0f - s));
                    d_u[row + i] = du[i];
                    // The derivative of softplus is the sigmoid: 1 - exp(-delta).
                    const float back = ddelta[i] * (1.0f - expf(-delta[i]));
                    d_dt[row + i] = back;
                    dbias[i] += back;
                }
            }
            LANES {
                d_bias[(long)b * channels + d0 + i] = dbias[i];
                d_D[(long)b * channels + d0 + i] = dD[i];
            }
            for (int n = 0; n < N; n++) LANES d_A[((long)b * N + n) * channels + d0 + i] = dA[n][i];
        }
    }
}
}

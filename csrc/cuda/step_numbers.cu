// The numbers of a step that depend on its count or lie on the device: see numbers in optimizers.h, each in double and
// rounded once, and the streams' keys of random bits.
//
// One warp reads lr, the step, whether to skip it and the gradients' scale where they are, on the device: no host sync, and
// a captured graph follows all four. Bytes: 25 read, 52 written. Flops: 4·log2(step), in double.
#include "launch.h"
#include "optimizers.h"
#include "update.h"

namespace fastsae {
namespace {

__device__ double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent /= 2, base *= base)
    if (exponent % 2) result *= base;
  return result;
}

__global__ void __launch_bounds__(WARP, 1)
    step_numbers_kernel(const double* lr, const int64_t* step, const uint8_t* skip, const double* grad_scale, bool corrected,
                        double beta1, double beta2, double weight_decay, uint32_t seed, float* numbers, uint32_t* keys,
                        int streams) {
  const int i = threadIdx.x;
  if (i == 0) numbers[0] = static_cast<float>(corrected ? *lr / (1 - power(beta1, *step)) : *lr);
  if (i == 1) numbers[1] = static_cast<float>(1 / sqrt(1 - power(beta2, *step)));
  if (i == 2) numbers[2] = skip && *skip ? 0.f : 1.f;
  if (i == 3) numbers[3] = static_cast<float>(1 - *lr * weight_decay);
  if (i == 4) numbers[4] = grad_scale ? static_cast<float>(*grad_scale) : 1.f;
  if (i < streams) keys[i] = stream_key(seed, static_cast<uint32_t>(*step), i);
}

}  // namespace

void step_numbers(const Where& where, const Array& lr, const Array& step, const Maybe& skip, const Maybe& grad_scale,
                  int64_t rule, double beta1, double beta2, double weight_decay, int64_t seed, const Array& numbers,
                  const Array& keys) {
  fit("lr", lr, 1), fit("step", step, 1), fit("skip", skip, 1), fit("grad_scale", grad_scale, 1), fit("numbers", numbers, 5);
  fit("keys", keys, counted("keys", keys.rows));
  launch(where, "step_numbers", step_numbers_kernel, {dim3(1), dim3(WARP)}, lr.as<double>(), step.as<int64_t>(),
         pointer<uint8_t>(skip), pointer<double>(grad_scale), rule_of(rule) == Rule::adam, beta1, beta2, weight_decay,
         static_cast<uint32_t>(seed), numbers.as<float>(), keys.as<uint32_t>(), static_cast<int>(keys.rows));
}

}  // namespace fastsae

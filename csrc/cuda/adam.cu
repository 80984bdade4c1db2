// The numbers of a step that depend on its count: lr / (1-β₁ᵗ) and 1 / √(1-β₂ᵗ) in double, rounded once, and the streams'
// keys of random bits.
//
// One warp reads lr, the step and whether to skip it where they are, on the device: no host sync, and a captured graph
// follows all three. Bytes: 17 read, 44 written. Flops: 4·log2(step), in double.
#include "adam.h"
#include "launch.h"
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
    step_numbers_kernel(const double* lr, const int64_t* step, const uint8_t* skip, double beta1, double beta2,
                        uint32_t seed, float* numbers, uint32_t* keys, int streams) {
  const int i = threadIdx.x;
  if (i == 0) numbers[0] = static_cast<float>(*lr / (1 - power(beta1, *step)));
  if (i == 1) numbers[1] = static_cast<float>(1 / sqrt(1 - power(beta2, *step)));
  if (i == 2) numbers[2] = skip && *skip ? 0.f : 1.f;
  if (i < streams) keys[i] = stream_key(seed, static_cast<uint32_t>(*step), i);
}

}  // namespace

void step_numbers(const Where& where, const Array& lr, const Array& step, const Maybe& skip, double beta1, double beta2,
                  int64_t seed, const Array& numbers, const Array& keys) {
  fit("lr", lr, 1), fit("step", step, 1), fit("skip", skip, 1), fit("numbers", numbers, 3);
  fit("keys", keys, counted("keys", keys.rows));
  launch(where, "step_numbers", step_numbers_kernel, {dim3(1), dim3(WARP)}, lr.as<double>(), step.as<int64_t>(),
         pointer<uint8_t>(skip), beta1, beta2, static_cast<uint32_t>(seed), numbers.as<float>(), keys.as<uint32_t>(),
         static_cast<int>(keys.rows));
}

}  // namespace fastsae

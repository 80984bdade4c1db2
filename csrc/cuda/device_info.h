// What the binding has to know of devices, without CUDA's headers.
#pragma once
#include <string>
#include <tuple>

#include "ops.h"

namespace fastsae {

// How many devices there are, why there is none, and the versions of CUDA's runtime and driver (12040 is 12.4).
std::tuple<int, std::string, int, int> status();

// What the build has code for, in nvcc's names.
std::string architectures();

// Makes where.device current during its lifetime.
class OnDevice {
 public:
  explicit OnDevice(const Where& where);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;

 private:
  int before_;
};

}  // namespace fastsae

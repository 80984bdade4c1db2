// Devices: how many, with which driver, and which one is current.
#include "device_info.h"

#include "launch.h"

#ifndef FASTSAE_ARCHITECTURES
#define FASTSAE_ARCHITECTURES "none"
#endif

namespace fastsae {

std::string architectures() { return FASTSAE_ARCHITECTURES; }

#ifdef FASTSAE_EMULATED

std::tuple<int, std::string, int, int> status() { return {1, "", 0, 0}; }
OnDevice::OnDevice(const Where&) : before_(-1) {}
OnDevice::~OnDevice() = default;

#else

std::tuple<int, std::string, int, int> status() {
  int devices = 0, runtime = 0, driver = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  (void)cudaGetLastError();
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  if (error != cudaSuccess) return {0, cudaGetErrorString(error), runtime, driver};
  return {devices, devices ? "" : "CUDA sees no device", runtime, driver};
}

OnDevice::OnDevice(const Where& where) : before_(where.device) {
  check(cudaGetDevice(&before_), "no current device");
  if (before_ != where.device) check(cudaSetDevice(where.device), "the device cannot be made current");
}

OnDevice::~OnDevice() { (void)cudaSetDevice(before_); }

#endif

}  // namespace fastsae

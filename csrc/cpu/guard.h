// An exception must not leave an OpenMP region: it would end the process. A Guard carries the first one out.
#pragma once
#include <exception>

namespace fastsae {

class Guard {
 public:
  template <class F> void run(F f) {
    try {
      f();
    } catch (...) {
#pragma omp critical(fastsae_guard)
      if (!first_) first_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::exception_ptr first_;
};

}  // namespace fastsae

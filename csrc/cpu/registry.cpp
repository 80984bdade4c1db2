// This instruction set's table of ops.
#include "registry.h"

#define FASTSAE_TEXT_(x) #x
#define FASTSAE_TEXT(x) FASTSAE_TEXT_(x)

namespace fastsae::FASTSAE_ISA {

extern const Ops table;
const Ops table = {FASTSAE_TEXT(FASTSAE_ISA), decode, active_dot, active_outer, prepare_screen, encode_topk,
                   encode_above, encode_batch_topk, update_latents, digest};

}  // namespace fastsae::FASTSAE_ISA

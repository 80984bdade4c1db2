// first[i] = Σ_{j < i} pieces of owner j: where the pieces of each latent begin (pieces.h). A latent with more than `length`
// entries has ceil(entries / length) pieces, others have none.
//
// A thread counts one latent's, and a running sum (sort.h) adds them up. Bytes: 8·M read, 12·M more in both. Flops: none.
#include "launch.h"
#include "sort.h"
#include "update.h"

namespace fastsae {
namespace {

constexpr int THREADS = 256, BLOCKS = 8;

// counts[i + 1] = the pieces of latent i, counts[0] = 0.
__global__ void __launch_bounds__(THREADS, BLOCKS)
    count_pieces_kernel(const int64_t* starts, int32_t* counts, int64_t latents, int64_t length) {
  const int64_t i = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (i > latents) return;
  const int64_t entries = i ? starts[i] - starts[i - 1] : 0;
  counts[i] = entries > length ? static_cast<int32_t>(ceil_div(entries, length)) : 0;
}

}  // namespace

int64_t piece_workspace(const Where&, int64_t latents) {
  return static_cast<int64_t>(scan_bytes(counted("latents", latents) + 1));
}

void piece_starts(const Where& where, const Array& starts, int64_t length, const Array& workspace, const Array& first) {
  const int64_t latents = starts.rows - 1;
  fit("starts", starts, counted("latents", latents) + int64_t{1}), fit("first", first, starts.rows);
  in_range("the length of a piece", length, 1, std::numeric_limits<int64_t>::max());
  fit_workspace(workspace, scan_bytes(static_cast<int>(latents + 1)));
  launch(where, "count_pieces", count_pieces_kernel, {dim3(ceil_div(latents + 1, THREADS)), dim3(THREADS)},
         starts.as<int64_t>(), first.as<int32_t>(), latents, length);
  inclusive_sum(where, first.as<int32_t>(), static_cast<int>(latents + 1), workspace.data,
                workspace.size() * size_of(workspace.dtype));
}

}  // namespace fastsae

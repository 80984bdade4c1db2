// The occupied slots of a code, latent by latent (CSC); tokens ascend within a latent, slots within a token.
//
//   key of a slot = its latent, M where it is empty;  order = a stable sort of the keys (sort.h)
//   starts[i] = how many keys are below i;  rows, values = those of order[0], order[1], ...
//
// A thread has one slot, or one latent. A counting sort of our own would have to be stable too, which takes a histogram of
// M for each block of slots: at M = 131072 more bytes than the radix sort's passes over the ceil(log2(M + 1)) bits of the
// keys, 3 of 8 bits up to M = 2^24.
// Bytes: slots·(4 + sizeof(act) + 12) for the keys, 3·16·slots and 4·slots in the sort, slots·(4 + 4 + 8 + 4 + 16) for the
// entries, 8·M. Flops: none; log2(slots)·M + (ragged) log2(N)·slots comparisons. Workspace: 24 bytes a slot and CUB's.
#include "codes.h"
#include "launch.h"
#include "search.h"
#include "sort.h"
#include "update.h"

namespace fastsae {
namespace {

constexpr int THREADS = 256, BLOCKS = 8;

Shape one_each(int64_t n) { return {dim3(ceil_div(n, THREADS)), dim3(THREADS)}; }

// With values an act of 0 is empty in a ragged code too, since it has no gradient unless one is given (zeros).
template <class T>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    list_slots_kernel(Codes<T> codes, int32_t* keys, int32_t* rows, float* values, int64_t first_row, bool zeros) {
  const int64_t slot = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (slot >= codes.slots) return;
  bool occupied = codes.inside(slot);

  const int64_t row = codes.offsets ? count_up_to(codes.offsets, codes.n + 1, slot) - 1 : slot / codes.k;
  occupied = occupied && row >= 0 && row < codes.n;  // a slot past the last offset has no token
  if (!codes.offsets || values) {
    const float act = widen(codes.acts[slot]);
    occupied = occupied && (act != 0.f || (codes.offsets && zeros));
    if (values) values[slot] = act;
  }
  keys[slot] = static_cast<int32_t>(occupied ? codes.indices[slot] : codes.latents);
  rows[slot] = static_cast<int32_t>(first_row + row);
}

__global__ void __launch_bounds__(THREADS, BLOCKS)
    latent_starts_kernel(const int32_t* keys, int64_t* starts, int64_t slots, int64_t latents) {
  const int64_t i = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (i <= latents) starts[i] = count_up_to(keys, slots, static_cast<int32_t>(i - 1));
}

// rows, slots and values in the order of the latents; -1, -1 and 0 past the last entry.
__global__ void __launch_bounds__(THREADS, BLOCKS)
    entries_kernel(const int32_t* keys, const int32_t* order, const int32_t* rows, const float* values, int32_t* sorted_rows,
                   int64_t* sorted_slots, float* sorted_values, int64_t slots, int64_t latents) {
  const int64_t e = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (e >= slots) return;
  const bool live = keys[e] < latents;
  const int64_t slot = live ? order[e] : -1;
  sorted_rows[e] = live ? rows[slot] : -1;
  sorted_slots[e] = slot;
  if (values) sorted_values[e] = live ? values[slot] : 0.f;
}

int key_bits(int64_t latents) {  // of 0 .. latents
  int bits = 0;
  while (latents >> bits) ++bits;
  return bits;
}

}  // namespace

void list_slots(const Where& where, const Array& acts, const Array& indices, const Maybe& offsets, int64_t latents,
                const Array& keys, const Array& rows, const Maybe& values, int64_t first_row, bool zeros) {
  const int64_t tokens = fit_code(acts, indices, offsets), slots = counted("slots", acts.size());
  fit("keys", keys, slots), fit("rows", rows, slots), fit("values", values, slots), counted("latents", latents);
  counted("rows", first_row), counted("rows", first_row + tokens);
  by_dtype(acts.dtype, [&](auto t) {
    using T = decltype(t);
    launch(where, "list_slots", list_slots_kernel<T>, one_each(acts.size()), codes<T>(acts, indices, offsets, latents),
           keys.as<int32_t>(), rows.as<int32_t>(), pointer<float>(values), first_row, zeros);
  });
}

int64_t sort_workspace(const Where&, int64_t slots, int64_t latents) {
  return static_cast<int64_t>(sort_bytes(counted("slots", slots), key_bits(counted("latents", latents))));
}

void sort_slots(const Where& where, const Array& keys, const Array& rows, const Maybe& values, int64_t latents,
                const Array& numbers, const Array& sorted_keys, const Array& order, const Array& workspace,
                const Array& starts, const Array& sorted_rows, const Array& sorted_slots, const Maybe& sorted_values) {
  const int64_t slots = keys.rows;
  fit("keys", keys, counted("slots", slots)), fit("rows", rows, slots), fit("values", values, slots);
  fit("numbers", numbers, slots), fit("sorted_keys", sorted_keys, slots), fit("order", order, slots);
  fit("starts", starts, counted("latents", latents) + int64_t{1}), fit("sorted_rows", sorted_rows, slots);
  fit("sorted_slots", sorted_slots, slots), fit("sorted_values", sorted_values, slots);
  if (values.has_value() != sorted_values.has_value()) throw std::invalid_argument("values without sorted_values, or these alone");
  if (slots) fit_workspace(workspace, sort_bytes(static_cast<int>(slots), key_bits(latents)));
  if (slots)
    sort(where, {keys.as<int32_t>(), numbers.as<int32_t>(), sorted_keys.as<int32_t>(), order.as<int32_t>(),
                 static_cast<int>(slots), key_bits(latents)},
         workspace.data, workspace.size() * size_of(workspace.dtype));
  launch(where, "latent_starts", latent_starts_kernel, one_each(latents + 1), sorted_keys.as<int32_t>(), starts.as<int64_t>(),
         slots, latents);
  launch(where, "entries", entries_kernel, one_each(slots), sorted_keys.as<int32_t>(), order.as<int32_t>(),
         rows.as<int32_t>(), pointer<float>(values), sorted_rows.as<int32_t>(), sorted_slots.as<int64_t>(),
         pointer<float>(sorted_values), slots, latents);
}

}  // namespace fastsae

// Host functions of the CUDA encoders, as declarations.h has the others. Shapes: fastsae/backends/gpu/stages.py. `table`
// comes as (rows of all chunks, width); 0-d numbers (count, limit, listed, needed, least, prefix) are on the device.
#pragma once
#include "ops.h"

namespace fastsae {

// narrow.cu
void narrow_rows(const Where&, const Array& t, const Array& low, const Array& scale, const Array& norm,
                 const Array& residual);

// bar.cu. limit: columns that are sampled, every step-th of them.
void bars(const Where&, const Array& scores, const Array& table, const Array& bounds, const Array& count, const Array& out,
          int64_t chunks, int64_t step, int64_t limit, int64_t rank);

// survivors.cu. scores is flat: rows of N tokens that begin row_stride apart; bars may be of any size if per_latent.
void append(const Where&, const Array& scores, int64_t row_stride, const Array& table, const Array& bounds,
            const Array& bars, const Array& limit, const Array& values, const Array& places, const Array& counts,
            int64_t chunk, int64_t stride, int64_t base, bool per_latent, float roundoff);

// candidates.cu. chunks: of the table. Not exact: as if no score had an error.
void select(const Where&, const Array& values, const Array& places, const Array& counts, const Array& table,
            const Array& bounds, const Array& bars, const Maybe& rows, const Array& latents, const Array& scores,
            const Array& found, const Array& certified, int64_t k, int64_t chunks, bool exact, float roundoff);

// rescore.cu
void rescore(const Where&, const Array& x, const Array& W, const Array& b, const Maybe& gate, const Array& latents,
             const Array& counts, const Array& scores);

// top_k.cu
void top_k(const Where&, const Array& latents, const Array& scores, const Array& counts, const Array& certified,
           const Array& acts, const Array& indices, int64_t offset, int64_t last);

// exhaustive.cu. scratch (slots, positions) float: slots are the tokens of a batch; progress (3,) int32, for the kernels.
void exhaustive_top_k(const Where&, const Array& x, const Array& W, const Array& b, const Maybe& gate, const Maybe& rows,
                      const Array& count, const Array& tokens, const Array& listed, const Array& acts,
                      const Array& indices, int64_t offset, int64_t last, const Array& scratch, const Array& progress);

// ragged.cu
void count_listed(const Where&, const Array& latents, const Array& scores, const Array& found, const Array& thresholds,
                  bool per_latent, const Array& totals);
void emit_listed(const Where&, const Array& latents, const Array& scores, const Array& found, const Array& thresholds,
                 bool per_latent, const Array& offsets, const Array& acts, const Array& indices);
void every_latent(const Where&, const Array& x, const Array& W, const Array& b, const Array& tokens, const Array& listed,
                  const Array& acts, const Array& indices, const Maybe& totals, const Maybe& offsets,
                  const Maybe& thresholds, bool per_latent, const Maybe& least, const Maybe& ties);
void histogram(const Where&, const Array& x, const Array& W, const Array& b, const Array& needed, const Maybe& prefix,
               const Array& bins);

}  // namespace fastsae

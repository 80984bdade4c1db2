// The sizes that a kernel's pointers must have: checked by every host function, whoever calls it, before it launches
// anything. Array::as checks the dtypes (ops.h). What lies in the memory is on the device and cannot be looked at here: a
// kernel guards each number that it uses as an index.
#pragma once
#include <limits>

#include "ops.h"

namespace fastsae {

inline void fit(const char* what, const Array& a, int64_t rows, int64_t cols = 1) {
  if (a.rows == rows && a.cols == cols) return;
  const auto shape = [](int64_t r, int64_t c) { return "(" + std::to_string(r) + ", " + std::to_string(c) + ")"; };
  throw std::invalid_argument(std::string(what) + " has shape " + shape(a.rows, a.cols) + ", expected " + shape(rows, cols));
}
inline void fit(const char* what, const Maybe& a, int64_t rows, int64_t cols = 1) {
  if (a) fit(what, *a, rows, cols);
}

inline void in_range(const char* what, int64_t n, int64_t least, int64_t most) {
  if (n < least || n > most)
    throw std::invalid_argument(std::string(what) + " is " + std::to_string(n) + ", expected " + std::to_string(least) +
                                " to " + std::to_string(most));
}

// A number that a kernel counts in int32.
inline int counted(const char* what, int64_t n) {
  in_range(what, n, 0, std::numeric_limits<int32_t>::max());
  return static_cast<int>(n);
}

inline void fit_workspace(const Array& a, size_t bytes) {
  const int64_t there = a.size() * size_of(a.dtype);
  if (there < static_cast<int64_t>(bytes))
    throw std::invalid_argument("the workspace has " + std::to_string(there) + " bytes, expected " + std::to_string(bytes));
}

// A code of n tokens, fixed or ragged; its tokens.
inline int64_t fit_code(const Array& acts, const Array& indices, const Maybe& offsets) {
  fit("indices", indices, acts.rows, acts.cols);
  if (!offsets) return acts.rows;
  fit("acts", acts, acts.rows), fit("offsets", offsets, offsets->rows);
  in_range("the size of offsets", offsets->rows, 1, std::numeric_limits<int32_t>::max() + int64_t{1});
  return offsets->rows - 1;
}

// The pieces of as many owners, and the rows to add them up in.
inline void fit_pieces(const Maybe& first, int64_t owners, int64_t length, const Maybe& sums, int64_t cols) {
  if (first.has_value() != sums.has_value()) throw std::invalid_argument("pieces without rows for their sums, or rows alone");
  if (!first) return;
  fit("the pieces", first, owners + 1), fit("the sums of pieces", sums, sums->rows, cols);
  in_range("the length of a piece", length, 1, std::numeric_limits<int64_t>::max());
}

}  // namespace fastsae

// Products of bf16 matrices into fp32, which torch does not have on a CPU. They use oneDNN's kernels for a processor
// with matrix tiles (AMX), where they are many times as fast as products in fp32.
//
// Shapes: M rows; K columns of `left` and rows of `right`; N columns.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>

namespace creche::linear_ensemble_kl {

using at::Tensor;

constexpr int64_t ROWS = 256, COLUMNS = 128, DEPTH = 512;  // Of M, N, K in one call: 512 KiB, within a core's cache.

bool has_tiles() { return at::native::cpublas::could_pack(at::kBFloat16); }

// Returns right [K, N], which is bf16, in the kernel's layout, [⌈N / COLUMNS⌉, ⌈K / 2⌉, COLUMNS, 2]: in blocks of
// columns, with the numbers of two rows side by side. Numbers past the edges are 0.
Tensor tiled(const Tensor& right) {
  const int64_t K = right.size(0), N = right.size(1), pairs = (K + 1) / 2, blocks = (N + COLUMNS - 1) / COLUMNS;
  const int64_t down = right.stride(0), along = right.stride(1);
  Tensor result = at::empty({blocks, pairs, COLUMNS, 2}, right.options());
  const auto* from = static_cast<const uint16_t*>(right.const_data_ptr());
  auto* to = static_cast<uint32_t*>(result.mutable_data_ptr());
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const uint16_t* source = from + block * COLUMNS * along;
      uint32_t* target = to + block * pairs * COLUMNS;
      const int64_t width = std::min(COLUMNS, N - block * COLUMNS);
      if (width < COLUMNS) std::fill_n(target, pairs * COLUMNS, 0);
      if (along == 1) {
        for (int64_t pair = 0; pair < K / 2; ++pair) {
          const uint16_t *first = source + 2 * pair * down, *second = first + down;
          uint32_t* place = target + pair * COLUMNS;
          for (int64_t n = 0; n < width; ++n) place[n] = first[n] | static_cast<uint32_t>(second[n]) << 16;
        }
      } else {
        for (int64_t n = 0; n < width; ++n) {
          const uint16_t* column = source + n * along;
          for (int64_t pair = 0; pair < K / 2; ++pair) {
            target[pair * COLUMNS + n] =
                column[2 * pair * down] | static_cast<uint32_t>(column[(2 * pair + 1) * down]) << 16;
          }
        }
      }
      for (int64_t n = 0; K % 2 == 1 && n < COLUMNS; ++n) {
        target[(pairs - 1) * COLUMNS + n] = n < width ? source[(K - 1) * down + n * along] : 0;
      }
    }
  });
  return result;
}

// Writes left [M, K]·right to out [M, N], fp32, or adds it. `right` is in the layout of `tiled`, K is even, and the
// columns of left and out are adjacent.
void mm_tiled_(const Tensor& left, const Tensor& right, const Tensor& out, bool add) {
  const int64_t M = left.size(0), K = left.size(1), N = out.size(1), rows = (M + ROWS - 1) / ROWS;
  const int64_t blocks = right.size(0), pairs = right.size(1);
  const auto *a = left.const_data_ptr<at::BFloat16>(), *b = right.const_data_ptr<at::BFloat16>();
  auto* c = out.mutable_data_ptr<float>();
  at::parallel_for(0, rows * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t row = at / blocks * ROWS, column = at % blocks * COLUMNS;
      for (int64_t k = 0; k < K; k += DEPTH) {
        at::native::cpublas::brgemm(
            std::min(ROWS, M - row), std::min(COLUMNS, N - column), std::min(DEPTH, K - k), left.stride(0), COLUMNS,
            out.stride(0), add || k > 0, a + row * left.stride(0) + k, b + (at % blocks * pairs + k / 2) * COLUMNS * 2,
            c + row * out.stride(0) + column);
      }
    }
    at::native::cpublas::brgemm_release();
  });
}

TORCH_LIBRARY_FRAGMENT(creche_native, library) {
  library.def("has_tiles() -> bool", has_tiles);
  library.def("tiled(Tensor right) -> Tensor", tiled);
  library.def("mm_tiled_(Tensor left, Tensor right, Tensor(a!) out, bool add) -> ()", mm_tiled_);
}

}  // namespace creche::linear_ensemble_kl

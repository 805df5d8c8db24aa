// `attention` on a CPU, causal or not.
//
// Shapes: B sequences, L positions, H query heads, G key and value heads, D width of a head.
//
// A head multiplies BLOCK queries at a time with all the keys that they see. Their scores, BLOCK × L, stay in the cache.
// So a row's maximum is known before its first exponential, and a causal row costs only what it sees. The backward pass
// computes the scores again (Dao et al. 2022, algorithm 4, in one pass).
//
// torch's own kernel also cuts the keys, into matrix products too small for a BLAS. Here they are register tiles.

#include <c10/util/Unroll.h>

#include <cstring>
#include <memory>
#include <utility>

#include "../../native/vector.h"

namespace creche::attention {

using at::Tensor;

constexpr int64_t BLOCK = 32;       // Queries.
constexpr int64_t CACHE = 1 << 20;  // Bytes of one task.
// Rows of a register tile of two or three vectors: 32 registers with AVX-512, 16 without.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int ROWS = 8;
#else
constexpr int ROWS = 4;
#endif
static_assert(BLOCK % ROWS == 0);

// A matrix in a task's own memory. `down` and `right` are its strides.
template <class A>
struct Matrix {
  const A* at;
  int64_t down, right;
};

// The compiler keeps an array of these in registers, but an array of Vectorized on the stack.
template <class A>
struct Register {
  typedef A type __attribute__((vector_size(sizeof(Vec<A>))));
};

// Computes c = a·b, or c += a·b, for ROWS rows and VECTORS vectors of columns.
template <class A, int VECTORS, bool ADD>
inline void tile(int64_t depth, Matrix<A> a, const A* b, int64_t b_stride, A* c, int64_t c_stride) {
  using R = typename Register<A>::type;
  R sums[ROWS * VECTORS], right[VECTORS];
  const auto each = c10::ForcedUnroll<ROWS * VECTORS>{};
  const auto place = [&](auto n) { return c + n / VECTORS * c_stride + n % VECTORS * Vec<A>::size(); };
  each([&](auto n) { sums[n] = R{}; });
  for (int64_t k = 0; k < depth; ++k) {
    each([&](auto n) {
      constexpr int i = n / VECTORS, j = n % VECTORS;
      if constexpr (i == 0) std::memcpy(&right[j], b + k * b_stride + j * Vec<A>::size(), sizeof(R));
      sums[n] += a.at[i * a.down + k * a.right] * right[j];
    });
  }
  each([&](auto n) {
    if constexpr (ADD) {
      R before;
      std::memcpy(&before, place(n), sizeof(R));
      sums[n] += before;
    }
    std::memcpy(place(n), &sums[n], sizeof(R));
  });
}

// Computes c = a·b, or c += a·b. `rows` is a multiple of ROWS, and `columns` of the vector's size.
template <class A, bool ADD>
void multiply(
    int64_t rows, int64_t columns, int64_t depth, Matrix<A> a, const A* b, int64_t b_stride, A* c, int64_t c_stride) {
  constexpr int64_t width = Vec<A>::size();
  for (int64_t at = 0; at < columns;) {
    const int64_t vectors = (columns - at) / width;
    for (int64_t i = 0; i < rows; i += ROWS) {
      const Matrix<A> from{a.at + i * a.down, a.down, a.right};
      A* to = c + i * c_stride + at;
      if (vectors == 1) {
        tile<A, 1, ADD>(depth, from, b + at, b_stride, to, c_stride);
      } else if (vectors == 3) {
        tile<A, 3, ADD>(depth, from, b + at, b_stride, to, c_stride);
      } else {
        tile<A, 2, ADD>(depth, from, b + at, b_stride, to, c_stride);
      }
    }
    at += width * (vectors == 3 ? 3 : std::min<int64_t>(vectors, 2));
  }
}

// The sizes of one call. A task's matrices are padded with zeros to whole vectors and tiles.
struct Sizes {
  int64_t B, L, H, G, D, group, padded_L, padded_D, row, heads, tasks;
  bool causal;
  double scale;

  // A key head needs `of_key` matrices, and each of its query heads `of_query`.
  Sizes(const Tensor& q, const Tensor& k, bool causal, int64_t width, int64_t of_key, int64_t of_query)
      : B(q.size(0)), L(q.size(1)), H(q.size(2)), G(k.size(2)), D(q.size(3)), group(H / G),
        padded_L(at::divup(L, std::max<int64_t>(width, ROWS)) * std::max<int64_t>(width, ROWS)),
        padded_D(at::divup(D, width) * width), row(padded_L + width), causal(causal),
        scale(1 / std::sqrt(static_cast<double>(D))) {
    // A task takes as many key heads as the cache holds, so that it reads and writes whole rows of memory, but it leaves
    // work for all threads.
    const int64_t bytes = (of_key + group * of_query) * matrix() * sizeof(float);
    heads = std::clamp<int64_t>(std::min(CACHE / bytes, B * G / (2 * at::get_num_threads())), 1, G);
    tasks = at::divup(G, heads);
  }

  // `row` is the stride of scores and of transposed keys and values. A power of 2 would crowd a few lines of the cache.
  int64_t matrix() const { return row * padded_D; }
  int64_t seen_by(int64_t query) const { return causal ? query + 1 : L; }
};

// The memory of one thread. It begins as zeros, so that padding is 0.
template <class A>
struct Scratch {
  std::unique_ptr<A[]> memory;
  A* next;

  explicit Scratch(int64_t elements) : memory(new A[elements]()), next(memory.get()) {}

  A* take(int64_t elements) { return std::exchange(next, next + elements); }
};

// Copies heads `first` to `last` of x [B, L, heads, D], times `factor`, to [heads, padded_L, padded_D].
template <class T>
void pack(
    const Tensor& x, int64_t b, int64_t first, int64_t last, const Sizes& sizes, Wide<T>* to, Wide<T> factor = 1) {
  const T* from = x.const_data_ptr<T>() + b * x.stride(0);
  const int64_t along = x.stride(1), across = x.stride(2);
  for (int64_t l = 0; l < sizes.L; ++l) {
    for (int64_t head = first; head < last; ++head) {
      const T* row = from + l * along + head * across;
      Wide<T>* out = to + (head - first) * sizes.matrix() + l * sizes.padded_D;
      for_each_vector<Wide<T>>(
          sizes.D, [&](int64_t d, auto count) { (load(row + d, count) * Vec<Wide<T>>(factor)).store(out + d); });
    }
  }
}

// Copies in the other direction.
template <class T>
void unpack(
    const Wide<T>* from, const Tensor& x, int64_t b, int64_t first, int64_t last, const Sizes& sizes,
    Wide<T> factor = 1) {
  T* to = x.data_ptr<T>() + b * x.stride(0);
  const int64_t along = x.stride(1), across = x.stride(2);
  for (int64_t l = 0; l < sizes.L; ++l) {
    for (int64_t head = first; head < last; ++head) {
      T* row = to + l * along + head * across;
      const Wide<T>* in = from + (head - first) * sizes.matrix() + l * sizes.padded_D;
      for_each_vector<Wide<T>>(sizes.D, [&](int64_t d, auto count) {
        store(row + d, Vec<Wide<T>>::loadu(in + d) * Vec<Wide<T>>(factor), count);
      });
    }
  }
}

// Transposes [padded_L, padded_D] to [padded_D, row].
template <class A>
void transpose(const A* from, const Sizes& sizes, A* to) {
  constexpr int step = Vec<A>::size();
  for (int64_t l = 0; l < sizes.padded_L; l += step) {
    for (int64_t d = 0; d < sizes.padded_D; d += step) {
      at::vec::transpose_mxn<A, step, step>(
          from + l * sizes.padded_D + d, sizes.padded_D, to + d * sizes.row + l, sizes.row);
    }
  }
}

// Replaces a row of scores by weights that are not divided yet, 0 from `seen` to `padded`. Returns the log-sum-exp.
template <class A>
A exponentiate_row(A* row, int64_t seen, int64_t padded, A* divisor) {
  using V = Vec<A>;
  V most(-std::numeric_limits<A>::infinity());
  for_each_vector<A>(seen, [&](int64_t j, auto count) {
    most = larger<A>(V::set(most, V::loadu(row + j), count), most);
  });
  const A top = at::vec::vec_reduce_all<A>([](V& a, V& b) { return larger<A>(a, b); }, most);
  V total(A(0));
  for_each_vector<A>(seen, [&](int64_t j, auto count) {
    const V weight = V::set(V(A(0)), exponential(V::loadu(row + j) - V(top)), count);
    total += weight;
    weight.store(row + j);
  });
  const int64_t end = at::divup(seen, V::size()) * V::size();
  std::fill(row + end, row + padded, A(0));
  *divisor = sum<A>(total);
  return top + std::log(*divisor);
}

// Replaces the scaled queries of a head by their weighted sums of the values.
template <class A>
void attend(A* Q, const A* keys_across, const A* V, const Sizes& sizes, A* scores, A* log_sums) {
  const int64_t PD = sizes.padded_D;
  for (int64_t first = 0; first < sizes.L; first += BLOCK) {
    const int64_t last = std::min(first + BLOCK, sizes.L), seen = sizes.seen_by(last - 1);
    const int64_t rows = at::divup(last - first, ROWS) * ROWS;
    const int64_t padded = at::divup(seen, Vec<A>::size()) * Vec<A>::size();
    A* block = Q + first * PD;
    A divisors[BLOCK];
    multiply<A, false>(rows, padded, sizes.D, {block, PD, 1}, keys_across, sizes.row, scores, sizes.row);
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i - first;
      log_sums[i] = exponentiate_row<A>(scores + row * sizes.row, sizes.seen_by(i), padded, divisors + row);
    }
    multiply<A, false>(rows, PD, seen, {scores, sizes.row, 1}, V, PD, block, PD);
    for (int64_t row = 0; row < last - first; ++row) {
      const Vec<A> factor(A(1) / divisors[row]);
      for_each_vector<A>(PD, [&](int64_t d, auto) {
        (Vec<A>::loadu(block + row * PD + d) * factor).store(block + row * PD + d);
      });
    }
  }
}

// Writes the gradient of a head's scaled queries, and adds to the gradients of its key head.
template <class A>
void attend_backward(
    const A* Q, const A* K, const A* keys_across, const A* values_across, const A* dO, A* dQ, A* dK, A* dV,
    const Sizes& sizes, A* weights, A* d_scores, const A* log_sums) {
  const int64_t PD = sizes.padded_D;
  for (int64_t first = 0; first < sizes.L; first += BLOCK) {
    const int64_t last = std::min(first + BLOCK, sizes.L), seen = sizes.seen_by(last - 1);
    const int64_t rows = at::divup(last - first, ROWS) * ROWS, keys = at::divup(seen, ROWS) * ROWS;
    const int64_t padded = at::divup(seen, Vec<A>::size()) * Vec<A>::size();
    multiply<A, false>(rows, padded, sizes.D, {Q + first * PD, PD, 1}, keys_across, sizes.row, weights, sizes.row);
    multiply<A, false>(rows, padded, sizes.D, {dO + first * PD, PD, 1}, values_across, sizes.row, d_scores, sizes.row);
    for (int64_t i = first; i < last; ++i) {
      A *weight = weights + (i - first) * sizes.row, *d_score = d_scores + (i - first) * sizes.row;
      const Vec<A> log_sum(log_sums[i]), zero(A(0));
      Vec<A> along(A(0));
      for_each_vector<A>(sizes.seen_by(i), [&](int64_t j, auto count) {
        const Vec<A> p = Vec<A>::set(zero, exponential(Vec<A>::loadu(weight + j) - log_sum), count);
        along = at::vec::fmadd(p, Vec<A>::set(zero, Vec<A>::loadu(d_score + j), count), along);
        p.store(weight + j);
      });
      // Unlike in Dao et al. 2022, the mean is not computed from the output: so where one weight is 1, the difference
      // below is exactly 0.
      const Vec<A> mean(sum<A>(along));
      for_each_vector<A>(sizes.seen_by(i), [&](int64_t j, auto count) {
        const Vec<A> d = Vec<A>::loadu(weight + j) * (Vec<A>::loadu(d_score + j) - mean);
        Vec<A>::set(zero, d, count).store(d_score + j);
      });
      const int64_t whole = at::divup(sizes.seen_by(i), Vec<A>::size()) * Vec<A>::size();
      std::fill(weight + whole, weight + padded, A(0));
      std::fill(d_score + whole, d_score + padded, A(0));
    }
    multiply<A, false>(rows, PD, seen, {d_scores, sizes.row, 1}, K, PD, dQ + first * PD, PD);
    multiply<A, true>(keys, PD, last - first, {d_scores, 1, sizes.row}, Q + first * PD, PD, dK, PD);
    multiply<A, true>(keys, PD, last - first, {weights, 1, sizes.row}, dO + first * PD, PD, dV, PD);
  }
}

Tensor with_adjacent_columns(const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

struct Attention : torch::autograd::Function<Attention> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& q_, const Tensor& k_, const Tensor& v_, bool causal) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor q = with_adjacent_columns(q_), k = with_adjacent_columns(k_), v = with_adjacent_columns(v_);
    const Tensor out = make(q.sizes(), q.options());
    const at::ScalarType wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const Tensor lse = make({q.size(0), q.size(2), q.size(1)}, q.options().dtype(wide));  // Of each row of scores.
    with_storage(q.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using A = Wide<T>;
      const Sizes sizes(q, k, causal, Vec<A>::size(), 2, 1);
      const int64_t M = sizes.matrix(), group = sizes.group;
      at::parallel_for(0, sizes.B * sizes.tasks, 1, [&](int64_t begin, int64_t end) {
        Scratch<A> scratch(M * (sizes.heads * (2 + group) + 1) + BLOCK * sizes.row);
        A *K = scratch.take(sizes.heads * M), *V = scratch.take(sizes.heads * M);
        A *Q = scratch.take(sizes.heads * group * M), *keys_across = scratch.take(M);
        A* scores = scratch.take(BLOCK * sizes.row);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t b = task / sizes.tasks, from = task % sizes.tasks * sizes.heads;
          const int64_t to = std::min(from + sizes.heads, sizes.G);
          pack<T>(k, b, from, to, sizes, K);
          pack<T>(v, b, from, to, sizes, V);
          pack<T>(q, b, from * group, to * group, sizes, Q, sizes.scale);
          for (int64_t g = 0; g < to - from; ++g) {
            transpose(K + g * M, sizes, keys_across);
            for (int64_t h = g * group; h < (g + 1) * group; ++h) {
              A* log_sums = lse.data_ptr<A>() + (b * sizes.H + from * group + h) * sizes.L;
              attend<A>(Q + h * M, keys_across, V + g * M, sizes, scores, log_sums);
            }
          }
          unpack<T>(Q, out, b, from * group, to * group, sizes);
        }
      });
    });
    ctx->save_for_backward({q_, k_, v_, lse});
    ctx->saved_data["causal"] = causal;
    return out;
  }

  static Tensors backward(AutogradContext* ctx, Tensors output_gradients) {
    check_once("attention");
    const auto saved = ctx->get_saved_variables();
    const Tensor q = with_adjacent_columns(saved[0]), k = with_adjacent_columns(saved[1]);
    const Tensor v = with_adjacent_columns(saved[2]), d_out = with_adjacent_columns(output_gradients[0]);
    const Tensor d_q = make(q.sizes(), q.options()), d_k = make(k.sizes(), k.options());
    const Tensor d_v = make(v.sizes(), v.options()), lse = saved[3];
    const bool causal = ctx->saved_data["causal"].toBool();
    with_storage(q.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using A = Wide<T>;
      const Sizes sizes(q, k, causal, Vec<A>::size(), 4, 3);
      const int64_t M = sizes.matrix(), group = sizes.group;
      at::parallel_for(0, sizes.B * sizes.tasks, 1, [&](int64_t begin, int64_t end) {
        Scratch<A> scratch(M * (sizes.heads * (4 + 3 * group) + 2) + 2 * BLOCK * sizes.row);
        A *K = scratch.take(sizes.heads * M), *V = scratch.take(sizes.heads * M);
        A *dK = scratch.take(sizes.heads * M), *dV = scratch.take(sizes.heads * M);
        A *Q = scratch.take(sizes.heads * group * M), *dQ = scratch.take(sizes.heads * group * M);
        A *dO = scratch.take(sizes.heads * group * M), *keys_across = scratch.take(M), *values_across = scratch.take(M);
        A *weights = scratch.take(BLOCK * sizes.row), *d_scores = scratch.take(BLOCK * sizes.row);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t b = task / sizes.tasks, from = task % sizes.tasks * sizes.heads;
          const int64_t to = std::min(from + sizes.heads, sizes.G);
          pack<T>(k, b, from, to, sizes, K);
          pack<T>(v, b, from, to, sizes, V);
          pack<T>(q, b, from * group, to * group, sizes, Q, sizes.scale);
          pack<T>(d_out, b, from * group, to * group, sizes, dO);
          std::fill(dK, dK + sizes.heads * M, A(0));
          std::fill(dV, dV + sizes.heads * M, A(0));
          for (int64_t g = 0; g < to - from; ++g) {
            transpose(K + g * M, sizes, keys_across);
            transpose(V + g * M, sizes, values_across);
            for (int64_t h = g * group; h < (g + 1) * group; ++h) {
              attend_backward<A>(
                  Q + h * M, K + g * M, keys_across, values_across, dO + h * M, dQ + h * M, dK + g * M, dV + g * M,
                  sizes, weights, d_scores, lse.const_data_ptr<A>() + (b * sizes.H + from * group + h) * sizes.L);
            }
          }
          unpack<T>(dQ, d_q, b, from * group, to * group, sizes, sizes.scale);
          unpack<T>(dK, d_k, b, from, to, sizes);
          unpack<T>(dV, d_v, b, from, to, sizes);
        }
      });
    });
    return {d_q, d_k, d_v, Tensor()};
  }
};

Tensor differentiable(const Tensor& q, const Tensor& k, const Tensor& v, bool causal) {
  return Attention::apply(q, k, v, causal);
}

TORCH_LIBRARY_FRAGMENT(creche_native, library) {
  library.def("attention(Tensor q, Tensor k, Tensor v, bool causal) -> Tensor", differentiable);
}

}  // namespace creche::attention

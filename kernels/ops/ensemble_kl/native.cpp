// `ensemble_kl` on a CPU. A thread takes one row of all streams at a time, which stays in its core's cache.
//
// Shapes: N tokens, V vocabulary, S students, R streams. reference.py has the definitions, and the gradients' formulas
// at `_divergence_gradient`. A row takes three steps:
//   softmax      reads each logit once from memory, and writes probabilities to a buffer of this thread;
//   divergences  computes the row's sums Σ p·f(u) from logits and probabilities in cache;
//   gradients    computes the gradients from the same, and writes them once.
// Every row is computed alone and in one order, so results are bitwise repeatable with any number of threads.

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../../native/vector.h"

namespace creche::ensemble_kl {

using at::Tensor;
using at::vec::fmadd;

constexpr int MAX_STREAMS = 8;
constexpr int64_t BLOCK = 1024;  // Columns. A block of one stream is 4 KiB in fp32.
constexpr double EDGE = 0.25;    // Below this |u|, f is computed by its series.
constexpr double LOWEST = -1e38;   // Stands for −inf in fp32's range, so that differences of logits are never NaN.
constexpr double INFINITE = 1e12;  // A loss above this is infinite: losses of finite logits never come near it.

// 1 / k! for every k below 14.
template <class A>
constexpr auto SERIES = [] {
  std::array<A, 14> inverse{1};
  for (double k = 1, factorial = 1; k < 14; ++k) inverse[k] = static_cast<A>(1 / (factorial *= k));
  return inverse;
}();

enum Divergence : int64_t { FORWARD, REVERSE, JSD };

// [N, V] logits or gradients of any storage type.
struct Matrix {
  char* data = nullptr;
  at::ScalarType type = at::kFloat;
  int64_t row_stride = 0, column_stride = 0;

  template <class T>
  T* row(int64_t n) const {
    return reinterpret_cast<T*>(data) + n * row_stride;
  }
};

Matrix matrix(const Tensor& x) { return {static_cast<char*>(x.data_ptr()), x.scalar_type(), x.stride(0), x.stride(1)}; }

// The weight of a loss in each row: an element of a [..., N] tensor, or one value for all rows.
struct Weight {
  const double* data = nullptr;
  int64_t row_stride = 0;

  double operator[](int64_t n) const { return data[n * row_stride]; }
};

// What to compute. What a null pointer stands for is not computed.
struct Problem {
  int64_t tokens, vocabulary;
  int students, streams;
  double temperature;
  Divergence divergence;
  at::ScalarType arithmetic;
  bool with_kl;
  std::array<Matrix, MAX_STREAMS> logits{}, gradients{};
  const int64_t* targets = nullptr;  // [N]. Null: no cross-entropy.
  const bool *ce_rows = nullptr, *kl_rows = nullptr;  // [N]. kl_rows is null: all rows count.
  std::vector<Tensor> owned{};  // Keeps the memory that the pointers to inputs point at.
  double *ce = nullptr, *kl = nullptr;
  // d loss_i = ce_weight[i]·d CE_i + Σ_j kl_weight[i][j]·d KL_ij
  std::array<Weight, MAX_STREAMS> ce_weight{};
  std::array<std::array<Weight, MAX_STREAMS>, MAX_STREAMS> kl_weight{};
};

// Computes one row at a time for one thread, in the arithmetic type A.
template <class A>
class Row {
 public:
  explicit Row(const Problem& problem)
      : p_(problem),
        same_softmax_(problem.temperature == 1),
        wants_gradients_(
            std::any_of(problem.gradients.begin(), problem.gradients.end(), [](auto& g) { return g.data != nullptr; })),
        blocks_((problem.vocabulary + BLOCK - 1) / BLOCK),
        stride_(blocks_ * BLOCK),
        peaks_(blocks_),
        sums_(blocks_),
        storage_(new A[(problem.streams * 2 + problem.students) * stride_ + 64]) {
    A* at = storage_.get();
    at += (64 - reinterpret_cast<uintptr_t>(at) / sizeof(A) % 64) % 64;
    const auto take = [&] { return std::exchange(at, at + stride_); };
    for (int r = 0; r < p_.streams; ++r) {
      tempered_[r] = {take(), std::vector<A>(blocks_), 0};
      copies_[r] = take();
    }
    for (int i = 0; i < p_.students; ++i) plain_[i] = {take(), std::vector<A>(blocks_), 0};
  }

  void run(int64_t n) {
    const bool ce_row = p_.targets != nullptr && p_.ce_rows[n];
    const bool kl_row = p_.with_kl && (p_.kl_rows == nullptr || p_.kl_rows[n]);
    fetch(n, kl_row ? p_.streams : p_.students);
    for (int r = 0; kl_row && r < p_.streams; ++r) softmax(logits_[r], static_cast<A>(1 / p_.temperature), tempered_[r]);
    for (int i = 0; ce_row && i < p_.students; ++i) {
      if (!(kl_row && same_softmax_)) softmax(logits_[i], A(1), plain_[i]);
    }
    // At temperature 1 the tempered softmax is the plain one.
    const auto& plain = kl_row && same_softmax_ ? tempered_ : plain_;
    if (kl_row && (p_.kl != nullptr || (wants_gradients_ && p_.divergence != FORWARD))) divergences();
    write_losses(n, ce_row, kl_row, plain);
    if (!wants_gradients_) return;
    for (int i = 0; i < p_.students; ++i) {
      ce_factor_[i] = ce_row ? p_.ce_weight[i][n] : 0;
      for (int j = 0; j < p_.streams; ++j) kl_factor_[i][j] = kl_row && i != j ? p_.kl_weight[i][j][n] : 0;
    }
    for (int64_t b = 0; b < blocks_; ++b) gradients(n, b, plain, ce_row, kl_row);
  }

 private:
  using V = Vec<A>;

  // The probability of v is unscaled[v]·factor[block of v].
  struct Softmax {
    A* unscaled;
    std::vector<A> factor;
    double log_sum;  // The log-sum-exp, in nats.
  };

  int64_t width(int64_t block) const { return std::min(BLOCK, p_.vocabulary - block * BLOCK); }

  // Points logits_ at the row's logits if they are adjacent and of type A, and else at a copy that is.
  void fetch(int64_t n, int streams) {
    for (int r = 0; r < streams; ++r) {
      const Matrix& from = p_.logits[r];
      if (from.type == c10::CppTypeToScalarType<A>::value && from.column_stride == 1) {
        logits_[r] = from.template row<A>(n);
        next_[r] = from.template row<A>(std::min(n + 1, p_.tokens - 1));
        continue;
      }
      logits_[r] = next_[r] = copies_[r];
      with_storage(from.type, [&](auto element) {
        const auto* row = from.template row<decltype(element)>(n);
        if constexpr (std::is_same_v<Wide<decltype(element)>, A>) {
          if (from.column_stride == 1) {
            return for_each_vector<A>(
                p_.vocabulary, [&](int64_t v, auto count) { load(row + v, count).store(copies_[r] + v, count); });
          }
        }
        for (int64_t v = 0; v < p_.vocabulary; ++v) copies_[r][v] = static_cast<A>(row[v * from.column_stride]);
      });
    }
  }

  // Computes the softmax of t·z. The exponentials of a block are relative to the block's own maximum. So the row is read
  // from memory once, and its maximum is not needed before. Each block's factor is applied where its probabilities are
  // used.
  void softmax(const A* z, A t, Softmax& to) {
    constexpr int64_t STEP = 4 * V::size();
    for (int64_t b = 0; b < blocks_; ++b) {
      const A* from = z + b * BLOCK;
      const int64_t whole = width(b) / STEP * STEP;
      std::array<V, 4> peaks;
      peaks.fill(V(static_cast<A>(LOWEST)));
      for (int64_t at = 0; at < whole; at += STEP) {
        for (int k = 0; k < 4; ++k) peaks[k] = larger(V::loadu(from + at + k * V::size()), peaks[k]);
      }
      const V peak = larger(larger(peaks[0], peaks[1]), larger(peaks[2], peaks[3]));
      A highest = at::vec::vec_reduce_all<A>([](V& a, V& b) { return larger(a, b); }, peak);
      for (int64_t at = whole; at < width(b); ++at) highest = from[at] > highest ? from[at] : highest;
      peaks_[b] = highest;
      std::array<V, 4> totals;  // Four sums of fewer terms have smaller errors than one.
      totals.fill(V(0));
      const auto take = [&](int64_t at, auto size, V& total) {
        V x = V::loadu(from + at, size) - V(highest);
        __builtin_prefetch(from + BLOCK + at);
        if (t != 1) x = x * V(t);
        V e = exponential(x);
        if (size != V::size()) e = V::set(V(0), e, size);
        e.store(to.unscaled + b * BLOCK + at);
        total = total + e;
      };
      for (int64_t at = 0; at < whole; at += STEP) {
        for (int k = 0; k < 4; ++k) take(at + k * V::size(), std::integral_constant<int64_t, V::size()>{}, totals[k]);
      }
      for_each_vector<A>(width(b) - whole, [&](int64_t at, auto size) { take(whole + at, size, totals[0]); });
      sums_[b] = sum<A>((totals[0] + totals[1]) + (totals[2] + totals[3]));
    }
    double peak = LOWEST, total = 0;
    for (const A x : peaks_) peak = std::max(peak, double(x));
    for (int64_t b = 0; b < blocks_; ++b) total += sums_[b] * std::exp((peaks_[b] - peak) * t);
    for (int64_t b = 0; b < blocks_; ++b) to.factor[b] = static_cast<A>(std::exp((peaks_[b] - peak) * t) / total);
    to.log_sum = peak * t + std::log(total);
  }

  // Returns u = log p_i − log p_j of `size` columns from v on. Where both logits are −inf it is a number, not NaN. This
  // hides no NaN of the streams, because their probabilities have it too.
  template <class Size>
  V log_ratio(int i, int j, int64_t v, Size size) const {
    const V limit(static_cast<A>(-LOWEST));
    V difference = V::loadu(logits_[i] + v, size) - V::loadu(logits_[j] + v, size);
    if (!same_softmax_) difference = difference * V(static_cast<A>(1 / p_.temperature));
    difference = smaller(larger(difference, limit.neg()), limit);
    return difference - V(static_cast<A>(tempered_[i].log_sum - tempered_[j].log_sum));
  }

  // Row sums of p·f(u), where u = log p − log q and f(u) = u − 1 + e^{−u}, and of q·f(−u) if both directions are wanted.
  // With c = u clamped to ±EDGE, p·f(u) = p·(f(c) + u − c) + (q − p·e^{−c}). The last term is 0 within the edges. Beyond
  // them its sign is known, which gives the two clamped sums `above` and `below`: it needs no branch and no exponential.
  struct KL {
    V p_terms{0}, q_terms{0}, above{0}, below{0};

    template <bool both_directions>
    void add(V u, V p, V q) {
      const V edge(static_cast<A>(EDGE)), grow(static_cast<A>(std::exp(EDGE))), zero(0);
      const V c = smaller(larger(u, edge.neg()), edge);
      const V square = c * c;
      // f(c) = even + odd and f(−c) = even − odd, where even = cosh c − 1 and odd = c − sinh c. Their series are
      // truncated at 1e-8 of f in fp32 and at 1e-17 in float64.
      constexpr int half_order = std::is_same_v<A, float> ? 3 : 6;
      V even(SERIES<A>[2 * half_order]), odd(-SERIES<A>[2 * half_order + 1]);
      for (int k = half_order - 1; k >= 1; --k) {
        even = fmadd(even, square, V(SERIES<A>[2 * k]));
        odd = fmadd(odd, square, V(-SERIES<A>[2 * k + 1]));
      }
      if constexpr (both_directions) {
        even = even * square;
        odd = fmadd(odd, c * square, u - c);
        p_terms = fmadd(p, even + odd, p_terms);
        q_terms = fmadd(q, even - odd, q_terms);
      } else {
        p_terms = fmadd(p, fmadd(fmadd(odd, c, even), square, u - c), p_terms);
      }
      above = above + larger(p - q * grow, zero);
      below = below + larger(q - p * grow, zero);
    }

    double p_to_q() const { return sum<A>(p_terms) + double(sum<A>(below)) - std::exp(-EDGE) * sum<A>(above); }
    double q_to_p() const { return sum<A>(q_terms) + double(sum<A>(above)) - std::exp(-EDGE) * sum<A>(below); }
  };

  // Returns log p − log m and log q − log m, m = (p + q) / 2, given u = log p − log q.
  static std::pair<V, V> log_ratios_to_mean(V u) {
    const V larger = ((V(0) - u.abs()).expm1() * V(A(0.5))).log1p().neg();  // The ratio of the larger of p and q.
    const V zero(0);
    return {larger + at::vec::minimum(u, zero), larger - at::vec::maximum(u, zero)};
  }

  // Computes, for every pair with a student, the KL divergences that a student's loss needs: between the two, or from
  // the mean of both in the Jensen-Shannon divergence.
  void divergences() {
    for (int i = 0; i < p_.students; ++i) {
      for (int j = i + 1; j < p_.streams; ++j) {
        double p_to_q = 0, q_to_p = 0;
        for (int64_t b = 0; b < blocks_; ++b) {
          KL of_p, of_q;
          for_each_pair(i, j, b, [&](V u, V p, V q) {
            if (p_.divergence == JSD) {
              const V mean = (p + q) * V(A(0.5));
              const auto [p_to_mean, q_to_mean] = log_ratios_to_mean(u);
              of_p.template add<false>(p_to_mean, p, mean);
              of_q.template add<false>(q_to_mean, q, mean);
            } else if (j < p_.students) {
              of_p.template add<true>(u, p, q);
            } else if (p_.divergence == FORWARD) {
              of_q.template add<false>(u.neg(), q, p);
            } else {
              of_p.template add<false>(u, p, q);
            }
          });
          p_to_q += of_p.p_to_q();
          q_to_p += p_.divergence != JSD && j < p_.students ? of_p.q_to_p() : of_q.p_to_q();
        }
        divergence_[i][j] = p_to_q > INFINITE ? std::numeric_limits<double>::infinity() : p_to_q;
        divergence_[j][i] = q_to_p > INFINITE ? std::numeric_limits<double>::infinity() : q_to_p;
      }
    }
  }

  // Calls body(u, p, q) for the vectors of block b of streams i and j, which are all 0 beyond the last column. Memory is
  // idle meanwhile, so the next row is prefetched, in the first student's pairs, where every stream occurs.
  template <class Body>
  void for_each_pair(int i, int j, int64_t b, const Body& body) const {
    const V p_factor(tempered_[i].factor[b]), q_factor(tempered_[j].factor[b]);
    for_each_vector<A>(width(b), [&](int64_t at, auto size) {
      const int64_t v = b * BLOCK + at;
      const V p = V::loadu(tempered_[i].unscaled + v) * p_factor, q = V::loadu(tempered_[j].unscaled + v) * q_factor;
      const V u = log_ratio(i, j, v, size);
      if (i == 0) __builtin_prefetch(next_[j] + v, 0, 2);
      if (i == 0 && j == 1) __builtin_prefetch(next_[0] + v, 0, 2);
      size == V::size() ? body(u, p, q) : body(V::set(V(0), u, size), V::set(V(0), p, size), V::set(V(0), q, size));
    });
  }

  void write_losses(int64_t n, bool ce_row, bool kl_row, const std::array<Softmax, MAX_STREAMS>& plain) {
    for (int i = 0; p_.ce != nullptr && i < p_.students; ++i) {
      double& loss = p_.ce[i * p_.tokens + n];
      loss = 0;
      if (!ce_row) continue;
      const double logit = logits_[i][p_.targets[n]];
      loss = plain[i].log_sum - (logit < LOWEST ? LOWEST : logit);
      if (loss > INFINITE) loss = std::numeric_limits<double>::infinity();
    }
    for (int i = 0; p_.kl != nullptr && i < p_.students; ++i) {
      for (int j = 0; j < p_.streams; ++j) {
        double& loss = p_.kl[(i * p_.streams + j) * p_.tokens + n];
        loss = 0;
        if (!kl_row || i == j) continue;
        loss = p_.divergence == FORWARD   ? divergence_[j][i]
               : p_.divergence == REVERSE ? divergence_[i][j]
                                          : (divergence_[i][j] + divergence_[j][i]) / 2;
      }
    }
  }

  // Writes block b of student i's gradient to `to`: to its place, or to a buffer if others still need what is there.
  void gradient(int i, int64_t b, const Softmax& plain, bool ce_row, bool kl_row, A* to, bool streaming) const {
    // The gradient is a weighted sum of softmax(z_i) and, in the forward divergence, of all p_r.
    std::array<const A*, MAX_STREAMS + 1> terms;
    std::array<A, MAX_STREAMS + 1> factors;
    int linear = 0;
    const auto add = [&](const Softmax& softmax, double factor) {
      terms[linear] = softmax.unscaled + b * BLOCK;
      factors[linear++] = static_cast<A>(factor) * softmax.factor[b];
    };
    if (kl_row && p_.divergence == FORWARD) {
      double own_factor = ce_row && same_softmax_ ? ce_factor_[i] : 0;
      for (int j = 0; j < p_.streams; ++j) own_factor += kl_factor_[i][j];
      for (int j = 0; j < p_.streams; ++j) add(tempered_[j], j == i ? own_factor : -kl_factor_[i][j]);
    }
    if (ce_row && (linear == 0 || !same_softmax_)) add(plain, ce_factor_[i]);
    for_each_vector<A>(width(b), [&](int64_t at, auto size) {
      V total(0);
      for (int k = 0; k < linear; ++k) total = fmadd(V::loadu(terms[k] + at), V(factors[k]), total);
      if (streaming && size == V::size()) {
        stream(to + at, total);
      } else {
        total.store(to + at, size);
      }
    });
    for (int j = 0; p_.divergence != FORWARD && j < p_.streams; ++j) {
      if (kl_factor_[i][j] == 0) continue;
      const V factor(static_cast<A>(kl_factor_[i][j] * (p_.divergence == JSD ? 0.5 : 1)) * tempered_[i].factor[b]);
      const V mean(static_cast<A>(divergence_[i][j]));
      for_each_vector<A>(width(b), [&](int64_t at, auto size) {
        V ratio = log_ratio(i, j, b * BLOCK + at, size);
        if (p_.divergence == JSD) ratio = log_ratios_to_mean(ratio).first;
        const V p = V::loadu(tempered_[i].unscaled + b * BLOCK + at);
        fmadd((ratio - mean) * p, factor, V::loadu(to + at)).store(to + at, size);
      });
    }
  }

  // Computes the gradients of one block: all students' before any is written, because logits may still be needed.
  void gradients(int64_t n, int64_t b, const std::array<Softmax, MAX_STREAMS>& plain, bool ce_row, bool kl_row) {
    const int64_t label = ce_row ? p_.targets[n] - b * BLOCK : -1;
    const bool has_label = label >= 0 && label < width(b);
    for (const bool writing : {false, true}) {
      for (int i = 0; i < p_.students; ++i) {
        const Matrix& to = p_.gradients[i];
        if (to.data == nullptr) continue;
        const bool direct =
            p_.divergence == FORWARD && to.type == c10::CppTypeToScalarType<A>::value && to.column_stride == 1;
        A* place = direct ? to.template row<A>(n) + b * BLOCK : buffers_[i].data();
        if (!writing) {
          const bool in_place = place == logits_[i] + b * BLOCK;  // The cache line is in cache already.
          const bool aligned = reinterpret_cast<uintptr_t>(place) % sizeof(V) == 0;
          const bool streaming = direct && !in_place && !has_label && aligned;
          gradient(i, b, plain[i], ce_row, kl_row, place, streaming);
          if (has_label) place[label] -= static_cast<A>(ce_factor_[i]);
        } else if (!direct) {
          with_storage(to.type, [&](auto element) {
            using T = decltype(element);
            T* row = to.template row<T>(n) + b * BLOCK * to.column_stride;
            for (int64_t v = 0; v < width(b); ++v) row[v * to.column_stride] = static_cast<T>(place[v]);
          });
        }
      }
    }
  }

  const Problem& p_;
  const bool same_softmax_, wants_gradients_;
  const int64_t blocks_, stride_;
  std::vector<A> peaks_, sums_;
  const std::unique_ptr<A[]> storage_;
  std::array<Softmax, MAX_STREAMS> tempered_, plain_;
  std::array<A*, MAX_STREAMS> copies_;
  std::array<const A*, MAX_STREAMS> logits_, next_;  // This row's logits, and those of the next.
  // divergence_[i][j]: KL of stream i from stream j, or in the Jensen-Shannon divergence from the mean of both.
  std::array<std::array<double, MAX_STREAMS>, MAX_STREAMS> divergence_, kl_factor_;
  std::array<double, MAX_STREAMS> ce_factor_;
  std::array<std::array<A, BLOCK>, MAX_STREAMS> buffers_;
};

Problem make_problem(
    at::TensorList streams, int64_t students, double temperature, c10::string_view divergence, bool with_kl) {
  const bool wide = std::any_of(streams.begin(), streams.end(), [](const Tensor& x) { return x.dtype() == at::kDouble; });
  Problem problem{
      .tokens = streams[0].size(0),
      .vocabulary = streams[0].size(1),
      .students = static_cast<int>(students),
      .streams = static_cast<int>(streams.size()),
      .temperature = temperature,
      .divergence = divergence == "forward" ? FORWARD : divergence == "reverse" ? REVERSE : JSD,
      .arithmetic = wide ? at::kDouble : at::kFloat,
      .with_kl = with_kl,
  };
  for (int r = 0; r < problem.streams; ++r) problem.logits[r] = matrix(streams[r]);
  return problem;
}

void set_rows(Problem& problem, const Tensor& targets, const Tensor& ce_rows, const Tensor& kl_rows) {
  const auto keep = [&](const Tensor& x) { return problem.owned.emplace_back(x.contiguous()); };
  problem.targets = keep(targets).const_data_ptr<int64_t>();
  problem.ce_rows = keep(ce_rows).const_data_ptr<bool>();
  problem.kl_rows = keep(kl_rows).const_data_ptr<bool>();
}

// Sets the losses' weights: ce [S, N] and kl [S, R, N], or ce [S] and kl [S, R] for all rows. kl may be undefined.
void set_weights(Problem& problem, const Tensor& ce, const Tensor& kl) {
  const int64_t stride = ce.dim() - 1, rows = stride == 1 ? problem.tokens : 1;
  const auto keep = [&](const Tensor& x) {
    return problem.owned.emplace_back(x.to(at::kDouble).contiguous()).const_data_ptr<double>();
  };
  const double *ce_at = keep(ce), *kl_at = kl.defined() ? keep(kl) : nullptr;
  for (int i = 0; i < problem.students; ++i) {
    problem.ce_weight[i] = {ce_at + i * rows, stride};
    for (int j = 0; kl_at != nullptr && j < problem.streams; ++j) {
      problem.kl_weight[i][j] = {kl_at + (i * problem.streams + j) * rows, stride};
    }
  }
}

void run(const Problem& problem) {
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, problem.vocabulary * problem.streams));
  const auto run_rows = [&](auto element) {
    at::parallel_for(0, problem.tokens, grain, [&](int64_t begin, int64_t end) {
      const auto row = std::make_unique<Row<decltype(element)>>(problem);
      for (int64_t n = begin; n < end; ++n) row->run(n);
      stream_end();
    });
  };
  problem.arithmetic == at::kDouble ? run_rows(double{}) : run_rows(float{});
}

// Runs the problem, and returns its losses: ce [S, N] and kl [S, R, N], which is empty where it is not wanted.
std::tuple<Tensor, Tensor> run_with_losses(Problem& problem) {
  const Tensor ce = at::empty({problem.students, problem.tokens}, at::kDouble);
  const Tensor kl = at::empty({problem.with_kl ? problem.students : 0, problem.streams, problem.tokens}, at::kDouble);
  problem.ce = ce.data_ptr<double>();
  problem.kl = problem.with_kl ? kl.data_ptr<double>() : nullptr;
  run(problem);
  return {ce.to(problem.arithmetic), kl.to(problem.arithmetic)};
}

// Computes losses and gradients in one pass, as `loss_and_grad` in reference.py does, and writes a gradient into each
// of `gradients` that is present. A row of these may begin where that of its logits does, if it takes no more bytes.
// Without `kl_weight`, kl is empty.
std::tuple<Tensor, Tensor> loss_and_grad_(
    at::TensorList logits,
    const c10::List<std::optional<Tensor>>& gradients,
    const Tensor& targets,
    const Tensor& ce_weight,
    const std::optional<Tensor>& kl_weight,
    const Tensor& ce_rows,
    const Tensor& kl_rows,
    double temperature,
    c10::string_view divergence) {
  Problem problem = make_problem(logits, ce_weight.size(0), temperature, divergence, kl_weight.has_value());
  set_rows(problem, targets, ce_rows, kl_rows);
  set_weights(problem, ce_weight, problem.with_kl ? kl_weight->to(at::kDouble).mul(temperature) : Tensor());
  for (int i = 0; i < problem.students; ++i) {
    const std::optional<Tensor> gradient = gradients.get(i);
    if (gradient.has_value()) problem.gradients[i] = matrix(*gradient);
  }
  return run_with_losses(problem);
}

struct EnsembleKL : torch::autograd::Function<EnsembleKL> {
  static Tensors forward(
      AutogradContext* ctx, at::TensorList streams, const std::optional<Tensor>& targets,
      const std::optional<Tensor>& rows, int64_t students, double temperature, const std::string& divergence) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensors saved = streams.vec();
    saved.insert(saved.end(), {targets.value_or(Tensor()), rows.value_or(Tensor())});
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["students"] = students;
    ctx->saved_data["temperature"] = temperature;
    ctx->saved_data["divergence"] = divergence;
    Problem problem = make_problem(streams, students, temperature, divergence, true);
    if (targets.has_value()) set_rows(problem, *targets, *rows, *rows);
    const auto [ce, kl] = run_with_losses(problem);
    return {ce, kl};
  }

  static Tensors backward(AutogradContext* ctx, Tensors output_gradients) {
    check_once("ensemble_kl");
    Tensors streams = ctx->get_saved_variables();
    const Tensor rows = streams.back(), targets = streams[streams.size() - 2];
    streams.resize(streams.size() - 2);
    const double temperature = ctx->saved_data["temperature"].toDouble();
    const int64_t students = ctx->saved_data["students"].toInt();
    Problem problem = make_problem(streams, students, temperature, ctx->saved_data["divergence"].toStringRef(), true);
    if (targets.defined()) set_rows(problem, targets, rows, rows);
    set_weights(problem, output_gradients[0], output_gradients[1].to(at::kDouble).div(temperature));
    // One for each stream and for each of the five other arguments. Only students' are defined.
    Tensors gradients(streams.size() + 5);
    for (int i = 0; i < problem.students; ++i) {
      if (!ctx->needs_input_grad(i)) continue;
      gradients[i] = make(streams[i].sizes(), streams[i].options());
      problem.gradients[i] = matrix(gradients[i]);
    }
    run(problem);
    return gradients;
  }
};

std::tuple<Tensor, Tensor> differentiable(
    at::TensorList streams, const std::optional<Tensor>& targets, int64_t students, double temperature,
    c10::string_view divergence, int64_t ignore_index) {
  const auto rows = targets.has_value() ? std::optional(targets->ne(ignore_index)) : std::nullopt;
  const auto losses = EnsembleKL::apply(streams, targets, rows, students, temperature, std::string(divergence));
  return {losses[0], losses[1]};
}

TORCH_LIBRARY_FRAGMENT(creche_native, library) {
  library.def(
      "ensemble_kl(Tensor[] streams, Tensor? targets, int students, float temperature, str divergence, "
      "int ignore_index) -> (Tensor, Tensor)",
      differentiable);
  library.def(
      "ensemble_kl_loss_and_grad_(Tensor[] logits, Tensor(a!)?[] gradients, Tensor targets, Tensor ce_weight, "
      "Tensor? kl_weight, Tensor ce_rows, Tensor kl_rows, float temperature, str divergence) -> (Tensor, Tensor)",
      loss_and_grad_);
}

}  // namespace creche::ensemble_kl

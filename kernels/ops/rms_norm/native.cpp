// `rms_norm` on a CPU. A row is read once from memory. If there is a residual, the sum is written meanwhile.
//
// Shapes: N rows, D columns. With the input z, r = 1 / sqrt(mean(z²) + eps), x̂ = z·r, y = x̂·weight and the gradient g
// of y, the gradients are dweight = Σ_n g·x̂ and dz = r·(g·weight − x̂·mean(g·weight·x̂)).

#include <optional>
#include <vector>

#include "../../native/vector.h"

namespace creche::rms_norm {

using at::Tensor;
using at::vec::fmadd;

// Each block of rows has its own sum of dweight, so that no result depends on the number of threads.
constexpr int64_t ROWS = 32;

// The type O of y is T, or fp32 if the weight is wider than the input.
template <class T, class O>
void forward_rows(
    const T* x, const T* residual, const Wide<T>* weight, double eps, int64_t D, int64_t begin, int64_t end, T* total,
    O* y, Wide<T>* inverse) {
  using A = Wide<T>;
  for (int64_t n = begin; n < end; ++n) {
    const T* z = x + n * D;
    Vec<A> squares(0);
    for_each_vector<A>(D, [&](int64_t d, auto count) {
      Vec<A> value = load(z + d, count);
      if (residual != nullptr) {
        value = rounded<T>(value + load(residual + n * D + d, count));
        store(total + n * D + d, value, count);
      }
      squares = fmadd(value, value, squares);
    });
    if (residual != nullptr) z = total + n * D;
    const A r = 1 / std::sqrt(sum<A>(squares) / D + static_cast<A>(eps));
    inverse[n] = r;
    for_each_vector<A>(D, [&](int64_t d, auto count) {
      const Vec<A> normed = rounded<T>(load(z + d, count) * Vec<A>(r));
      store(y + n * D + d, normed * load(weight + d, count), count);
    });
  }
}

// Adds dweight of the rows to `d_weight` [D]. `d_total` is the gradient of z itself, or null.
template <class T, class O>
void backward_rows(
    const O* d_y, const T* d_total, const T* z, const Wide<T>* weight, const Wide<T>* inverse, int64_t D, int64_t begin,
    int64_t end, T* d_z, Wide<T>* d_weight) {
  using A = Wide<T>;
  for (int64_t n = begin; n < end; ++n) {
    const Vec<A> r(inverse[n]);
    Vec<A> products(0);
    for_each_vector<A>(D, [&](int64_t d, auto count) {
      const Vec<A> g = load(d_y + n * D + d, count), normed = load(z + n * D + d, count) * r;
      fmadd(g, rounded<T>(normed), load(d_weight + d, count)).store(d_weight + d, count);
      products = fmadd(g * load(weight + d, count), normed, products);
    });
    const Vec<A> mean(sum<A>(products) / D);
    for_each_vector<A>(D, [&](int64_t d, auto count) {
      const Vec<A> normed = load(z + n * D + d, count) * r;
      Vec<A> gradient = r * (load(d_y + n * D + d, count) * load(weight + d, count) - normed * mean);
      if (d_total != nullptr) gradient = gradient + load(d_total + n * D + d, count);
      store(d_z + n * D + d, gradient, count);
    });
  }
}

// Calls body(T{}, O{}) with the types of the input and of y.
template <class Body>
void with_types(at::ScalarType input, at::ScalarType output, const Body& body) {
  with_storage(input, [&](auto t) {
    using T = decltype(t);
    input == output ? body(t, t) : body(t, Wide<T>{});
  });
}

struct RMSNorm : torch::autograd::Function<RMSNorm> {
  static Tensors forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& weight, double eps, const std::optional<Tensor>& residual) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor input = x.contiguous();
    const Tensor other = residual.has_value() ? residual->contiguous() : Tensor();
    const int64_t D = input.size(-1), N = D == 0 ? 0 : input.numel() / D;
    const at::ScalarType wide = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const Tensor factors = weight.to(wide).contiguous();
    const at::ScalarType output = at::promote_types(input.scalar_type(), weight.scalar_type());
    TORCH_CHECK_VALUE(
        output == input.scalar_type() || output == wide, "weight is ", weight.dtype(), ": expected x's dtype or ",
        wide);
    const Tensor y = make(input.sizes(), input.options().dtype(output));
    const Tensor total = other.defined() ? make(input.sizes(), input.options()) : input;
    const Tensor inverse = at::empty({N}, input.options().dtype(wide));
    with_types(input.scalar_type(), output, [&](auto t, auto o) {
      using T = decltype(t);
      using O = decltype(o);
      at::parallel_for(0, N, at::divup(1 << 14, std::max<int64_t>(D, 1)), [&](int64_t begin, int64_t end) {
        forward_rows<T, O>(
            input.const_data_ptr<T>(), other.defined() ? other.const_data_ptr<T>() : nullptr,
            factors.const_data_ptr<Wide<T>>(), eps, D, begin, end, other.defined() ? total.data_ptr<T>() : nullptr,
            y.data_ptr<O>(), inverse.data_ptr<Wide<T>>());
      });
    });
    ctx->save_for_backward({total, weight, inverse});
    ctx->set_materialize_grads(false);
    if (residual.has_value()) return {y, total};
    return {y};
  }

  static Tensors backward(AutogradContext* ctx, Tensors output_gradients) {
    check_once("rms_norm");
    const auto saved = ctx->get_saved_variables();
    const Tensor &total = saved[0], &weight = saved[1], &inverse = saved[2];
    const Tensor d_total = output_gradients.size() > 1 ? output_gradients[1] : Tensor();
    if (!output_gradients[0].defined()) return {d_total, Tensor(), Tensor(), d_total};
    const int64_t D = total.size(-1), N = inverse.numel(), blocks = at::divup(N, ROWS);
    const at::ScalarType wide = inverse.scalar_type();
    const Tensor d_y = output_gradients[0].contiguous(), other = d_total.defined() ? d_total.contiguous() : d_total;
    const Tensor factors = weight.to(wide).contiguous();
    const Tensor d_z = make(total.sizes(), total.options());
    const Tensor sums = at::zeros({blocks, D}, inverse.options());
    with_types(total.scalar_type(), d_y.scalar_type(), [&](auto t, auto o) {
      using T = decltype(t);
      using O = decltype(o);
      at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          backward_rows<T, O>(
              d_y.const_data_ptr<O>(), other.defined() ? other.const_data_ptr<T>() : nullptr, total.const_data_ptr<T>(),
              factors.const_data_ptr<Wide<T>>(), inverse.const_data_ptr<Wide<T>>(), D, b * ROWS,
              std::min(N, (b + 1) * ROWS), d_z.data_ptr<T>(), sums.data_ptr<Wide<T>>() + b * D);
        }
      });
    });
    const Tensor d_weight = sums.sum(0).to(weight.scalar_type());
    return {d_z, d_weight, Tensor(), output_gradients.size() > 1 ? d_z : Tensor()};
  }
};

// Returns {y}, or {y, x + residual}.
std::vector<Tensor> differentiable(
    const Tensor& x, const Tensor& weight, double eps, const std::optional<Tensor>& residual) {
  return RMSNorm::apply(x, weight, eps, residual);
}

TORCH_LIBRARY_FRAGMENT(creche_native, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual) -> Tensor[]", differentiable);
}

}  // namespace creche::rms_norm

// `rotary` on a CPU. One parallel loop over positions rotates queries and keys. The backward pass rotates in the other
// direction, because a rotation's transpose is its inverse.
//
// Shapes: B sequences, L positions, H heads.

#include "../../native/vector.h"

namespace creche::rotary {

using at::Tensor;

// Rotates the heads of one position by its D/2 angles, whose cosines and sines are given. A `sign` of −1 reverses it.
template <class T>
void rotate_position(
    const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t H, int64_t half, const Wide<T>* cosine,
    const Wide<T>* sine, Wide<T> sign) {
  using A = Wide<T>;
  for (int64_t h = 0; h < H; ++h) {
    const T* x = from + h * from_stride;
    T* y = to + h * to_stride;
    for_each_vector<A>(half, [&](int64_t d, auto count) {
      const Vec<A> c = load(cosine + d, count), s = load(sine + d, count) * Vec<A>(sign);
      const Vec<A> first = load(x + d, count), second = load(x + half + d, count);
      store(y + d, first * c - second * s, count);
      store(y + half + d, second * c + first * s, count);
    });
  }
}

std::tuple<Tensor, Tensor> rotate(
    const Tensor& q, const Tensor& k, const Tensor& cosines, const Tensor& sines, double sign) {
  const at::ScalarType wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor c = cosines.to(wide).contiguous(), s = sines.to(wide).contiguous();
  const Tensor from[] = {q.stride(-1) == 1 ? q : q.contiguous(), k.stride(-1) == 1 ? k : k.contiguous()};
  const Tensor to[] = {make(q.sizes(), q.options()), make(k.sizes(), k.options())};
  const int64_t L = q.size(1), half = q.size(3) / 2, work = std::max<int64_t>(1, q.size(2) * q.size(3));
  TORCH_CHECK_VALUE(
      (k.scalar_type() == at::kDouble) == (wide == at::kDouble), "q is ", q.dtype(), ", k is ", k.dtype(),
      ": expected float64 for both or for neither");
  at::parallel_for(0, q.size(0) * L, at::divup(1 << 14, work), [&](int64_t begin, int64_t end) {
    for (int x = 0; x < 2; ++x) {
      with_storage(from[x].scalar_type(), [&](auto element) {
        using T = decltype(element);
        for (int64_t at = begin; at < end; ++at) {
          const int64_t b = at / L, l = at % L;
          rotate_position<T>(
              from[x].const_data_ptr<T>() + b * from[x].stride(0) + l * from[x].stride(1), from[x].stride(2),
              to[x].data_ptr<T>() + b * to[x].stride(0) + l * to[x].stride(1), to[x].stride(2), from[x].size(2), half,
              c.const_data_ptr<Wide<T>>() + l * half, s.const_data_ptr<Wide<T>>() + l * half,
              static_cast<Wide<T>>(sign));
        }
      });
    }
  });
  return {to[0], to[1]};
}

struct Rotary : torch::autograd::Function<Rotary> {
  static Tensors forward(
      AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& cosines, const Tensor& sines) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({cosines, sines});
    const auto [rotated_q, rotated_k] = rotate(q, k, cosines, sines, 1);
    return {rotated_q, rotated_k};
  }

  static Tensors backward(AutogradContext* ctx, Tensors output_gradients) {
    check_once("rotary");
    const auto saved = ctx->get_saved_variables();
    const auto [d_q, d_k] = rotate(output_gradients[0], output_gradients[1], saved[0], saved[1], -1);
    return {d_q, d_k, Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> differentiable(
    const Tensor& q, const Tensor& k, const Tensor& cosines, const Tensor& sines) {
  TORCH_CHECK_VALUE(
      !cosines.requires_grad() && !sines.requires_grad(),
      "cos or sin requires a gradient, which the native rotary does not give: pass them detached, or choose the "
      "reference backend");
  const auto rotated = Rotary::apply(q, k, cosines, sines);
  return {rotated[0], rotated[1]};
}

TORCH_LIBRARY_FRAGMENT(creche_native, library) {
  library.def("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)", differentiable);
}

}  // namespace creche::rotary

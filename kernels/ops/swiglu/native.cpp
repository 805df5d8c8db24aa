// `swiglu` on a CPU. The backward pass computes the sigmoid again, which costs less than reading it would.

#include "../../native/vector.h"

namespace creche::swiglu {

using at::Tensor;

constexpr int64_t GRAIN = 1 << 14;  // Fewer elements are not worth a thread.

template <class A>
Vec<A> sigmoid(Vec<A> x) {
  const Vec<A> one(1), largest(88);  // e^88 is finite in fp32.
  return one / (one + exponential(smaller(x.neg(), largest)));
}

struct SwiGLU : torch::autograd::Function<SwiGLU> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gate, const Tensor& up) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({gate, up});
    const Tensor g = gate.contiguous(), u = up.contiguous(), y = make(g.sizes(), g.options());
    with_storage(g.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using A = Wide<T>;
      at::parallel_for(0, g.numel(), GRAIN, [&](int64_t begin, int64_t end) {
        const T *g_at = g.const_data_ptr<T>() + begin, *u_at = u.const_data_ptr<T>() + begin;
        T* y_at = y.data_ptr<T>() + begin;
        for_each_vector<A>(end - begin, [&](int64_t v, auto count) {
          const Vec<A> x = load(g_at + v, count);
          store(y_at + v, x * sigmoid<A>(x) * load(u_at + v, count), count);
        });
      });
    });
    return y;
  }

  static Tensors backward(AutogradContext* ctx, Tensors output_gradients) {
    check_once("swiglu");
    const auto saved = ctx->get_saved_variables();
    const Tensor d = output_gradients[0].contiguous(), g = saved[0].contiguous(), u = saved[1].contiguous();
    const Tensor d_g = make(g.sizes(), g.options()), d_u = make(u.sizes(), u.options());
    with_storage(g.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using A = Wide<T>;
      at::parallel_for(0, g.numel(), GRAIN, [&](int64_t begin, int64_t end) {
        const T *d_at = d.const_data_ptr<T>() + begin, *g_at = g.const_data_ptr<T>() + begin;
        const T* u_at = u.const_data_ptr<T>() + begin;
        T *d_g_at = d_g.data_ptr<T>() + begin, *d_u_at = d_u.data_ptr<T>() + begin;
        for_each_vector<A>(end - begin, [&](int64_t v, auto count) {
          const Vec<A> y = load(d_at + v, count), x = load(g_at + v, count), s = sigmoid<A>(x), one(1);
          store(d_u_at + v, y * x * s, count);
          store(d_g_at + v, y * load(u_at + v, count) * s * (one + x * (one - s)), count);
        });
      });
    });
    return {d_g, d_u};
  }
};

Tensor differentiable(const Tensor& gate, const Tensor& up) { return SwiGLU::apply(gate, up); }

TORCH_LIBRARY_FRAGMENT(creche_native, library) {
  library.def("swiglu(Tensor gate, Tensor up) -> Tensor", differentiable);
}

}  // namespace creche::swiglu

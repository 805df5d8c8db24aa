// The CPU kernels' common code: vectors of the arithmetic type, loaded from and stored to any storage type.
//
// This file is compiled once for each instruction set. at::vec::Vectorized is then as wide as the set's registers.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarType.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace creche {

using torch::autograd::AutogradContext;
using Tensors = torch::autograd::variable_list;

// The arithmetic type of a storage type: float64 for float64, else fp32.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A>
using Vec = at::vec::Vectorized<A>;

// Raises if a graph of the backward pass is requested, for an op whose second derivative does not exist.
inline void check_once(const char* op) {
  TORCH_CHECK(
      !at::GradMode::is_enabled(), "the native ", op, " is differentiable once: run its backward without create_graph, ",
      "or under kernels.backend('reference'), which is differentiable twice");
}

// Makes a new tensor. The system gives a large one's memory page by page as it is written. This asks for pages of 2 MiB:
// with pages of 4 KiB the system takes three times as long to give the memory as the kernels take to write it.
inline at::Tensor make(at::IntArrayRef sizes, at::TensorOptions options) {
  at::Tensor x = at::empty(sizes, options);
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 1 << 21;
  const auto start = reinterpret_cast<uintptr_t>(x.data_ptr());
  const uintptr_t begin = (start + page - 1) / page * page, end = (start + x.nbytes()) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return x;
}

// Calls body(T{}) with the storage type that `type` names.
template <class Body>
inline auto with_storage(at::ScalarType type, const Body& body) {
  switch (type) {
    case at::kFloat:
      return body(float{});
    case at::kBFloat16:
      return body(at::BFloat16{});
    case at::kHalf:
      return body(at::Half{});
    case at::kDouble:
      return body(double{});
    default:
      TORCH_CHECK_VALUE(false, "dtype is ", type, ": expected float32, bfloat16, float16 or float64");
  }
}

// Loads `count` elements of T as a vector of T's arithmetic type, whose other elements are 0.
template <class T>
inline Vec<Wide<T>> load(const T* from, int64_t count = Vec<Wide<T>>::size()) {
  using V = Vec<Wide<T>>;
  if constexpr (std::is_same_v<T, Wide<T>>) {
    return count == V::size() ? V::loadu(from) : V::loadu(from, count);
  } else {
    __at_align__ T whole[V::size()];
    if (count != V::size()) {
      for (int64_t k = 0; k < V::size(); ++k) whole[k] = k < count ? from[k] : T(0);
      from = whole;
    }
    V wide;
    if constexpr (std::is_same_v<T, at::BFloat16>) {
      at::vec::load_fp32_from_bf16(from, wide);
    } else {
      at::vec::load_fp32_from_fp16(from, wide);
    }
    return wide;
  }
}

// Rounds the first `count` elements to T and stores them.
template <class T>
inline void store(T* to, Vec<Wide<T>> wide, int64_t count = Vec<Wide<T>>::size()) {
  if constexpr (std::is_same_v<T, Wide<T>>) {
    wide.store(to, count);
  } else {
    at::vec::convert_from_float<T>(wide, wide).store(to, count);
  }
}

// Rounds to T and converts back.
template <class T>
inline Vec<Wide<T>> rounded(Vec<Wide<T>> wide) {
  if constexpr (std::is_same_v<T, Wide<T>>) {
    return wide;
  } else {
    __at_align__ T narrow[Vec<T>::size()];
    store(narrow, wide);
    return creche::load<T>(narrow);
  }
}

// Calls body(at, count) for the vectors of A in [0, n). `count` is the vector's size, and may be less for the last one.
template <class A, class Body>
inline void for_each_vector(int64_t n, const Body& body) {
  constexpr int64_t width = Vec<A>::size();
  int64_t at = 0;
  for (; at + width <= n; at += width) body(at, std::integral_constant<int64_t, width>{});
  if (at < n) body(at, n - at);
}

template <class A>
inline A sum(Vec<A> x) {
  return at::vec::vec_reduce_all<A>([](Vec<A>& a, Vec<A>& b) { return a + b; }, x);
}

// Returns the larger of both, and b where a is NaN. It is one instruction, unlike maximum, which keeps NaN.
template <class A>
inline Vec<A> larger(Vec<A> a, Vec<A> b) {
  return at::vec::clamp_min(b, a);
}

// Returns the smaller of both, and b where a is NaN.
template <class A>
inline Vec<A> smaller(Vec<A> a, Vec<A> b) {
  return at::vec::clamp_max(b, a);
}

// Returns e^x to 2 ulp, for x ≤ 88. Unlike Vectorized::exp it is inlined, and unlike exp_u20 it keeps NaN and reaches 0.
inline Vec<double> exponential(Vec<double> x) { return x.exp(); }

inline Vec<float> exponential(Vec<float> x) {
  using at::vec::fmadd;
  using V = Vec<float>;
#if defined(CPU_CAPABILITY_AVX512)
  const V lowest(-105.0f);  // There and below, e^x rounds to 0.
#else
  const V lowest(-87.33654f);  // Below it, e^x is subnormal and returned as 0.
#endif
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  const V clamped = at::vec::clamp_min(x, lowest);
#else  // Lanes that nobody reads may hold more than 88, and integers of plain C++ must not wrap.
  const V clamped = at::vec::clamp(x, lowest, V(88.0f));
#endif
  // Adding 1.5·2^23 rounds x / ln 2 to an integer n, which is then in the low bits of the sum.
  const V magic(12582912.0f);
  const V shifted = fmadd(clamped, V(1.44269504f), magic);
  const V n = shifted - magic;
  const V r = fmadd(n, V(-0.693147182f), clamped);
  // This is the minimax polynomial of degree 6 on |r| ≤ ln 2 / 2. Its relative error is 3e-9.
  V p = fmadd(r, V(0.00138144672f), V(0.00836878084f));
  p = fmadd(p, r, V(0.0416683927f));
  p = fmadd(p, r, V(0.166665196f));
  p = fmadd(p, r, V(0.49999994f));
  p = fmadd(p, r, V(1.0f));
  p = fmadd(p, r, V(1.0f));
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(p, n);
#else
  const Vec<int32_t> scaled = at::vec::cast<int32_t>(p) + (at::vec::cast<int32_t>(shifted) << Vec<int32_t>(23));
  return V::blendv(at::vec::cast<float>(scaled), V(0.0f), x < lowest);
#endif
}

// Stores past the cache: memory that is not read again soon need not be fetched before it is written. `to` is aligned to
// a vector.
inline void stream(double* to, Vec<double> x) { x.store(to); }

inline void stream(float* to, Vec<float> x) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm512_stream_ps(to, x);
#elif defined(CPU_CAPABILITY_AVX2)
  _mm256_stream_ps(to, x);
#else
  x.store(to);
#endif
}

// Makes streamed stores visible before other threads read.
inline void stream_end() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

}  // namespace creche

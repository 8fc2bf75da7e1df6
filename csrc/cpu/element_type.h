// From the element type a contract names to the one a kernel is compiled for. Included by
// target.cpp after simd.h.

// Calls f with a null pointer to the element type: with_type(dtype, [&]<class T>(const T*) {...}).
template <class F>
inline auto with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(static_cast<const bf16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<const fp16*>(nullptr));
    case DType::kFloat32:
      break;
  }
  return f(static_cast<const float*>(nullptr));
}

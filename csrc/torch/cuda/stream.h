// Finds PyTorch's CUDA functions at run time.
//
// A library linked against libtorch_cuda.so would not load where PyTorch has no CUDA, and a weak
// symbol finds nothing even where it has: Python loads PyTorch without RTLD_GLOBAL, so
// libtorch_cuda is in no scope that the loader searches for fastlm/_cuda.so. It is asked for by
// name.
#pragma once
#include <dlfcn.h>

namespace fastlm::cuda {

// A function of a library that this process has loaded already; null if it has not.
inline void* loaded_symbol(const char* library, const char* symbol) {
  if (void* found = dlsym(RTLD_DEFAULT, symbol)) return found;
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return handle == nullptr ? nullptr : dlsym(handle, symbol);
}

}  // namespace fastlm::cuda

// The text of a CUDA error, for the bindings, which do not see the CUDA runtime.
#include <cuda_runtime.h>

namespace fastlm::cuda {

const char* error_text(int status);
const char* error_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace fastlm::cuda

// The Python module fastlm._C: what was built and what runs. Torch-free but for the fact that
// importing it registers the kernels of the other files.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#include "torch/decode_plan_python.h"
#include "torch/triton_launch_python.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "fastlm's native kernels; importing it registers them with PyTorch.";
  m.def(
      "cpu_isa", [] { return fastlm::isa_name(fastlm::active_isa()); },
      "The instruction set in use: baseline, avx2, avx512, avx512bf16 or amx.");
  m.def(
      "supported_isas",
      [] {
        py::list names;
        for (int i = 0; i <= static_cast<int>(fastlm::Isa::kAmx); ++i) {
          const auto isa = static_cast<fastlm::Isa>(i);
          if (fastlm::isa_supported(isa)) names.append(fastlm::isa_name(isa));
        }
        return names;
      },
      "The instruction sets this processor and operating system offer.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["torch"] = FASTLM_TORCH_VERSION;
        info["torch_abi"] = "2.11";
        info["stems"] = py::str(FASTLM_STEMS).attr("split")(",");
        info["cuda"] = static_cast<bool>(FASTLM_WITH_CUDA);
        return info;
      },
      "Compiler, torch it was compiled against, stable ABI version, operators, whether with CUDA.");
  fastlm::bind_decode_plan(m);
  m.def("triton_launcher", &fastlm::make_triton_launcher, py::arg("tensor_type"), py::arg("names"),
        py::arg("watched"), py::arg("current_device"), py::arg("current_stream"), py::arg("plan"),
        py::arg("slow"), py::arg("most"),
        "Launches of one Triton kernel that are like earlier ones (fastlm/triton/_launch.py).");
}

// The decode plan as a Python class. Addresses come as integers from fastlm/models/plan.py, which
// checks the tensors and keeps them alive.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "torch/decode_plan.h"

namespace fastlm {

using Addresses = std::vector<uintptr_t>;

inline void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// Reads addresses and numbers in the order in which plan.py lists them.
struct PlanReader {
  const std::vector<uintptr_t>& from;
  size_t at = 0;
  uintptr_t next() { return from.at(at++); }
  PlanNorm norm() {
    void* weight = pointer(next());
    return {weight, pointer(next())};
  }
  PlanProduct product(int64_t out, int64_t in) {
    PlanProduct p;
    p.w = pointer(next());
    p.bias = pointer(next());
    p.scale = pointer(next());
    p.minimum = pointer(next());
    p.group = static_cast<int64_t>(next());
    p.form = static_cast<QuantizedForm>(next());
    p.digits = static_cast<int>(next());
    p.stride = static_cast<int64_t>(next());
    p.transposed = next() != 0;
    p.out = p.w == nullptr ? 0 : out;
    p.in = in;
    return p;
  }
};

inline PlanLayer plan_layer(const std::vector<uintptr_t>& from, const PlanStep& s, int64_t width) {
  PlanReader read{from};
  PlanLayer layer;
  layer.attention_norm = read.norm();
  layer.q = read.product(s.heads * s.head_dim, s.hidden);
  layer.k = read.product(s.kv_heads * s.head_dim, s.hidden);
  layer.v = read.product(s.kv_heads * s.head_dim, s.hidden);
  layer.out = read.product(s.hidden, s.heads * s.head_dim);
  layer.mlp_norm = read.norm();
  layer.gate = read.product(width, s.hidden);
  layer.up = read.product(width, s.hidden);
  layer.down = read.product(s.hidden, width);
  return layer;
}

inline std::unique_ptr<DecodePlan> make_decode_plan(const pybind11::dict& sizes,
                                                    const std::vector<Addresses>& layers,
                                                    const Addresses& others) {
  const auto whole = [&](const char* name) { return pybind11::cast<int64_t>(sizes[name]); };
  const auto real = [&](const char* name) { return pybind11::cast<float>(sizes[name]); };
  PlanModel model;
  PlanStep& s = model.step;
  s.dtype = static_cast<DType>(whole("dtype"));
  s.batch = whole("batch");
  s.one_sequence = whole("one_sequence") != 0;
  s.hidden = whole("hidden");
  s.heads = whole("heads");
  s.kv_heads = whole("kv_heads");
  s.head_dim = whole("head_dim");
  s.vocab = whole("vocab");
  s.eps = real("eps");
  s.centred = whole("centred") != 0;
  s.act = static_cast<Activation>(whole("activation"));
  PlanReader read{others};
  s.embed = pointer(read.next());
  s.learned = pointer(read.next());
  s.cos = static_cast<const float*>(pointer(read.next()));
  s.sin = static_cast<const float*>(pointer(read.next()));
  model.norm = read.norm();
  model.head = read.product(whole("outputs"), s.hidden);
  model.places = whole("places");
  model.window = whole("window");
  model.scale = real("scale");
  for (const auto& layer : layers) {
    model.layers.push_back(plan_layer(layer, s, whole("intermediate")));
  }
  return std::make_unique<DecodePlan>(std::move(model));
}

inline void bind_decode_plan(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<DecodePlan>(m, "DecodePlan",
                         "A decoder's weights and cache bound by address; a token a call.")
      .def(py::init(&make_decode_plan), py::arg("sizes"), py::arg("layers"), py::arg("others"))
      .def(
          "bind_cache",
          [](DecodePlan& plan, const Addresses& keys, const Addresses& values, int64_t capacity) {
            std::vector<void*> k, v;
            for (uintptr_t address : keys) k.push_back(pointer(address));
            for (uintptr_t address : values) v.push_back(pointer(address));
            plan.bind_cache(k, v, capacity);
          },
          "Where the layers' keys and values lie, and how many tokens they have room for.")
      .def(
          "step",
          [](DecodePlan& plan, uintptr_t tokens, uintptr_t positions, uintptr_t slots, int64_t past,
             uintptr_t first, uintptr_t logits, int64_t limit, uintptr_t best) {
            int64_t same[kPlanMaxBatch];
            for (int64_t b = 0; b < plan.batch(); ++b) {
              same[b] = past + (plan.one_sequence() ? b : 0);
            }
            const auto whole = [](uintptr_t address) {
              return static_cast<int64_t*>(pointer(address));
            };
            PlanTokens given;
            given.tokens = whole(tokens);
            given.slots = slots != 0 ? whole(slots) : same;
            given.positions = positions != 0 ? whole(positions) : given.slots;
            given.first = whole(first);
            const py::gil_scoped_release others_may_run;
            plan.step(given, static_cast<float*>(pointer(logits)), limit, whole(best));
          },
          py::arg("tokens"), py::arg("positions"), py::arg("slots"), py::arg("past"),
          py::arg("first"), py::arg("logits"), py::arg("limit"), py::arg("best"),
          "One token of each sequence: logits and, unless best is 0, the place of the largest "
          "among "
          "the first `limit`. Where `slots` is 0 `past` is the place in the cache, of all or of "
          "the "
          "first token of one sequence; where `positions` is 0 they are the slots.");
}

}  // namespace fastlm

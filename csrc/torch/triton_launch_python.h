// A launch of a Triton kernel that is like an earlier one, in one call from Python: what
// fastlm/triton/_launch.py's `Kernel` does, which stands behind it for everything else.
// Tensors are read through DLPack's exchange table (DLPack 1.x), a C interface that
// PyTorch keeps behind `Tensor.__dlpack_c_exchange_api__`; so nothing here depends on its headers.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace fastlm {

namespace py = pybind11;

// As in dlpack.h.
struct DlTensor {
  void* data;
  int32_t device_type, device;
  int32_t dims;
  uint8_t type, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t offset;
};
struct DlExchange {
  uint32_t major, minor;
  void* previous;
  void *allocate, *to_managed, *from_managed;
  int (*borrow)(void* tensor, DlTensor* out);  // -1 with a Python exception set
};
constexpr int32_t kDlCpu = 1;

// All that a compiled kernel depends on, as words that are compared one by one.
class LaunchKey {
 public:
  bool add(uint64_t word) {
    if (size_ == kMost) return false;
    words_[size_++] = word;
    return true;
  }
  size_t hash() const {
    uint64_t h = size_;
    for (size_t i = 0; i < size_; ++i) h = (h ^ words_[i]) * 0x9E3779B97F4A7C15u, h ^= h >> 29;
    return h;
  }
  bool operator==(const LaunchKey& o) const {
    return size_ == o.size_ && std::memcmp(words_, o.words_, size_ * sizeof *words_) == 0;
  }
  LaunchKey() = default;
  LaunchKey(const LaunchKey& o) : size_(o.size_) {
    std::memcpy(words_, o.words_, size_ * sizeof *words_);
  }

 private:
  static constexpr size_t kMost = 256;
  size_t size_ = 0;
  uint64_t words_[kMost];  // only the first size_ hold anything
};

// How a compiled kernel is launched: call(*grid, stream, *middle, *arguments), the arguments being
// the tensors' addresses and then `rest`, or one tuple of them.
struct LaunchPlan {
  py::object call;
  py::tuple middle, rest;
  bool nested;
  py::object config;  // kept, as `rest` keeps the constants: the key may know them by their address
};

class TritonLauncher {
 public:
  // names: the constants' in their order; watched: lists, one of which is not empty when a launch
  // must go the slow way (profilers, recording); plan(tensors, scalars, config, constants)
  // compiles; slow(grid, tensors, scalars, config, **constants) is the Python way; most: plans that
  // are kept.
  TritonLauncher(py::object tensor_type, py::tuple names, py::tuple watched,
                 py::object current_device, py::object current_stream, py::object plan,
                 py::object slow, size_t most)
      : tensor_type_(std::move(tensor_type)),
        names_(std::move(names)),
        watched_(std::move(watched)),
        current_device_(std::move(current_device)),
        current_stream_(std::move(current_stream)),
        plan_(std::move(plan)),
        slow_(std::move(slow)),
        most_(most) {
    const py::object capsule = tensor_type_.attr("__dlpack_c_exchange_api__");
    exchange_ =
        static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (exchange_ == nullptr) throw py::error_already_set();
    for (const py::handle list : watched_) {
      if (!PyList_Check(list.ptr())) throw py::type_error("triton_launcher: watched must be lists");
    }
    if (exchange_->major != 1 || exchange_->borrow == nullptr) {
      throw py::value_error("torch.Tensor offers no DLPack exchange of version 1");
    }
  }

  // grid, tensors, scalars, config, then the constants by name.
  py::object launch(PyObject* const* args, Py_ssize_t given, PyObject* names) {
    const auto slowly = [&] {
      return checked(PyObject_Vectorcall(slow_.ptr(), args, given, names));
    };
    if (!usual(args, given, names)) return slowly();
    for (int i = 0; i < 3; ++i) {
      if (PyObject_IsTrue(PyTuple_GET_ITEM(args[0], i)) == 0) return py::none();  // an empty grid
    }
    LaunchKey key;
    std::array<uint64_t, kTensors> addresses;
    int32_t device = 0;
    if (!describe(args, key, addresses.data(), &device)) return slowly();
    const py::object current = checked(PyObject_CallNoArgs(current_device_.ptr()));
    if (current.cast<int32_t>() != device) return slowly();
    std::shared_ptr<const LaunchPlan> plan = find(key);
    if (plan == nullptr) plan = make(key, args, names);
    return run(*plan, args[0], device, addresses.data(), PyTuple_GET_SIZE(args[1]));
  }

 private:
  static constexpr Py_ssize_t kTensors = 64;

  static py::object checked(PyObject* made) {
    if (made == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(made);
  }

  bool usual(PyObject* const* args, Py_ssize_t given, PyObject* names) const {
    const Py_ssize_t constants = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
    if (PyVectorcall_NARGS(given) != 4 || constants != PyTuple_GET_SIZE(names_.ptr())) return false;
    for (Py_ssize_t i = 0; i < constants; ++i) {  // names are interned
      if (PyTuple_GET_ITEM(names, i) != PyTuple_GET_ITEM(names_.ptr(), i)) return false;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(watched_.ptr()); ++i) {
      if (PyList_GET_SIZE(PyTuple_GET_ITEM(watched_.ptr(), i)) != 0) return false;
    }
    for (int i = 0; i < 3; ++i) {
      if (!PyTuple_Check(args[i])) return false;
    }
    if (PyTuple_GET_SIZE(args[0]) != 3) return false;
    for (int i = 0; i < 3; ++i) {
      if (!PyLong_Check(PyTuple_GET_ITEM(args[0], i))) return false;
    }
    const Py_ssize_t tensors = PyTuple_GET_SIZE(args[1]);
    return tensors > 0 && tensors <= kTensors && PyTuple_GET_ITEM(args[1], 0) != Py_None;
  }

  // The key, the tensors' addresses and the device of the first; false: not for here.
  bool describe(PyObject* const* args, LaunchKey& key, uint64_t* addresses, int32_t* device) const {
    uint64_t aligned = 0;
    const Py_ssize_t tensors = PyTuple_GET_SIZE(args[1]);
    for (Py_ssize_t i = 0; i < tensors; ++i) {
      PyObject* t = PyTuple_GET_ITEM(args[1], i);
      addresses[i] = 0;
      if (t == Py_None) {
        key.add(~uint64_t{0});
        continue;
      }
      if (!PyObject_TypeCheck(t, reinterpret_cast<PyTypeObject*>(tensor_type_.ptr()))) return false;
      DlTensor view;
      if (exchange_->borrow(t, &view) != 0) throw py::error_already_set();
      addresses[i] = reinterpret_cast<uint64_t>(view.data) + view.offset;
      aligned |= uint64_t{addresses[i] % 16 == 0} << i;
      key.add(uint64_t{view.type} << 32 | uint64_t{view.bits} << 16 | view.lanes);
      if (i == 0) *device = view.device_type == kDlCpu ? -1 : view.device;
    }
    key.add(static_cast<uint64_t>(tensors));
    key.add(aligned);
    key.add(static_cast<uint64_t>(*device));
    key.add(reinterpret_cast<uint64_t>(args[3]));
    bool fits = true;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[2]); ++i) {
      fits &= add(key, PyTuple_GET_ITEM(args[2], i));
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names_.ptr()); ++i) fits &= add(key, args[4 + i]);
    return fits;
  }

  // A number by its type and value; anything else is what it is: compared by its address.
  static bool add(LaunchKey& key, PyObject* x) {
    uint64_t word = reinterpret_cast<uint64_t>(x);
    if (PyLong_CheckExact(x)) {
      int overflow;
      word = static_cast<uint64_t>(PyLong_AsLongLongAndOverflow(x, &overflow));
      if (overflow != 0) return false;
    } else if (PyFloat_CheckExact(x)) {
      const double value = PyFloat_AS_DOUBLE(x);
      std::memcpy(&word, &value, sizeof word);
    }
    return key.add(reinterpret_cast<uint64_t>(Py_TYPE(x))) && key.add(word);
  }

  std::shared_ptr<const LaunchPlan> find(const LaunchKey& key) {
    const std::lock_guard guard(lock_);
    const auto it = plans_.find(key);
    return it == plans_.end() ? nullptr : it->second;
  }

  std::shared_ptr<const LaunchPlan> make(const LaunchKey& key, PyObject* const* args,
                                         PyObject* names) {
    py::dict constants;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names_.ptr()); ++i) {
      constants[py::handle(PyTuple_GET_ITEM(names, i))] = py::handle(args[4 + i]);
    }
    const auto config = py::reinterpret_borrow<py::object>(args[3]);
    const py::tuple made = plan_(py::handle(args[1]), py::handle(args[2]), config, constants);
    auto plan = std::make_shared<const LaunchPlan>(
        LaunchPlan{made[0], made[1], made[2], made[3].cast<bool>(), config});
    Plans dropped;  // after the lock, for this runs Python's destructors
    const std::lock_guard guard(lock_);
    if (plans_.size() >= most_) dropped.swap(plans_);
    plans_[key] = plan;
    return plan;
  }

  py::object run(const LaunchPlan& plan, PyObject* grid, int32_t device, const uint64_t* addresses,
                 Py_ssize_t tensors) const {
    const Py_ssize_t middle = PyTuple_GET_SIZE(plan.middle.ptr());
    const Py_ssize_t rest = PyTuple_GET_SIZE(plan.rest.ptr());
    const Py_ssize_t before = 4 + middle;
    const py::tuple all(before + (plan.nested ? 1 : tensors + rest));
    const py::tuple arguments = plan.nested ? py::tuple(tensors + rest) : all;
    const auto put = [](const py::tuple& to, Py_ssize_t i, PyObject* x) {
      Py_INCREF(x);
      PyTuple_SET_ITEM(to.ptr(), i, x);
    };
    for (int i = 0; i < 3; ++i) put(all, i, PyTuple_GET_ITEM(grid, i));
    const py::int_ number(device);
    PyTuple_SET_ITEM(
        all.ptr(), 3,
        checked(PyObject_CallOneArg(current_stream_.ptr(), number.ptr())).release().ptr());
    for (Py_ssize_t i = 0; i < middle; ++i) {
      put(all, 4 + i, PyTuple_GET_ITEM(plan.middle.ptr(), i));
    }
    Py_ssize_t at = plan.nested ? 0 : before;
    for (Py_ssize_t i = 0; i < tensors; ++i) {
      PyObject* address = checked(PyLong_FromUnsignedLongLong(addresses[i])).release().ptr();
      PyTuple_SET_ITEM(arguments.ptr(), at++, address);
    }
    for (Py_ssize_t i = 0; i < rest; ++i) {
      put(arguments, at++, PyTuple_GET_ITEM(plan.rest.ptr(), i));
    }
    if (plan.nested) put(all, before, arguments.ptr());
    checked(PyObject_Call(plan.call.ptr(), all.ptr(), nullptr));
    return py::none();
  }

  struct Hash {
    size_t operator()(const LaunchKey& key) const { return key.hash(); }
  };
  using Plans = std::unordered_map<LaunchKey, std::shared_ptr<const LaunchPlan>, Hash>;

  py::object tensor_type_;
  py::tuple names_, watched_;
  py::object current_device_, current_stream_, plan_, slow_;
  size_t most_;
  const DlExchange* exchange_;
  std::mutex lock_;
  Plans plans_;
};

constexpr const char* kTritonLauncher = "fastlm triton launcher";

inline PyObject* triton_launch(PyObject* self, PyObject* const* args, Py_ssize_t given,
                               PyObject* names) {
  auto* launcher = static_cast<TritonLauncher*>(PyCapsule_GetPointer(self, kTritonLauncher));
  if (launcher == nullptr) return nullptr;
  try {
    return launcher->launch(args, given, names).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// A builtin function with a launcher behind it: arguments come as an array, names without a dict.
inline py::object make_triton_launcher(py::object tensor_type, py::tuple names, py::tuple watched,
                                       py::object current_device, py::object current_stream,
                                       py::object plan, py::object slow, size_t most) {
  static PyMethodDef method = {
      "launch", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(triton_launch)),
      METH_FASTCALL | METH_KEYWORDS, "launch(grid, tensors, scalars, config, **constants)"};
  auto made = std::make_unique<TritonLauncher>(
      std::move(tensor_type), std::move(names), std::move(watched), std::move(current_device),
      std::move(current_stream), std::move(plan), std::move(slow), most);
  const py::capsule behind(made.release(), kTritonLauncher, [](PyObject* capsule) {
    delete static_cast<TritonLauncher*>(PyCapsule_GetPointer(capsule, kTritonLauncher));
  });
  PyObject* function = PyCFunction_NewEx(&method, behind.ptr(), nullptr);
  if (function == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(function);
}

}  // namespace fastlm

// op(name, function): a host function as Python calls it, `function(where, *tensors and numbers)`.
//
// What is wrong with a tensor's place is refused before anything is launched, and whatever CUDA refuses comes out as an
// exception that names the op, the device and the shapes.
#pragma once
#include <vector>

#include "arrays.h"
#include "device_info.h"

namespace fastsae {

// What an argument looks like from Python.
template <class A> struct Given { using type = std::decay_t<A>; };
template <> struct Given<const Array&> { using type = Tensor; };
template <> struct Given<const Maybe&> { using type = std::optional<Tensor>; };
template <> struct Given<const std::vector<Array>&> { using type = std::vector<Tensor>; };
template <> struct Given<const std::vector<Maybe>&> { using type = std::vector<std::optional<Tensor>>; };

inline const Array& plain(const Tensor& t) { return t.array; }
inline Maybe plain(const std::optional<Tensor>& t) { return t ? Maybe(t->array) : Maybe(); }
inline std::vector<Array> plain(const std::vector<Tensor>& all) {
  std::vector<Array> r;
  for (const Tensor& t : all) r.push_back(t.array);
  return r;
}
inline std::vector<Maybe> plain(const std::vector<std::optional<Tensor>>& all) {
  std::vector<Maybe> r;
  for (const auto& t : all) r.push_back(plain(t));
  return r;
}
template <class A> std::enable_if_t<std::is_arithmetic_v<A>, A> plain(A a) { return a; }

inline std::string device_name(int device) { return device < 0 ? "cpu" : "cuda:" + std::to_string(device); }

// Calls f with every tensor among the arguments.
template <class F> void each(const F& f, const Tensor& t) { f(t); }
template <class F, class T> void each(const F& f, const std::optional<T>& t) { if (t) each(f, *t); }
template <class F, class T> void each(const F& f, const std::vector<T>& all) { for (const T& t : all) each(f, t); }
template <class F, class A> std::enable_if_t<std::is_arithmetic_v<A>> each(const F&, A) {}

template <class R, class... A> auto op(const char* name, R (*run)(const Where&, A...)) {
  return [=](const Where& where, const typename Given<A>::type&... given) -> R {
    const auto refuse = [&](const Tensor& t) {
      if (t.device != where.device)
        throw py::value_error(std::string(name) + " got a " + t.shape() + " tensor on " + device_name(t.device) +
                              ", expected all of them on " + device_name(where.device));
    };
    (each(refuse, given), ...);
    try {
      py::gil_scoped_release release;
      const OnDevice current(where);
      return run(where, plain(given)...);
    } catch (const std::invalid_argument& error) {
      throw py::value_error(std::string(name) + ": " + error.what());
    } catch (const Error& error) {
      std::string shapes;
      const auto describe = [&](const Tensor& t) {
        shapes += (shapes.empty() ? "" : ", ") + std::string(name_of(t.array.dtype)) + " " + t.shape();
      };
      (each(describe, given), ...);
      throw Error(std::string(name) + " on " + device_name(where.device) + ": " + error.what() +
                  "; its tensors: " + shapes);
    }
  };
}

}  // namespace fastsae

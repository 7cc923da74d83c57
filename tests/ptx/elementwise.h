// Instructions that compute each lane for itself: d = f(a, b, ...), sources after the destination.
#pragma once

#include <tuple>
#include <utility>

#include "decode.h"
#include "machine.h"

namespace ptx {

using Execute = void (*)(Machine&, const Instruction&, uint32_t);

template <class F, class D, class... S>
struct Elementwise {
  static void execute(Machine& m, const Instruction& in, uint32_t active) {
    run(m, in, active, std::index_sequence_for<S...>{});
  }

 private:
  template <size_t... I>
  static void run(Machine& m, const Instruction& in, uint32_t active, std::index_sequence<I...>) {
    const std::tuple<const S*...> source{m.lanes<const S>(in.operand[1 + I])...};
    for_lanes(m.lanes<D>(in.operand[0]), active, [&](int lane) { return static_cast<D>(F{}(std::get<I>(source)[lane]...)); });
  }
};

// Operand widths of S, and the function.
template <class F, class D, class... S>
void elementwise(Decoder& d) {
  if (d.count() != 1 + sizeof...(S)) d.unsupported("number of operands");
  d.in.operand[0] = d.destination(0, sizeof(D));
  int i = 1;
  ((d.in.operand[i] = d.source(i, sizeof(S)), ++i), ...);
  d.in.execute = Elementwise<F, D, S...>::execute;
}

}  // namespace ptx

// PTX ISA, "Floating Point Instructions", single precision: rounded to nearest even, as the kernels have it. The approximate
// ones (ex2, rsqrt, ...) are computed exactly and rounded: they stay within the errors that PTX allows, but are not a device's.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "elementwise.h"

namespace ptx {

namespace {

float flush_subnormal(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.f, x) : x;
}

// .ftz: subnormal sources and results are zero, with their sign.
template <class F>
struct Flushed {
  template <class... S>
  float operator()(S... s) const {
    return flush_subnormal(F{}(flush_subnormal(s)...));
  }
};

struct Add {
  float operator()(float a, float b) const { return a + b; }
};
struct Subtract {
  float operator()(float a, float b) const { return a - b; }
};
struct Multiply {
  float operator()(float a, float b) const { return a * b; }
};
struct FusedMultiplyAdd {
  float operator()(float a, float b, float c) const { return std::fma(a, b, c); }
};
struct Divide {
  float operator()(float a, float b) const { return a / b; }
};
// A NaN gives way to a number, and -0 is less than +0.
struct Minimum {
  float operator()(float a, float b) const {
    if (a != a) return b;
    return b < a || (a == b && std::signbit(b)) ? b : a;
  }
};
struct Maximum {
  float operator()(float a, float b) const {
    if (a != a) return b;
    return a < b || (a == b && !std::signbit(b)) ? b : a;
  }
};
struct Negate {
  float operator()(float a) const { return -a; }
};
struct Absolute {
  float operator()(float a) const { return std::fabs(a); }
};
struct CopySign {  // the first source's sign on the second
  float operator()(float a, float b) const { return std::copysign(b, a); }
};
struct SquareRoot {
  float operator()(float a) const { return std::sqrt(a); }
};
struct Reciprocal {
  float operator()(float a) const { return 1.f / a; }
};
struct ReciprocalSquareRoot {
  float operator()(float a) const { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
};
struct Exp2 {
  float operator()(float a) const { return static_cast<float>(std::exp2(static_cast<double>(a))); }
};
struct Log2 {
  float operator()(float a) const { return static_cast<float>(std::log2(static_cast<double>(a))); }
};

template <class F, class... S>
void single(Decoder& d) {
  d.has("ftz") ? elementwise<Flushed<F>, float, S...>(d) : elementwise<F, float, S...>(d);
}

}  // namespace

bool decode_float(Decoder& d) {
  const std::string& op = d.op();
  static constexpr const char* kOps[] = {"add", "sub",      "mul",  "fma", "div",   "min", "max", "neg",
                                         "abs", "copysign", "sqrt", "rcp", "rsqrt", "ex2", "lg2"};
  if (std::none_of(std::begin(kOps), std::end(kOps), [&](const char* o) { return op == o; })) return false;
  const Type type = d.type();
  if (type.kind != Kind::kFloat || type.bytes != 4) d.unsupported("type");
  const bool approximate = d.has("approx") || d.has("full");
  if (op == "rsqrt" || op == "ex2" || op == "lg2" ? !approximate : approximate && op != "div" && op != "sqrt" && op != "rcp") {
    d.unsupported("precision");
  }
  d.allow({"rn", "ftz", "approx", "full"});
  if (op == "add") single<Add, float, float>(d);
  if (op == "sub") single<Subtract, float, float>(d);
  if (op == "mul") single<Multiply, float, float>(d);
  if (op == "fma") single<FusedMultiplyAdd, float, float, float>(d);
  if (op == "div") single<Divide, float, float>(d);
  if (op == "min") single<Minimum, float, float>(d);
  if (op == "max") single<Maximum, float, float>(d);
  if (op == "neg") single<Negate, float>(d);
  if (op == "abs") single<Absolute, float>(d);
  if (op == "copysign") single<CopySign, float, float>(d);
  if (op == "sqrt") single<SquareRoot, float>(d);
  if (op == "rcp") single<Reciprocal, float>(d);
  if (op == "rsqrt") single<ReciprocalSquareRoot, float>(d);
  if (op == "ex2") single<Exp2, float>(d);
  if (op == "lg2") single<Log2, float>(d);
  return true;
}

}  // namespace ptx

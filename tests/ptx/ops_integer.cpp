// PTX ISA, "Integer Arithmetic Instructions", "Logic and Shift Instructions", "Data Movement: prmt".
#include <algorithm>
#include <limits>
#include <type_traits>

#include "elementwise.h"

namespace ptx {

namespace {

template <class T>
using Twice = std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                                 std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;

// Compiled with -fwrapv: signed arithmetic wraps, as PTX's does.
struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Subtract {
  template <class T>
  T operator()(T a, T b) const {
    return a - b;
  }
};
struct MultiplyLow {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
  }
};
struct MultiplyHigh {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (sizeof(T) == 8) {
      using Product = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
      return static_cast<T>(static_cast<Product>(a) * b >> 64);
    } else {
      return static_cast<T>(static_cast<Twice<T>>(a) * b >> 8 * sizeof(T));
    }
  }
};
struct MultiplyWide {
  template <class T>
  Twice<T> operator()(T a, T b) const {
    return static_cast<Twice<T>>(a) * b;
  }
};
template <class Multiply>
struct MultiplyAdd {
  template <class T, class C>
  C operator()(T a, T b, C c) const {
    return Multiply{}(a, b) + c;
  }
};
// What a division by zero gives is not specified.
struct Divide {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return static_cast<T>(-1);
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return -a;
    return a / b;
  }
};
struct Remainder {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0 || (std::is_signed_v<T> && b == static_cast<T>(-1))) return b == 0 ? a : 0;
    return a % b;
  }
};
struct Minimum {
  template <class T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Maximum {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct Negate {
  template <class T>
  T operator()(T a) const {
    return -a;
  }
};
struct Absolute {
  template <class T>
  T operator()(T a) const {
    return a < 0 ? -a : a;
  }
};
struct And {
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct Xor {
  template <class T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  T operator()(T a) const {
    return ~a;
  }
};
// Amounts beyond the width are clamped to it.
struct ShiftLeft {
  template <class T>
  T operator()(T a, uint32_t by) const {
    return by < 8 * sizeof(T) ? static_cast<T>(a << by) : 0;
  }
};
struct ShiftRight {
  template <class T>
  T operator()(T a, uint32_t by) const {
    constexpr uint32_t kBits = 8 * sizeof(T);
    if (std::is_signed_v<T>) return static_cast<T>(a >> std::min(by, kBits - 1));
    return by < kBits ? static_cast<T>(a >> by) : 0;
  }
};
struct FunnelLeft {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t by) const { return (uint64_t{b} << 32 | a) << (by & 31) >> 32; }
};
struct FunnelRight {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t by) const { return (uint64_t{b} << 32 | a) >> (by & 31); }
};
// bfi: a's low `length` bits put into b at `position`
struct InsertBits {
  template <class T>
  T operator()(T a, T b, uint32_t position, uint32_t length) const {
    constexpr uint32_t kBits = 8 * sizeof(T);
    position &= 255;
    length &= 255;
    if (position >= kBits) return b;
    const T ones = length < kBits ? static_cast<T>((T{1} << length) - 1) : static_cast<T>(-1);
    const T mask = static_cast<T>(ones << position);
    return (b & ~mask) | (static_cast<T>(a << position) & mask);
  }
};
// bfe: `length` bits of a from `position`; signed: filled with the field's sign, or a's where the field goes beyond it
struct ExtractBits {
  template <class T>
  T operator()(T a, uint32_t position, uint32_t length) const {
    constexpr uint32_t kBits = 8 * sizeof(T);
    position &= 255;
    length &= 255;
    if (length == 0) return 0;
    const T sign = std::is_signed_v<T> ? static_cast<T>(-(a >> std::min(position + length - 1, kBits - 1) & 1)) : 0;
    if (position >= kBits) return sign;
    using U = std::make_unsigned_t<T>;
    const U ones = length < kBits ? static_cast<U>((U{1} << length) - 1) : static_cast<U>(-1);
    const U inside = static_cast<U>(-1) >> position & ones;  // bits that a has
    return static_cast<T>((static_cast<U>(a) >> position & inside) | (static_cast<U>(sign) & ~inside));
  }
};
// prmt, default mode: byte i of the result is byte (selector nibble & 7) of {b, a}, or its sign where the nibble's bit 3 is set
struct Permute {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t selector) const {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t nibble = selector >> 4 * i & 15;
      uint32_t byte = bytes >> 8 * (nibble & 7) & 255;
      if (nibble & 8) byte = byte & 128 ? 255 : 0;
      result |= byte << 8 * i;
    }
    return result;
  }
};
struct PopulationCount {
  template <class T>
  uint32_t operator()(T a) const {
    return __builtin_popcountll(a);
  }
};
struct LeadingZeros {
  template <class T>
  uint32_t operator()(T a) const {
    return a == 0 ? 8 * sizeof(T) : __builtin_clzll(a) - (64 - 8 * sizeof(T));
  }
};

// lop3: bit (a, b, c) of the table, for every bit
void execute_lop3(Machine& m, const Instruction& in, uint32_t active) {
  const uint32_t *a = m.lanes<uint32_t>(in.operand[1]), *b = m.lanes<uint32_t>(in.operand[2]),
                 *c = m.lanes<uint32_t>(in.operand[3]);
  for_lanes(m.lanes<uint32_t>(in.operand[0]), active, [&](int lane) {
    uint32_t result = 0;
    for (int i = 0; i < 8; ++i) {
      const uint32_t chosen = -(in.immediate >> i & 1);
      result |= chosen & (i & 4 ? a[lane] : ~a[lane]) & (i & 2 ? b[lane] : ~b[lane]) & (i & 1 ? c[lane] : ~c[lane]);
    }
    return result;
  });
}

template <class F>
void execute_predicates(Machine& m, const Instruction& in, uint32_t active) {
  const uint32_t result = F{}(m.predicate(in.operand[1]), m.predicate(in.operand[2]));
  uint32_t& to = m.predicate(in.operand[0]);
  to = (to & ~active) | (result & active);
}
struct NotFirst {
  uint32_t operator()(uint32_t a, uint32_t) const { return ~a; }
};

template <class F, int kSources, class T>
void same_type(Decoder& d) {
  if constexpr (kSources == 1) elementwise<F, T, T>(d);
  if constexpr (kSources == 2) elementwise<F, T, T, T>(d);
}
template <class F, int kSources>
void by_type(Decoder& d) {
  const Type type = d.type();
  const bool is_signed = type.kind == Kind::kSigned;
  if (type.bytes == 2) return is_signed ? same_type<F, kSources, int16_t>(d) : same_type<F, kSources, uint16_t>(d);
  if (type.bytes == 4) return is_signed ? same_type<F, kSources, int32_t>(d) : same_type<F, kSources, uint32_t>(d);
  if (type.bytes == 8) return is_signed ? same_type<F, kSources, int64_t>(d) : same_type<F, kSources, uint64_t>(d);
  d.unsupported("type");
}

template <class F>
void bits(Decoder& d) {
  if (d.type().kind != Kind::kPredicate) return by_type<F, 2>(d);
  d.in.operand[0] = d.predicate_destination(d.operand(0));
  for (int i = 1; i < 3; ++i) {
    if (d.operand(i).negated) d.unsupported("negated predicate");
    d.in.operand[i] = d.predicate(d.operand(i));
  }
  d.in.execute = execute_predicates<F>;
}

template <class F>
void shift(Decoder& d) {
  const Type type = d.type();
  const bool is_signed = type.kind == Kind::kSigned;
  if (type.bytes == 2)
    return is_signed ? elementwise<F, int16_t, int16_t, uint32_t>(d) : elementwise<F, uint16_t, uint16_t, uint32_t>(d);
  if (type.bytes == 4)
    return is_signed ? elementwise<F, int32_t, int32_t, uint32_t>(d) : elementwise<F, uint32_t, uint32_t, uint32_t>(d);
  return is_signed ? elementwise<F, int64_t, int64_t, uint32_t>(d) : elementwise<F, uint64_t, uint64_t, uint32_t>(d);
}

template <class T>
void multiply_typed(Decoder& d, bool add) {
  if (d.has("wide")) {
    if constexpr (sizeof(T) < 8) {
      using W = Twice<T>;
      return add ? elementwise<MultiplyAdd<MultiplyWide>, W, T, T, W>(d) : elementwise<MultiplyWide, W, T, T>(d);
    }
    d.unsupported("64-bit wide");
  }
  if (d.has("hi")) return add ? elementwise<MultiplyAdd<MultiplyHigh>, T, T, T, T>(d) : elementwise<MultiplyHigh, T, T, T>(d);
  if (!d.has("lo")) d.unsupported("which half");
  return add ? elementwise<MultiplyAdd<MultiplyLow>, T, T, T, T>(d) : elementwise<MultiplyLow, T, T, T>(d);
}
void multiply(Decoder& d, bool add) {
  d.allow({"lo", "hi", "wide"});
  const Type type = d.type();
  const bool is_signed = type.kind == Kind::kSigned;
  if (type.bytes == 2) return is_signed ? multiply_typed<int16_t>(d, add) : multiply_typed<uint16_t>(d, add);
  if (type.bytes == 4) return is_signed ? multiply_typed<int32_t>(d, add) : multiply_typed<uint32_t>(d, add);
  return is_signed ? multiply_typed<int64_t>(d, add) : multiply_typed<uint64_t>(d, add);
}

template <class T>
void count_bits(Decoder& d) {
  return d.op() == "popc" ? elementwise<PopulationCount, uint32_t, T>(d) : elementwise<LeadingZeros, uint32_t, T>(d);
}

}  // namespace

bool decode_integer(Decoder& d) {
  const std::string& op = d.op();
  static constexpr const char* kOps[] = {"add", "sub", "mul", "mad", "div",  "rem", "min", "max",  "neg", "abs",  "and", "or",
                                         "xor", "not", "shl", "shr", "lop3", "bfi", "bfe", "prmt", "shf", "popc", "clz"};
  if (std::none_of(std::begin(kOps), std::end(kOps), [&](const char* o) { return op == o; })) return false;
  const Type type = d.type();
  if (type.floating()) return false;
  const bool is_signed = type.kind == Kind::kSigned, is_long = type.bytes == 8;
  if (op == "mul" || op == "mad") {
    multiply(d, op == "mad");
  } else if (op == "lop3") {
    d.allow({});
    d.in.operand[0] = d.destination(0, 4);
    for (int i = 1; i < 4; ++i) d.in.operand[i] = d.source(i, 4);
    d.in.immediate = d.immediate(4);
    d.in.execute = execute_lop3;
  } else if (op == "shf") {
    d.allow({"l", "r", "wrap"});
    d.has("l") ? elementwise<FunnelLeft, uint32_t, uint32_t, uint32_t, uint32_t>(d)
               : elementwise<FunnelRight, uint32_t, uint32_t, uint32_t, uint32_t>(d);
  } else {
    d.allow({});
    if (op == "add") by_type<Add, 2>(d);
    if (op == "sub") by_type<Subtract, 2>(d);
    if (op == "div") by_type<Divide, 2>(d);
    if (op == "rem") by_type<Remainder, 2>(d);
    if (op == "min") by_type<Minimum, 2>(d);
    if (op == "max") by_type<Maximum, 2>(d);
    if (op == "neg") by_type<Negate, 1>(d);
    if (op == "abs") by_type<Absolute, 1>(d);
    if (op == "and") bits<And>(d);
    if (op == "or") bits<Or>(d);
    if (op == "xor") bits<Xor>(d);
    if (op == "not" && type.kind != Kind::kPredicate) by_type<Not, 1>(d);
    if (op == "not" && type.kind == Kind::kPredicate) {
      d.in.operand[0] = d.predicate_destination(d.operand(0));
      d.in.operand[1] = d.in.operand[2] = d.predicate(d.operand(1));
      d.in.execute = execute_predicates<NotFirst>;
    }
    if (op == "shl") shift<ShiftLeft>(d);
    if (op == "shr") shift<ShiftRight>(d);
    if (op == "prmt") elementwise<Permute, uint32_t, uint32_t, uint32_t, uint32_t>(d);
    if (op == "popc" || op == "clz") is_long ? count_bits<uint64_t>(d) : count_bits<uint32_t>(d);
    if (op == "bfi") {
      is_long ? elementwise<InsertBits, uint64_t, uint64_t, uint64_t, uint32_t, uint32_t>(d)
              : elementwise<InsertBits, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>(d);
    }
    if (op == "bfe" && is_long) {
      is_signed ? elementwise<ExtractBits, int64_t, int64_t, uint32_t, uint32_t>(d)
                : elementwise<ExtractBits, uint64_t, uint64_t, uint32_t, uint32_t>(d);
    }
    if (op == "bfe" && !is_long) {
      is_signed ? elementwise<ExtractBits, int32_t, int32_t, uint32_t, uint32_t>(d)
                : elementwise<ExtractBits, uint32_t, uint32_t, uint32_t, uint32_t>(d);
    }
  }
  return true;
}

}  // namespace ptx

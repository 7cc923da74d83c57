// PTX ISA, "Data Movement and Conversion Instructions: mov, cvta" and "Comparison and Selection Instructions: setp, selp".
#include <cmath>
#include <functional>

#include "elementwise.h"

namespace ptx {

namespace {

struct Same {
  template <class T>
  T operator()(T a) const {
    return a;
  }
};
struct Split {  // mov.b64 {lo, hi}
  static void execute32(Machine& m, const Instruction& in, uint32_t active) { run<uint16_t, uint32_t>(m, in, active); }
  static void execute64(Machine& m, const Instruction& in, uint32_t active) { run<uint32_t, uint64_t>(m, in, active); }

 private:
  template <class Half, class Whole>
  static void run(Machine& m, const Instruction& in, uint32_t active) {
    const Whole* const whole = m.lanes<Whole>(in.operand[2]);
    Whole copy[kWarpSize];
    for (int lane = 0; lane < kWarpSize; ++lane) copy[lane] = whole[lane];
    for_lanes(m.lanes<Half>(in.operand[0]), active, [&](int lane) { return static_cast<Half>(copy[lane]); });
    for_lanes(m.lanes<Half>(in.operand[1]), active,
              [&](int lane) { return static_cast<Half>(copy[lane] >> 8 * sizeof(Half)); });
  }
};
struct Join {
  uint32_t operator()(uint16_t lo, uint16_t hi) const { return uint32_t{hi} << 16 | lo; }
  uint64_t operator()(uint32_t lo, uint32_t hi) const { return uint64_t{hi} << 32 | lo; }
};

void move_predicate(Machine& m, const Instruction& in, uint32_t active) {
  uint32_t& to = m.predicate(in.operand[0]);
  to = (to & ~active) | (m.predicate(in.operand[1]) & active);
}

void move(Decoder& d) {
  d.allow({});
  const Type type = d.type();
  const std::vector<Operand> to = Decoder::items(d.operand(0)), from = Decoder::items(d.operand(1));
  Instruction& in = d.in;
  if (type.kind == Kind::kPredicate) {
    in.operand[0] = d.predicate_destination(to[0]);
    in.operand[1] = d.predicate(from[0]);
    in.execute = move_predicate;
  } else if (to.size() == 1 && from.size() == 1) {
    if (type.bytes == 2) elementwise<Same, uint16_t, uint16_t>(d);
    if (type.bytes == 4) elementwise<Same, uint32_t, uint32_t>(d);
    if (type.bytes == 8) elementwise<Same, uint64_t, uint64_t>(d);
  } else if (to.size() == 2 && from.size() == 1 && type.bytes >= 4) {
    for (int i = 0; i < 2; ++i) in.operand[i] = d.destination(to[i], type.bytes / 2);
    in.operand[2] = d.source(from[0], type.bytes);
    in.execute = type.bytes == 4 ? Split::execute32 : Split::execute64;
  } else if (to.size() == 1 && from.size() == 2 && type.bytes >= 4) {
    in.operand[0] = d.destination(to[0], type.bytes);
    for (int i = 0; i < 2; ++i) in.operand[1 + i] = d.source(from[i], type.bytes / 2);
    in.execute = type.bytes == 4 ? Elementwise<Join, uint32_t, uint16_t, uint16_t>::execute
                                 : Elementwise<Join, uint64_t, uint32_t, uint32_t>::execute;
  }
}

template <class T>
void execute_selp(Machine& m, const Instruction& in, uint32_t active) {
  const T *a = m.lanes<T>(in.operand[1]), *b = m.lanes<T>(in.operand[2]);
  const uint32_t chosen = m.predicate(in.operand[3]);
  for_lanes(m.lanes<T>(in.operand[0]), active, [&](int lane) { return chosen >> lane & 1 ? a[lane] : b[lane]; });
}

void select(Decoder& d) {
  d.allow({});
  const int bytes = d.type().bytes;
  d.in.operand[0] = d.destination(0, bytes);
  for (int i = 1; i < 3; ++i) d.in.operand[i] = d.source(i, bytes);
  if (d.operand(3).negated) d.unsupported("negated predicate");
  d.in.operand[3] = d.predicate(d.operand(3));
  d.in.execute = bytes == 2 ? execute_selp<uint16_t> : bytes == 4 ? execute_selp<uint32_t> : execute_selp<uint64_t>;
}

// setp p|q, a, b, c: p = (a ? b) op c, q = !(a ? b) op c
template <class T, class F>
void execute_setp(Machine& m, const Instruction& in, uint32_t active) {
  const T *a = m.lanes<T>(in.operand[2]), *b = m.lanes<T>(in.operand[3]);
  uint32_t p = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) p |= uint32_t{F{}(a[lane], b[lane])} << lane;
  uint32_t q = ~p;
  if (in.count != 0) {
    const uint32_t c = in.flag ? ~m.predicate(in.operand[4]) : m.predicate(in.operand[4]);
    p = in.count == 'a' ? p & c : in.count == 'o' ? p | c : p ^ c;
    q = in.count == 'a' ? q & c : in.count == 'o' ? q | c : q ^ c;
  }
  uint32_t& to_p = m.predicate(in.operand[0]);
  to_p = (to_p & ~active) | (p & active);
  uint32_t& to_q = m.predicate(in.operand[1]);
  to_q = (to_q & ~active) | (q & active);
}

template <class F>
struct OrUnordered {  // ltu, ...: true where a source is NaN
  bool operator()(float a, float b) const { return a != a || b != b || F{}(a, b); }
};
struct Numbers {
  bool operator()(float a, float b) const { return a == a && b == b; }
};
struct NotNumbers {
  bool operator()(float a, float b) const { return a != a || b != b; }
};
struct OrderedNotEqual {
  bool operator()(float a, float b) const { return a < b || a > b; }
};

template <class T>
Execute comparison(const std::string& name) {
  if (name == "eq") return execute_setp<T, std::equal_to<>>;
  if (name == "ne") {
    if constexpr (std::is_same_v<T, float>) return execute_setp<T, OrderedNotEqual>;
    return execute_setp<T, std::not_equal_to<>>;
  }
  if (name == "lt" || name == "lo") return execute_setp<T, std::less<>>;
  if (name == "le" || name == "ls") return execute_setp<T, std::less_equal<>>;
  if (name == "gt" || name == "hi") return execute_setp<T, std::greater<>>;
  if (name == "ge" || name == "hs") return execute_setp<T, std::greater_equal<>>;
  if constexpr (std::is_same_v<T, float>) {
    if (name == "equ") return execute_setp<T, OrUnordered<std::equal_to<>>>;
    if (name == "neu") return execute_setp<T, std::not_equal_to<>>;
    if (name == "ltu") return execute_setp<T, OrUnordered<std::less<>>>;
    if (name == "leu") return execute_setp<T, OrUnordered<std::less_equal<>>>;
    if (name == "gtu") return execute_setp<T, OrUnordered<std::greater<>>>;
    if (name == "geu") return execute_setp<T, OrUnordered<std::greater_equal<>>>;
    if (name == "num") return execute_setp<T, Numbers>;
    if (name == "nan") return execute_setp<T, NotNumbers>;
  }
  return nullptr;
}

void compare(Decoder& d) {
  const Type type = d.type();
  const bool is_signed = type.kind == Kind::kSigned;
  Instruction& in = d.in;
  in.operand[0] = d.predicate_destination(d.operand(0));
  in.operand[1] = d.second_predicate(d.operand(0));
  in.operand[2] = d.source(1, type.bytes);
  in.operand[3] = d.source(2, type.bytes);
  in.count = 0;
  if (d.count() == 4) {
    in.count = static_cast<uint8_t>(d.part(2)[0]);
    if (d.part(2) != "and" && d.part(2) != "or" && d.part(2) != "xor") d.unsupported("combination");
    in.operand[4] = d.predicate(d.operand(3));
    in.flag = d.operand(3).negated;
  }
  if (d.has("ftz")) d.unsupported("flush to zero");
  const std::string& name = d.part(1);
  if (type.floating()) {
    if (type.kind == Kind::kFloat && type.bytes == 4) in.execute = comparison<float>(name);
  } else if (type.bytes == 2) {
    in.execute = is_signed ? comparison<int16_t>(name) : comparison<uint16_t>(name);
  } else if (type.bytes == 4) {
    in.execute = is_signed ? comparison<int32_t>(name) : comparison<uint32_t>(name);
  } else if (type.bytes == 8) {
    in.execute = is_signed ? comparison<int64_t>(name) : comparison<uint64_t>(name);
  }
}

// Global, param and const addresses are generic ones already; a shared one is not, and no kernel makes it generic.
void convert_address(Decoder& d) {
  if (!d.has("global") && !d.has("param") && !d.has("const")) d.unsupported("generic address");
  elementwise<Same, uint64_t, uint64_t>(d);
}

}  // namespace

bool decode_move(Decoder& d) {
  const std::string& op = d.op();
  if (op == "mov") {
    move(d);
  } else if (op == "selp") {
    select(d);
  } else if (op == "setp") {
    compare(d);
  } else if (op == "cvta") {
    convert_address(d);
  } else {
    return false;
  }
  return true;
}

}  // namespace ptx

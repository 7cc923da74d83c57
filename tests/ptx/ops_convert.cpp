// PTX ISA, "Data Movement and Conversion Instructions: cvt". A source is read as an int64_t or a float, converted, and written
// as its destination: wider registers take integers extended by the destination type's sign.
#include <algorithm>
#include <cmath>

#include "elementwise.h"
#include "sixteen.h"

namespace ptx {

namespace {

enum Rounding : uint32_t { kNone, kNearest, kZero, kDown, kUp };

template <class T, class R>
void read_as(const Machine&, const T* from, R* to) {
  for (int lane = 0; lane < kWarpSize; ++lane) to[lane] = static_cast<R>(from[lane]);
}

// The lowest `bytes` of an integer, extended.
int64_t narrow(int64_t v, Type type) {
  const int unused = 64 - 8 * type.bytes;
  const auto top = static_cast<uint64_t>(v) << unused;
  return type.kind == Kind::kSigned ? static_cast<int64_t>(top) >> unused : static_cast<int64_t>(top >> unused);
}

void read_integers(Machine& m, const Instruction& in, int64_t* values) {
  const Slot slot = in.operand[1];
  if (in.source_register_bytes == 2) read_as(m, m.lanes<uint16_t>(slot), values);
  if (in.source_register_bytes == 4) read_as(m, m.lanes<uint32_t>(slot), values);
  if (in.source_register_bytes == 8) read_as(m, m.lanes<int64_t>(slot), values);
  for (int lane = 0; lane < kWarpSize; ++lane) values[lane] = narrow(values[lane], in.source_type);
}

void write_integers(Machine& m, const Instruction& in, uint32_t active, const int64_t* values) {
  const Slot slot = in.operand[0];
  const auto value = [&](int lane) { return narrow(values[lane], in.type); };
  if (in.register_bytes == 2) for_lanes(m.lanes<uint16_t>(slot), active, value);
  if (in.register_bytes == 4) for_lanes(m.lanes<uint32_t>(slot), active, value);
  if (in.register_bytes == 8) for_lanes(m.lanes<int64_t>(slot), active, value);
}

void read_floats(Machine& m, Type type, Slot slot, float* values) {
  if (type.bytes == 4) return read_as(m, m.lanes<float>(slot), values);
  const uint16_t* const from = m.lanes<uint16_t>(slot);
  const bool bfloat = type.kind == Kind::kBfloat;
  for (int lane = 0; lane < kWarpSize; ++lane) values[lane] = bfloat ? bf16_to_float(from[lane]) : fp16_to_float(from[lane]);
}

uint16_t to_sixteen(Type type, float f) {
  return type.kind == Kind::kBfloat ? float_to_bf16(f) : float_to_fp16(f);
}

void write_floats(Machine& m, const Instruction& in, uint32_t active, const float* values) {
  if (in.type.bytes == 4) return for_lanes(m.lanes<float>(in.operand[0]), active, [&](int lane) { return values[lane]; });
  for_lanes(m.lanes<uint16_t>(in.operand[0]), active, [&](int lane) { return to_sixteen(in.type, values[lane]); });
}

float to_integral(float x, uint32_t rounding) {
  switch (rounding) {
    case kNearest:
      return std::nearbyint(x);
    case kZero:
      return std::trunc(x);
    case kDown:
      return std::floor(x);
    case kUp:
      return std::ceil(x);
    default:
      return x;
  }
}

// Clamped to the type's range; NaN is 0.
int64_t float_to_integer(float x, Type type) {
  if (x != x) return 0;
  const bool is_signed = type.kind == Kind::kSigned;
  const int bits = 8 * type.bytes - is_signed;
  const double limit = std::ldexp(1.0, bits);
  if (x >= limit) return bits == 64 ? -1 : static_cast<int64_t>((uint64_t{1} << bits) - 1);
  if (x <= (is_signed ? -limit : 0)) return is_signed ? -static_cast<int64_t>(uint64_t{1} << (bits - 1)) * 2 : 0;
  return x >= 9223372036854775808.f ? static_cast<int64_t>(static_cast<uint64_t>(x)) : static_cast<int64_t>(x);
}

void integer_to_integer(Machine& m, const Instruction& in, uint32_t active) {
  int64_t values[kWarpSize];
  read_integers(m, in, values);
  write_integers(m, in, active, values);
}

// .sat: clamped to the destination's range, of at most 32 bits.
void integer_to_saturated(Machine& m, const Instruction& in, uint32_t active) {
  int64_t values[kWarpSize];
  read_integers(m, in, values);
  const bool is_signed = in.type.kind == Kind::kSigned;
  const int bits = 8 * in.type.bytes - is_signed;
  const int64_t high = (int64_t{1} << bits) - 1, low = is_signed ? -high - 1 : 0;
  for (int64_t& v : values) v = std::clamp(v, low, high);
  write_integers(m, in, active, values);
}

void integer_to_float(Machine& m, const Instruction& in, uint32_t active) {
  int64_t values[kWarpSize];
  float floats[kWarpSize];
  read_integers(m, in, values);
  const bool is_signed = in.source_type.kind == Kind::kSigned;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    floats[lane] = is_signed ? static_cast<float>(values[lane]) : static_cast<float>(static_cast<uint64_t>(values[lane]));
  }
  write_floats(m, in, active, floats);
}

void float_to_integers(Machine& m, const Instruction& in, uint32_t active) {
  float floats[kWarpSize];
  int64_t values[kWarpSize];
  read_floats(m, in.source_type, in.operand[1], floats);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    values[lane] = float_to_integer(to_integral(floats[lane], in.immediate), in.type);
  }
  write_integers(m, in, active, values);
}

void float_to_float(Machine& m, const Instruction& in, uint32_t active) {
  float floats[kWarpSize];
  read_floats(m, in.source_type, in.operand[1], floats);
  for (float& f : floats) {
    f = to_integral(f, in.immediate);
    if (in.flag) f = f != f ? 0.f : std::clamp(f, 0.f, 1.f);  // .sat
  }
  write_floats(m, in, active, floats);
}

// cvt.rn.bf16x2.f32 d, a, b: a is the upper half
void floats_to_pair(Machine& m, const Instruction& in, uint32_t active) {
  const float *upper = m.lanes<float>(in.operand[1]), *lower = m.lanes<float>(in.operand[2]);
  for_lanes(m.lanes<uint32_t>(in.operand[0]), active,
            [&](int lane) { return uint32_t{to_sixteen(in.type, upper[lane])} << 16 | to_sixteen(in.type, lower[lane]); });
}

uint32_t integral_rounding(const Decoder& d) {
  return d.has("rni") ? kNearest : d.has("rzi") ? kZero : d.has("rmi") ? kDown : d.has("rpi") ? kUp : kNone;
}

int register_width(Decoder& d, size_t operand, Type type) {
  return d.operand(operand).is == Operand::Is::kRegister ? d.register_bytes(d.operand(operand)) : std::max<int>(type.bytes, 2);
}

}  // namespace

bool decode_convert(Decoder& d) {
  if (d.op() != "cvt") return false;
  Instruction& in = d.in;
  in.type = d.type(0);
  in.source_type = d.type(1);
  if ((in.type.floating() || in.source_type.floating()) && (in.type.bytes == 8 && in.type.floating())) d.unsupported("type");
  if (in.source_type.floating() && in.source_type.bytes == 8) d.unsupported("type");
  if (in.type.pair) {
    d.allow({"rn"});
    if (!d.has("rn") || d.count() != 3 || in.source_type.bytes != 4) d.unsupported("form");
    in.operand[0] = d.destination(0, 4);
    for (int i = 1; i < 3; ++i) in.operand[i] = d.source(i, 4);
    in.execute = floats_to_pair;
    return true;
  }
  in.register_bytes = static_cast<uint8_t>(register_width(d, 0, in.type));
  in.source_register_bytes = static_cast<uint8_t>(register_width(d, 1, in.source_type));
  in.operand[0] = d.destination(0, in.register_bytes);
  in.operand[1] = d.source(1, in.source_register_bytes);
  in.immediate = integral_rounding(d);
  in.flag = d.has("sat");
  const bool to_float = in.type.floating(), from_float = in.source_type.floating();
  if (from_float) {
    d.allow({"rn", "rni", "rzi", "rmi", "rpi", "sat"});
    if (in.source_register_bytes != in.source_type.bytes) d.unsupported("width of the source");
    in.execute = to_float ? float_to_float : float_to_integers;
  } else {
    d.allow({"rn", "sat"});
    if (in.flag && in.type.bytes == 8) d.unsupported("64-bit saturation");
    in.execute = to_float ? integer_to_float : in.flag ? integer_to_saturated : integer_to_integer;
  }
  if (to_float && in.register_bytes != in.type.bytes) d.unsupported("width of the destination");
  return true;
}

}  // namespace ptx

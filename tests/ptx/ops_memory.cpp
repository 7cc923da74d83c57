// PTX ISA, "Data Movement and Conversion Instructions: ld, ld.global.nc, st". Cache hints change nothing here. A generic
// address is a global one: kernels name the state space of shared memory.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "elementwise.h"

namespace ptx {

void Machine::addresses(const Instruction& in, Slot base, uint64_t (&address)[kWarpSize]) {
  if (in.address_bytes == 8) {
    const uint64_t* const from = lanes<uint64_t>(base);
    for (int lane = 0; lane < kWarpSize; ++lane) address[lane] = from[lane] + in.offset;
  } else {
    const uint32_t* const from = lanes<uint32_t>(base);
    for (int lane = 0; lane < kWarpSize; ++lane) address[lane] = static_cast<uint32_t>(from[lane] + in.offset);
  }
}

namespace {

// The lanes whose access is good, and what their addresses are relative to.
uint32_t check(Machine& m, const Instruction& in, const uint64_t* address, uint32_t active, Access access, uint8_t*& base) {
  const int bytes = in.type.bytes * in.count;
  base = nullptr;
  switch (in.space) {
    case Space::kShared: {
      base = m.shared.data.data();
      const uint32_t good = m.check_shared(address, active, bytes, access);
      count_wavefronts(m.count(in), address, good, bytes);
      return good;
    }
    case Space::kParam:
      base = const_cast<uint8_t*>(m.parameters);
      each_lane(active, [&](int lane) {
        if (address[lane] + bytes > m.kernel.parameter_bytes) fail("parameters end before " + in.text);
      });
      return active;
    case Space::kConst:
      return m.check_global(address, active, bytes, access);
    default: {
      const uint32_t good = m.check_global(address, active, bytes, access);
      m.count_global(in, address, good, bytes, access);
      return good;
    }
  }
}

// T in memory, R in the register.
template <class T, class R>
void execute_load(Machine& m, const Instruction& in, uint32_t active) {
  uint64_t address[kWarpSize];
  m.addresses(in, in.operand[0], address);
  uint8_t* base;
  const uint32_t good = check(m, in, address, active, Access::kRead, base);
  for (int i = 0; i < in.count; ++i) {
    R* const to = m.lanes<R>(in.operand[1 + i]);
    each_lane(good, [&](int lane) {
      T value;
      std::memcpy(&value, reinterpret_cast<const uint8_t*>(reinterpret_cast<uint64_t>(base) + address[lane]) + i * sizeof(T),
                  sizeof(T));
      to[lane] = static_cast<R>(value);
    });
    each_lane(active & ~good, [&](int lane) { to[lane] = static_cast<R>(-1); });
  }
}

template <class T, class R>
void execute_store(Machine& m, const Instruction& in, uint32_t active) {
  uint64_t address[kWarpSize];
  m.addresses(in, in.operand[0], address);
  uint8_t* base;
  const uint32_t good = check(m, in, address, active, Access::kWrite, base);
  for (int i = 0; i < in.count; ++i) {
    const R* const from = m.lanes<R>(in.operand[1 + i]);
    each_lane(good, [&](int lane) {
      const auto value = static_cast<T>(from[lane]);
      std::memcpy(reinterpret_cast<uint8_t*>(reinterpret_cast<uint64_t>(base) + address[lane]) + i * sizeof(T), &value,
                  sizeof(T));
    });
  }
}

template <class R>
Execute load_into(Type type) {
  const bool is_signed = type.kind == Kind::kSigned;
  if (type.bytes == 1) return is_signed ? execute_load<int8_t, R> : execute_load<uint8_t, R>;
  if (type.bytes == 2) return is_signed ? execute_load<int16_t, R> : execute_load<uint16_t, R>;
  if (type.bytes == 4) return is_signed ? execute_load<int32_t, R> : execute_load<uint32_t, R>;
  return execute_load<uint64_t, R>;
}
template <class R>
Execute store_from(Type type) {
  if (type.bytes == 1) return execute_store<uint8_t, R>;
  if (type.bytes == 2) return execute_store<uint16_t, R>;
  if (type.bytes == 4) return execute_store<uint32_t, R>;
  return execute_store<uint64_t, R>;
}

Space space_of(const Decoder& d) {
  if (d.has("global")) return Space::kGlobal;
  if (d.has("shared")) return Space::kShared;
  if (d.has("param")) return Space::kParam;
  if (d.has("const")) return Space::kConst;
  return Space::kGeneric;
}

}  // namespace

bool decode_memory(Decoder& d) {
  const bool load = d.op() == "ld";
  if (!load && d.op() != "st") return false;
  d.allow({"global",
           "shared",
           "param",
           "const",
           "v2",
           "v4",
           "nc",
           "ca",
           "cg",
           "cs",
           "lu",
           "cv",
           "wb",
           "wt",
           "volatile",
           "L1::no_allocate",
           "L1::evict_first",
           "L1::evict_last",
           "L2::128B",
           "L2::256B"});
  Instruction& in = d.in;
  in.space = space_of(d);
  in.type = d.type();
  in.count = d.has("v4") ? 4 : d.has("v2") ? 2 : 1;
  const int bytes = in.type.bytes * in.count;
  if (bytes > 16) d.unsupported("more than 16 bytes");
  if (!load && (in.space == Space::kParam || in.space == Space::kConst)) d.unsupported("state space");
  if (in.space == Space::kShared) d.shared_access(bytes);
  if (in.space == Space::kGlobal || in.space == Space::kGeneric) d.global_access(bytes);
  d.address(load ? 1 : 0, 0);
  const std::vector<Operand> data = Decoder::items(d.operand(load ? 0 : 1));
  if (data.size() != in.count) d.unsupported("number of vector elements");
  int width = std::max<int>(in.type.bytes, 2);
  for (const Operand& o : data) {
    if (o.is == Operand::Is::kRegister) width = d.register_bytes(o);
  }
  if (width < in.type.bytes) d.unsupported("width of a register");
  for (int i = 0; i < in.count; ++i) in.operand[1 + i] = load ? d.destination(data[i], width) : d.source(data[i], width);
  if (load) {
    in.execute = width == 2   ? load_into<uint16_t>(in.type)
                 : width == 4 ? load_into<uint32_t>(in.type)
                              : load_into<uint64_t>(in.type);
  } else {
    in.execute = width == 2   ? store_from<uint16_t>(in.type)
                 : width == 4 ? store_from<uint32_t>(in.type)
                              : store_from<uint64_t>(in.type);
  }
  return true;
}

}  // namespace ptx

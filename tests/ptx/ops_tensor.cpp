// PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy" (cp.async), "Warp-level matrix load: ldmatrix" and
// "Matrix multiply-accumulate operation using mma instruction" (mma.m16n8k16 with .f16 and .bf16).
#include <algorithm>
#include <cstring>

#include "elementwise.h"
#include "sixteen.h"

namespace ptx {

namespace {

constexpr int kAllGroups = -1;  // cp.async.wait_all

// cp.async [shared], [global], bytes, source_bytes
void execute_copy(Machine& m, const Instruction& in, uint32_t active) {
  uint64_t from[kWarpSize];
  m.addresses(in, in.operand[1], from);
  const uint32_t *to = m.lanes<uint32_t>(in.operand[0]), *wanted = m.lanes<uint32_t>(in.operand[2]);
  const uint32_t bytes = in.immediate;
  uint64_t shared[kWarpSize];
  uint32_t good = 0, reading = 0;
  each_lane(active, [&](int lane) {
    shared[lane] = to[lane] + in.shared_offset;
    uint32_t source_bytes = in.flag ? wanted[lane] : bytes;
    if (source_bytes > bytes) {
      m.report("memcheck", lane, "cp.async of %u bytes reads %u", bytes, source_bytes);
      source_bytes = bytes;
    }
    if (from[lane] % bytes != 0) {
      m.report("memcheck", lane, "source %#llx of cp.async is misaligned", static_cast<unsigned long long>(from[lane]));
    }
    if (source_bytes > 0 && !m.check_global(from[lane], lane, static_cast<int>(source_bytes), Access::kRead)) source_bytes = 0;
    if (!m.check_shared(shared[lane], lane, static_cast<int>(bytes), Access::kWrite)) return;
    good |= 1u << lane;
    if (source_bytes > 0) reading |= 1u << lane;
    const auto at = static_cast<uint32_t>(shared[lane]);
    m.begin_copy({lane, m.warp->copy_group[lane], at, from[lane], bytes, source_bytes});
  });
  count_wavefronts(m.count(in), shared, good, static_cast<int>(bytes));
  m.count_global(in, from, reading, static_cast<int>(bytes), Access::kRead);
}

void execute_commit(Machine& m, const Instruction&, uint32_t active) {
  each_lane(active, [&](int lane) { ++m.warp->copy_group[lane]; });
}

void execute_wait(Machine& m, const Instruction& in, uint32_t active) {
  if (in.flag) execute_commit(m, in, active);
  m.wait_copies(active, in.immediate);
}

void decode_copy(Decoder& d) {
  Instruction& in = d.in;
  const std::string& what = d.part(2);
  if (what == "commit_group") {
    in.execute = execute_commit;
  } else if (what == "wait_group" || what == "wait_all") {
    in.flag = what == "wait_all";
    in.immediate = in.flag ? 0 : d.immediate(0);
    in.execute = execute_wait;
  } else {
    d.allow({"async", "ca", "cg", "shared", "global", "L2::128B", "L2::256B"});
    d.address(0, 0);
    if (in.address_bytes != 4) d.unsupported("shared address of 64 bits");
    in.shared_offset = static_cast<int32_t>(in.offset);
    d.address(1, 1);
    in.immediate = d.immediate(2);
    in.flag = d.count() == 4;
    if (in.flag) in.operand[2] = d.source(3, 4);
    if (in.immediate != 4 && in.immediate != 8 && in.immediate != 16) d.unsupported("size");
    d.shared_access(static_cast<int>(in.immediate));
    d.global_access(static_cast<int>(in.immediate));
    in.execute = execute_copy;
  }
}

void need_all_lanes(Machine& m, const Instruction& in, uint32_t active) {
  if (active != kAllLanes) m.report("synccheck", __builtin_ctz(active), "%s by lanes %08x only", in.opcode.c_str(), active);
}

// Matrix i has its eight rows of 16 bytes at the addresses of lanes 8 i ... 8 i + 7. Lane l receives elements (l / 4, 2 (l %
// 4)) and the one after, of the matrix or its transpose.
void execute_ldmatrix(Machine& m, const Instruction& in, uint32_t active) {
  need_all_lanes(m, in, active);
  uint64_t address[kWarpSize];
  m.addresses(in, in.operand[0], address);
  const uint32_t rows = in.count == 4 ? kAllLanes : (1u << 8 * in.count) - 1;
  const uint32_t good = m.check_shared(address, rows & active, 16, Access::kRead);
  count_wavefronts(m.count(in), address, good, 16);
  for (int i = 0; i < in.count; ++i) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * i + row;
      if (good >> lane & 1) {
        std::memcpy(matrix[row], &m.shared.data[address[lane]], 16);
      } else {
        std::memset(matrix[row], 0xff, 16);
      }
    }
    for_lanes(m.lanes<uint32_t>(in.operand[1 + i]), active, [&](int lane) {
      const int row = lane / 4, col = 2 * (lane % 4);
      const uint32_t first = in.flag ? matrix[col][row] : matrix[row][col];
      const uint32_t second = in.flag ? matrix[col + 1][row] : matrix[row][col + 1];
      return second << 16 | first;
    });
  }
}

void decode_ldmatrix(Decoder& d) {
  d.allow({"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared"});
  Instruction& in = d.in;
  const std::vector<Operand> to = Decoder::items(d.operand(0));
  in.count = d.has("x4") ? 4 : d.has("x2") ? 2 : 1;
  in.flag = d.has("trans");
  if (to.size() != in.count || d.type().bytes != 2) d.unsupported("form");
  d.address(1, 0);
  for (int i = 0; i < in.count; ++i) in.operand[1 + i] = d.destination(to[i], 4);
  d.shared_access(16);
  in.execute = execute_ldmatrix;
}

// D (16, 8) = A (16, 16) B (16, 8) + C, in fp32. Products are exact; PTX leaves the order of the sums open, here it is that of
// k. With row = lane / 4, col = 2 (lane % 4):  A's registers hold (row, col), (row + 8, col), (row, col + 8), (row + 8, col +
// 8) and the column after each; B's (col, row), (col + 8, row) and the row after; C's and D's (row, col), (row, col + 1), and
// row + 8 likewise.
template <float (*kToFloat)(uint16_t)>
void execute_mma(Machine& m, const Instruction& in, uint32_t active) {
  need_all_lanes(m, in, active);
  float A[16][16], B[16][8], D[16][8];
  for (int i = 0; i < 4; ++i) {
    const uint32_t* const a = m.lanes<uint32_t>(in.operand[4 + i]);
    const float* const c = m.lanes<float>(in.operand[10 + i]);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int row = lane / 4, col = 2 * (lane % 4);
      float* const pair = &A[row + 8 * (i % 2)][col + 8 * (i / 2)];
      pair[0] = kToFloat(static_cast<uint16_t>(a[lane]));
      pair[1] = kToFloat(static_cast<uint16_t>(a[lane] >> 16));
      D[row + 8 * (i / 2)][col + i % 2] = c[lane];
    }
  }
  for (int i = 0; i < 2; ++i) {
    const uint32_t* const b = m.lanes<uint32_t>(in.operand[8 + i]);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int col = lane / 4, row = 2 * (lane % 4) + 8 * i;
      B[row][col] = kToFloat(static_cast<uint16_t>(b[lane]));
      B[row + 1][col] = kToFloat(static_cast<uint16_t>(b[lane] >> 16));
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sum[8] = {};
    for (int k = 0; k < 16; ++k) {
      for (int col = 0; col < 8; ++col) sum[col] += A[row][k] * B[k][col];
    }
    for (int col = 0; col < 8; ++col) D[row][col] += sum[col];
  }
  for (int i = 0; i < 4; ++i) {
    for_lanes(m.lanes<float>(in.operand[i]), active,
              [&](int lane) { return D[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]; });
  }
}

void decode_mma(Decoder& d) {
  d.allow({"sync", "aligned", "m16n8k16", "row", "col"});
  Instruction& in = d.in;
  const Type type = d.type(1);
  if (!d.has("m16n8k16") || d.type(0).bytes != 4 || type.bytes != 2 || d.type(3).bytes != 4) d.unsupported("shape or type");
  const size_t sizes[] = {4, 4, 2, 4};
  int place = 0;
  for (int i = 0; i < 4; ++i) {
    const std::vector<Operand> items = Decoder::items(d.operand(i));
    if (items.size() != sizes[i]) d.unsupported("number of registers");
    for (const Operand& o : items) in.operand[place++] = i == 0 ? d.destination(o, 4) : d.source(o, 4);
  }
  in.execute = type.kind == Kind::kBfloat ? execute_mma<bf16_to_float> : execute_mma<fp16_to_float>;
}

}  // namespace

bool decode_tensor(Decoder& d) {
  const std::string& op = d.op();
  if (op == "cp" && d.part(1) == "async") {
    decode_copy(d);
  } else if (op == "ldmatrix") {
    decode_ldmatrix(d);
  } else if (op == "mma") {
    decode_mma(d);
  } else {
    return false;
  }
  return true;
}

}  // namespace ptx

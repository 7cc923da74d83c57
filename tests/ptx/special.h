// Special registers. PTX ISA, "Special Registers".
#pragma once

namespace ptx {

constexpr const char* kSpecialRegisters[] = {
    "%tid.x",    "%tid.y",    "%tid.z",    "%ntid.x", "%ntid.y", "%ntid.z",      "%ctaid.x",     "%ctaid.y",     "%ctaid.z",
    "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid", "%lanemask_lt", "%lanemask_le", "%lanemask_eq",
};
constexpr int kSpecialRegisterCount = sizeof kSpecialRegisters / sizeof *kSpecialRegisters;

}  // namespace ptx

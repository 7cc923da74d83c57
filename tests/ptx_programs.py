"""PTX written by hand for the executor's own tests, and its launch on a warp or two."""

from collections.abc import Sequence

import numpy as np
import torch
from ptx.device import Device, Run

REGISTERS = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


# %r2: the place of 16 bytes per thread in shared memory, %rd3: their source in x
COPY = "mad.lo.u32 %r2, %tid, 16, %s; mad.wide.u32 %rd3, %tid, 16, %x;"


def entry(body: str, parameters: Sequence[str], shared_bytes: int = 0) -> str:
    """A module with the entry `k`. Its parameters are addresses, in registers of their names; %tid is the thread's number."""
    declared = ", ".join(f".param .u64 k_{p}" for p in parameters)
    loads = "\n".join(f".reg .b64 %{p}; ld.param.u64 %{p}, [k_{p}];" for p in parameters)
    shared = f".shared .align 16 .b8 smem[{shared_bytes}];" if shared_bytes else ""
    return f"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry k({declared})
{{
{shared}
.reg .b32 %tid, %s, %r<32>;
.reg .f32 %f<16>;
.reg .b64 %rd<16>;
.reg .b16 %h<8>;
.reg .pred %p<8>;
mov.u32 %tid, %tid.x;
{"mov.u32 %s, smem;" if shared_bytes else ""}
{loads}
{body}
ret;
}}
"""


def launch(
    device: Device,
    run: Run,
    body: str,
    arguments: dict[str, torch.Tensor],
    threads: int = 32,
    shared_bytes: int = 0,
    blocks: int = 1,
) -> None:
    device.load_module("program", entry(body, list(arguments), shared_bytes))
    run.launch("k", [blocks], [threads], 0, *arguments.values())


def reports(device: Device, body: str, shared_bytes: int = 1024, threads: int = 64, blocks: int = 1) -> list[str]:
    """What the checkers say of a kernel with the parameters x, 64 floats, and y, 64 floats that nobody wrote."""
    with device.run(check=False) as run:
        launch(device, run, body, {"x": torch.randn(64), "y": torch.empty(64)}, threads, shared_bytes, blocks)
        return run.reports


def elementwise(device: Device, instructions: str, sources: Sequence[np.ndarray], out: np.dtype) -> np.ndarray:
    """out[i] = the instructions' %d for their %a, %b, %c, %e = sources[...][i]."""
    n = len(sources[0])
    names = "abce"[: len(sources)]
    lines = ["setp.ge.u32 %p7, %tid, " + str(n) + ";", "@%p7 ret;"]
    for name, source in zip(names, sources, strict=True):
        bits = source.itemsize
        lines += [
            f".reg .{REGISTERS[bits]} %{name};",
            f"mad.wide.u32 %rd1, %tid, {bits}, %in_{name};",
            f"ld.global.b{8 * bits} %{name}, [%rd1];",
        ]
    size = np.dtype(out).itemsize
    lines += [
        f".reg .{REGISTERS[size]} %d;",
        instructions,
        f"mad.wide.u32 %rd1, %tid, {size}, %out;",
        f"st.global.b{8 * size} [%rd1], %d;",
    ]
    with device.run() as run:
        arguments = {f"in_{name}": torch.from_numpy(s.view(np.uint8).copy()) for name, s in zip(names, sources, strict=True)}
        result = arguments["out"] = torch.empty(n * size, dtype=torch.uint8)
        launch(device, run, "\n".join(lines), arguments, threads=(n + 31) // 32 * 32)
    return result.numpy().view(out)


def warp(executor: Device, body: str, x: torch.Tensor, out: torch.Tensor, shared_bytes: int = 0) -> torch.Tensor:
    """out as the body leaves it: %r1 is the lane's x, and what it stores to [%rd2] is the lane's element of out."""
    size = out.element_size()
    with executor.run() as run:
        out = torch.empty_like(out)
        run.register(x)
        around = f"mad.wide.u32 %rd1, %tid, 4, %x; ld.global.b32 %r1, [%rd1]; mad.wide.u32 %rd2, %tid, {size}, %y;"
        launch(executor, run, around + body, {"x": x, "y": out}, shared_bytes=shared_bytes)
    return out

"""From timings to a table, a CSV, a roofline and the README."""

import csv
import os
import platform
from pathlib import Path

import torch
from machine import peak_flops, read_bandwidth
from sides import Case

import lora_ops


class Results:
    """One row per case and side, with the bounds of the machine measured beside it."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def add(self, case: Case, backward: bool, seconds: dict[str, float]) -> None:
        peak = peak_flops(case.dtype) * torch.get_num_threads()
        bandwidth = read_bandwidth(case.K * case.N * case.dtype.itemsize)
        for side, t in seconds.items():
            flops = case.flops(side, backward)
            self.rows.append(
                {
                    "pass": "forward+backward" if backward else "forward",
                    "dtype": str(case.dtype).removeprefix("torch."),
                    "adapter_dtype": str(case.adapter_dtype).removeprefix("torch."),
                    "M": case.M,
                    "K": case.K,
                    "N": case.N,
                    "r": case.r,
                    "dropout": case.dropout,
                    "side": side,
                    "ms": t * 1e3,
                    "gflops": flops / t / 1e9,
                    "share_of_peak": flops / t / peak,
                    "weight_reads": t / (case.K * case.N * case.dtype.itemsize / bandwidth),
                    "speedup_over_linear": seconds["linear"] / t,
                    "speedup_over_peft": seconds["peft"] / t,
                    "peak_gflops": peak / 1e9,
                    "read_gb_s": bandwidth / 1e9,
                }
            )

    def report(self, root: Path, update_readme: bool) -> str:
        out = root / "bench_out"
        out.mkdir(exist_ok=True)
        with written(out / "bench.csv") as temporary, temporary.open("w", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        self._roofline(out)
        table = self._table()
        if update_readme:
            replace_in_readme(root, "bench", table)
        return f"\n{table}\nwritten: {out / 'bench.csv'}, {out / 'roofline.png'}\n"

    def _table(self) -> str:
        bounds = {d: max(r["peak_gflops"] for r in self.rows if r["dtype"] == d) for d in {r["dtype"] for r in self.rows}}
        peaks = ", ".join(f"{d} {g:.0f} GFLOP/s" for d, g in sorted(bounds.items()))
        lines = [
            f"{platform.machine()}, {lora_ops.build_info()['isa']}, {torch.get_num_threads()} thread(s), torch "
            f"{torch.__version__}; peak: {peaks}. Minimum of many rounds, all sides taking turns. Share of peak counts every "
            "FLOP of base and low-rank products; prepack keeps the packed weight.",
            "",
            "| pass | x | M x K x N | r | F.linear, no LoRA | PEFT | lora_ops | share of peak | prepack | over PEFT | "
            "over F.linear |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        cases: dict[tuple, dict[str, dict]] = {}
        for row in self.rows:
            key = tuple(row[k] for k in ("pass", "dtype", "adapter_dtype", "M", "K", "N", "r", "dropout"))
            cases.setdefault(key, {})[row["side"]] = row
        for (passed, dtype, _, M, K, N, r, dropout), by_side in cases.items():
            ours, pre = by_side["lora_ops"], by_side.get("lora_ops prepack")
            name = dtype.replace("float32", "fp32").replace("bfloat16", "bf16") + (f", dropout {dropout}" if dropout else "")
            prepack = f"{pre['ms']:.2f} ms, {pre['share_of_peak']:.0%}" if pre else ""
            lines.append(
                f"| {passed} | {name} | {M} x {K} x {N} | {r} | {by_side['linear']['ms']:.2f} ms | "
                f"{by_side['peft']['ms']:.2f} ms | {ours['ms']:.2f} ms | {ours['share_of_peak']:.0%} | {prepack} | "
                f"{ours['speedup_over_peft']:.2f} x | {ours['speedup_over_linear']:.2f} x |"
            )
        return "\n".join(lines) + "\n"

    def _roofline(self, out: Path) -> None:
        """GFLOP/s over arithmetic intensity (flops per byte of weight, the traffic that no blocking avoids)."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        dtypes = [d for d in ("float32", "bfloat16") if any(r["dtype"] == d for r in self.rows)]
        figure, axes = plt.subplots(1, len(dtypes), figsize=(7 * len(dtypes), 5), squeeze=False, sharey=True)
        for ax, dtype in zip(axes[0], dtypes, strict=True):
            rows = [r for r in self.rows if r["dtype"] == dtype and r["pass"] == "forward"]
            if not rows:
                continue
            size = 4 if dtype == "float32" else 2
            peak, bandwidth = max(r["peak_gflops"] for r in rows), max(r["read_gb_s"] for r in rows)
            intensity = [0.4, 3000]
            ax.plot(intensity, [min(peak, i * bandwidth) for i in intensity], color="0.6", lw=1)
            corner = peak / bandwidth
            ax.plot([intensity[0], corner, intensity[1]], [intensity[0] * bandwidth, peak, peak], color="black", lw=1.5)
            for side, marker in (("linear", "o"), ("peft", "s"), ("lora_ops", "^"), ("lora_ops prepack", "v")):
                points = [(2 * r["M"] / size, r["gflops"]) for r in rows if r["side"] == side]
                ax.plot(*zip(*points, strict=True), marker, label="F.linear, no LoRA" if side == "linear" else side, alpha=0.8)
            ax.set(xscale="log", yscale="log", title=f"forward, {dtype}: peak {peak:.0f} GFLOP/s, read {bandwidth:.0f} GB/s")
            ax.set_xlabel("flops per byte of weight (2 M / bytes per element)")
            ax.set_ylabel("GFLOP/s")
            ax.grid(alpha=0.3, which="both")
            ax.legend()
        figure.tight_layout()
        for suffix in ("png", "svg"):
            with written(out / f"roofline.{suffix}") as temporary:
                figure.savefig(temporary, format=suffix, dpi=120)
        plt.close(figure)


def replace_in_readme(root: Path, name: str, table: str) -> None:
    """What lies between the marks <!-- name:begin --> and <!-- name:end -->."""
    readme, begin, end = root / "README.md", f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, rest = readme.read_text().split(begin)
    with written(readme) as temporary:
        temporary.write_text(f"{head}{begin}\n{table}{end}{rest.split(end)[1]}")


class written:  # noqa: N801  (reads as a verb)
    """A temporary path that takes the real name once the block has ended well."""

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, path.with_name(path.name + ".tmp")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)

"""From bench_nf4.py's timings to a table, a CSV, a figure of time over M and the README."""

import csv
import platform
from pathlib import Path

import torch
from report import replace_in_readme, written
from sides import Case
from sides_4bit import DENSE, INT4, LINEAR, NF4, PEFT, PREPACK, THEIRS, THEIRS_EVAL

import lora_ops

ORDER = (LINEAR, DENSE, PREPACK, NF4, THEIRS, THEIRS_EVAL, PEFT, INT4)


class Results4Bit:
    """One row per case and side."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.bits: dict[str, float] = {}

    def add(self, case: Case, backward: bool, seconds: dict[str, float], bits: dict[str, float]) -> None:
        self.bits |= bits
        for side in (side for side in ORDER if side in seconds):
            self.rows.append(
                {
                    "pass": "forward+backward" if backward else "forward",
                    "dtype": str(case.dtype).removeprefix("torch."),
                    "M": case.M,
                    "K": case.K,
                    "N": case.N,
                    "r": case.r,
                    "side": side,
                    "ms": seconds[side] * 1e3,
                    "bits_per_weight": bits.get(side),
                    "speedup_over_linear": seconds[LINEAR] / seconds[side],
                }
            )

    def report(self, root: Path, update_readme: bool) -> str:
        out = root / "bench_out"
        out.mkdir(exist_ok=True)
        with written(out / "nf4.csv") as temporary, temporary.open("w", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        self._figure(out)
        table = self._table()
        if update_readme:
            replace_in_readme(root, "bench-nf4", table)
        return f"\n{table}\nwritten: {out / 'nf4.csv'}, {out / 'nf4.png'}\n"

    def _cases(self) -> dict[tuple, dict[str, float]]:
        """ms by side, by pass, dtype, M, K, N and r."""
        cases: dict[tuple, dict[str, float]] = {}
        for row in self.rows:
            cases.setdefault(tuple(row[k] for k in ("pass", "dtype", "M", "K", "N", "r")), {})[row["side"]] = row["ms"]
        return cases

    def _table(self) -> str:
        bits = ", ".join(f"{side} {n:.2f}" for side, n in self.bits.items())
        shape = " x ".join(str(self.rows[0][k]) for k in "KN")
        lines = [
            f"{platform.machine()}, {lora_ops.build_info()['isa']}, {torch.get_num_threads()} thread(s), torch "
            f"{torch.__version__}; {shape}. Milliseconds, minimum of many rounds, all sides taking turns. With LoRA, r = "
            f"{self.rows[0]['r']}: lora_ops and PEFT. Bits per weight: {bits}.",
            "",
            f"| pass | x | M | {' | '.join(ORDER)} | NF4 over F.linear | NF4 / dense |",
            "|" + "---|" * (len(ORDER) + 5),
        ]
        for (passed, dtype, M, *_), ms in self._cases().items():
            name = dtype.replace("float32", "fp32").replace("bfloat16", "bf16")
            times = " | ".join(f"{ms[side]:.2f}" if side in ms else "" for side in ORDER)
            dense = min(ms[DENSE], ms.get(PREPACK, ms[DENSE]))
            lines.append(f"| {passed} | {name} | {M} | {times} | {ms[LINEAR] / ms[NF4]:.2f} x | {ms[NF4] / dense:.2f} |")
        return "\n".join(lines) + "\n"

    def _figure(self, out: Path) -> None:
        """Time over M, and below it the time relative to the bare dense layer's."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        rows = [r for r in self.rows if r["dtype"] == "bfloat16" and r["pass"] == "forward"]
        if not rows:
            return
        figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 9), height_ratios=[3, 2], layout="constrained")
        for side, marker in zip(ORDER, "os^DvP*X", strict=True):
            points = [(r["M"], r["ms"], 1 / r["speedup_over_linear"]) for r in rows if r["side"] == side]
            M, ms, relative = zip(*points, strict=True)
            style = {"marker": marker, "label": side, "lw": 2.5 if side == NF4 else 1.2, "alpha": 0.9}
            top.plot(M, ms, **style)
            bottom.plot(M, relative, **style)
        K, N, r = (rows[0][k] for k in "KNr")
        top.set(xscale="log", yscale="log", ylabel="ms", title=f"forward, bf16, {K} x {N}, r = {r}")
        bottom.set(xscale="log", yscale="log", ylabel="time / time of F.linear in bf16", xlabel="M, rows of x")
        bottom.set_xticks(sorted({r["M"] for r in rows}), labels=[str(m) for m in sorted({r["M"] for r in rows})])
        bottom.minorticks_off()
        top.legend()
        for ax in (top, bottom):
            ax.grid(alpha=0.3)
        for suffix in ("png", "svg"):
            with written(out / f"nf4.{suffix}") as temporary:
                figure.savefig(temporary, format=suffix, dpi=120)
        plt.close(figure)

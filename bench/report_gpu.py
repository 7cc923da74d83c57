"""From the gpu.csv of bench_gpu.py to a table and a figure."""

import csv
from pathlib import Path

from report import written

STYLES = {
    "eager": "C1s-",
    "fused": "C0^-",
    "split": "C0o-",
    "NF4 eager": "C3s--",
    "NF4 fused": "C2^--",
    "NF4 split": "C2o--",
}
PASSES = {"f": "forward", "f+b": "forward + backward"}
Case = tuple[str, int, int, str]  # dtype of A and B, K, N, pass
Times = dict[str, dict[int, float]]  # µs in a graph, by side and M


def read(file: Path) -> dict[Case, Times]:
    cases: dict[Case, Times] = {}
    with file.open(newline="") as f:
        for row in csv.DictReader(f):
            times = cases.setdefault((row["adapter"], int(row["K"]), int(row["N"]), row["pass"]), {})
            times.setdefault(row["side"], {})[int(row["M"])] = float(row["us"])
    return cases


def table(cases: dict[Case, Times]) -> str:
    """µs, of the layer that comes first, with each dtype of adapters."""
    first = next(iter(cases))[1:3]
    sides = ["F.linear", *STYLES]
    lines = [f"| A and B | pass | M x K x N | {' | '.join(sides)} |", "|---" * (3 + len(sides)) + "|"]
    for (adapter, K, N, which), times in cases.items():
        if first != (K, N):
            continue
        for M in times["F.linear"]:
            cells = " | ".join(f"{times[side][M]:.1f}" for side in sides)
            lines.append(f"| {adapter} | {PASSES[which]} | {M} x {K} x {N} | {cells} |")
    return "\n".join(lines)


def plot(cases: dict[Case, Times], out: Path) -> None:
    """out.png and out.svg: each side's time in multiples of F.linear's, over M."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "gpu", "svg.fonttype": "none"})  # the same bytes every time, and few
    import matplotlib.pyplot as plt

    layers, passes = list(dict.fromkeys(c[:3] for c in cases)), list(dict.fromkeys(c[3] for c in cases))
    size = (4 * len(layers), 3.6 * len(passes) + 0.6)
    chart, axes = plt.subplots(
        len(passes), len(layers), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for row, which in zip(axes, passes, strict=True):
        row[0].set_ylabel("time / time of F.linear in bf16")
        for ax, (adapter, K, N) in zip(row, layers, strict=True):
            times = cases[adapter, K, N, which]
            linear = times["F.linear"]
            ax.axhline(1.0, color="black", lw=1.5)
            for side, style in STYLES.items():
                ax.plot(list(linear), [times[side][M] / linear[M] for M in linear], style, label=side, markersize=4, lw=1.2)
            ax.set(xscale="log", title=f"{PASSES[which]}, K = {K}, N = {N}\nA and B in {adapter}")
            ax.set_xticks(list(linear), labels=[str(M) for M in linear])
            ax.minorticks_off()
            ax.grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("M, rows of x")
    axes[0][0].set_ylim(bottom=0)
    chart.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(STYLES))
    for suffix in ("png", "svg"):
        with written(out.with_name(f"{out.name}.{suffix}")) as temporary:
            chart.savefig(temporary, format=suffix, dpi=80, metadata={"Date": None} if suffix == "svg" else None)
    plt.close(chart)

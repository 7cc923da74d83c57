"""What the papers, and texts about them, claim; what study.py measured; and whether that bears the claim out."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

from _study_cells import Row, over_seeds, pick
from _study_results import Results, better, listed, ratio_of, text, verdict

TWO_TO_FOUR = 2.0
NEGLIGIBLE, LONG_RUN = 0.03, 300  # of the time of that many steps
CLOSE = 0.01  # of accuracy
COLLAPSE = 4.0  # of a gradient's norm, over 256-fold rank
ARXIV = {
    "rsLoRA": "2312.03732", "LoRA+": "2402.12354", "LoRA-GA": "2407.05000", "PiSSA": "2404.02948", "MiLoRA": "2406.09044",
    "OLoRA": "2406.01775", "DoRA": "2402.09353", "AdaLoRA": "2303.10512",
}  # fmt: skip


@dataclass
class Claim:
    text: str
    source: str
    measured: str
    verdict: str  # "holds", "does not hold", "no difference seen" or, for what has two parts, "partly"


def lora_ga(r: Results) -> list[Claim]:
    source, lr = "LoRA-GA, arXiv:2407.05000", r.middle_lr()
    one = {name: r.at(name, lr) for name in ("LoRA", "rsLoRA", "LoRA-GA")}
    own = {name: r.of(name) for name in ("full", "LoRA", "rsLoRA", "LoRA-GA")}
    starts = {name: r.of(name, study="starts") for name in ("Gaussian", "+SO", "+GA")}
    starts |= {name: own[name] for name in ("LoRA", "LoRA-GA")}
    share = {
        part: median(row["init_s"] for row in rows) / (LONG_RUN * median(row["train_s"] / steps for row in rows))
        for part, steps, rows in (
            ("digits", len(own["LoRA-GA"][0]["curve"]) * 10, pick(r.rows, study="methods", part="digits", method="LoRA-GA")),
            ("SmolLM2", len(r.lm("LoRA-GA")[0]["curve"]), pick(r.rows, part="smollm2", method="LoRA-GA")),
        )
    }
    return [
        Claim(
            f"Converges 2 to 4 times as fast as LoRA (at one learning rate for all, {lr:.2g})",
            source,
            f"loss < 0.5 after {listed(one, 't50')} steps: "
            f"{ratio_of(one['LoRA'], one['LoRA-GA'], 't50'):.1f} times; rsLoRA, whose scaling LoRA-GA has, "
            f"{ratio_of(one['LoRA'], one['rsLoRA'], 't50'):.1f} times",
            verdict(ratio_of(one["LoRA"], one["LoRA-GA"], "t50") >= TWO_TO_FOUR),
        ),
        Claim(
            "The same, each with its own learning rate",
            source,
            f"loss < 0.1 after {listed(own, 't10')} steps: {ratio_of(own['LoRA'], own['LoRA-GA'], 't10'):.2f} times",
            verdict(ratio_of(own["LoRA"], own["LoRA-GA"], "t10") >= TWO_TO_FOUR),
        ),
        Claim(
            "Its initialisation takes a negligible share of the time",
            source,
            ", ".join(f"{part} {value:.1%}" for part, value in share.items())
            + f" of the time of {LONG_RUN} steps, which are short here (128 digits; 64 tokens): of longer ones it is less "
            f"(holds: below {NEGLIGIBLE:.0%})",
            verdict(*(value < NEGLIGIBLE for value in share.values())),
        ),
        Claim(
            "Stable scale (+SO) and gradient directions (+GA) help, each alone; a Gaussian A alone does not",
            source,
            f"loss < 0.1 after {listed(starts, 't10')} steps, own learning rates",
            verdict(
                better(starts["+SO"], own["LoRA"], "t10"),
                better(starts["+GA"], own["LoRA"], "t10"),
                better(starts["Gaussian"], own["LoRA"], "t10") != "holds",
            ),
        ),
    ]


def loraplus(r: Results) -> list[Claim]:
    best, gains = {}, {}
    ratios = pick(r.rows, study="ratio")
    for width in sorted({row["width"] for row in ratios}):
        at = {ratio: r.of("LoRA+", "loss", study="ratio", width=width, ratio=ratio) for ratio in {x["ratio"] for x in ratios}}
        best[width] = min(at, key=lambda ratio: over_seeds(at[ratio], "loss")[0])
        gains[width] = ratio_of(at[1], at[best[width]], "loss")
    found = ", ".join(f"{width}: {best[width]:.0f} (loss / {gains[width]:.1f})" for width in best)
    source = "LoRA+, arXiv:2402.12354"
    return [
        Claim("B should learn faster than A", source, f"best ratio by width {found}", verdict(*(b > 1 for b in best.values()))),
        Claim(
            "The best ratio grows with the width",
            source,
            f"{', '.join(f'{b:.0f}' for b in best.values())} over widths {', '.join(map(str, best))}",
            verdict(list(best.values()) == sorted(best.values()) and max(best.values()) > min(best.values())),
        ),
    ]


def rslora(r: Results) -> list[Claim]:
    source, lr = "rsLoRA, arXiv:2312.03732", r.middle_lr()
    ranks = sorted({row["r"] for row in pick(r.rows, study="scaling")})
    norms = {
        name: [over_seeds(r.at(name, lr, study="scaling", r=rank), "gradient")[0] for rank in ranks]
        for name in ("LoRA", "rsLoRA")
    }
    losses = {name: [text(r.at(name, lr, study="scaling", r=rank), "loss") for rank in (ranks[0], ranks[-1])] for name in norms}
    tuned = {name: r.of(name, "loss", study="scaling", r=ranks[-1]) for name in norms}
    at_one = [r.at(name, lr, study="scaling", r=ranks[-1]) for name in ("rsLoRA", "LoRA")]
    fall = {name: max(n) / min(n) for name, n in norms.items()}
    return [
        Claim(
            "With alpha / r gradients collapse as r grows, with alpha / √r they do not",
            source,
            f"norm at the first step, r = {', '.join(map(str, ranks))}: alpha / r "
            f"{', '.join(f'{n:.3g}' for n in norms['LoRA'])}; alpha / √r {', '.join(f'{n:.3g}' for n in norms['rsLoRA'])}",
            verdict(fall["LoRA"] > COLLAPSE, fall["rsLoRA"] < COLLAPSE),
        ),
        Claim(
            f"So larger ranks learn more with alpha / √r (at one learning rate, {lr:.2g})",
            source,
            f"loss, r = {ranks[0]} and {ranks[-1]}: alpha / r {' and '.join(losses['LoRA'])}; "
            f"alpha / √r {' and '.join(losses['rsLoRA'])}",
            better(*at_one, "loss"),
        ),
        Claim(
            f"The same at r = {ranks[-1]}, each with its own learning rate",
            source,
            ", ".join(f"{name} {text(rows, 'loss')} at {rows[0]['lr']:.2g}" for name, rows in tuned.items()),
            better(tuned["rsLoRA"], tuned["LoRA"], "loss"),
        ),
    ]


def starts(r: Results) -> list[Claim]:
    def stable(name: str) -> float:
        rows = pick(r.rows, study="starts", method=name)
        return max((lr for lr in {row["lr"] for row in rows} if all(x["loss"] < 0.5 for x in pick(rows, lr=lr))), default=0.0)

    fast = {name: r.of(name, study="starts") for name in ("Init[A]", "Init[B]")}
    acc = {name: r.of(name, "val", study="starts") for name in ("Init[A]", "Init[B]", "A only", "B only")}
    both = r.of("LoRA", "val")
    shown = {"LoRA": both} | {name: acc[name] for name in ("A only", "B only")}
    source = "Asymmetric LoRA, arXiv:2402.16842"
    return [
        Claim(
            "Init[A] (B = 0) is better than Init[B] (A = 0)",
            "arXiv:2406.08447",
            ", ".join(f"{name} {text(fast[name], 't10')} steps, accuracy {text(acc[name], 'test')}" for name in fast),
            better(fast["Init[A]"], fast["Init[B]"], "t10"),
        ),
        Claim(
            "Init[A] bears larger learning rates",
            "arXiv:2406.08447",
            f"largest of the grid with a loss < 0.5: {', '.join(f'{name} {stable(name):.2g}' for name in fast)}",
            verdict(stable("Init[A]") > stable("Init[B]")),
        ),
        Claim(
            "Training B alone is about as good as LoRA, and better than training A alone",
            source,
            f"accuracy {listed(shown, 'test')}",
            verdict(
                over_seeds(both, "test")[0] - over_seeds(acc["B only"], "test")[0] < CLOSE,
                better(acc["B only"], acc["A only"], "test", 1),
            ),
        ),
        Claim(
            "Training B alone generalises better out of distribution",
            source,
            f"accuracy on digits shifted by a pixel {listed(shown, 'shifted')}; on the old task {listed(shown, 'old')}",
            verdict(better(acc["B only"], both, "shifted", 1), better(acc["B only"], acc["A only"], "shifted", 1)),
        ),
    ]


def others(r: Results) -> list[Claim]:
    fa, lora = r.of("LoRA-FA", "val"), r.of("LoRA", "val")
    ranks = {rank: r.of("LoRA", "val", study="rank", r=rank) for rank in sorted({x["r"] for x in pick(r.rows, study="rank")})}
    top = max(over_seeds(rows, "test")[0] for rows in ranks.values())
    enough = min(rank for rank, rows in ranks.items() if over_seeds(rows, "test")[0] > top - CLOSE)
    signs = {name: pick(r.rows, study="magnitude", method=name) for name in ("full", "LoRA", "DoRA")}
    means = {name: over_seeds(rows, "correlation")[0] for name, rows in signs.items()}
    return [
        Claim(
            "Changes of magnitude and direction correlate: -0.62 in full fine-tuning, 0.83 in LoRA, -0.31 in DoRA",
            "DoRA, arXiv:2402.09353",
            ", ".join(f"{name} {text(rows, 'correlation')}" for name, rows in signs.items()),
            verdict(means["full"] < 0, means["LoRA"] > 0, means["DoRA"] < 0),
        ),
        Claim(
            "Freezing A halves what trains and keeps less for the backward, for similar quality",
            "LoRA-FA, arXiv:2308.03303",
            f"parameters {fa[0]['params']:.0f} of {lora[0]['params']:.0f}, kept {fa[0]['saved_kib']:.0f} of "
            f"{lora[0]['saved_kib']:.0f} KiB, accuracy {text(fa, 'test')} and LoRA {text(lora, 'test')}",
            verdict(
                fa[0]["saved_kib"] < lora[0]["saved_kib"] and fa[0]["params"] < 0.6 * lora[0]["params"],
                over_seeds(lora, "test")[0] - over_seeds(fa, "test")[0] < CLOSE,
            ),
        ),
        Claim(
            "A low rank is enough",
            "LoRA, arXiv:2106.09685",
            f"accuracy by r: {listed(ranks, 'test')}; within {CLOSE} of the best from r = {enough}",
            verdict(enough <= 8),
        ),
    ]


def against_lora(r: Results) -> list[Claim]:
    found = []
    accurate, lm = r.of("LoRA", "val"), r.lm("LoRA")
    for name, arxiv in ARXIV.items():
        theirs, fast = r.lm(name), r.of(name)
        parts = better(fast, r.of("LoRA"), "t10"), better(theirs, lm, "loss")
        found.append(
            Claim(
                f"{name} is better than LoRA",
                f"arXiv:{arxiv}",
                f"digits: {text(fast, 't10')} steps (LoRA {text(r.of('LoRA'), 't10')}), accuracy "
                f"{text(r.of(name, 'val'), 'test')} ({text(accurate, 'test')}); SmolLM2: {text(theirs, 'loss', 4)} "
                f"({text(lm, 'loss', 4)}). Faster on digits: {parts[0]}; better on SmolLM2: {parts[1]}",
                verdict(*parts),
            )
        )
    vera, of_lm = r.of("VeRA", "val"), r.lm("VeRA")
    measured = (
        f"{vera[0]['params']:.0f} of {accurate[0]['params']:.0f} parameters, accuracy {text(vera, 'test')} and LoRA "
        f"{text(accurate, 'test')}; SmolLM2 {of_lm[0]['params']:.0f} of {lm[0]['params']:.0f}, loss "
        f"{text(of_lm, 'loss', 4)} and {text(lm, 'loss', 4)}"
    )
    similar = over_seeds(accurate, "test")[0] - over_seeds(vera, "test")[0] < CLOSE, ratio_of(of_lm, lm, "loss") < 1 + CLOSE
    return [
        *found,
        Claim("VeRA trains far fewer parameters for similar quality", "arXiv:2310.11454", measured, verdict(*similar)),
    ]


CLAIMS: tuple[Callable[[Results], list[Claim]], ...] = (lora_ga, loraplus, rslora, starts, others, against_lora)


def claims(rows: Iterable[Row]) -> list[Claim]:
    results = Results(rows)
    return [claim for of in CLAIMS for claim in of(results)]

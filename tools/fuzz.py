"""Long fuzzing; tests/test_fuzz.py is the short form.

    python tools/fuzz.py operators --count 50000     calls of the public operators (tests/fuzzing.py)
    python tools/fuzz.py readers --count 1000000     adapter files and 4-bit states (tests/reading.py), led by coverage

The first thing that is wrong is printed, with what it takes to see it again, and ends the run. The readers need atheris: pip
install -e '.[fuzz]'.
"""

import argparse
import os
import random
import resource
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).parent.parent.resolve()
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
GROWTH = 64  # MiB that a run may grow by, behind its first tenth


def operators(count: int, seed: int, _: str | None) -> None:
    from fuzzing import Call, Spec, specs
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as seeded

    bar = tqdm(total=count, desc="operators")

    @seeded(seed)
    @settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(specs())
    def check(spec: Spec) -> None:
        bar.update()
        Call(spec).check()

    check()
    bar.close()


def readers(count: int, seed: int, corpus: str | None) -> None:
    import atheris

    with atheris.instrument_imports(include=["lora_ops.adapters", "lora_ops.quant", "json"]):
        import lora_ops  # noqa: F401
    import torch
    from reading import Reader

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    reader, bar, begun = Reader(), tqdm(total=count, desc="readers", mininterval=5), [0]
    folder = Path(corpus or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(reader.seeds()):
        reader.one(data)
        (folder / f"seed{i}").write_bytes(data)

    def one(data: bytes) -> None:
        reader.one(data)
        bar.update()
        if bar.n == count // 10:
            begun[0] = resident()
        if bar.n == count:
            bar.close()
            grown = resident() - begun[0]
            print(f"{count} executions, {grown} MiB more than after the first tenth", flush=True)
            assert grown < GROWTH, "memory is leaked"

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        """Files and JSON by libFuzzer; edits of valid ones are drawn anew, which are never too long to be read."""
        if len(data) < 3 or data[0] % 8 not in (2, 3, 6, 7) or seed % 4 == 0:
            return atheris.Mutate(data, most)
        drawn = random.Random(seed)
        return data[:1] + drawn.randbytes(1 + 3 * drawn.choice((1, 1, 1, 2, 2, 3)))

    options = [f"-runs={count}", f"-seed={seed}", "-timeout=300", "-rss_limit_mb=6000", "-max_len=4096", "-verbosity=0"]
    options += [f"-artifact_prefix={folder}/"]  # what fails, not into the user's folder
    atheris.Setup([sys.argv[0], *options, str(folder)], one, custom_mutator=mutate)
    atheris.Fuzz()


def resident() -> int:
    """MiB of memory, or the most there was where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") >> 20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["operators", "readers"])
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", help="a folder that keeps what led readers to new code, for the next run")
    chosen: Any = parser.parse_args()
    run, usual = {"operators": (operators, 50_000), "readers": (readers, 1_000_000)}[chosen.what]
    run(chosen.count or usual, chosen.seed, chosen.corpus)


if __name__ == "__main__":
    main()

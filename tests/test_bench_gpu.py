"""What bench/bench_gpu.py makes of a CSV: the figure and the table of docs/cuda.md."""

import subprocess
import sys

from ptx.build import REPOSITORY


def test_figure_and_table_of_the_measurements_in_the_docs(tmp_path):
    command = [sys.executable, "bench/bench_gpu.py", "--plot", "docs/gpu_h100.csv", str(tmp_path / "gpu")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (REPOSITORY / "docs" / "cuda.md").read_text()
    svg = (tmp_path / "gpu.svg").read_text()
    assert all(f">{side}</text>" in svg for side in ("eager", "fused", "split", "NF4 eager", "NF4 fused", "NF4 split"))
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")

"""Which path is taken: the faster one, by a clock that the tests hold, and what is remembered of it."""

import json
import threading
import warnings

import pytest

from lora_ops.cuda import path
from lora_ops.cuda.path import Choices


class Clock:
    """Says how long each path takes, and counts how often it was asked."""

    def __init__(self, fused: float, split: float):
        self.seconds, self.asked = {"fused": fused, "split": split}, 0

    def __call__(self, run):
        self.asked += 1
        return self.seconds[run()]


def run(which: str) -> str:
    return which


@pytest.fixture(autouse=True)
def nothing_is_forced(monkeypatch):
    monkeypatch.delenv("LORA_OPS_CUDA_PATH", raising=False)


@pytest.mark.parametrize(("fused", "split", "faster"), [(1.0, 2.0, "fused"), (2.0, 1.0, "split")])
def test_the_faster_one_is_taken_and_timed_once(fused, split, faster, tmp_path):
    clock, file = Clock(fused, split), tmp_path / "new" / "paths.json"
    choices = Choices(clock, "a GPU", file)
    assert [choices.choose("op M=64", 64, run) for _ in range(3)] == [faster] * 3
    assert clock.asked == 2
    assert choices.known() == {"op M=64": faster}
    other = Clock(0.0, 0.0)  # another process: from the file
    assert Choices(other, "a GPU", file).choose("op M=64", 64, run) == faster
    assert other.asked == 0
    assert [p.name for p in file.parent.iterdir()] == ["paths.json"]


def test_machines_and_processes_keep_what_others_wrote(tmp_path):
    file = tmp_path / "paths.json"
    one, two = Choices(Clock(1, 2), "one", file), Choices(Clock(2, 1), "two", file)
    again = Choices(Clock(2, 1), "one", file)  # has read before the others wrote
    one.choose("a", 64, run)
    two.choose("a", 64, run)
    again.choose("b", 64, run)
    assert Choices(Clock(0, 0), "one", file).known() == {"a": "fused", "b": "split"}
    assert Choices(Clock(0, 0), "two", file).known() == {"a": "split"}


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", '{"format": 1}', '{"format": 2, "paths": {}}',
        '{"format": 1, "paths": {"a GPU": {"k": "fast"}}}',
        '{"format": 1, "paths": {"a GPU": []}}', '{"format": 1, "paths": {"other": {"k": 3}}}', "\x00\x01",
    ],
)  # fmt: skip
def test_a_damaged_file_is_ignored_whole_and_replaced(content, tmp_path):
    file = tmp_path / "paths.json"
    file.write_text(content)
    with pytest.warns(UserWarning, match="is ignored") as warned:
        choices = Choices(Clock(1, 2), "a GPU", file)
    assert len(warned) == 1
    assert choices.known() == {}
    assert choices.choose("k", 64, run) == "fused"
    assert json.loads(file.read_text())["paths"]["a GPU"] == {"k": "fused"}


def test_a_folder_that_cannot_be_written_costs_a_timing(tmp_path):
    (tmp_path / "file").write_text("")
    choices = Choices(Clock(1, 2), "a GPU", tmp_path / "file" / "paths.json")
    assert choices.choose("k", 64, run) == "fused"
    assert Choices(Clock(1, 2), "a GPU", None).choose("k", 64, run) == "fused"


def test_a_forced_path_is_not_timed(monkeypatch, tmp_path):
    clock = Clock(1, 2)
    choices = Choices(clock, "a GPU", tmp_path / "paths.json")
    for forced in path.PATHS:
        monkeypatch.setenv("LORA_OPS_CUDA_PATH", forced)
        assert choices.choose("k", 64, run) == forced
    assert clock.asked == 0 and choices.known() == {}
    monkeypatch.setenv("LORA_OPS_CUDA_PATH", "auto")
    assert choices.choose("k", 64, run) == "fused"
    monkeypatch.setenv("LORA_OPS_CUDA_PATH", "cublas")
    with pytest.raises(ValueError, match=r'LORA_OPS_CUDA_PATH is "cublas"; it may be fused, split or auto'):
        choices.choose("k", 64, run)


def test_without_timing_a_default_is_taken_and_forgotten(tmp_path):
    """As during the capture of a CUDA graph."""
    clock = Clock(2, 1)
    choices = Choices(clock, "a GPU", tmp_path / "paths.json")
    assert choices.choose("k", 64, run, may_time=False) == "fused"
    assert choices.choose("k", 65, run, may_time=False) == "split"
    assert clock.asked == 0 and choices.known() == {}
    assert choices.choose("k", 64, run) == "split"
    assert choices.choose("k", 64, run, may_time=False) == "split"  # known by now


def test_a_path_that_fails_is_not_taken(tmp_path):
    def no_memory(which):
        if which in failing:
            raise RuntimeError(f"{which}: out of memory")
        return which

    choices = Choices(Clock(1, 2), "a GPU", None)
    failing = {"fused"}
    assert choices.choose("k", 64, no_memory) == "split"
    failing = {"fused", "split"}
    with pytest.raises(RuntimeError, match="fused: out of memory"):
        choices.choose("other", 64, no_memory)
    assert choices.known() == {"k": "split"}


def test_two_threads_time_once():
    """The second comes while the first is timing, and is told to wait by nobody but the lock."""
    clock, paths, timing, second_is_here = Clock(1, 2), [], threading.Event(), threading.Event()
    choices = Choices(clock, "a GPU", None)

    def slowly(which):
        timing.set()
        second_is_here.wait(timeout=0.2)  # nobody comes in where there is a lock
        return which

    def first():
        paths.append(choices.choose("k", 64, slowly))

    def second():
        def run_too(which):
            second_is_here.set()
            return which

        timing.wait()
        paths.append(choices.choose("k", 64, run_too))

    threads = [threading.Thread(target=target) for target in (first, second)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert paths == ["fused", "fused"] and clock.asked == 2


def test_buckets_are_powers_of_two():
    assert [path.bucket(M) for M in (1, 2, 3, 4, 5, 64, 65, 4096)] == [1, 2, 4, 4, 8, 64, 128, 4096]


def test_the_cache_lies_in_the_users_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("LORA_OPS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert path.cache_file() == tmp_path / "lora_ops" / "cuda_paths.json"
    monkeypatch.setenv("LORA_OPS_CACHE", str(tmp_path / "mine"))
    assert path.cache_file() == tmp_path / "mine" / "cuda_paths.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LORA_OPS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert path.cache_file() == tmp_path / "home" / ".cache" / "lora_ops" / "cuda_paths.json"

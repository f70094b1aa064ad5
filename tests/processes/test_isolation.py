"""Tasks in a process of their own: results, errors, crashes, hangs, and what is left behind."""

import time
from pathlib import Path

import pytest

from nnunet_deform.processes.isolation import Outcome, Task, run_isolated


def pid_is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_results_and_errors_in_turn():
    tasks = [Task("math:hypot", [3, 4]), Task("math:sqrt", [-1]), Task("math:hypot", [5, 12])]
    first, second, third = run_isolated(tasks, 60)
    assert (first, third) == (Outcome(result=5.0), Outcome(result=13.0))
    assert second.result is None
    assert second.error.startswith("ValueError: ")


def test_after_an_error_there_is_a_new_process():
    pid = Task("os:getpid")
    first, second, _, third = run_isolated([pid, pid, Task("math:sqrt", [-1]), pid], 60)
    assert first == second != third


def test_a_crash_is_told_from_its_neighbours_and_the_rest_goes_on():
    tasks = [Task("os:getpid"), Task("os:kill", [0, 0]), Task("os:abort"), Task("os:getpid"), Task("os:_exit", [3])]
    before, harmless, crash, after, ended = run_isolated(tasks, 60)
    assert harmless == Outcome()
    assert crash.error == "ended its process by SIGABRT"
    assert after.error is None
    assert before.result != after.result
    assert ended.error == "ended its process with code 3"


def test_the_last_word_of_a_process_that_ends_is_kept():
    program = "import sys; print('a'); print('CUDA error: an illegal memory access', file=sys.stderr); sys.exit(7)"
    (outcome,) = run_isolated([Task("builtins:exec", [program])], 60)
    assert outcome.error == "ended its process with code 7 (CUDA error: an illegal memory access)"


def test_a_hang_is_ended_with_all_that_it_started(tmp_path: Path):
    """The limit is each task's own; the process and its child are gone afterwards."""
    children = tmp_path / "children"
    hang = (
        "import os, subprocess, time; child = subprocess.Popen(['sleep', '600']); "
        f"open({str(children)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}'); time.sleep(600)"
    )
    started = time.monotonic()
    outcomes = list(run_isolated([Task("time:sleep", [1]), Task("builtins:exec", [hang]), Task("os:getpid")], 4))
    assert time.monotonic() - started < 30
    assert [outcome.error for outcome in outcomes] == [None, "did not end within 4 s", None]
    for pid in map(int, children.read_text().split()):
        deadline = time.monotonic() + 10
        while pid_is_alive(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not pid_is_alive(pid)


def test_output_does_not_get_between_the_results(capfd: pytest.CaptureFixture):
    (outcome,) = run_isolated([Task("builtins:print", ['{"result": 1}'])], 60)
    assert outcome == Outcome()
    assert capfd.readouterr() == ("", "")


def test_the_working_directory_is_not_imported_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "math.py").write_text("")
    (tmp_path / "json.py").write_text("raise SystemExit('mine')")
    monkeypatch.chdir(tmp_path)
    (outcome,) = run_isolated([Task("statistics:mean", [[1, 2, 3]])], 60)
    assert outcome == Outcome(result=2)


def test_what_this_process_imports_from_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "of_mine.py").write_text("def twice(x): return 2 * x")
    monkeypatch.syspath_prepend(str(tmp_path))
    (outcome,) = run_isolated([Task("of_mine:twice", [4])], 60)
    assert outcome == Outcome(result=8)


def test_an_iteration_that_is_left_ends_the_process():
    outcomes = run_isolated([Task("os:getpid"), Task("time:sleep", [600])], 600)
    pid = next(outcomes).result
    assert pid_is_alive(pid)
    outcomes.close()
    assert not pid_is_alive(pid)

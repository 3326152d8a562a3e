import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from prune2deploy.errors import BuildError, MeasureError
from prune2deploy.measure import child

SPEC = {"engines": [{"path": "/engines/net.onnx"}], "threads": 1}


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Make a module that runs in place of the worker."""

    def make(code: str) -> str:
        (tmp_path / "standin.py").write_text(textwrap.dedent(code))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return "standin"

    return make


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_result_arrives_and_chatter_is_ignored(worker):
    module = worker(
        """
        print("a library says hello")
        print('{"alive": true}')
        print('[1, 2]')
        print('{"result": {"answer": 42}}')
        """
    )
    assert child.run(SPEC, 20, module) == {"answer": 42}


def test_an_error_of_the_child_is_raised_here_as_what_it_was(worker):
    module = worker("""print('{"error": "BuildError", "message": "no such node"}')""")
    with pytest.raises(BuildError, match="no such node"):
        child.run(SPEC, 20, module)


def test_a_segmentation_fault_names_engine_and_signal(worker):
    module = worker(
        """
        import os, signal, sys
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
        """
    )
    with pytest.raises(MeasureError, match="SIGSEGV") as caught:
        child.run(SPEC, 20, module)
    assert "/engines/net.onnx" in str(caught.value)
    assert "last words" in str(caught.value)


def test_a_python_crash_shows_its_traceback(worker):
    module = worker("raise RuntimeError('broken driver')")
    with pytest.raises(MeasureError, match="broken driver"):
        child.run(SPEC, 20, module)


def test_a_child_that_hangs_is_killed(worker, tmp_path):
    module = worker(
        f"""
        import os, time
        open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
        time.sleep(600)
        """
    )
    with pytest.raises(MeasureError, match="got no further within 2 s"):
        child.run(SPEC, 2, module)
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_slow_child_that_gets_on_is_waited_for(monkeypatch):
    """Every word of it begins the time anew; what a library prints does not."""
    said = ["hello", *('{"alive": true}' for _ in range(9)), '{"result": {}}']
    lines, waited, now = [line.encode() for line in said], [], itertools.count(0.0, 6.0)

    class Lines:
        def get(self, timeout):
            waited.append(timeout)
            return lines.pop(0)

    monkeypatch.setattr(child.queue, "Queue", Lines)
    monkeypatch.setattr(child.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(child.time, "monotonic", lambda: next(now))
    assert child._listen(SimpleNamespace(stdout=object()), 20.0) == {}
    assert waited == [14.0, 8.0, *[14.0] * 9]


def test_what_a_child_started_neither_outlives_it_nor_holds_us_up(worker, tmp_path):
    """A forked process keeps the child's standard output open."""
    module = worker(
        f"""
        import os, time
        if os.fork() == 0:
            open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
            time.sleep(600)
        while not os.path.exists({str(tmp_path / "pid")!r}):
            time.sleep(0.01)
        print('{{"result": {{"answer": 42}}}}', flush=True)
        os._exit(0)
        """
    )
    started = time.monotonic()
    assert child.run(SPEC, 60, module) == {"answer": 42}
    assert time.monotonic() - started < 60
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10  # its new parent takes its status in its own time
    while time.monotonic() < deadline and not ended(pid):
        time.sleep(0.05)
    assert ended(pid)


def ended(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_an_interrupt_kills_the_child(worker, tmp_path, monkeypatch):
    module = worker(
        f"""
        import os, time
        open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
        print('{{"alive": true}}', flush=True)
        time.sleep(600)
        """
    )

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(child, "_message", interrupt)
    with pytest.raises(KeyboardInterrupt):
        child.run(SPEC, 60, module)
    assert not alive(int((tmp_path / "pid").read_text()))


def test_the_worker_ends_when_its_parent_is_killed_even_while_it_still_imports(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "order").mkdir()
    order = tmp_path / "order" / "spec.json"
    order.write_text(json.dumps({"scratch": [str(tmp_path / "scratch")]}))
    (tmp_path / "slow.py").write_text(  # as far as this has come, nothing of ours is imported
        "import os, sys, time\n"
        "assert not [name for name in sys.modules if name.startswith('prune2deploy')]\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    code = (
        "import subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from prune2deploy import watched\n"
        "line = watched.command('slow', Path(sys.argv[1]))\n"
        "subprocess.Popen(line, stdin=subprocess.PIPE)\n"
        "time.sleep(600)\n"
    )
    path = os.pathsep.join([str(Path(child.__file__).parents[2]), str(tmp_path)])
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(order)], env={**os.environ, "PYTHONPATH": path}
    )
    pid_file = tmp_path / "pid"
    deadline = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pid = int(pid_file.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
    assert not (tmp_path / "scratch").exists()
    assert not order.parent.exists()

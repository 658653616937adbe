"""What a run does with Ray that needs no Ray: limits, causes, signals, and who is left over."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zpipe.schemas import ray_session as module
from zpipe.schemas import reaper
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.ray_session import cause_of, ray_session, signals_as_raised, socket_path_problem


def never():
    raise AssertionError("ray is not to be imported")


def test_a_folder_too_long_for_sockets_is_named_with_the_remedy(monkeypatch):
    prefix = len("/ray//sockets/plasma_store") + len(module.SESSION_FOLDER)
    fits = "/" + "x" * (module.MAX_SOCKET_PATH - prefix - 1)
    assert socket_path_problem(fits) is None and socket_path_problem(f"{fits}/") is None
    problem = socket_path_problem(f"{fits}x")
    assert problem.startswith(f"{fits}x is too long") and f"at most {len(fits)} bytes" in problem
    assert "set RAY_TMPDIR to a shorter folder, such as /tmp" in problem
    assert socket_path_problem("/" + "ü" * 30) is not None  # 61 bytes, 31 characters

    monkeypatch.setenv("TMPDIR", f"{fits}x")
    assert socket_path_problem() == problem
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(ZpipeError, match=r"Ray on this machine can't be started: .*RAY_TMPDIR.*, or do without"),
        ray_session(never, None, 1, instead="do without"),
    ):
        pass
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert socket_path_problem() is None


TRACEBACK = 'ray::A.f() (pid=3)\n  File "/x/a.py", line 3, in f\n    raise ValueError\nValueError: the digest differs'
DEAD = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: A\n\tpid: 8\n"
    "The actor is dead because its worker process has died."
)
VERSIONS = (
    "Version mismatch: The cluster was started with:\n    Ray: 2.60.0\nThis process was started with:\n    Ray: 2.59.0"
)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (TRACEBACK, "ValueError: the digest differs"),
        (DEAD, "The actor is dead because its worker process has died."),
        (
            VERSIONS,
            "Version mismatch: The cluster was started with: Ray: 2.60.0 This process was started with: Ray: 2.59.0",
        ),
        ("", "RuntimeError"),
        ("no https://user:canary@host/x", "no https://..."),
    ],
)
def test_the_cause_is_told_and_not_what_happened(text, cause):
    assert cause_of(RuntimeError(text)) == cause


def test_the_innermost_exception_is_the_cause():
    try:
        try:
            raise RuntimeError(f"Last connection error: Traceback (most recent call last):\n{TRACEBACK}")
        except RuntimeError as error:
            raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379") from error
    except ConnectionError as error:
        assert cause_of(error) == "ValueError: the digest differs"


def test_a_signal_in_compiled_code_that_had_a_result_is_no_error_of_it():
    """Cython's words for a handler that raises just before a function returns."""
    told = SystemError("<cyfunction CoreWorker.wait> returned a result with an exception set")
    with pytest.raises(KeyboardInterrupt), signals_as_raised():
        raise told from KeyboardInterrupt()
    for cause in (None, ValueError("a fault")):
        with pytest.raises(SystemError), signals_as_raised():
            raise told from cause


def test_sigterm_is_handled_as_before_while_ray_starts():
    class Terminated(BaseException):
        pass

    def handle(number, frame):
        raise Terminated

    before = signal.signal(signal.SIGTERM, handle)
    try:
        with pytest.raises(Terminated), module._sigterm_kept():
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as ray.init does
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is handle
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_writes_to_the_folder_of_a_dead_parent_is_ended(tmp_path):
    """A writer that ignores signals is killed; who reads there, or writes elsewhere, is left alone."""
    folder, program = tmp_path / "session", Path(reaper.__file__)
    folder.mkdir()
    (folder / "log").touch()
    ignoring = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(99)"
    )
    parent = (
        "import subprocess, sys, os, time; "
        f"subprocess.Popen([sys.executable, {str(program)!r}, {str(folder)!r}, str(os.getpid())], "
        "stdin=subprocess.PIPE, start_new_session=True); print(flush=True); time.sleep(99)"
    )
    sleep = [sys.executable, "-c", "import time; time.sleep(99)"]
    with contextlib.ExitStack() as stack:

        def start(line, **streams):
            process = stack.enter_context(subprocess.Popen(line, **streams))
            stack.callback(process.kill)
            return process

        driver = start([sys.executable, "-c", parent], stdout=subprocess.PIPE)
        written = stack.enter_context((folder / "log").open("w"))
        writer = start([sys.executable, "-c", ignoring], stdout=subprocess.PIPE, stderr=written)
        reader = start(sleep, stdin=stack.enter_context((folder / "log").open()))
        stranger = start(sleep, stdout=stack.enter_context((tmp_path / "session-2").open("w")))
        written.close()
        driver.stdout.readline(), writer.stdout.readline()
        assert reaper.writers(str(folder), os.getpid()) == [writer.pid]
        assert reaper.writers(str(folder), writer.pid) == []
        driver.kill()
        assert writer.wait(30) == -signal.SIGKILL
        time.sleep(0.3)
        assert reader.poll() is None and stranger.poll() is None

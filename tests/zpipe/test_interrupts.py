"""A second Ctrl-C or SIGTERM ends a command at once, wherever it is blocked; two at a time are one."""

import os
import signal
import subprocess
import sys
import time

import pytest

from zpipe.interrupts import Terminated, stoppable

COMMAND = """
import ctypes, os, signal, sys, threading
from concurrent.futures import ThreadPoolExecutor
from zpipe.console import reporting

def in_open():
    open(sys.argv[1], "rb").read()

def in_foreign_code():  # which does not come back to Python for a signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    ctypes.CDLL(None).sleep(100)

def in_another_thread():  # for which Python waits at its end
    ThreadPoolExecutor().submit(in_open).result()

def in_training():
    from zpipe.train.signals import stop_flag
    with stop_flag():
        while True:
            threading.Event().wait(0.1)

def in_a_child():
    if os.fork() == 0:
        signal.pause()
    in_open()

import typer
app = typer.Typer()

@app.command()
def command(fifo: str, where: str):
    with reporting():
        print("begun", flush=True)
        globals()[where]()

app()
"""
FIRST_ENDS = {"in_open": True, "in_a_child": True, "in_foreign_code": False, "in_another_thread": False}
FIRST_ENDS |= {"in_training": False}
EXIT = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture
def blocked(tmp_path):
    """Start a command that is blocked: `blocked(where) -> Popen`."""
    os.mkfifo(tmp_path / "fifo")
    started = []

    def run(where):
        line = [sys.executable, "-c", COMMAND, str(tmp_path / "fifo"), where]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        started.append(subprocess.Popen(line, **streams))
        assert started[-1].stdout.readline() == "begun\n"
        time.sleep(0.2)
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=30)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", FIRST_ENDS)
def test_the_second_signal_ends_it(blocked, where, number):
    process = blocked(where)
    # `timeout` and shells send one to the process and one to its group.
    process.send_signal(number)
    os.killpg(process.pid, number)
    if FIRST_ENDS[where]:
        _, told = process.communicate(timeout=30)
        assert process.returncode == (130 if number == signal.SIGINT else 1)
        assert told.splitlines()[-1].startswith(("error: interrupted; ", "error: terminated; "))
        return
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert process.returncode == EXIT[number]
    assert told.splitlines()[-1] == "error: ended at once by a second signal; run the same command again to resume"
    assert "Traceback" not in told


def test_signals_are_as_before_after_a_command():
    def state():
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup)
        return wakeup, [signal.getsignal(number) for number in EXIT]

    before = state()
    with stoppable():
        assert state() != before
        with stoppable():  # a command within another one changes nothing
            pass
    assert state() == before


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "Terminated")])
def test_what_the_first_signal_raises(number, kind):
    """In a process of its own, because what watches for a second one stays."""
    script = f"""
import signal
from zpipe.interrupts import Terminated, stoppable
try:
    with stoppable():
        signal.raise_signal({int(number)})
except ({kind}) as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == kind and not done.stderr and not issubclass(Terminated, Exception)

"""Locks of torch's extension builds: what a killed run left goes, or is told; what a living one holds stays."""

import os
import subprocess
import sys
import time

import pytest

from modeling.build_locks import LONGEST_BUILD, clear_stale_locks


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu/some_op/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    return lock


def make_old(lock):
    then = time.time() - LONGEST_BUILD - 1
    os.utime(lock, (then, then))


def test_a_lock_that_nobody_holds(lock, caplog):
    clear_stale_locks()
    assert lock.exists() and f"{lock}: no process of this machine holds it." in caplog.text
    make_old(lock)
    caplog.clear()
    clear_stale_locks()
    assert not lock.exists() and "was left by a run that was killed while it compiled, and is removed." in caplog.text


def test_a_lock_that_is_held(lock, caplog):
    make_old(lock)
    code = f"file = open({str(lock)!r}); print('open', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        clear_stale_locks()
        assert lock.exists() and not caplog.records
        holder.kill()
        holder.wait()
    clear_stale_locks()
    assert not lock.exists()


def test_nothing_there(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    clear_stale_locks()
    assert not caplog.records

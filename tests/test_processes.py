"""Worker processes."""

import signal
import subprocess
import sys

PARENT = """
import multiprocessing, os, signal, time
from concurrent.futures import ProcessPoolExecutor
from lockfree.processes import begin_worker
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=begin_worker)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_ends_with_its_parent_in_the_middle_of_its_work():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        worker, _ = parent.communicate(timeout=120)  # returns when nobody is left who could write
    assert parent.returncode == -signal.SIGKILL
    assert int(worker)

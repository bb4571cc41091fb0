"""Running a function in several processes that train together."""

import multiprocessing
import os
import queue
import time
import traceback

from torch.distributed import TCPStore


def together(processes, what, *arguments, seconds=240):
    """Returns what a function of a module returns in each process; it is given the process's number first."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(processes),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }
    started = [
        context.Process(target=_do, args=(rank, environment, what, arguments, answers), daemon=True)
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    found, end = {}, time.monotonic() + seconds
    try:
        while len(found) < processes:
            try:
                rank, answer, trouble = answers.get(timeout=0.5)
            except queue.Empty:
                dead = [p.exitcode for rank, p in enumerate(started) if p.exitcode and rank not in found]
                assert not dead, f"processes ended with {dead}"
                assert time.monotonic() < end, f"only processes {sorted(found)} answered in {seconds} s"
                continue
            assert trouble is None, trouble
            found[rank] = answer
    finally:
        for process in started:
            process.kill()
            process.join()
    return [found[rank] for rank in range(processes)]


def _do(rank, environment, what, arguments, answers):
    os.environ.update(environment, RANK=str(rank))
    import torch

    torch.set_num_threads(1)
    try:
        answers.put((rank, what(rank, *arguments), None))
    except BaseException:
        answers.put((rank, None, f"in process {rank}:\n{traceback.format_exc()}"))
    answers.close()
    answers.join_thread()
    time.sleep(600)  # whoever ends first must not seem to have died; the parent ends all of them

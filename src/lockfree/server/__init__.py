"""Many workers train one model: with the barrier lock of synchronous data parallelism, or without.

How an engine drives it. One `Server` owns the weights; a `Worker` turns weights and the number of a batch into a gradient. An engine
only carries messages, and calls the server one call at a time:

    server = Server(model, optimizer=..., consistency=SSP(3), correction=DelayCompensation())
    worker = Worker(model, Batches(data, batch_size=32, seed=0), loss=...)     # one a process, or one for all in one process
    incarnation = server.join(number)               # all that are to begin together join before the first of them pulls
    pulled = server.pull(number, incarnation)       # None: wait until `server.slowest` is another; then pull again
    answer = server.push(worker.answer(pulled))     # Applied or Dropped; raises Refused: NotFinite (pull again), Gone (join again)
    server.evict(number)                            # as soon as it is known to have died; `join` of one at work replaces it at once
    torch.save(server.snapshot(), path); server.restore(torch.load(path, weights_only=True))
    server.write_to(model)                          # at the end

An engine that `train` can use is an `Engine`: it makes server, worker and milestones of a `Job`, and notes what the server tells in a
`Recorder`.

The calls may be repeated: a pull that is repeated gives the same answer until its push has come, and a push that is repeated gets the first
answer again. `Pulled.weights` belong to the server: they stay as they are until the push that answers the pull.
"""

from lockfree.server.allreduce import AllReduce
from lockfree.server.batches import Batches
from lockfree.server.cluster import Ray
from lockfree.server.core import Server
from lockfree.server.durations import Constant, Duration, Gamma, Straggler
from lockfree.server.failures import Failure, Point, ServerFailure
from lockfree.server.history import Entry, delays, entry_of
from lockfree.server.job import Engine, Job, Outcome
from lockfree.server.messages import Answer, Applied, Dropped, Gone, NotFinite, Pulled, Push, Refused
from lockfree.server.milestones import Milestones
from lockfree.server.replay import replay
from lockfree.server.simulate import Simulator
from lockfree.server.tickets import Tickets
from lockfree.server.trace import Recorder, read
from lockfree.server.train import Trained, train
from lockfree.server.worker import Gradient, Worker

__all__ = [
    "AllReduce",
    "Answer",
    "Applied",
    "Batches",
    "Constant",
    "Dropped",
    "Duration",
    "Engine",
    "Entry",
    "Failure",
    "Gamma",
    "Gone",
    "Gradient",
    "Job",
    "Milestones",
    "NotFinite",
    "Outcome",
    "Point",
    "Pulled",
    "Push",
    "Ray",
    "Recorder",
    "Refused",
    "Server",
    "ServerFailure",
    "Simulator",
    "Straggler",
    "Tickets",
    "Trained",
    "Worker",
    "delays",
    "entry_of",
    "read",
    "replay",
    "train",
]

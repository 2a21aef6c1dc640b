"""Let rank 1 receive SIGTERM before the last poll of a run, and print the signal for which this rank stops."""

import signal

import torch.distributed as dist

from training.runtime.coordinated_stop import CoordinatedStop
from training.runtime.distributed import rank

if __name__ == "__main__":
    dist.init_process_group("gloo")
    stop = CoordinatedStop()
    stop.start(2)
    stop.poll()
    if rank() == 1:
        stop.request(signal.SIGTERM)
    assert not stop.poll(), "other ranks learn of it one step later"
    stop.finish()
    print(f"rank {rank()} stops for {stop.global_signal}")
    dist.destroy_process_group()

"""A process of a distributed run ends with its own exit status, while threads of its process group still run."""

from tests.helpers import CHECKOUT, FSDP
from tests.process_pool import start_ranks

#: A strategy whose first step ends the run in rank 0, with a thread of the process group in Python code.
LEAVING = """
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from common.errors import RunError
from zclip import ZClip

reached = threading.Event()


def run_on(future):
    reached.set()
    while True:
        time.sleep(0.01)


class Leaving(ZClip):
    def step(self, *args, **kwargs):
        begun = Path("begun")
        if dist.get_rank() == 1:
            while not begun.exists():
                time.sleep(0.01)
            dist.all_reduce(torch.ones(1))
            time.sleep(600)
        work = dist.all_reduce(torch.ones(1), async_op=True)
        work.get_future().then(run_on)
        begun.touch()
        reached.wait()
        raise RunError("the run ends here")
"""


def test_error_has_its_status_while_the_process_group_has_a_thread(tiny, tmp_path):
    (tmp_path / "leaving.py").write_text(LEAVING)
    overrides, env = (*tiny, *FSDP, "clip._target_=leaving.Leaving"), {"PYTHONPATH": str(tmp_path)}
    store, (job, other) = start_ranks("train.py", *overrides, processes=2, cwd=tmp_path, env=env)
    _, errors = job.communicate(timeout=120)
    other.kill()
    other.wait()
    del store
    assert job.returncode == 3 and errors.endswith("the run ends here\n"), errors


#: A program that succeeds while a thread of its process group runs for another second.
SUCCEEDING = """
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from training.runtime.distributed import end_process, init_process_group, rank

init_process_group(gpu=False)
begun = Path("begun")
if rank() == 1:
    while not begun.exists():
        time.sleep(0.01)
    dist.all_reduce(torch.ones(1))
else:
    work = dist.all_reduce(torch.ones(1), async_op=True)
    work.get_future().then(lambda future: time.sleep(1))
    begun.touch()
print("done")
end_process(0)
"""


def test_success_is_no_abort_while_the_process_group_has_a_thread(tmp_path):
    (tmp_path / "succeeding.py").write_text(SUCCEEDING)
    env = {"PYTHONPATH": str(CHECKOUT)}
    store, jobs = start_ranks(str(tmp_path / "succeeding.py"), processes=2, cwd=tmp_path, env=env)
    ends = [job.communicate(timeout=120) for job in jobs]
    del store
    assert [job.returncode for job in jobs] == [0, 0], ends
    assert [out for out, _ in ends] == ["done\n", "done\n"], ends

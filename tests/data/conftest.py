"""Settings of the tests of the package `data`."""

import torch

torch.set_num_threads(1)  # more threads spin while they wait for each other, and take several times the CPU time

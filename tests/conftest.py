"""One thread a process: several run tests beside each other, and a fork does not survive OpenMP's threads."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

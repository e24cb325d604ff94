"""Environment variables that must be set before Triton is imported; child processes of tests inherit them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors are slower on many threads, and much slower where cores are busy

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels run on the CPU

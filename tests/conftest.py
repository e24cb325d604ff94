"""What has to stand before Triton is imported; the processes that tests start inherit it."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors are slower on many threads, and much slower where cores are busy

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels run on the CPU

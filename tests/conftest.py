"""What has to stand before torch and Triton are imported; the processes that tests start inherit it."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors are slower on many threads, and much slower where cores are busy
os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels run on the CPU

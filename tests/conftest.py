"""Tiny tensors are slower on many threads than on one, and much slower where the cores are busy."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the processes that tests start inherit it

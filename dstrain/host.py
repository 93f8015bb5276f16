"""What makes a CPU process fast, and is not torch's to decide.

Two defaults that suit short programs cost a training run a lot: glibc gives every large freed block back to the kernel
and pays page faults for the next one, and oneDNN keeps the machine code of only 1024 matrix shapes, while experts see a
new number of rows, hence a new shape, in nearly every product.
"""

import ctypes
import os
import platform

# mallopt parameters of glibc (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP_BELOW_BYTES = 1 << 30
MATMUL_SHAPES = 8192


def tune_cpu() -> None:
    """Keeps freed memory and compiled shapes for this process; the user's own settings in the environment win.

    Takes effect for oneDNN if no matrix product has run yet.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(MATMUL_SHAPES))
    if platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, KEEP_BELOW_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEEP_BELOW_BYTES)

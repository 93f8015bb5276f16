"""Settings of the process that are not torch's to decide: what makes one on a CPU fast, and keeps one on a GPU going.

Two defaults that suit short programs cost a training run a lot: glibc gives every large freed block back to the kernel
and pays page faults for the next one, and oneDNN keeps the machine code of only 1024 matrix shapes, while experts see a
new number of rows, hence a new shape, in nearly every product.

Two defaults of CUDA stop a run whose kernels wait for other processes, as NCCL's do. A kernel is loaded when it is
first used, which may wait for all that runs on the device: with a receive posted there ahead of its time, for ever. And
streams share 8 queues, in which one that could go on stands behind one that waits.

A default of torch costs a GPU memory: what its allocator once got from CUDA keeps its size, and rows of experts come in
a new number, hence a new size, in nearly every micro-batch. A freed block that is a little too small for the next one
lies idle. Segments that may grow are cut anew, and whole pages of them given back where memory runs out.
"""

import ctypes
import os
import platform

# mallopt parameters of glibc (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP_BELOW_BYTES = 1 << 30
MATMUL_SHAPES = 8192
# The most that CUDA has.
DEVICE_QUEUES = 32
# Where torch reads settings of its allocators: their present name, and former ones that it still takes.
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def tune_cpu() -> None:
    """Keeps freed memory and compiled shapes for this process; the user's own settings in the environment win.

    Takes effect for oneDNN if no matrix product has run yet.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(MATMUL_SHAPES))
    if platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, KEEP_BELOW_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEEP_BELOW_BYTES)


def tune_gpu_memory() -> None:
    """Lets segments of the allocator grow; the user's own settings of it in the environment win. Takes effect in a
    process that has not yet allocated anything on a GPU."""
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def tune_gpu() -> None:
    """For a process among others: all kernels are loaded at the start, and streams get as many queues as there are;
    the user's own settings in the environment win. Takes effect in a process that has not yet used CUDA."""
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", str(DEVICE_QUEUES))

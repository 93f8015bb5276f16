"""Without a GPU, Triton's interpreter takes the place of its compiler; this is said before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

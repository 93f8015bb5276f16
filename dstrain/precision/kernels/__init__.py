"""Triton kernels beside the plain meanings of quantize.py and its neighbours; imported only where a GPU runs them."""

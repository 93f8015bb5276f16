"""`python -m dstrain`, as torchrun calls it."""

from dstrain.cli import main

main()

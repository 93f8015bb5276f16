"""The one small interface behind which gradients are reduced and parameters updated.

    engine.expect(gradients)         every parameter will get so many gradients, by whatever backward passes
    ... backward passes ...          the engine takes each gradient when autograd has accumulated it
    engine.reduce()                  gradients are now sums over all data ranks
    engine.step(lr)                  clip by the global norm, update, refresh the compute parameters

The loss of a micro-batch is its sum of token losses divided by the token count of the *global* batch, so gradients are
summed over ranks and micro-batches, never averaged.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

from dstrain.engine.state import FlatShard, Shards


class Engine(Protocol):
    def expect(self, gradients: Mapping[str, int]) -> None:
        """Announces a step: how many gradients each parameter will get, by name. Those of a stage arrive in the order
        of the micro-batches; they are added in FP32, and a bucket may leave as soon as its last one is there."""
        ...

    def reduce(self) -> float:
        """Finishes the reduction and returns the norm of the whole gradient, before clipping."""
        ...

    def gradients(self) -> Iterator[tuple[str, FlatShard]]:
        """Between `reduce` and `step`: this rank's ranges of the summed FP32 gradients, by parameter name."""
        ...

    def step(self, lr: float) -> None:
        """Clips, updates the master weights, refreshes the compute parameters and forgets the gradients."""
        ...

    def state(self) -> Shards:
        """The live `master/<name>`, `exp_avg/<name>` and `exp_avg_sq/<name>` ranges; a load writes into them. Those of
        moments in 8 bits are FP32 copies, which the next `loaded` takes over or the next `expect` forgets."""
        ...

    def loaded(self, step: int) -> None:
        """After a load wrote into `state()`: `step` updates have been made; refresh the compute parameters."""
        ...

    def settle(self) -> None:
        """Waits until the compute parameters can be read other than through the model's forward pass."""
        ...

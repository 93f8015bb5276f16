"""Initial weights that depend on the seed and a tensor's name alone, never on the layout.

Every parameter, and every single expert, has a random stream of its own, so a rank that holds experts 12 to 15 fills
them with the very values that one process would.
"""

import zlib

import torch
from torch import Tensor, nn

from dstrain.model.moe import Experts
from dstrain.model.transformer import Transformer


def _fill(tensor: Tensor, name: str, seed: int, std: float) -> None:
    # On a CPU only the low 32 bits of a generator's seed count, so seed and name have to share them.
    generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode(), seed))
    tensor.normal_(0.0, std, generator=generator)


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Norms one, router biases zero, everything else N(0, init_std^2) (DeepSeek-V3 section 4.2)."""
    std = model.config.init_std
    for prefix, module in model.named_modules():
        if isinstance(module, nn.RMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, Experts):
            for name, stacked in module.named_parameters():
                for expert, weight in zip(module.held, stacked.unbind(), strict=True):
                    _fill(weight, f"{prefix}.{name}/{expert}", seed, std)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                _fill(parameter, f"{prefix}.{name}", seed, std)
    for _, router in model.routers():
        router.bias.zero_()

"""Balance without an auxiliary loss (DeepSeek-V3 section 2.1.2, arXiv:2408.15664).

After every step the bias of each expert moves by a fixed amount against its load in the global batch: down if it was
above the mean, up if below.
"""

import torch
from torch import Tensor


@torch.no_grad()
def update_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> None:
    """Moves `bias_E` in place; `load_E` counts the tokens that each expert received from the whole batch."""
    load = load_E.double()
    bias_E += rate * (load.mean() - load).sign().to(bias_E.dtype)

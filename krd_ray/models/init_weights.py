"""Answers with which numbers krd_ray's own networks start.

Does not seed (`registry.build_model` does) and does not touch torchvision models, which bring their own.
"""

from __future__ import annotations

from torch import nn


def init_weights(model: nn.Module) -> None:
    """Draws new weights in place, from torch's global generator.

    Convolutions: Kaiming normal, fan out, gain of ReLU. Batch norm: weight 1, bias 0.
    Linear: weight uniform in +-1 / sqrt(fan_in), bias 0, so that the first predictions are near uniform.

    Args:
        model: a module with convolutions, batch norms and linear layers.
    Source: He et al. 2015 (arXiv:1502.01852), section 2.2. Deviation: the linear layer, where the paper's
        gain would make the untrained logits sqrt(6) times larger.

    Example:
        >>> head = nn.Linear(4, 2)
        >>> init_weights(head)
        >>> head.bias.tolist(), bool(head.weight.abs().max() <= 0.5)
        ([0.0, 0.0], True)
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)

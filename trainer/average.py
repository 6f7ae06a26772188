"""An exponential moving average of the encoder's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer import parallel

_DECODER = ("decoder_", "mask_token", "feature_weights")


class EncoderAverage:
    """Averages the weights that fine-tuning starts from, sharded as they are.

    Source:
        Polyak & Juditsky 1992; as an exponential average over training steps, Tarvainen & Valpola 2017.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with the model's weights. Args: model: sharded or not; decay: of the average, in each update."""
        self._decay = decay
        self._weights = self.weights(model)
        self.tensors = {name: weight.clone() for name, weight in self._weights.items()}
        """The average, by the names of the weights: goes with a checkpoint."""

    @staticmethod
    def weights(model: nn.Module) -> dict[str, Tensor]:
        """The model's own tensors of which an average is kept, by name."""
        return {name: weight.detach() for name, weight in model.named_parameters() if not name.startswith(_DECODER)}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an update."""
        averages, weights = (
            [parallel.local(tensor) for tensor in tensors.values()] for tensors in (self.tensors, self._weights)
        )
        torch._foreach_lerp_(averages, weights, 1 - self._decay)


def ema_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Averaged weights under their names in a checkpoint."""
    return {f"ema.{name}": tensor for name, tensor in tensors.items()}

"""Batch normalisation over the batch of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that in training takes the statistics of all ranks' batches, which must be of one size.

    On one rank, and in evaluation, it is ``nn.BatchNorm2d`` to the bit. ``nn.SyncBatchNorm`` knows GPUs only.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same; statistics are fp32 under autocast."""
        if not (self.training and torch.distributed.is_available() and torch.distributed.is_initialized()):
            return super().forward(x)
        ranks = torch.distributed.get_world_size()
        wide = x.float()
        mean = all_reduce(wide.mean((0, 2, 3), keepdim=True)) / ranks
        centred = wide - mean
        variance = all_reduce(centred.square().mean((0, 2, 3), keepdim=True)) / ranks
        count = ranks * wide[:, 0].numel()
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(variance.flatten() * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        weight, bias = self.weight[:, None, None], self.bias[:, None, None]
        return (centred * (variance + self.eps).rsqrt() * weight + bias).to(x.dtype)

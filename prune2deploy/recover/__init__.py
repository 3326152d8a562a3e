"""Getting accuracy back: reconstruction of weights, BatchNorm re-estimation, training."""

from prune2deploy.recover.batchnorm import Reestimated, reestimate_batchnorm
from prune2deploy.recover.evaluate import Accuracy, evaluate
from prune2deploy.recover.finetune import Finetuned, Training, finetune
from prune2deploy.recover.options import FinetuneOptions
from prune2deploy.recover.reconstruct import Reconstructed, reconstruct

__all__ = [
    "Accuracy",
    "FinetuneOptions",
    "Finetuned",
    "Reconstructed",
    "Reestimated",
    "Training",
    "evaluate",
    "finetune",
    "reconstruct",
    "reestimate_batchnorm",
]

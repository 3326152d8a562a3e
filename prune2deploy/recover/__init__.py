"""Getting accuracy back: BatchNorm re-estimation, fine-tuning with a teacher, sparse training."""

from prune2deploy.recover.batchnorm import Reestimated, reestimate_batchnorm
from prune2deploy.recover.evaluate import Accuracy, evaluate
from prune2deploy.recover.finetune import Finetuned, FinetuneOptions, finetune

__all__ = [
    "Accuracy",
    "FinetuneOptions",
    "Finetuned",
    "Reestimated",
    "evaluate",
    "finetune",
    "reestimate_batchnorm",
]

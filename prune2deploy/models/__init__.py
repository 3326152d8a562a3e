"""Models by name: torchvision, timm, ultralytics, transformers, own factories, archives."""

from prune2deploy.models.loaded import LoadedModel
from prune2deploy.models.registry import LOADERS, load
from prune2deploy.models.weights import load_weights

__all__ = ["LOADERS", "LoadedModel", "load", "load_weights"]

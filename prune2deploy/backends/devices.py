"""Which kinds of devices this machine has, told from the file system alone: no driver is loaded."""

from __future__ import annotations

from pathlib import Path

_NVIDIA = ("nvidia[0-9]*", "nvhost-gpu", "nvgpu", "dxg")  # discrete, Jetson, WSL


def nvidia_gpu_visible(dev: Path = Path("/dev")) -> bool:
    """Whether an NVIDIA GPU is visible to this process (Linux, Jetson, WSL)."""
    return any(any(dev.glob(pattern)) for pattern in _NVIDIA)


NO_GPU = "no NVIDIA GPU is visible (/dev/nvidia* is missing)"
NO_GPU_FIX = "install the NVIDIA driver, or give the container its GPU (docker run --gpus all)"

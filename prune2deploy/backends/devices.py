"""Which device a profile means, and which kinds this machine has, told from its files alone."""

from __future__ import annotations

from pathlib import Path

from prune2deploy.errors import ConfigError
from prune2deploy.target import Target

JETSON = Path("/etc/nv_tegra_release")
"""Is there on Jetson boards, whose libraries come with JetPack."""
_NVIDIA = ("nvidia[0-9]*", "nvhost-gpu", "nvgpu", "dxg")  # discrete, Jetson, WSL


def nvidia_gpu_visible(dev: Path = Path("/dev")) -> bool:
    """Whether an NVIDIA GPU is visible to this process (Linux, Jetson, WSL)."""
    return any(any(dev.glob(pattern)) for pattern in _NVIDIA)


NO_GPU = "no NVIDIA GPU is visible (/dev/nvidia* is missing)"
NO_GPU_FIX = "install the NVIDIA driver, or give the container its GPU (docker run --gpus all)"


def device_index(target: Target) -> int:
    """Number of the GPU in the profile's ``device`` (``cuda:1``).

    Raises:
        ConfigError: It is not of that form.
    """
    kind, _, number = target.device.partition(":")
    if kind != "cuda" or not (number or "0").isdigit():
        raise ConfigError(f"{target.path}:device: found {target.device!r}, expected cuda:0")
    return int(number or 0)

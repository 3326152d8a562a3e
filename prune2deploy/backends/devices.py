"""Which device a profile means, and which kinds this machine has, told from its files alone."""

from __future__ import annotations

from collections.abc import Collection
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


CPU = "cpu"
GPU = "cuda:0"
"""Stands for every NVIDIA GPU, whatever its number."""


def require(target: Target, forms: Collection[str], user: str) -> str:
    """Return which of ``forms`` the profile's ``device`` has.

    Args:
        target: The profile.
        forms: ``CPU``, ``GPU``, or other names in small letters, whose case does not count.
        user: What needs such a device, for the message.

    Raises:
        ConfigError: It has none of them.
    """
    kind, _, number = target.device.partition(":")
    on_gpu = kind == "cuda" and (number or "0").isdigit()
    found = GPU if on_gpu else target.device.lower()
    if found not in forms:
        raise ConfigError(
            f"{target.path}:device: found {target.device!r}, expected {' or '.join(forms)} "
            f"for {user}"
        )
    return found


def device_index(target: Target) -> int:
    """Number of the GPU in the profile's ``device`` (``cuda:1``).

    Raises:
        ConfigError: It is not of that form.
    """
    require(target, (GPU,), f"backend {target.backend!r} on a GPU")
    return int(target.device.partition(":")[2] or 0)

"""What the host is and what it does meanwhile: fingerprint, noise counters, vector width.

Everything is read from the operating system; what a system does not tell is left out or zero.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

Counters = tuple[int, int, int, int, int]


def counters() -> Counters:
    """Read what disturbs this thread, as counters that only grow.

    Returns:
        Involuntary and voluntary context switches, nanoseconds spent waiting for a processor,
        microseconds during which some task of the host waited for one (pressure-stall
        information), and ticks stolen by the hypervisor. Zero where Linux does not tell.
    """
    usage = resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF))
    delay = _words("/proc/thread-self/schedstat")
    steal = _words("/proc/stat")
    return (
        usage.ru_nivcsw,
        usage.ru_nvcsw,
        int(delay[1]) if len(delay) > 1 else 0,
        _pressure(),
        int(steal[8]) if len(steal) > 8 else 0,
    )


def _words(path: str) -> list[str]:
    text = _text(path)
    return text.split("\n", 1)[0].split() if text else []


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _pressure() -> int:
    for word in _words("/proc/pressure/cpu"):
        if word.startswith("total="):
            return int(word[6:])
    return 0


def cpu_flags() -> frozenset[str]:
    """Return the CPU's feature flags as Linux names them; empty elsewhere."""
    for line in _text("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def channel_multiple_of(flags: frozenset[str]) -> int:
    """Return the width step of CPU convolution kernels for a set of CPU flags.

    Blocked kernels work on one vector of channels at a time: 16 floats with AVX-512, 8 with AVX2;
    8 is two vectors of NEON. Detected widths are a starting point, to be confirmed by measuring.

    >>> channel_multiple_of(frozenset({'avx2', 'avx512f'}))
    16
    >>> channel_multiple_of(frozenset({'asimd'}))
    8
    """
    return 16 if "avx512f" in flags else 8


def native_channel_multiple() -> int:
    """Return the width step of convolution kernels on this machine's CPU."""
    return channel_multiple_of(cpu_flags())


def fingerprint() -> dict[str, Any]:
    """Return facts that latency depends on: CPU, kernel, governor, limits, GPU, board."""
    info = {
        "machine": platform.machine(),
        "system": platform.system(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "affinity": _affinity(),
        "flags": sorted(cpu_flags() & _TELLING),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip(),
        "max_khz": _text("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").strip(),
        "cgroup_cpu": _text("/sys/fs/cgroup/cpu.max").strip(),
        "board": _text("/proc/device-tree/model").strip("\0 \n"),
        "l4t": _text("/etc/nv_tegra_release").split("\n", 1)[0],
        "power_mode": _text("/var/lib/nvpmodel/status").strip(),
        "gpu": _gpu(),
    }
    return {key: value for key, value in info.items() if value not in ("", None)}


_TELLING = frozenset(
    {"avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16"}
    | {"amx_int8", "amx_tile", "asimd", "asimddp", "asimdhp", "sve", "sve2", "i8mm"}
)
"""CPU flags that latency depends on."""


def _cpu_model() -> str:
    for line in _text("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor()


def _affinity() -> list[int]:
    if platform.system() != "Linux":
        return []
    return sorted(os.sched_getaffinity(0))


def _gpu() -> str:
    """Name, driver, power limit and clocks of the NVIDIA GPUs, as the driver's tool prints them."""
    query = "name,driver_version,power.limit,clocks.max.sm,clocks.applications.graphics"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

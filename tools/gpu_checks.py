"""Everything that needs an NVIDIA GPU, in one go: build, run, time, profile, refuse, prune.

    python tools/gpu_checks.py [--target trt ...] [--only NAME ...] [--minutes M] [--out F.json]

Checks every target that is usable here (TensorRT, TensorRT for RTX, PyTorch, ONNX Runtime, unless
told which). Each check is a process of its own with a time limit, so that a crash or a hang costs
that check alone. The JSON file, with the date, the machine's fingerprint and one entry per check,
is written anew after each; after ``--minutes`` no further check is begun, and ``--resume`` goes on
with the file where it ended. Ends with 0 if every check was made and none failed, 1 otherwise, and
3, after saying what is missing (in the file too), where no target is usable.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prune2deploy import target as targets
from prune2deploy import watched
from prune2deploy.atomic import write_text
from prune2deploy.backends import gpu_driver, registry
from prune2deploy.backends.base import Availability
from prune2deploy.target import Target

SCHEMA = 2  # 1: date, host, versions, target, checks; 2: targets by name, each with its checks
TARGETS = ("trt", "trt-rtx", "torch-cuda", "ort-cuda", "ort-trt")
SECONDS = 400.0  # of one check
LEFT = "not run"
LOG_TAIL = 3000  # characters of what a failed check printed


def load(name: str) -> Target:
    """A target for the GPU that is here."""
    found = targets.load(name)
    options = tuple((k, v) for k, v in found.options if k != "compute_capability")
    return replace(found, options=options)


def usable(name: str) -> Availability:
    """Whether a target can be checked here; what its look-up raises is a reason too."""
    try:
        target = load(name)
        known = registry.for_target(target).availability(target)
        return _knows_gpu(target) if known.usable else known
    except Exception as error:  # noqa: BLE001  the other targets still have to be checked
        return Availability(False, f"{type(error).__name__}: {error}")


def _knows_gpu(target: Target) -> Availability:
    """Whether TensorRT for RTX, which is for some generations only, knows the GPU that is here."""
    gpu = gpu_driver.facts(0)
    if target.option("module", "") != "tensorrt_rtx" or isinstance(gpu, str):
        return Availability(True)
    import tensorrt_rtx

    known = tensorrt_rtx.ComputeCapability.__members__
    if f"SM{gpu.capability}" in known:
        return Availability(True)
    return Availability(False, f"it is not for {gpu.name}, only for {', '.join(known)}")


def run_check(name: str, target: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Run one check in a process of its own; how that ends is the result."""
    started = time.perf_counter()
    answer, log = folder / "answer.json", folder / "log.txt"
    answer.unlink(missing_ok=True)
    line = [sys.executable, __file__, "--child", name, "--target", target, "--work", str(folder)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            line,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=watched.environment(),
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"nothing within {seconds:g} s"
        finally:
            _end(process)
    try:
        facts = json.loads(answer.read_text())
    except (OSError, ValueError):
        facts = {"result": "crashed", "error": f"the check ended with {code}"}
    if facts["result"] == "passed" and code != 0:  # freeing what it held
        facts |= {"result": "crashed", "error": f"it passed, and then ended with {code}"}
    if facts["result"] not in ("passed", "skipped"):
        facts["log"] = log.read_text(errors="replace")[-LOG_TAIL:]
    return {**facts, "seconds": round(time.perf_counter() - started, 2)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a check with everything that it started."""
    with contextlib.suppress(ProcessLookupError):  # all have ended already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def child(name: str, target: str, folder: Path) -> None:
    """Make one check and leave its answer in ``folder``."""
    try:
        import gpu_check_list as checks

        try:
            facts = checks.CHECKS[name].work(checks.Bench(folder, load(target)))
            answer = {"result": "passed", **facts}
        except checks.Skip as reason:
            answer = {"result": "skipped", "reason": str(reason)}
    except Exception as error:  # noqa: BLE001  whatever it raises is its result
        answer = {"result": "failed", "error": f"{type(error).__name__}: {error}"}
        traceback.print_exc()
    write_text(folder / "answer.json", json.dumps(answer, default=str))


def fingerprint() -> dict[str, Any]:
    """What the figures belong to."""
    gpu = gpu_driver.facts(0)
    facts = {"gpu": gpu} if isinstance(gpu, str) else vars(gpu)
    return {
        **facts,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "nvidia_smi": _nvidia_smi(),
    }


def _nvidia_smi() -> str:
    """Driver, power limit and clocks as the driver's own tool tells them; empty without it."""
    fields = "name,driver_version,power.limit,clocks.sm,clocks.max.sm,mig.mode.current"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def versions(name: str) -> dict[str, str]:
    """Versions of a target's runtime, or why they are not known."""
    try:
        return registry.for_target(load(name)).versions()
    except Exception as error:  # noqa: BLE001  a library that does not import may raise anything
        return {"error": f"{type(error).__name__}: {error}"}


def check_target(report: dict[str, Any], name: str, arguments: argparse.Namespace) -> None:
    """Run those checks of one target that are still to be made; write the report after each."""
    entry = report["targets"].setdefault(name, {})
    entry.pop("skipped", None)
    entry.setdefault("versions", versions(name))
    checks = entry.setdefault("checks", {})
    with tempfile.TemporaryDirectory(prefix="p2d-gpu-") as folder:
        for check in wanted(name, arguments):
            if check in checks and checks[check]["result"] != LEFT:
                continue
            left = arguments.until - time.monotonic()
            result: dict[str, Any] = {"result": LEFT}
            if left > 0:
                result = run_check(check, name, Path(folder), min(arguments.seconds, left))
            if time.monotonic() > arguments.until and result["result"] == "crashed":
                result = {"result": LEFT}  # it was cut short by the limit for all
            checks[check] = result
            write_text(arguments.out, json.dumps(report, indent=2))
            told = result.get("error") or result.get("reason") or ""
            print(
                f"{result['result']:8} {name}: {check}  {told[:200]}", file=sys.stderr, flush=True
            )


def listed() -> Mapping[str, Any]:
    """Every check by its name; imported only here, because it imports much."""
    from gpu_check_list import CHECKS

    return CHECKS


def wanted(name: str, arguments: argparse.Namespace) -> list[str]:
    """Names of the checks that are for a target."""
    target = load(name)
    fitting = [check for check, found in listed().items() if found.fits(target)]
    return [check for check in fitting if check in (arguments.only or fitting)]


def failures(report: Mapping[str, Any]) -> list[str]:
    """Target, name and result of every check that neither passed nor was skipped."""
    return [
        f"{result['result']}: {name}: {check}"
        for name, entry in report["targets"].items()
        for check, result in entry.get("checks", {}).items()
        if result["result"] not in ("passed", "skipped")
    ]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--target", nargs="+", default=list(TARGETS), help="profiles to check")
    parser.add_argument("--only", nargs="+", help="names of checks")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of a check")
    parser.add_argument("--minutes", type=float, default=600.0, help="of all checks")
    parser.add_argument("--resume", action="store_true", help="go on with the file of --out")
    parser.add_argument("--out", type=Path, default=Path("gpu_checks.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.only or ()) - set(listed())
    if unknown:
        parser.error(f"no check {', '.join(sorted(unknown))}; there are {', '.join(listed())}")
    return arguments


def begin(arguments: argparse.Namespace, known: Mapping[str, Availability]) -> dict[str, Any]:
    """The report so far: that of an earlier call, or an empty one, which is written at once."""
    if arguments.resume and arguments.out.is_file():
        report: dict[str, Any] = json.loads(arguments.out.read_text())
        if report.get("schema") == SCHEMA:
            return report
    report = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "host": fingerprint(),
        "targets": {n: {"skipped": f.reason} for n, f in known.items() if not f.usable},
    }
    write_text(arguments.out, json.dumps(report, indent=2))
    return report


def main() -> int:
    """Run all checks; see the module's text for the exit code."""
    arguments = parse()
    if arguments.child:
        child(arguments.child, arguments.target[0], arguments.work)
        return 0
    known = {name: usable(name) for name in arguments.target}
    for name, found in known.items():
        if not found.usable:
            print(f"not checked: {name}: {found.reason}; {found.fix}", file=sys.stderr)
    arguments.until = time.monotonic() + 60 * arguments.minutes
    report = begin(arguments, known)
    if not any(found.usable for found in known.values()):
        print("nothing was checked", file=sys.stderr)
        return 3
    for name, found in known.items():
        if found.usable:
            check_target(report, name, arguments)
    print(arguments.out)
    for failed in failures(report):
        print(failed, file=sys.stderr)
    return 1 if failures(report) else 0


if __name__ == "__main__":
    raise SystemExit(main())

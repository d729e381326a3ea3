"""Describe the machine and the package versions that measurements depend on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("mmcv", "mmengine", "mmdet", "triton")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describe the CPU, the GPU if it is the device, and the package versions.

    Args:
        device (torch.device): Device of the measurement.

    Returns:
        dict[str, Any]: ``machine``: ``cpu``, ``cores``, ``simd`` (used by torch's own kernels) and
        ``gpu`` (None on the CPU). ``versions``: of Python, torch, CUDA if torch is built with it,
        and the installed packages of :data:`PACKAGES`.

    Example:
        >>> found = describe_machine(torch.device("cpu"))
        >>> found["machine"]["gpu"] is None, found["versions"]["torch"] == torch.__version__
        (True, True)
    """
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")  # Linux, where platform does not know the CPU's name
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    capability = torch.backends.cpu.get_cpu_capability()
    machine = {"cpu": cpu, "cores": os.cpu_count(), "simd": capability, "gpu": gpu}
    return {"machine": machine, "versions": versions}

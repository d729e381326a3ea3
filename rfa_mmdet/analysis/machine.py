"""What measured numbers depend on: the machine, and the versions of what runs on it."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("mmcv", "mmengine", "mmdet", "triton")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describe the processor, the GPU if that is the device, and the versions.

    Args:
        device (torch.device): Where the numbers are measured.

    Returns:
        dict[str, Any]: ``machine``: ``cpu``, ``cores``, ``simd`` (what torch's own kernels use)
        and ``gpu`` (None on the CPU). ``versions``: of Python, torch, CUDA if torch is built with
        it, and of those of :data:`PACKAGES` that are installed.

    Example:
        >>> found = describe_machine(torch.device("cpu"))
        >>> found["machine"]["gpu"] is None, found["versions"]["torch"] == torch.__version__
        (True, True)
    """
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")  # Linux; platform knows no name there
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

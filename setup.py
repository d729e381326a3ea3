"""Packaging of rfa_mmdet.

torch and mmcv are needed but not listed: which build of them is right (CPU or CUDA, with or
without compiled ops) is the machine's matter. ``make env`` installs tested versions of both.
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="rfa_mmdet",
    version="0.1.0",
    description="Receptive-field attention convolutions and attention plug-ins for MMDetection 3.x",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["rfa_mmdet", "rfa_mmdet.*"]),
    install_requires=[
        "mmengine>=0.10.5,<0.11",
        "mmdet>=3.3,<3.4",
        "matplotlib",
        "numpy",
        "pandas",
        "rich",
    ],
)

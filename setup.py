"""The distribution `tubeworks`: what is installed, and what it needs.

Install torch first and pinned (see `constraints.txt`): left to itself, an open range pulls several gigabytes
of CUDA packages. `make install` does this.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """Read `__version__` without importing the package."""
    text = (ROOT / "framework" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('framework/__init__.py has no line `__version__ = "…"`')
    return found.group(1)


def long_description() -> str:
    """The README, where it lies beside this file."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="tubeworks",
    version=version(),
    description="Distributed pretraining of joint image-and-video transformers (TubeViT) on DeepSpeed",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["framework*", "launch*", "data_tools*", "recipes*"]),
    package_data={"recipes": ["*.yaml", "*/*.yaml"]},
    install_requires=[
        "av>=16,<19",
        "deepspeed>=0.19,<0.20",
        "einops>=0.8,<1",
        "fsspec[http]>=2025.3",
        "matplotlib>=3.9,<4",
        "mlflow>=3.7,<4",
        "numpy>=2.1,<3",
        "nvidia-ml-py>=12.560",
        "pillow>=11",
        "psutil>=6",
        "pyarrow>=18",
        "pydantic>=2.11,<3",
        "rich>=13.7",
        "ruamel.yaml>=0.18.6,<0.20",
        "safetensors>=0.5,<1",
        "scikit-learn>=1.5,<2",
        "submitit>=1.5.2,<2",
        "torch>=2.11,<2.14",
        "typer>=0.29",
        "webdataset>=1.0,<2",
        "zlib-ng>=0.5,<2",
    ],
    extras_require={
        # newer wheels of torchcodec need CUDA libraries even where torch is the CPU build
        "torchcodec": ["torchcodec>=0.12,<0.14"],
        "ffcv": ["ffcv>=1.0.2,<2", "pillow"],
        "simplejpeg": ["simplejpeg>=1.8,<2"],
        "hf": ["transformers>=4.56"],
        "s3": ["s3fs>=2025.3"],
        "gs": ["gcsfs>=2025.3"],
        "onnx": ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5"],
        "dev": [
            "hypothesis>=6.130",
            "moto[server]>=5",
            "pyright[nodejs]>=1.1.400",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "setuptools>=68",
            "wheel",
        ],
    },
    entry_points={"console_scripts": ["tubeworks = launch.start:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

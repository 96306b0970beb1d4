"""The package: `wan` with the folders presets, kernels and demo model inside, so that a wheel works from anywhere.

In a checkout those folders stand beside `wan/`; in a wheel they are copied to `wan/_data/`. `wan.resources.folder`
finds them in both.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

DATA = ("configs", "kernels", "demo")


class BuildWithData(build_py):
    """Copies the data folders into the built package; an editable install leaves them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in DATA:
            if Path(name).is_dir():
                target = Path(self.build_lib, "wan", "_data", name)
                shutil.copytree(name, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", ".*"))


setup(
    name="wan-engine",
    version="0.1.0",
    description="Wan 2.1 and 2.2 video generation: upstream's checkpoints, flags and API, pluggable optimisations",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE.txt", "NOTICE"],
    python_requires=">=3.11",
    packages=find_packages(include=["wan", "wan.*"]),
    package_data={"wan.engine.caching": ["tables.json"]},
    cmdclass={"build_py": BuildWithData},
    install_requires=[
        "torch>=2.11",
        "transformers>=4.51",
        "diffusers>=0.35",
        "huggingface_hub>=1.31",
        "safetensors>=0.5",
        "numpy>=1.26",
        "pillow>=10",
        "imageio-ffmpeg>=0.5",
        "easydict>=1.11",
        "ftfy>=6.2",
    ],
    extras_require={
        "flash": ["flash-attn>=2.7", "ninja"],
        "audio": ["librosa>=0.10", "soundfile>=0.12"],
        "ray": ["ray>=2.40"],
        "dev": ["mypy>=2.4", "pytest>=9", "pytest-xdist>=3.6", "ruff>=0.17"],
    },
    entry_points={
        "console_scripts": [
            "wan-generate = wan.cli.generate:main",
            "wan-benchmark = wan.cli.benchmark:main",
        ]
    },
)

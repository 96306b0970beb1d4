"""The package: `wan` with the folders presets, kernels and demo model inside, so that a wheel works from anywhere.

In a checkout those folders stand beside `wan/`; in a wheel they are copied to `wan/_data/`. `wan.resources.folder`
finds them in both.

Where nvcc and a torch with CUDA are there, the kernels of `kernels/csrc/` are compiled too; where they are not, or
do not compile, one line says so and the installation goes on. It needs torch while building, which pip's
--no-build-isolation lets it see.
"""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

DATA = ("configs", "kernels", "demo")
LIBRARY = "libfused_ops.so"
CARDS = ("80", "86", "89", "90", "100", "120")
"""Compute capabilities kernels are compiled for, of those this nvcc knows; newer cards compile them when loading."""


class Unbuildable(Exception):
    """Why there are no CUDA kernels here."""


def find_nvcc() -> str:
    """The compiler to use; raises Unbuildable where CUDA kernels would be of no use or cannot be compiled."""
    try:
        import torch
    except ImportError:
        raise Unbuildable("torch is not there while building (pip install --no-build-isolation)") from None
    if torch.version.cuda is None:
        raise Unbuildable("this torch has no CUDA")
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(CUDA_HOME or "", "bin")))
    if nvcc is None:
        raise Unbuildable("nvcc is not there (install the CUDA toolkit)")
    return nvcc


def compile_kernels(nvcc: str, target: Path) -> None:
    """One library with code for all cards; raises Unbuildable."""
    known = {word.removeprefix("compute_") for word in _run(nvcc, "--list-gpu-arch").split()}
    cards = [card for card in CARDS if card in known]
    if not cards:
        raise Unbuildable(f"{nvcc} knows none of sm_{', sm_'.join(CARDS)}")
    codes = [f"-gencode=arch=compute_{card},code=sm_{card}" for card in cards]
    codes.append(f"-gencode=arch=compute_{cards[-1]},code=compute_{cards[-1]}")
    source = str(Path("kernels", "csrc", "fused_ops.cu"))
    _run(nvcc, "-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-shared", *codes, "-o", str(target), source)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Unbuildable(f"{command[0]} does not start: {error}") from error
    if done.returncode:
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
        raise Unbuildable(f"{command[0]} fails: {complaint}")
    return done.stdout


def build_kernels(folder: Path) -> None:
    """Compiles into `folder` and says once what became of it; never fails."""
    try:
        compile_kernels(find_nvcc(), folder / LIBRARY)
    except Unbuildable as reason:
        print(f"CUDA kernels were not compiled: {reason}; those of Triton and PyTorch are used instead", flush=True)
    else:
        print("CUDA kernels compiled successfully", flush=True)


class WithKernels(Distribution):
    """Tied to a platform where kernels will be in it."""

    @cache  # noqa: B019 (one distribution a process)
    def has_ext_modules(self) -> bool:
        try:
            find_nvcc()
        except Unbuildable:
            return super().has_ext_modules()
        return True


class BuildWithData(build_py):
    """Copies the data folders into the built package; an editable install leaves them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            build_kernels(Path("kernels"))
            return
        for name in DATA:
            if Path(name).is_dir():
                target = Path(self.build_lib, "wan", "_data", name)
                shutil.copytree(
                    name, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", ".*", LIBRARY)
                )
        build_kernels(Path(self.build_lib, "wan", "_data", "kernels"))


if __name__ == "__main__":
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
        package_data={"wan.engine.caching": ["tables.json"], "wan.engine.sampling": ["recipes.toml"]},
        cmdclass={"build_py": BuildWithData},
        distclass=WithKernels,
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
            "hopper": ["fa3-fwd>=0.0.3"],
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

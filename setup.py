"""Hands the build over to CMake and Ninja; everything about the package itself is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds the op libraries into the package directory (in place for an editable install)."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no Python version in the name: it does not depend on one

    def build_extension(self, ext: Extension) -> None:
        try:
            from torch.utils.cpp_extension import include_paths
        except ImportError:
            sys.exit(
                "llama-adapter-kernels: torch is not installed here; install torch >= 2.11 first and build with "
                "--no-build-isolation"
            )
        package = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        # One build tree for every kind of install: repeating a build only compiles what changed.
        build = ROOT / "build" / "cmake"
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DLAK_TORCH_INCLUDE={include_paths()[0]}",
            f"-DLAK_CUDA={os.environ.get('LAK_CUDA', 'AUTO')}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        # Of an editable install setuptools copies the declared library alone into the sources; the CUDA library is optional.
        folders = {package, ROOT / "llama_adapter_kernels"} if self.editable_mode else {package}
        for folder in folders:
            subprocess.run(["cmake", "--install", str(build), "--prefix", str(folder)], check=True)


class AnyPythonWheel(bdist_wheel):
    """The libraries use neither Python's nor torch's unstable interface: one wheel per platform serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("llama_adapter_kernels.libllama_adapter_kernels", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)

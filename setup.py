"""Builds kt_sft._native with CMake; everything else is in pyproject.toml, and instruction sets are CMake's business."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def cmake(*args: str | Path) -> None:
    """Run the cmake of this Python environment; its own output says what went wrong."""
    command = [sys.executable, "-m", "cmake", *map(str, args)]
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        needed = "Linux x86-64 and g++ >= 12 (the variable CXX names a compiler)"
        sys.exit(f"kt_sft: building the native library failed ({error}); needed: {needed}")


def configure_args(version: str) -> list[str]:
    """Settings of the build tree: the tools of this Python environment, a release build, no C++ tests."""
    import ninja
    import pybind11

    return [
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DKTS_VERSION={version}",
        "-DKTS_TESTS=OFF",
    ]


class CMakeBuild(build_ext):
    """One CMake run for the one extension; an editable build keeps its build tree for incremental builds."""

    def build_extension(self, ext: Extension) -> None:
        keeps_tree = self.inplace or self.editable_mode
        build_dir = ROOT / "build" / "native" if keeps_tree else Path(self.build_temp).resolve() / "native"
        version = self.distribution.get_version()
        args = [*configure_args(version), f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build_dir / 'lib'}"]
        stamp = build_dir / "configured_with.txt"
        settings = "\n".join([*args, os.environ.get("CXX", ""), os.environ.get("CXXFLAGS", "")])
        if not stamp.is_file() or stamp.read_text() != settings:
            shutil.rmtree(build_dir, ignore_errors=True)  # CMake cannot change the tools of a build tree
            build_dir.mkdir(parents=True)
        cmake("-S", ROOT / "native", "-B", build_dir, *args)
        stamp.write_text(settings)
        cmake("--build", build_dir, "--target", "_native")
        library = Path(self.get_ext_fullpath(ext.name))
        built = build_dir / "lib" / library.name
        if not built.is_file():
            sys.exit(f"kt_sft: CMake built no {library.name}; is that Python's own suffix? See native/CMakeLists.txt")
        library.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(built, library)  # with the time of now: setuptools keeps a newer file in the source tree


setup(ext_modules=[Extension("kt_sft._native", sources=[])], cmdclass={"build_ext": CMakeBuild})

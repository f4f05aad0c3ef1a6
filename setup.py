"""Compiles the kernels; all else is in setup.cfg. Without a compiler torch takes their place."""

from __future__ import annotations

import os
import shutil
import sysconfig
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCE = "relora_mora/kernels/kernels.c"


class BuildKernels(build_ext):
    """A library for ctypes: nothing of it depends on the version of Python, so its name does not either."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def run(self) -> None:
        # the compiler that built Python may have another name here, or be missing
        if "CC" not in os.environ and not shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]):
            os.environ["CC"] = "gcc"
        super().run()


class AnyPython(bdist_wheel):
    """A wheel for every Python on this kind of machine."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "relora_mora.kernels._kernels",
            [SOURCE],
            optional=True,
            define_macros=[("SOURCE_CRC", f"{zlib.crc32(Path(SOURCE).read_bytes())}u")],
            # compiled for OpenMP and not linked with it: see kernels.c
            extra_compile_args=["-O3", "-g0", "-fopenmp"],
            libraries=["m"],
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython},
)

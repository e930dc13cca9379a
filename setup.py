"""Two importable packages: oreal_megatron, and oreal_kernels from kernels/oreal_kernels.

`kernels/` itself has no __init__.py: as a top-level package it would shadow the PyPI package of that name.
The native library joins oreal_kernels where CMake, make and a C++ compiler are there; without them the
package is complete and slower.
"""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from warnings import warn

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "oreal_megatron/__init__.py").read_text())[1]
LIBRARY = "liboreal_kernels.so"


def found(*programs: str) -> bool:
    return any(shutil.which(program) for program in programs)


COMPILERS = (
    os.environ["CXX"].split()[:1] if "CXX" in os.environ else ["c++", "g++", "clang++"]
)  # as CMake looks for them
NATIVE = found("cmake") and found("make") and found(*COMPILERS)


class BuildNative(Command):
    """A step of `build`: CMake puts the library into the package, or into the checkout for an editable install."""

    description = "build the native library"
    user_options = []

    def initialize_options(self):
        self.build_lib, self.editable_mode = None, False

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        package = HERE / "kernels" if self.editable_mode else Path(self.build_lib).absolute()
        output = f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package / 'oreal_kernels'}"
        with tempfile.TemporaryDirectory() as folder:
            try:
                subprocess.run(["cmake", "-S", HERE, "-B", folder, output], check=True)
                subprocess.run(["cmake", "--build", folder, "--parallel"], check=True)
            except subprocess.CalledProcessError as error:  # an old CMake, a broken compiler: not worth an installation
                warn(
                    f"the native library could not be built ({error}); torch will do its work, more slowly",
                    stacklevel=1,
                )

    def get_source_files(self):
        return ["CMakeLists.txt", *(str(file.relative_to(HERE)) for file in (HERE / "kernels/csrc").iterdir())]

    def get_outputs(self):
        built = Path(self.build_lib, "oreal_kernels", LIBRARY)
        return [str(built)] if built.exists() else []

    def get_output_mapping(self):
        return {}


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", lambda self: NATIVE)]


class Wheel(bdist_wheel):
    """The library is of one platform, but of no Python version, because ctypes loads it."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


class PackagesWithLibrary(Distribution):
    def has_ext_modules(self):
        return NATIVE


setup(
    name="oreal-megatron",
    version=VERSION,
    description="OREAL reinforcement learning of math reasoners on Megatron-core and colocated vLLM",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["oreal_megatron*"]) + find_packages("kernels", include=["oreal_kernels*"]),
    package_dir={"oreal_kernels": "kernels/oreal_kernels"},
    distclass=PackagesWithLibrary,
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "triton>=3.4",
        "megatron-core==0.16.1",
        "transformers>=5.5.3",
        "safetensors",
        "sentencepiece",
        "sympy",
        "mpmath",
        "httpx",
        "numpy",
        "packaging",
        "rich",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        # apex is never required and not named here: `pip install apex` fetches an unrelated package.
        "gpu": ["vllm>=0.26,<0.34"],
        "te": ["transformer-engine[pytorch]"],  # its torch part is source only: docs/how_to/cluster.md, section 1
        "dev": ["pytest", "hypothesis", "ruff", "math-verify==0.9.0", "antlr4-python3-runtime==4.13.2"],
    },
    entry_points={"console_scripts": ["oreal = oreal_megatron.cli.main:main"]},
)

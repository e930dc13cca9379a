"""Build of the native library of oreal_kernels; everything else about the packages is in pyproject.toml.

The library is built if CMake, make and a C++ compiler are found; without it CPUs use plain torch, which is slower.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from warnings import warn

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

HERE = Path(__file__).parent
LIBRARY = "liboreal_kernels.so"


def any_installed(*programs: str) -> bool:
    """Return whether one of the programs is on PATH."""
    return any(shutil.which(program) for program in programs)


# CMake's own choice of a compiler
COMPILERS = os.environ["CXX"].split()[:1] if "CXX" in os.environ else ["c++", "g++", "clang++"]
CAN_BUILD = any_installed("cmake") and any_installed("make") and any_installed(*COMPILERS)


class BuildNative(Command):
    """Step of `build` that compiles the library into the package, or into the checkout for an editable install."""

    description = "build the native library"
    user_options = []

    def initialize_options(self):
        """Set the defaults that setuptools overwrites."""
        self.build_lib, self.editable_mode = None, False

    def finalize_options(self):
        """Take the build folder of `build_py`."""
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        """Build the library; warn instead of failing, because torch can do its work."""
        package = HERE / "kernels" if self.editable_mode else Path(self.build_lib).absolute()
        output = f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package / 'oreal_kernels'}"
        with tempfile.TemporaryDirectory() as folder:
            try:
                subprocess.run(["cmake", "-S", HERE, "-B", folder, output], check=True)
                subprocess.run(["cmake", "--build", folder, "--parallel"], check=True)
            except subprocess.CalledProcessError as error:  # an old CMake or a broken compiler
                warn(
                    f"the native library could not be built ({error}); torch will do its work, which is slower",
                    stacklevel=1,
                )

    def get_source_files(self):
        """Return the files that a source distribution needs."""
        return ["CMakeLists.txt", *(str(file.relative_to(HERE)) for file in (HERE / "kernels/csrc").iterdir())]

    def get_outputs(self):
        """Return the files that a wheel contains beside the Python modules."""
        built = Path(self.build_lib, "oreal_kernels", LIBRARY)
        return [str(built)] if built.exists() else []

    def get_output_mapping(self):
        """Return source files that an editable install links to: none, the library is compiled in place."""
        return {}


class Build(build):
    """`build` with the native library as its last step."""

    sub_commands = [*build.sub_commands, ("build_native", lambda self: CAN_BUILD)]


class Wheel(bdist_wheel):
    """Wheel of one platform and of any Python version, because ctypes loads the library."""

    def get_tag(self):
        """Return (python, abi, platform)."""
        return ("py3", "none", super().get_tag()[2])


class PackagesWithLibrary(Distribution):
    """Distribution that counts as platform-specific if the library is built."""

    def has_ext_modules(self):
        """Return whether the wheel contains compiled code."""
        return CAN_BUILD


setup(
    distclass=PackagesWithLibrary,
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel},
)

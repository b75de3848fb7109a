"""What pyproject.toml cannot say: where the packages stand, and how the two C libraries are built.

flash/*.c become `_reader.so` beside reader.py, cli/stop.c `_stop.so` beside stopping.py: they load them with ctypes.
They use nothing of Python's C interface, so one wheel per platform, tagged py3-none-<platform>, serves every Python
version.
"""

import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

NO_COMPILER = (
    "mlx-flash-runtime needs a C compiler to build its libraries: "
    "on Debian/Ubuntu `apt-get install gcc`, on macOS `xcode-select --install`"
)

# Directories at the top that are installed inside mlx_flash.
PARTS = [part for part in ("convert", "bench", "apps") if Path(part, "__init__.py").is_file()]
PACKAGES = {
    *find_packages(include=["mlx_flash", "mlx_flash.*"]),
    *(f"mlx_flash.{name}" for part in PARTS for name in find_packages(include=[part, f"{part}.*"])),
}

LIBRARIES = [
    Extension(
        name,
        sources=sources,
        depends=[f"mlx_flash/flash/{header}.h" for header in ("batch", "crc32", "requests")],
        extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-pthread"],
        extra_link_args=["-pthread"],
    )
    for name, sources in (
        (
            "mlx_flash.flash._reader",
            [f"mlx_flash/flash/{part}.c" for part in ("reader", "batch", "crc32", "requests", "slots")],
        ),
        ("mlx_flash.cli._stop", ["mlx_flash/cli/stop.c"]),
    )
]


class BuildLibraries(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no Python version in the name

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except CompileError:
            if _runs(self.compiler.compiler[0]):  # then its own messages say what is wrong
                raise
            raise PlatformError(NO_COMPILER) from None

    def run(self) -> None:
        super().run()
        # `python -m mlx_flash.x` started in a clone imports the clone's files, not the installed ones:
        # a normal install, too, leaves the library there.
        if not self.inplace:
            for ext in self.extensions:
                # copy_file unlinks first: a process that has the old library mapped keeps it.
                self.copy_file(self.get_ext_fullpath(ext.name), self.get_ext_filename(ext.name))


class BinaryWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def _runs(compiler: str) -> bool:
    """Whether it is there and starts: without the command line tools, macOS has a `cc` that only says so."""
    try:
        return subprocess.run([compiler, "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


setup(
    packages=sorted(PACKAGES),
    package_dir={f"mlx_flash.{part}": part for part in PARTS},
    ext_modules=LIBRARIES,
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": BinaryWheel},
)

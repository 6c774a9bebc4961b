"""The kernels in C. Where they do not compile, svdit is installed without them, and says so when it runs.

The library has no symbol of CPython, so one wheel serves all its versions.
"""

from runpy import run_path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

c = run_path("svdit/kernels/cpu/sources.py")
macros = [("SVDIT_SOURCE", f'"{c["source_hash"]()}"')]


class PlainLibrary(build_ext):
    """A shared library without the version of Python in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"


class AnyPython(bdist_wheel):
    """py3-none-PLATFORM"""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("svdit.kernels.cpu._library", c["files"](), None, macros, optional=True, **c["COMPILE"])],
    cmdclass={"build_ext": PlainLibrary, "bdist_wheel": AnyPython},
)

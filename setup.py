"""The kernels in C, and README.md as package indexes show it.

Where the kernels do not compile, svdit is installed without them, and says so when it runs. The library has no symbol
of CPython, so one wheel serves all its versions.
"""

import re
from runpy import run_path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

c = run_path("svdit/kernels/cpu/sources.py")
macros = [("SVDIT_SOURCE", f'"{c["source_hash"]()}"')]
LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:)(?P<path>[^()\s]+)\)")


class PlainLibrary(build_ext):
    """A shared library without the version of Python in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"


class AnyPython(bdist_wheel):
    """py3-none-PLATFORM"""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class Described(Distribution):
    """An index shows README.md without the files beside it: links to them lead to this version in the repository, which
    pyproject.toml names as `Source` under [project.urls]; without it links are their text, and images are left out."""

    def parse_config_files(self, *arguments, **options) -> None:
        super().parse_config_files(*arguments, **options)
        about = self.metadata
        source = (about.project_urls or {}).get("Source", "").rstrip("/")

        def elsewhere(link: re.Match[str]) -> str:
            image, text, path = link.groups()
            if not source:
                return "" if image else text
            path = f"README.md{path}" if path.startswith("#") else path
            return f"{image}[{text}]({source}/{'raw' if image else 'blob'}/v{about.version}/{path})"

        about.long_description = LINK.sub(elsewhere, about.long_description)


setup(
    distclass=Described,
    ext_modules=[Extension("svdit.kernels.cpu._library", c["files"](), None, macros, optional=True, **c["COMPILE"])],
    cmdclass={"build_ext": PlainLibrary, "bdist_wheel": AnyPython},
)

"""The kernels in C. Where they do not compile, svdit is installed without them, and says so when it runs."""

from runpy import run_path

from setuptools import Extension, setup

c = run_path("svdit/kernels/cpu/sources.py")
macros = [("SVDIT_SOURCE", f'"{c["source_hash"]()}"')]
setup(ext_modules=[Extension("svdit.kernels.cpu._library", c["files"](), None, macros, optional=True, **c["COMPILE"])])

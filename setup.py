"""The only thing pyproject.toml cannot say: "find subpackages under a mapped folder"."""

from setuptools import find_packages, setup

# The layers live at the repository root; each is installed as fedapt.<layer>.
LAYERS = ["server", "client", "protocols", "privacy", "kernels", "sim"]
setup(
    packages=[
        *find_packages(include=["fedapt", "fedapt.*"]),
        *(f"fedapt.{p}" for layer in LAYERS for p in find_packages(include=[layer, f"{layer}.*"])),
    ],
    package_dir={f"fedapt.{layer}": layer for layer in LAYERS},
)

"""What pyproject.toml cannot say: ``lillama.pth`` goes beside the packages, see registry/lillama_startup.py."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

STARTUP = Path("registry/lillama.pth")


class BuildWithStartup(build_py):
    """Builds the packages, and the file that Python reads when it starts."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copy(STARTUP, self.build_lib)

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib, STARTUP.name))]


class EditableWithStartup(editable_wheel):
    """The same for ``pip install --editable``."""

    def _install_namespaces(self, installation_dir, pth_prefix):
        # Setuptools has no public place for this; it puts .pth files of its own there.
        super()._install_namespaces(installation_dir, pth_prefix)
        shutil.copy(STARTUP, installation_dir)


setup(cmdclass={"build_py": BuildWithStartup, "editable_wheel": EditableWithStartup})

"""The control plane of Easel: contract, job state, policies, client and command. Imports no torch."""

from importlib.metadata import version

__version__ = version("easel")

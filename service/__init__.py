"""normserve: the HTTP service. A thin shell around normcore."""

from importlib.metadata import version

__version__ = version("normserve")

"""Serving frameworks of others, each set up as its documentation shows: what the service is measured beside.

Usage: PYTHON -m benchmarks.frameworks.NAME MODEL --port N --threads N --rows N, where PYTHON has the framework. They
pin other releases of what this project needs, so these modules import nothing of it.
"""

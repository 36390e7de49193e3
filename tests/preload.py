"""Imports that forked test processes inherit."""

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401

import irtune.app  # noqa: F401

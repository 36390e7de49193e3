"""Imports that forked test processes inherit."""

import irtune.app  # noqa: F401

"""Fixtures that several tests of the server share."""

from tests.fixtures.attaching import page

__all__ = ["page"]

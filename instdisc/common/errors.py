"""What a user can fix; shown without a traceback."""

from __future__ import annotations


class ConfigError(ValueError):
    """Settings that cannot work together, or a run directory that does not fit them."""


class NonFiniteError(ValueError):
    """Loss or embeddings are infinite or not a number; nothing has been updated with them."""

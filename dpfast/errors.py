"""The one exception type of our own."""

__all__ = ["PrivacyError"]


class PrivacyError(RuntimeError):
    """A step that would break the privacy guarantee or its accounting; nothing was released."""

"""What any training needs, and nothing of the method. Signals come first: torch takes seconds."""

from engine import signals  # noqa: F401

"""Find the best teacher-student pair for learning without labels."""

__version__ = "0.1.0"

"""Scripts that print figures; by hand."""

"""From a pair to its stages, and from a stage to its artifact."""

"""Ways to run the same search logic: on Ray Tune, or on a virtual clock."""

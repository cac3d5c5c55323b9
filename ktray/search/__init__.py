"""Drawing pairs, stopping early, and remembering: pure search logic without Ray. Time is a clock that the caller brings."""

"""What each command does, from a name to a result."""

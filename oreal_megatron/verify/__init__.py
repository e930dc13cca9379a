"""Response text -> Verdict."""

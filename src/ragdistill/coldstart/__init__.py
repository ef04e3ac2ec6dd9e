"""Cold start: teaches a small model the *interface* of an environment, not its rules (DESIGN: ETO, SCoRe)."""

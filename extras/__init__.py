"""More programs: python -m extras.sample, extras.theory, extras.bench. Nothing imports them."""

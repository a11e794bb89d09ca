"""More programs: python -m extras.sample, extras.theory, extras.bench. Nothing else imports them."""
